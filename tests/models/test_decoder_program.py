"""The step program of every family, interpreted, against an independent reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import Tiny, reference_logits, write_model

from dure.ir.core import Function
from dure.ir.dtypes import element_type
from dure.ir.interpret import execute
from dure.ir.pack import unpack
from dure.ir.stored import stored_layout
from dure.models.decoder import StepLimits, step_program
from dure.models.stored import StoredModel
from dure.serve.kv import KVCache
from dure.serve.work import BatchEntry, build_step

LIMITS = StepLimits(
    tokens=64, sequences=3, pages=4, pool_pages=12, logit_rows=64, positions=64, query_rows=8
)
FAMILIES = [
    Tiny("llama"),
    Tiny("llama", tied=False, heads=6, kv_heads=2, head_dim=8, layers=3),
    Tiny("qwen2", rope_base=1e6),
    Tiny("qwen3", head_dim=32, tied=False),
    Tiny("gemma3", layers=7, window=5, kv_heads=1, rope_base=1e6),
]


class Interpreted:
    """Runs a step program with the interpreter."""

    def __init__(self, model: StoredModel, kv_dtype: str = "float32") -> None:
        self.program: Function = step_program(model.config, model.types, LIMITS, kv_dtype)
        values: dict[str, object] = dict(model.tables(LIMITS.positions))
        for weight in model.weights():
            element = element_type(weight.dtype)
            layout = stored_layout(weight.shape, element)
            values[weight.name] = unpack(weight.data, layout, element, weight.shape, 1)
        names = self.program.attrs["names"]
        roles = self.program.attrs["roles"]
        assert isinstance(names, tuple) and isinstance(roles, tuple)
        for name, role, param in zip(names, roles, self.program.params, strict=True):
            if role == "state":
                kind = param.value.tensor
                shape = tuple(int(str(e)) for e in kind.shape)
                values[str(name)] = np.full(shape, np.nan, kind.dtype.numpy)
        self.values = values
        self.cache = KVCache(
            sequences=LIMITS.sequences, pool_pages=LIMITS.pool_pages, pages_per_sequence=4
        )

    def step(self, parts: list[tuple[object, list[int]]]) -> np.ndarray:
        entries = []
        for sequence, ids in parts:
            self.cache.extend(sequence, len(ids))
            rows = tuple(range(len(ids)))
            entries.append(BatchEntry(sequence, np.array(ids, np.int32), rows))
        inputs = build_step(self.cache, entries, LIMITS.query_rows).arrays()
        names = self.program.attrs["names"]
        arguments = [inputs.get(n, self.values.get(n)) for n in names]
        logits, *states = execute(self.program, arguments)
        for sequence, _ in parts:
            self.cache.commit(sequence)
        roles = self.program.attrs["roles"]
        state_names = [n for n, r in zip(names, roles, strict=True) if r == "state"]
        self.values.update(zip(state_names, states, strict=True))
        return logits


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda t: f"{t.family}-{t.heads}-{t.tied}")
def test_logits_are_the_references(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    weights = write_model(tiny, path)
    model = StoredModel.open(path)
    runner = Interpreted(model)
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, tiny.vocabulary, n).tolist() for n in (21, 9))
    a, b = runner.cache.sequence(), runner.cache.sequence()
    # A chunk of one sequence, then both in one step, then single tokens of both.
    found_a = [runner.step([(a, first[:7])])]
    both = runner.step([(b, second[:8]), (a, first[7:20])])
    found_a.append(both[8:])
    both_last = runner.step([(a, first[20:]), (b, second[8:])])
    found_a.append(both_last[:1])
    expected = reference_logits(tiny, weights, first)
    np.testing.assert_allclose(np.concatenate(found_a), expected, rtol=2e-4, atol=2e-4)
    expected = reference_logits(tiny, weights, second)
    found_b = np.concatenate([both[:8], both_last[1:]])
    np.testing.assert_allclose(found_b, expected, rtol=2e-4, atol=2e-4)
