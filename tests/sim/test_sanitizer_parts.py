"""What proofs rest on: cells, programs that are alike, loops inside loops of unknown
length.
"""

from __future__ import annotations

import numpy as np
import pytest
from programs import Program, toy_chip

from dure.ir.core import Function
from dure.ir.expr import as_expr
from dure.sim.sanitizer import sanitize
from dure.sim.sanitizer.alike import key_of
from dure.sim.sanitizer.cells import Cells, Rectangle

CHIP = toy_chip()


def test_bytes_that_regions_treat_alike_are_one_cell() -> None:
    """The whole tile, and every other row of it, of two slots: four cells, however many rows."""

    def rows(at: int, step: int) -> list[Rectangle]:
        return [("sram", 0, 1, at + 16 * n, at + 16 * n + 16) for n in range(0, 64, step)]

    cells = Cells()
    whole = [[("sram", 0, 1, at, at + 1024)] for at in (0, 1024)]
    assert cells.add(whole)
    assert cells.add([rows(0, 2), rows(1024, 2)])
    assert not cells.add([rows(0, 2), []])
    cells.build()
    assert cells.count == 4
    assert set(cells.of(rows(0, 2))) < set(cells.of(whole[0]))
    assert cells.of([]) == ()
    moved = cells.moved(1024)
    assert {moved[c] for c in cells.of(whole[0])} == set(cells.of(whole[1]))
    assert moved[cells.of(rows(0, 2))[0]] == cells.of(rows(1024, 2))[0]


def _copy(name: str, offset: int, trips: int = 4, between: int = 0) -> Function:
    p = Program(name, grid=(2,))
    x = p.tensor(f"{name}_x", (64, 128))
    y = p.tensor(f"{name}_y", (64, 128), access="out")
    tile = p.buffer(f"{name}_tile", (8, 128), stages=2, offset=offset)
    p.buffer(f"{name}_other", (8, 128), offset=offset + 8192 + between)
    full = p.semaphore(f"{name}_full", maximum=2)
    free = p.semaphore(f"{name}_free", initial=2, maximum=2)
    with p.loop(trips, name=f"{name}_i") as i:
        p.wait("in", free)
        p.load("in", x, tile, (p.ids[0] * trips + i, 0))
        p.signal("in", full)
        p.wait("out", full)
        p.store("out", y, tile, (p.ids[0] * trips + i, 0))
        p.signal("out", free)
        p.rotate(tile)
    return p.build()


def test_programs_that_differ_in_names_and_by_one_distance_are_alike() -> None:
    key = key_of(_copy("first", 0))
    assert key_of(_copy("second", 4096)) == key
    assert key_of(_copy("first", 0, trips=3)) != key
    assert key_of(_copy("first", 0, between=64)) != key


@pytest.mark.parametrize("late", [2, 90])
def test_turns_of_a_loop_inside_one_of_unknown_length(late: int) -> None:
    """Each iteration has one more turn inside that does something; the fifth is wrong."""
    p = Program("late")
    lengths = p.tensor("lengths", (4,), "int32", index=(0, 400))
    trips = p.scalar(lengths, (0,), "n")
    found, back = p.semaphore("found", maximum=1), p.semaphore("back", initial=1, maximum=1)
    with (
        p.loop(trips, name="outer") as outer,
        p.loop(100, name="inner") as inner,
        p.when(inner + late < outer),
    ):
        p.wait("in", back)
        p.signal("in", found)
        p.wait("out", found)
        p.signal("out", back)
        with p.when(as_expr(4) <= inner):
            p.signal("in", found)
    function = p.build()
    assert not sanitize(function, CHIP).ok
    for length, right in ((late + 5, True), (late + 6, False)):
        values = {"lengths": np.full(4, length, np.int32)}
        assert sanitize(function, CHIP, indices=values).ok == right
