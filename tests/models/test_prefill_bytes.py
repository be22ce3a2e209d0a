"""Prefill steps on chips' bytes: attention by columns, rope of whole heads, what lies near."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dure.ir.dtypes import Array
from dure.ir.interpret import execute
from dure.ir.types import static_extent
from dure.machine.chip import Chip
from dure.models.batch import Batch
from dure.models.chip_answer import step_answer
from dure.models.chip_program import StepProgram
from dure.models.chip_step import ChipStep, StepCall, chip_step
from dure.models.chip_values import run_step
from dure.models.config import ModelConfig, RopeConfig
from dure.targets import chip

TINY = ModelConfig("llama", 64, 96, 2, 4, 2, 16, 128, 512, 1e-6, RopeConfig(1e6), tied=False)
KERNELS = {"attention_columns", "rope_whole", "rope_whole_kv_write", "rms_norm_rows"}


def drawn(step: ChipStep) -> dict[str, Array]:
    """Weights, pools and inputs by name."""
    rng = np.random.default_rng(1)
    arrays: dict[str, Array] = dict(step.inputs)
    assert step.program is not None
    for param in step.program.params:
        name, kind = param.value.name, param.value.tensor
        if name not in arrays:
            array = rng.standard_normal([static_extent(e) or 0 for e in kind.shape])
            array = np.clip(array, -1, 1) if name.startswith("rope_") else array * 0.125
            arrays[name] = (array + 1 if name.endswith("norm") else array).astype(kind.dtype.numpy)
    return arrays


def narrowed(step: ChipStep, wanted: set[str]) -> ChipStep:
    """The step with the wanted kernels where it has them, however long they take."""
    calls: list[StepCall] = []
    for entry in step.calls:
        part = entry.part
        places = [n for n, c in enumerate(part.calls) if c.kernel.__name__ in wanted][:1]
        if places:
            kept, operands = ([own[n] for n in places] for own in (part.calls, part.operands))
            part = replace(part, calls=tuple(kept), operands=tuple(operands))
        calls.append(replace(entry, part=part))
    return replace(step, calls=tuple(calls))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "normed"),
    [("tpu-v6e", False), ("tpu-v6e", True), ("mtia-v2", False), ("mtia-v2", True), ("rngd", True)],
)
def test_a_prefill_on_bytes(name: str, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dure.models.chip_answer.streams", lambda step, chip: False)
    target = chip(name)
    config = replace(TINY, qk_norm=normed)
    step = narrowed(chip_step(config, Batch("prefill", 1, 300)).cut(target), KERNELS)
    answer = step_answer(step, target)
    assert answer.verdict.ok
    assert bool(answer.program.function.attrs.get("near")) == bool(target.near)
    kernels = {part.built.call.kernel.__name__ for part in answer.parts}
    assert kernels >= KERNELS - ({"attention_columns"} if not target.bundles else set())
    check(step, answer.program, target)


@pytest.mark.long
@pytest.mark.parametrize(("sequences", "length"), [(1, 600), (3, 300), (2, 512)])
def test_a_prefill_in_one_pass_on_bytes(sequences: int, length: int) -> None:
    target = chip("trainium2")
    names = {"attention_rows", "rms_norm_sums"}
    config = replace(TINY, heads=16, kv_heads=8, context=4096)
    step = chip_step(config, Batch("prefill", sequences, length)).cut(target)
    assert step.batch.query_rows > length // 2
    step = narrowed(step, names)
    answer = step_answer(step, target)
    assert answer.verdict.ok
    assert {part.built.call.kernel.__name__ for part in answer.parts} >= names
    check(step, answer.program, target)


def check(step: ChipStep, program: StepProgram, target: Chip) -> None:
    """Compare a step's logits on bytes with those of the interpreted program."""
    arrays = drawn(step)
    found = run_step(step, program, target, arrays)
    assert step.program is not None
    values = [arrays[p.value.name].copy() for p in step.program.params]
    wanted = np.asarray(execute(step.program, values, step.sizes)[0])
    error = np.abs(found["logits"].astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert error < 0.05
