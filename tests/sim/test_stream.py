"""Streams of runs, and index lists that needn't be followed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from brute_force import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program, copy_program, matmul_program, toy_chip
from test_rests import MIXTURE

from dure.errors import IRError
from dure.ir.core import Function, Value
from dure.models.batch import Batch
from dure.models.chip_answer import step_answer
from dure.models.chip_step import chip_step
from dure.sim import nodes, streams
from dure.sim.cost import Costs
from dure.sim.expand import core_ids
from dure.sim.stream import Stream
from dure.sim.streams import Streams
from dure.sim.timing import simulate
from dure.sim.whole_lists import whole_lists
from dure.targets import chip

CHIP = toy_chip()
#: No page lies behind the one before it.
APART = [5 * n % 12 for n in range(12)]


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**9))
def test_a_stream_of_runs_is_the_stream_laid_out(seed: int) -> None:
    rng = random.Random(seed)
    some: list[Any] = [(0, None, name) for name in "ab"]
    sizes = [rng.choice((0, 1, 2, 5, 50)) for _ in range(rng.randint(1, 5))]
    runs = [(rng.choices(some, (9, 1), k=size), rng.choice((0, 1, 2, 7))) for size in sizes]
    runs += rng.choices(runs, k=rng.choice((0, 3, 12)))
    stream = Stream(runs)
    flat = [item for items, times in runs for _ in range(times) for item in items]
    assert list(stream) == flat
    assert len(stream) == len(flat)
    for position, item in enumerate(flat):
        items, place = stream.at(position)
        assert items[place] is item
    for _ in range(20):
        first, second = sorted(rng.randint(0, len(flat)) for _ in range(2))
        if first == second:
            continue
        most = rng.choice((1, 3, 1000))
        later = flat[second : second + most]
        pairs = zip(flat[first:], later, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a is not b), len(later))
        assert stream.alike(first, second, most) == same


def test_equal_turns_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    function = copy_program(16 * 3000)
    ids = {s.name: 0 for s in function.program_ids}
    traced = Streams(function, CHIP, Costs(CHIP), {}).trace(ids)
    assert [len(stream) for stream in traced] == [3000 * 3, 3000 * 3]
    assert [len(items) for stream in traced for items, _ in stream.runs] == [3, 3]
    monkeypatch.setattr(nodes, "MOST", 500)
    assert simulate(copy_program(16 * 3000), CHIP).instructions == 18_000
    with pytest.raises(IRError, match="more than 500 instructions that differ"):
        simulate(copy_program(16 * 3000 - 3), CHIP)
    with pytest.raises(IRError, match="more than 500 instructions that differ"):
        simulate(matmul_program(16, 32, 16 * 3000), CHIP)


def pages(fill: int = 0, rows: int = 96) -> Function:
    """Each core loads the pages that its part of a table names, some of them beyond its end."""
    p = Program("pages", grid=(3,))
    pool = p.tensor("pool", (rows, 32), "bfloat16")
    table = p.tensor("table", (12,), "int32", index=(-1, 11))
    tile = p.buffer("tile", (4 * 8, 32), "bfloat16", stages=2)
    entries = p.buffer("entries", (4,), "int32", memory="lists", stages=2)
    listed = p.semaphore("listed", maximum=9)
    with p.loop(5, name="i") as i:
        p.load("in", table, entries, (p.ids[0] + i,), fill=fill)
        p.signal("in", listed)
        p.wait("in", listed)
        p.load("in", pool, tile, (entries, 0))
        p.rotate(entries, tile)
    return p.build()


@pytest.mark.parametrize(
    ("function", "table", "whole"),
    [
        (pages(), APART, True),
        (pages(), [*APART[:-1], -1], False),
        (pages(fill=-1), APART, False),
        (pages(rows=93), APART, False),
        (pages(rows=93), [n % 11 for n in APART], True),
    ],
)
def test_lists_whose_entries_are_all_there(
    function: Function, table: list[int], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices = {"table": np.array(table, np.int32)}
    assert bool(whole_lists(function, indices)) == whole
    found = simulate(function, CHIP, indices=indices)
    if whole:
        assert found.ps == brute_force(function, CHIP, indices)

    def none(*_: object) -> frozenset[Value]:
        return frozenset()

    monkeypatch.setattr(streams, "whole_lists", none)
    followed = simulate(function, CHIP, indices=indices)
    assert (found.ps, found.bytes, found.events) == (followed.ps, followed.bytes, followed.events)


@pytest.mark.parametrize("name", ["rngd", "mtia-v2"])
def test_phases_that_cores_have_in_common(name: str) -> None:
    """Each core executes what it does where it alone is traced."""
    on = chip(name)
    program = step_answer(chip_step(MIXTURE, Batch("decode", 3, 40)), on).program
    together = Streams(program.function, on, Costs(on), program.indices)
    for core in [*core_ids(program.function)][::5]:
        alone = Streams(program.function, on, Costs(on), program.indices)
        for one, other in zip(together.trace(core), alone.trace(core), strict=True):
            assert list(one) == list(other)
    assert len(together.trace({s.name: 0 for s in program.function.program_ids})[0].runs) > 3
