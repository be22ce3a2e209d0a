"""Rings of weights by what arrives before a kernel begins, kernels side by side, and values that
lie transposed: the plan, and whole steps with them on bytes.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from dure.compiler.chip.compose import Binding, Kernel, Repeat, compose
from dure.compiler.chip.pipeline import Options, compile_for
from dure.ir.core import Function
from dure.ir.dtypes import bfloat16
from dure.ir.expr import symbol
from dure.ir.interpret import execute
from dure.ir.machine.phase import phases_of
from dure.ir.types import static_extent
from dure.library.build import Built, tile_function
from dure.library.call import KernelCall, tensor
from dure.library.convert import convert
from dure.library.elementwise import KERNELS, apply
from dure.models.batch import Batch, Phase
from dure.models.chip_answer import step_answer
from dure.models.chip_layouts import standing_values
from dure.models.chip_rings import Streamed, Turn, demand, placed
from dure.models.chip_step import ChipStep, chip_step
from dure.models.chip_values import run_step
from dure.models.config import ModelConfig, RopeConfig
from dure.sim.sanitizer import sanitize
from dure.sim.values import run_values
from dure.targets import chip, chip_names

Array = npt.NDArray[Any]
WIDE = ModelConfig("llama", 256, 512, 2, 4, 2, 64, 512, 512, 1e-6, RopeConfig(1e4), tied=False)


def ring(slot: int, chain: int) -> Streamed:
    return Streamed(cast(Built, None), {}, Options(), 1, slot, 0, chain)


def test_what_arrives_early_has_a_slot() -> None:
    first, second = ring(10, 20), ring(10, 20)
    # While what has no weights runs for 50, half of the first ring's 100 arrive.
    turns = [Turn(50), Turn(20, 100, first), Turn(20, 100, second)] * 3
    needed = demand(turns, {first: 20, second: 20}, 2)
    assert needed.slots[first] == 10 + 4
    # The second's loads begin when the first's have arrived, and it is used at once.
    assert needed.slots[second] == 4
    assert needed.beside == {first: {second}, second: {first}}


def test_a_ring_is_no_longer_than_its_weights() -> None:
    only = ring(10, 1)
    needed = demand([Turn(1000), Turn(1, 10, only)] * 2, {only: 3}, 16)
    assert needed.slots == {only: 3}


def test_rings_share_bytes_where_they_are_not_in_use_at_once() -> None:
    rings = [ring(10, 5) for _ in range(4)]
    turns = [Turn(5, 100, r) for r in rings] * 3
    needed = demand(turns, dict.fromkeys(rings, 20), 6)
    found = placed(needed, 160)
    assert found is not None
    assert {r.offset for r in found} == {0, 80}
    assert placed(needed, 60) is None
    # With a little less room, the largest give some up.
    less = placed(needed, 130)
    assert less is not None and sum(r.slots for r in less) < sum(r.slots for r in found)


# --- kernels side by side ------------------------------------------------------------------------


def doubled(target: Any) -> Function:
    call = KernelCall(
        KERNELS[2],
        (tensor(bfloat16, 8, 64),) * 2,
        {"function": apply(lambda x: convert(x + x, x.dtype), ((False, False),), 2)},
        {"bm": 8, "bn": 64},
    )
    return compile_for(tile_function(call), target, Options(oriented=False)).function


@pytest.mark.parametrize("name", chip_names())
def test_what_does_not_depend_runs_side_by_side(name: str) -> None:
    target = chip(name)
    kernel = doubled(target)
    pairs = [("x", "a"), ("x", "b"), ("a", "c"), ("b", "d")]
    places = [p.access == "in" for p in kernel.params]
    items: list[Kernel] = []
    for source, result in pairs:
        names = [source if read else result for read in places]
        items.append(Kernel(result, kernel, tuple(Binding(n, (8, 64)) for n in names)))
    body = Repeat(1, symbol("layer", "loop", 0, 0), tuple(items))
    tensors = {n: tensor(bfloat16, 8, 64) for n in "xabcd"}
    program = compose("pairs", tensors, [body], target)
    assert [p.attr("kernels") for p in phases_of(program.body)] == [2, 2]
    assert sanitize(program, target).ok
    x = np.arange(512).reshape(8, 64).astype(bfloat16.numpy)
    arrays = [x, *(np.full_like(x, np.nan) for _ in range(4))]
    run_values(program, target, arrays, seed=3)
    for array, times in zip(arrays, (1, 2, 2, 4, 4), strict=True):
        assert (array.astype(np.float32) == times * x.astype(np.float32)).all()


# --- whole steps ---------------------------------------------------------------------------------


def drawn(step: ChipStep) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    arrays: dict[str, Array] = dict(step.inputs)
    assert step.program is not None
    for param in step.program.params:
        name, kind = param.value.name, param.value.tensor
        if name in arrays:
            continue
        shape = [static_extent(e) or 0 for e in kind.shape]
        array = rng.standard_normal(shape) * (0.0625 if len(shape) > 1 else 0.5)
        array = np.clip(array, -1, 1) if name.startswith("rope_") else array
        arrays[name] = (array + 1 if name.endswith("norm") else array).astype(np.float32)
    return arrays


@pytest.mark.long
@pytest.mark.parametrize(("phase", "tokens"), [("decode", 40), ("prefill", 128)])
def test_a_step_on_bytes(phase: Phase, tokens: int) -> None:
    step, target = chip_step(WIDE, Batch(phase, 1, tokens), "f32"), chip("trainium2")
    assert bool(standing_values(step, target)) == (phase == "prefill")
    answer = step_answer(step, target)
    assert answer.verdict.ok
    assert sum(part.total_ps for part in answer.parts) == answer.ps - answer.timing.launch
    arrays = drawn(step)
    found = run_step(step, answer.program, target, arrays)
    assert step.program is not None
    values = [arrays[p.value.name].copy() for p in step.program.params]
    wanted = np.asarray(execute(step.program, values, step.sizes)[0])
    np.testing.assert_allclose(found["logits"], wanted, atol=0.01 * np.abs(wanted).max())
