"""Instructions of different engines in one, where a queue's instructions are bundles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dure.compiler.chip.pipeline import Compiled, compile_for
from dure.errors import TargetError
from dure.ir.machine.compute import ops_of
from dure.library.build import tile_function
from dure.library.matrix import check_values
from dure.library.suite import case as case_of
from dure.machine.chip import Chip
from dure.machine.chip_checks import check_chip
from dure.sim.sanitizer import sanitize
from dure.targets import chip

CASE = replace(case_of("attention by columns bf16"), tiles={"bq": 8, "bh": 1, "piece": 64})
SIZE = (8, 4, 7, 21, 16, 3)


def compiled(target: Chip) -> Compiled:
    return compile_for(tile_function(CASE.call(CASE.drawn(SIZE))), target)


def mixed(found: Compiled) -> int:
    """Instructions that hold a product and exponentials."""
    names = [
        {inner.name for inner in op.regions[0].ops}
        for op in ops_of(found.function.body)
        if op.name == "compute"
    ]
    return sum({"dot", "exp"} <= own for own in names)


def test_products_beside_exponentials() -> None:
    target = chip("tpu-v6e")
    plain = target.model_copy(update={"bundles": ()})
    packed, apart = compiled(target), compiled(plain)
    assert mixed(packed) >= 2 and mixed(apart) == 0
    assert sanitize(packed.function, target).ok
    check_values(CASE, target, SIZE, packed)


def test_a_queue_without_bundles_has_none() -> None:
    assert mixed(compiled(chip("rngd"))) == 0


def test_bundles_are_of_a_compute_queue() -> None:
    wrong = chip("tpu-v6e").model_copy(update={"bundles": ("dma_load",)})
    with pytest.raises(TargetError, match="dma_load"):
        check_chip(wrong, "here")
