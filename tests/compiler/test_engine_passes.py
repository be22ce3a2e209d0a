"""Engines that do several ops on elements as they pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dure.compiler.chip.pipeline import compile_for
from dure.errors import TargetError
from dure.ir.machine.compute import ops_of, works
from dure.library.build import tile_function
from dure.library.matrix import check_values
from dure.library.suite import case as case_of
from dure.machine.chip import Chip
from dure.machine.chip_checks import check_chip
from dure.sim.cost import Costs
from dure.sim.sanitizer import sanitize
from dure.targets import chip

CASE = replace(case_of("attention by rows bf16"), tiles={"bq": 8, "bh": 1, "piece": 64})
SIZE = (8, 4, 7, 21, 16, 3)


def exponentials(target: Chip) -> list[tuple[set[str], int]]:
    """What the instructions with exponentials and sums hold, and their picoseconds."""
    found = compile_for(tile_function(CASE.call(CASE.drawn(SIZE))), target)
    assert sanitize(found.function, target).ok
    check_values(CASE, target, SIZE, found)
    held: list[tuple[set[str], int]] = []
    for op in ops_of(found.function.body):
        if op.name == "compute":
            own = {str(operation) for operation, _ in works(op.regions[0])}
            if {"transcendental", "sum"} <= own:
                held.append((own, Costs(target).compute(op).ps))
    return held


def test_a_softmax_is_one_pass() -> None:
    target = chip("trainium2")
    scalar = target.engines["scalar"].model_copy(update={"passes": ()})
    slow = target.model_copy(update={"engines": {**target.engines, "scalar": scalar}})
    fast = exponentials(target)
    assert any({"shift", "transcendental", "sum", "convert"} <= own for own, _ in fast)
    apart = exponentials(slow)
    assert not apart or max(ps for _, ps in fast) < max(ps for _, ps in apart)


def test_stages_have_laws() -> None:
    target = chip("trainium2")
    scalar = target.engines["scalar"].model_copy(update={"passes": (("scan",),)})
    wrong = target.model_copy(update={"engines": {**target.engines, "scalar": scalar}})
    with pytest.raises(TargetError, match="scan"):
        check_chip(wrong, "here")
