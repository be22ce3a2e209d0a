"""Chips of few semaphores: blocks count with the same one, as long as there are enough."""

from __future__ import annotations

import pytest

from dure.compiler.chip.pipeline import compile_for
from dure.errors import KernelError
from dure.ir.core import Function
from dure.ir.verifier import verify
from dure.library.build import tile_function
from dure.library.matrix import check_values
from dure.library.suite import case
from dure.machine.chip import Chip
from dure.sim.sanitizer import sanitize
from dure.targets import chip


def _count(function: Function) -> int:
    return sum(op.name == "semaphore" for op in function.body.ops)


def _few(name: str, semaphores: int) -> Chip:
    return chip(name, {"sync.semaphores": str(semaphores)})


@pytest.mark.parametrize("name", ["rngd", "atom", "h100"])
def test_blocks_share_semaphores_where_there_are_few(name: str) -> None:
    asked = case("paged attention of a ragged batch f32")
    size = asked.sizes[0]
    function = tile_function(asked.call(asked.drawn(size)))
    usual = _count(compile_for(function, chip(name)).function)
    fewer = _few(name, usual - 2)
    made = compile_for(function, fewer)
    assert _count(made.function) == usual - 2
    verify(made.function)
    assert sanitize(made.function, fewer).ok
    check_values(asked, fewer, size, made)


def test_too_many_semaphores_are_named() -> None:
    asked = case("paged attention of a ragged batch f32")
    function = tile_function(asked.call(asked.drawn(asked.sizes[0])))
    with pytest.raises(KernelError, match=r"needs \d+ semaphores; a core of rngd has 3"):
        compile_for(function, _few("rngd", 3))
