"""Core classes are replayed together while they do the same, and nothing of a replay changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program, matmul_program, toy_chip
from random_programs import random_case
from test_rests import MIXTURE, same

from dure.ir.core import Function
from dure.machine.chip import Chip
from dure.models.batch import Batch, Phase
from dure.models.chip_answer import step_answer
from dure.models.chip_step import chip_step
from dure.sim.convoys import Convoys
from dure.sim.replay import Queue, Replay
from dure.sim.timing import Timing, simulate
from dure.targets import chip

CHIP = toy_chip(6)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many classes each convoy begins to have, as they come."""
    found: list[int] = []
    lead = Convoys._lead

    def spy(self: Convoys, cores: list[int]) -> None:
        found.append(len(cores))
        lead(self, cores)

    monkeypatch.setattr(Convoys, "_lead", spy)
    return found


def apart(function: Function, on: Chip) -> Timing:
    """``record`` replays each class by itself."""
    return simulate(function, on, record=True)


def test_classes_part_where_they_differ(sizes: list[int]) -> None:
    """Loops of 40, 41 and 42 turns: what flows when a class goes on differently is its own."""
    p = Program("turns", grid=(3,))
    core = p.ids[0]
    x, y = p.tensor("x", (42 * 16, 32)), p.tensor("y", (3 * 16, 32), access="out")
    tile = p.buffer("tile", (16, 32), stages=3)
    free, full = p.semaphore("free", 3, 3), p.semaphore("full", 0, 3)
    with p.loop(core + 40) as i:
        p.wait("in", free)
        p.load("in", x, tile, (i, 0))
        p.signal("in", full)
        p.wait("vec", full)
        p.compute("vec", ["vec"], [tile], [tile], lambda t, a: t("neg", a))
        p.signal("vec", free)
    p.store("out", y, tile, (core, 0))
    function = p.build()
    found = simulate(function, CHIP)
    assert sizes == [3, 2, 1, 1, 1]
    same(found, apart(function, CHIP))


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**9))
def test_classes_may_come_together_at_any_time(seed: int) -> None:
    go_on = Replay._all_go_on

    def always(self: Replay, *more: object) -> int:
        self.convoys.due = self._joining
        return go_on(self, *more)

    function, on = random_case(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "_all_go_on", always)
        found = simulate(function, on)
    same(found, apart(function, on))


def test_every_core_by_itself(sizes: list[int]) -> None:
    function = matmul_program(6 * 16 - 5, 4 * 32 - 7, 64, cores=(3, 2))
    full = simulate(function, CHIP, full=True)
    assert not sizes
    assert simulate(function, CHIP).ps == full.ps
    assert max(sizes) > 1


@pytest.mark.parametrize(
    ("name", "phase"),
    [("rngd", "decode"), pytest.param("mtia-v2", "prefill", marks=pytest.mark.long)],
)
def test_steps(name: str, phase: Phase, sizes: list[int]) -> None:
    answer = step_answer(chip_step(MIXTURE, Batch(phase, 2, 40)), chip(name))
    sizes.clear()
    found = simulate(answer.program.function, chip(name), indices=answer.program.indices)
    assert max(sizes) > 1
    lists = answer.program.indices
    same(found, simulate(answer.program.function, chip(name), indices=lists, record=True))


def test_who_leads_follows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that had followed another, too."""
    further, led = Convoys.further, list[int]()

    def spy(self: Convoys, queue: Queue) -> bool:
        assert not queue.ahead and not queue.more
        led.append(queue.core)
        return further(self, queue)

    monkeypatch.setattr(Convoys, "further", spy)
    step_answer(chip_step(MIXTURE, Batch("decode", 2, 40)), chip("rngd"))
    assert len({*led}) > 1
