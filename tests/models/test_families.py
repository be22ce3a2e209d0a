"""Decoders of every published shape: built whole, and cut small, compiled pass by pass checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_runner import LIMITS, Compiled, Floats, same_types

from dure.ir.core import walk
from dure.ir.interpret import execute
from dure.ir.verifier import verify
from dure.models import shapes
from dure.models.config import ModelConfig
from dure.models.decoder import step_program
from dure.models.encoder import EncoderLimits, encoder_program, encoder_types
from dure.models.hf_config import config_from_hf, read_json
from dure.models.stored import program_name
from dure.models.weights import weight_specs
from dure.serve.work import BatchEntry, build_step

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 40, "num_experts_per_tok": 3}
CUT: dict[str, dict[str, Any]] = {
    "exaone-4.0-32b": {"num_hidden_layers": 8, "sliding_window": 9},
    "mixtral-8x7b": {"num_hidden_layers": 2, "num_local_experts": 4},
    "qwen3-30b-a3b": {"num_hidden_layers": 2, **EXPERTS},
    "gpt-oss-120b": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        "num_local_experts": 6,
    },
}


@pytest.mark.parametrize("name", [n for n in shapes.names() if n != "bert-large"])
def test_the_program_of_a_published_shape_is_small(name: str) -> None:
    config = shapes.model_config(name)
    program = step_program(config, same_types(config, "bfloat16"), LIMITS)
    verify(program)
    ops = list(walk(program.body))
    attentions = [op for op in ops if op.name == "attention"]
    # One body for each kind of layer in a period: the text's length doesn't grow with the layers.
    period = {"exaone": 4, "gpt-os": 2, "gemma-": 6}.get(name[:6], 1)
    assert len(attentions) <= period + config.layers % period
    assert all(op.attr("sinks") == config.sinks for op in attentions)
    kinds = {op.name for op in ops}
    assert ("grouped_linear" in kinds) == (config.experts is not None)


def test_the_program_of_bert_is_small() -> None:
    config = shapes.encoder_config("bert-large")
    program = encoder_program(
        config, encoder_types(config, "bfloat16", 2), EncoderLimits(512, 64), 2
    )
    verify(program)
    assert sum(op.name == "attention" for op in walk(program.body)) == 1


def small(name: str) -> ModelConfig:
    values = read_json(Path(shapes.__file__).with_name(f"{name}.json"))
    return config_from_hf({**values, **SMALL, **CUT[name]}, name)


def random_weights(config: ModelConfig) -> dict[str, Floats]:
    rng = np.random.default_rng(5)
    found: dict[str, Floats] = {}
    for spec in weight_specs(config):
        values = rng.standard_normal(spec.shape).astype(np.float32)
        norm = spec.name.endswith("norm")
        found[program_name(spec)] = (
            1 + values * np.float32(0.1) if norm else values * np.float32(spec.shape[-1] ** -0.5)
        )
    return found


@pytest.mark.parametrize("name", CUT)
def test_a_compiled_step_is_the_interpreted_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(name)
    with monkeypatch.context() as patch:
        # Every pass is compared with the program before it, on drawn arguments.
        patch.setenv("DURE_CHECK", "1")
        runner = Compiled(config, random_weights(config))
    names = [str(n) for n in runner.function.attrs["names"]]
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocabulary, 23).astype(np.int32)
    sequence = runner.cache.sequence()
    runner.cache.extend(sequence, len(ids))
    entries = [BatchEntry(sequence, ids, tuple(range(len(ids))))]
    inputs = build_step(runner.cache, entries, LIMITS.query_rows).arrays()
    found = runner.program.run(inputs)["logits"]
    shape = (LIMITS.pool_pages * LIMITS.page_size, config.kv_heads, config.head_dim)
    empty = np.zeros(shape, np.float32)
    values = {**runner.values, **inputs}
    expected = execute(runner.function, [values.get(n, empty) for n in names])[0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
