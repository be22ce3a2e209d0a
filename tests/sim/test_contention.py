"""Computing slows down while transfers of its core use the same memory: by hand, by brute force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from brute_force import brute_force
from programs import Program, copy_program, matmul_program, number, toy_chip, toy_tables

from dure.errors import TargetError
from dure.ir.core import Function
from dure.machine.chip import Chip
from dure.machine.chip_checks import check_chip
from dure.sim.contention import SPEED, Contention
from dure.sim.replay import Queue
from dure.sim.timing import simulate

HALF = toy_chip(memories__sram__contention=number(0.5))


def one_of_each() -> Function:
    """A load that nothing waits for, beside a computation that takes longer."""
    p = Program("beside")
    x = p.tensor("x", (8, 16))
    tile, other = p.buffer("tile", (8, 16)), p.buffer("other", (128, 64))
    p.load("in", x, tile, (0, 0))
    p.compute("vec", ["vec"], [other], [other], lambda t, a: t("exp", a))
    return p.build()


def test_what_a_transfer_takes_from_a_computation_by_hand() -> None:
    alone = simulate(one_of_each(), toy_chip())
    [span] = [s for s in simulate(one_of_each(), HALF, record=True).spans if s.queue == "vec"]
    [load] = [s for s in simulate(one_of_each(), HALF, record=True).spans if s.queue == "in"]
    assert load.flow is not None and span.start < load.flow and load.end < span.end
    # At half its speed while bytes flow, it needs half of that time more.
    flowing = load.end - load.flow
    assert span.end - span.start == alone.busy["vec"] + -(-flowing // 2)
    # The transfer is as fast as ever.
    assert load.end == next(
        s.end for s in simulate(one_of_each(), toy_chip(), record=True).spans if s.queue == "in"
    )


def test_slow_transfers_take_their_part_and_all_together_no_more_than_one() -> None:
    replayed = Contention({"sram": SPEED // 2})
    queue = cast(Queue, SimpleNamespace(core=0, computing=None))

    def until(*flowing: int) -> int | None:
        """When what takes 1,000 ps ends beside these transfers."""
        for part in flowing:
            replayed.flow(0, "sram", 0, part)
        replayed.begin(queue, ["sram"], 0, 1000)
        end = replayed.next_end()
        assert end is not None and replayed.ended(end)
        for part in flowing:
            replayed.flow(0, "sram", end, -part)
        return end

    assert until() == 1000
    assert until(SPEED // 4) == -(-8000 // 7)
    assert until(SPEED // 4, SPEED // 4) == -(-4000 // 3)
    assert until(SPEED) == until(SPEED, SPEED // 4) == until(SPEED, SPEED) == 2000


def test_other_memories_and_other_cores_do_not_contend() -> None:
    lists = toy_chip(memories__lists__contention=number(0.5))
    assert simulate(one_of_each(), lists).ps == simulate(one_of_each(), toy_chip()).ps
    p = Program("apart", grid=(2,))
    x = p.tensor("x", (8, 16))
    tile, other = p.buffer("tile", (8, 16)), p.buffer("other", (128, 64))
    with p.when(p.ids[0] < 1):
        p.load("in", x, tile, (0, 0))
    with p.when(p.ids[0] > 0):
        p.compute("vec", ["vec"], [other], [other], lambda t, a: t("exp", a))
    assert simulate(p.build(), HALF).ps == simulate(p.build(), toy_chip()).ps


@pytest.mark.parametrize(
    "function",
    [copy_program(70, 40, 16, cores=3, stages=3), matmul_program(70, 50, 33, cores=(2, 2))],
)
@pytest.mark.parametrize("part", [0.07, 0.22, 0.99])
def test_whole_kernels_take_what_brute_force_finds(function: Function, part: float) -> None:
    chip = toy_chip(memories__sram__contention=number(part))
    assert simulate(function, chip).ps == brute_force(function, chip)


def test_recurrences_are_skipped_and_change_nothing(jumps: list[int]) -> None:
    function = matmul_program(64, 64, 32 * 300)
    skipped = simulate(function, HALF)
    assert sum(jumps) > 100
    replayed = simulate(function, HALF, record=True)
    assert (skipped.ps, skipped.events) == (replayed.ps, replayed.events)
    assert skipped.busy == replayed.busy
    assert skipped.ps > simulate(function, toy_chip()).ps


def test_a_memory_that_loses_everything_is_refused() -> None:
    tables = toy_tables()
    tables["memories"]["sram"]["contention"] = number(1)
    with pytest.raises(TargetError, match="instructions lose 1 of their speed in 'sram'"):
        check_chip(Chip.model_validate(tables), "toy")


def test_transfers_of_a_serial_engine_flow_one_after_another() -> None:
    p = Program("two loads")
    x = p.tensor("x", (64, 64))
    first, second = p.buffer("first", (64, 64)), p.buffer("second", (64, 64))
    p.load("in", x, first, (0, 0))
    p.load("in", x, second, (0, 0))
    loader = toy_tables()["dma"]["loader"]
    alone = Program("one load")
    y = alone.tensor("x", (64, 64))
    alone.load("in", y, alone.buffer("first", (64, 64)), (0, 0))
    side = simulate(p.build(), toy_chip(), record=True).spans
    line = simulate(p.build(), toy_chip(dma__loader={**loader, "serial": True}), record=True).spans
    [one] = simulate(alone.build(), toy_chip(), record=True).spans
    assert line[0].end == one.end < side[0].end
    assert line[1].flow == line[0].end
