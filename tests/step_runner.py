"""A step program with weights in float32, compiled for the CPU, and how tests drive it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import dure.library
from dure.compiler.pipeline import compile_program
from dure.models.config import ModelConfig
from dure.models.decoder import ROPE_TABLES, StepLimits, WeightTypes, step_program
from dure.models.rope import rope_tables
from dure.models.weights import weight_specs
from dure.serve.kv import KVCache, Sequence
from dure.serve.work import BatchEntry, build_step

assert dure.library
Floats = npt.NDArray[np.float32]
LIMITS = StepLimits(
    tokens=64, sequences=3, pages=5, pool_pages=12, logit_rows=64, positions=80, query_rows=8
)


def same_types(config: ModelConfig, dtype: str) -> WeightTypes:
    """One element type for all weights."""
    specs = weight_specs(config)
    layer = {s.name: dtype for s in specs if s.layer == 0}
    return WeightTypes({s.name: dtype for s in specs if s.layer is None}, (layer,) * config.layers)


class Compiled:
    """The step program on the CPU, with caches in float32."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Floats], workers: int | None = 2
    ) -> None:
        self.function = step_program(config, same_types(config, "float32"), LIMITS, "float32")
        self.program = compile_program(self.function, workers=workers)
        values = dict(weights)
        for kind, rope in (("global", config.rope), ("local", config.local_rope)):
            if rope is not None:
                tables = rope_tables(rope, config.head_dim, LIMITS.positions)
                values |= dict(zip(ROPE_TABLES[kind], tables, strict=True))
        names = self.program.weight_types
        self.values = values
        self.program.load({n: v for n, v in values.items() if n in names})
        self.program.allocate_states()
        self.cache = KVCache(
            sequences=LIMITS.sequences,
            pool_pages=LIMITS.pool_pages,
            pages_per_sequence=LIMITS.pages,
            page_size=LIMITS.page_size,
        )

    def step(self, parts: list[tuple[Sequence, list[int]]]) -> Floats:
        entries: list[BatchEntry] = []
        for sequence, ids in parts:
            self.cache.extend(sequence, len(ids))
            entries.append(BatchEntry(sequence, np.array(ids, np.int32), tuple(range(len(ids)))))
        inputs = build_step(self.cache, entries, LIMITS.query_rows).arrays()
        logits = self.program.run(inputs)["logits"].copy()
        for sequence, _ in parts:
            self.cache.commit(sequence)
        return logits
