"""Time: exactly what a brute-force simulator finds, on any program; classes, bounds, refusals."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from brute_force import brute_force, compute_time, longest_path, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import (
    Program,
    copy_program,
    law,
    matmul_program,
    number,
    toy_chip,
)
from random_programs import random_case, unshared_chip

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.core import Function
from dure.ir.expr import const
from dure.ir.stored import stored_type
from dure.ir.types import TensorType
from dure.sim.cost import Costs, picoseconds
from dure.sim.flows import UNIT, Flows, units_a_picosecond, weight_of
from dure.sim.footprint import Reach, footprint
from dure.sim.timing import Timing, simulate
from dure.targets import chip

CHIP = toy_chip()

# --- against brute force -------------------------------------------------------------------------


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**9))
def test_random_programs_take_what_brute_force_finds(seed: int) -> None:
    """Several classes of cores, shared and private resources, loops, branches, cut and absent
    tiles, strides, views, block formats: to the picosecond, by classes and core by core."""
    function, chip = random_case(seed)
    expected = brute_force(function, chip)
    assert simulate(function, chip).ps == expected
    assert simulate(function, chip, full=True).ps == expected


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**9))
def test_where_nothing_is_shared_time_is_the_longest_path(seed: int) -> None:
    function, _ = random_case(seed)
    chip = unshared_chip()
    assert simulate(function, chip).ps == longest_path(function, chip)


@pytest.mark.parametrize(
    "function",
    [
        copy_program(cores=2),
        copy_program(70, 40, 16, cores=3, stages=3),
        matmul_program(32, 48, 32),
        matmul_program(70, 50, 33, cores=(2, 2)),
    ],
)
def test_whole_kernels_take_what_brute_force_finds(function: Function) -> None:
    assert simulate(function, CHIP).ps == brute_force(function, CHIP)


@pytest.mark.long
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_many_random_programs(start: int) -> None:
    for seed in range(start, start + 100):
        function, chip = random_case(seed)
        assert simulate(function, chip).ps == brute_force(function, chip), seed


def test_a_small_program_by_hand() -> None:
    """load, compute, store, one after another: every term of the law once."""
    p = Program("by hand")
    x, y = p.tensor("x", (8, 16)), p.tensor("y", (8, 16), access="out")
    tile = p.buffer("tile", (8, 16))
    loaded, done = p.semaphore("loaded"), p.semaphore("done")
    p.load("in", x, tile, (0, 0))
    p.signal("in", loaded)
    p.wait("vec", loaded)
    p.compute("vec", ["vec"], [tile], [tile], lambda t, a: t("exp", t("add", a, a)))
    p.signal("vec", done)
    p.wait("out", done)
    p.store("out", y, tile, (0, 0))
    # 512 bytes in one run: 50 GB/s * 512 / (512 + 32), in units of 2^-32 byte a picosecond.
    limit = int(Fraction(50e9 * (512 / 544)) * 2**32 / 10**12)
    flow = -(-512 * 2**32 // limit)
    transfer = 7_000 + 300_000 + flow
    # 2 cycles for add, 8 for exp, at 0.9 GHz; 10 ns to issue.
    compute = 10_000 + -(-10 * 10_000 // 9)
    assert simulate(p.build(), CHIP).ps == 2_000_000 + 2 * transfer + 2 * 11_000 + compute


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "classes"),
    [
        # 3 x 2 cores of 2 x 2 tiles: last row cut, last column cut.
        (matmul_program(6 * 16 - 5, 4 * 32 - 7, 64, cores=(3, 2)), 4),
        # Rows divide: only the last column of cores differs.
        (matmul_program(6 * 16, 4 * 32 - 7, 64, cores=(3, 2)), 2),
        (matmul_program(6 * 16, 4 * 32, 64, cores=(3, 2)), 1),
        # The last core has nothing to do.
        (copy_program(80, 32, 16, cores=6), 2),
    ],
)
def test_classes_are_found_and_equal_full_simulation(function: Function, classes: int) -> None:
    chip = toy_chip(6)
    by_class, full = simulate(function, chip), simulate(function, chip, full=True)
    assert len(by_class.classes) == classes
    assert sum(c.multiplicity for c in by_class.classes) == len(full.classes) == 6
    assert (by_class.ps, by_class.flops, by_class.bytes) == (full.ps, full.flops, full.bytes)
    assert by_class.resources["memories.hbm"] == full.resources["memories.hbm"]


def test_cores_that_differ_only_in_a_late_branch_are_told_apart() -> None:
    p = Program("late", grid=(4,))
    tile = p.buffer("tile", (16, 16))
    x = p.tensor("x", (4 * 16 - 3, 16))
    with p.loop(5, name="i") as i:
        p.compute("vec", ["vec"], [tile], [tile], lambda t, a: t("neg", a))
        with p.when(const(3) < i):
            p.load("in", x, tile, (p.ids[0], 0))
    timing = simulate(p.build(), CHIP)
    assert [c.multiplicity for c in timing.classes] == [3, 1]


def test_index_reads_stay_in_their_branches() -> None:
    """A read that is in bounds only where it is executed, and decides how much is loaded."""
    p = Program("guarded", grid=(4,))
    x = p.tensor("x", (64, 16))
    rows = p.tensor("rows", (2,), "int32", index=(0, 64))
    tile = p.buffer("tile", (16, 16))
    with p.when(p.ids[0] < 2):
        n = p.scalar(rows, (p.ids[0],), "n")
        p.load("in", p.view(x, 0, 0, n), tile, (0, 0))
    indices = {"rows": np.array([3, 16], np.int32)}
    timing = simulate(p.build(), CHIP, indices=indices)
    assert timing.ps == brute_force(p.build(), CHIP, indices)
    assert [c.multiplicity for c in timing.classes] == [1, 1, 2]
    assert timing.bytes == (3 + 16) * 64


def test_a_program_for_no_core_takes_the_launch() -> None:
    p = Program("none", grid=(0,))
    x, tile = p.tensor("x", (16, 16)), p.buffer("tile", (16, 16))
    p.load("in", x, tile, (0, 0))
    timing = simulate(p.build(), CHIP)
    assert (timing.ps, timing.classes, timing.bound) == (2_000_000, (), "latency")


def test_absurd_sizes_are_refused_at_once() -> None:
    p = Program("absurd")
    x, tile = p.tensor("x", (16, 16)), p.buffer("tile", (16, 16))
    with p.loop(10**5, name="i"), p.loop(10**12, name="j"):
        p.load("in", x, tile, (0, 0))
    with pytest.raises(IRError, match="more than 4,000,000 instructions"):
        simulate(p.build(), CHIP)


def test_more_cores_than_the_chip_has_are_refused() -> None:
    with pytest.raises(IRError, match="8 cores on toy"):
        simulate(copy_program(cores=8), CHIP)


# --- recurrences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_skipping_a_recurrence_changes_nothing(stages: int, jumps: list[int]) -> None:
    """``record`` replays every instruction, so nothing is skipped."""
    function = copy_program(64 * 300, 32, 16, cores=3, stages=stages)
    skipped = simulate(function, CHIP)
    assert sum(jumps) > 100 or stages == 3
    replayed = simulate(function, CHIP, record=True)
    assert (skipped.ps, skipped.events) == (replayed.ps, replayed.events)
    assert skipped.busy == replayed.busy


def test_turns_of_outer_loops_are_skipped_too(jumps: list[int]) -> None:
    """The inner loop is skipped in its first turns only, then the loop around it as a whole."""
    function = matmul_program(16 * 40, 16, 16 * 64)
    skipped = simulate(function, CHIP)
    assert 1 < len(jumps) < 10
    replayed = simulate(function, CHIP, record=True)
    assert (skipped.ps, skipped.events) == (replayed.ps, replayed.events)
    assert skipped.busy == replayed.busy


@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**9))
def test_skipping_recurrences_of_nested_loops_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    m, n, k = (rng.randint(1, 400) for _ in range(3))
    function = matmul_program(m, n, k, cores=(rng.randint(1, 3), rng.randint(1, 2)))
    _, chip = random_case(seed)
    skipped, replayed = simulate(function, chip), simulate(function, chip, record=True)
    assert (skipped.ps, skipped.events) == (replayed.ps, replayed.events)
    assert skipped.busy == replayed.busy


# --- index lists and scalars ---------------------------------------------------------------------


def paged(pages: int = 12, count: int = 4) -> Function:
    """Each core loads the pages that its part of a table names, a ragged number of times."""
    p = Program("paged", grid=(3,))
    pool = p.tensor("pool", (pages * 8 - 3, 32), "bfloat16")
    table = p.tensor("table", (3 * count,), "int32", index=(-1, pages - 1))
    turns = p.tensor("turns", (3,), "int32", index=(0, 5))
    tile = p.buffer("tile", (count * 8, 32), "bfloat16", stages=2)
    entries = p.buffer("entries", (count,), "int32", memory="lists", stages=2)
    listed = p.semaphore("listed", maximum=9)
    n = p.scalar(turns, (p.ids[0],), "n")
    with p.loop(n, name="i") as i:
        p.load("in", table, entries, ((p.ids[0] + i),), fill=-1)
        p.signal("in", listed)
        p.wait("in", listed)
        p.load("in", pool, tile, (entries, 0))
        p.rotate(entries, tile)
    return p.build()


def test_index_lists_with_known_entries() -> None:
    rng = np.random.default_rng(5)
    function = paged()
    for _ in range(5):
        table = rng.integers(-1, 12, 12).astype(np.int32)
        indices = {"table": table, "turns": rng.integers(0, 5, 3).astype(np.int32)}
        timing = simulate(function, CHIP, indices=indices)
        assert timing.ps == brute_force(function, CHIP, indices)
        assert timing.ps == simulate(function, CHIP, indices=indices, full=True).ps


def test_index_lists_with_unknown_entries_are_full() -> None:
    function = paged()
    turns = {"turns": np.array([4, 1, 2], np.int32)}
    assert simulate(function, CHIP, indices=turns).ps == brute_force(function, CHIP, turns)
    full = {**turns, "table": np.zeros(12, np.int32)}
    first_two = {**turns, "table": np.full(12, -1, np.int32)}
    bytes_of = [simulate(function, CHIP, indices=i).bytes for i in (turns, full, first_two)]
    assert bytes_of[0] >= bytes_of[1] > bytes_of[2]


def test_scalars_without_values_are_refused() -> None:
    with pytest.raises(IRError, match="reads scalars from 'turns'"):
        simulate(paged(), CHIP)


def test_scalars_outside_their_range_are_refused() -> None:
    with pytest.raises(IRError, match="holds 9"):
        simulate(paged(), CHIP, indices={"turns": np.array([1, 9, 1], np.int32)})


# --- what a transfer touches ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q8_0", "q4_1", "q4_k", "q6_k", "bfloat16", "int4"])
@pytest.mark.parametrize("stored", [False, True])
def test_bytes_and_runs_are_those_of_the_addresses(name: str, stored: bool) -> None:
    """Row-major tensors and GGUF's blocks: counted against every element's address."""
    element = dtypes.element_type(name)
    kind = TensorType((const(6), const(512)), element, quantized_axis=-1)
    if stored:
        if not isinstance(element, dtypes.BlockFormat):
            pytest.skip("only block formats are stored otherwise")
        kind = stored_type(kind)
    for rows, columns in ((1, 256), (1, 512), (4, 256), (4, 512), (6, 512)):
        p = Program("one")
        tensor = p.tensor("x", (6, 512), name, layout=kind.layout, quantized_axis=1)
        axis = 1 if isinstance(element, dtypes.BlockFormat) else -1
        buffer = p.buffer("b", (rows, columns), name, quantized_axis=axis)
        p.load("in", tensor, buffer, (0, 0))
        op = p.build().body.ops[-1]
        expected = moved(p.build(), op, {}, 32, [])
        found = footprint(tensor.tensor, (Reach(rows), Reach(columns)), 32)
        assert (found.bytes, found.runs) == (expected.bytes, expected.runs)
        assert found.granules == expected.granules


def test_entries_of_a_list_are_runs_of_their_own() -> None:
    kind = TensorType((const(64), const(32)), paged().params[0].value.tensor.dtype)
    whole = footprint(kind, (Reach(16, 1, 4), Reach(32)))
    assert (whole.bytes, whole.runs) == (16 * 64, 4)
    part = footprint(kind, (Reach(16, 1, 4), Reach(16)))
    assert (part.bytes, part.runs) == (16 * 32, 16)


# --- flows ---------------------------------------------------------------------------------------


def test_max_min_fairness() -> None:
    """One resource of 90 for all, one of 20 for two of them: 10, 10 and, of the rest, 30 and 40."""
    flows = Flows[str]([90, 20])
    groups = [
        flows.group(1000, ((0, 1 << 20), (1, 1 << 20))),
        flows.group(1000, ((0, 1 << 20),)),
        flows.group(30, ((0, 1 << 20),)),
    ]
    for group, name in zip((groups[0], *groups), "aabc", strict=True):
        flows.start(group, 1000, name)
    assert flows.next_end() == 25
    assert [flows.rate(g) for g in groups] == [10, 40, 30]
    assert flows.advance(25) == ["b"]


def rates_by_the_law(flows: Flows[int]) -> list[int]:
    """Law 5 word by word: all transfers rise together, looked at anew at every step."""
    rising = [g for g in flows.groups if g.ends]
    left = list(flows.capacities)
    rates: dict[int, int] = {}
    while rising:
        load = [
            sum(w * len(g.ends) for g in rising for r, w in g.uses if r == n)
            for n in range(len(left))
        ]
        shares = {n: left[n] // total for n, total in enumerate(load) if total}
        level = max(1, min([g.limit for g in rising] + list(shares.values())))
        full = {n for n, share in shares.items() if share <= level}
        stay = [g for g in rising if g.limit <= level or any(r in full for r, _ in g.uses)]
        for group in stay:
            rates[group.number] = level
            for resource, weight in group.uses:
                left[resource] -= weight * len(group.ends) * level
        rising = [g for g in rising if g not in stay]
    return [rates[number] for number in sorted(rates)]


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**9), st.booleans())
def test_rates_that_are_found_from_what_changed(seed: int, alike: bool) -> None:
    """Against the law looked at anew each time, and transfers followed one by one; ``alike`` are
    many groups, of which all use one resource that is mostly full.
    """
    rng = random.Random(seed)
    resources = range(rng.randint(1, 6))
    flows = Flows[int](
        [rng.choice([rng.randint(1, 100), rng.randint(1, 10**6)]) for _ in resources]
    )
    groups: list[Any] = []
    for _ in range(40 if alike else rng.randint(1, 10)):
        some = rng.sample(resources, rng.randint(0, min(len(resources), 3)))
        limit = rng.choice([rng.randint(1, 50), rng.randint(1, 10**6)])
        if alike:
            some, limit = sorted({0, *some[:1]}), rng.randint(10**5, 10**6)
        groups.append(flows.group(limit, tuple((r, rng.randint(1, 3 << 20)) for r in some)))
    left: dict[int, tuple[Any, int]] = {}
    for token in range(150 if alike else 60):
        if rng.random() < 0.6:
            # Several may start before rates are asked for.
            group, units = rng.choice(groups), rng.randint(1, 10**7)
            flows.start(group, units, token)
            left[token] = group, units
            continue
        end = flows.next_end()
        if end is not None:
            rates = rates_by_the_law(flows)
            assert [flows.rate(g) for g in groups if g.ends] == rates
            soonest = min(-(-units // flows.rate(group)) for group, units in left.values())
            assert end == flows.now + soonest
            now, end = flows.now, end if rng.random() < 0.7 else rng.randint(flows.now, end)
            left = {
                n: (group, units - flows.rate(group) * (end - now))
                for n, (group, units) in left.items()
            }
            ended = {n for n, (_, units) in left.items() if units <= 0}
            assert set(flows.advance(end)) == ended
            left = {n: entry for n, entry in left.items() if n not in ended}


def test_the_rounding_law() -> None:
    assert picoseconds(Fraction(300e-9)) == 300_000
    assert picoseconds(Fraction(1, 3 * 10**9)) == 334
    assert units_a_picosecond(1e12) == UNIT
    assert weight_of(Fraction(1, 3)) == 349_526


def test_a_share_of_the_home_memory() -> None:
    """Four cores that read the same bytes at once take a quarter of them each."""
    times: list[Timing] = []
    for share in ((1, 1), (1, 4)):
        p = Program("shared", grid=(4,))
        x = p.tensor("x", (256, 128))
        tile = p.buffer("tile", (16, 128), stages=4)
        with p.loop(16, name="i") as i:
            p.load("in", x, tile, (i, 0), share=share)
            p.rotate(tile)
        times.append(simulate(p.build(), toy_chip(memories__hbm__bandwidth=number(40, "GB/s"))))
    alone, shared = times
    assert alone.bytes == 4 * shared.bytes == 4 * 256 * 128 * 4
    assert alone.bound == "memory"
    assert shared.ps < alone.ps / 2


# --- what is reported ----------------------------------------------------------------------------


def test_spans_show_each_queue_in_order() -> None:
    timing = simulate(matmul_program(64, 64, 64), CHIP, record=True)
    by_queue: dict[str, list[tuple[int, int]]] = {}
    for span in timing.spans:
        assert timing.launch <= span.start <= span.end <= timing.ps
        if span.queue in ("in", "out"):
            assert span.flow is not None
            assert span.start < span.flow < span.end
        else:
            by_queue.setdefault(span.queue, []).append((span.start, span.end))
    for times in by_queue.values():
        assert all(a[1] <= b[0] for a, b in pairwise(times))
    dot = next(s for s in timing.spans if s.label.startswith("dot"))
    assert dot.buffers == ("left", "right", "total")
    assert {(w.semaphore, w.queue) for w in dot.waits} == {("cleared", "vec"), ("loaded", "in")}
    assert all(w.start <= w.end <= dot.start for w in dot.waits)
    assert sum(s.end - s.start for s in timing.spans if s.queue == "mxu") == timing.busy["mxu"]


def test_what_bounds_a_program() -> None:
    heavy = matmul_program(256, 256, 256)
    slow = toy_chip(engines__mxu__rates={"float32": number(8)})
    assert simulate(heavy, slow).bound == "compute"
    full = toy_chip(memories__hbm__bandwidth=number(40, "GB/s"))
    assert simulate(copy_program(3200, 128, 16, stages=4), full).bound == "memory"
    narrow = toy_chip(fabrics__bus__bandwidth=number(5, "GB/s"))
    assert simulate(copy_program(3200, 128, 16, stages=4), narrow).bound == "link"
    assert simulate(copy_program(16, 16, 16), CHIP).bound == "latency"


def test_flops_and_instructions_are_counted() -> None:
    timing = simulate(matmul_program(64, 64, 64, cores=(2, 2)), CHIP)
    assert timing.flops == 2 * 64**3
    assert (
        timing.instructions * 4
        == simulate(matmul_program(64, 64, 64, cores=(2, 2)), CHIP, full=True).instructions
    )


# --- costs ---------------------------------------------------------------------------------------


def test_every_class_of_op_costs_by_its_law() -> None:
    p = Program("costs")
    a = p.buffer("a", (2, 16, 32))
    b = p.buffer("b", (2, 32, 8))
    c = p.buffer("c", (2, 16, 8))

    def work(t: Any, x: Any, y: Any, z: Any) -> Any:
        row = t("reduce", x, axis=1, combiner="max")
        scan = t("cumsum", x, axis=2)
        t("transpose", scan, order=(0, 2, 1))
        t.cast(t.cast(row, "bfloat16"), "float32")
        t("where", t("lt", x, scan), x, scan)
        t("add", t.full((2, 16, 32), 1.0), t("reshape", x, shape=(2, 16, 32)))
        return z

    p.compute("vec", ["vec"], [a, b, c], [c], work)
    p.compute("mxu", ["mxu"], [a, b, c], [c], lambda t, x, y, z: t("dot", x, y, z))
    costs = Costs(CHIP)
    for op in p.build().body.ops[-2:]:
        assert costs.compute(op).ps == compute_time(CHIP, op)
    assert costs.cycles("mxu", "dot", op.regions[0].ops[0]) == 2 * (20 + 16 * 8 * 32 / 256)


def test_ops_that_share_a_pass_cost_as_the_slowest() -> None:
    """A softmax's numbers in one pass of an engine that has one, and what doesn't fit it apart."""
    target = chip("trainium2")
    p = Program("passes")
    x = p.buffer("x", (256, 64), "bfloat16")
    row = p.buffer("row", (256, 1))
    y = p.buffer("y", (256, 64))

    def softmax(t: Any, a: Any, r: Any) -> Any:
        across = t("broadcast", r, shape=(256, 64))
        lowered = t("sub", t.cast(a, "float32"), across)
        weights = t("exp", t("mul", lowered, t.full((256, 64), 0.5)))
        return t.cast(weights, "bfloat16"), t(
            "reduce", weights, axis=1, combiner="sum", keepdims=True
        )

    def chains(t: Any, a: Any, b: Any) -> Any:
        twice = t("mul", a, t.full((256, 64), 2.0))
        both = t("mul", t("add", twice, b), t.full((256, 64), 3.0))
        return t("add", both, twice)

    def squares(t: Any, a: Any) -> Any:
        return t("reduce", t("mul", a, a), axis=1, combiner="sum")

    p.compute("scalar", ["scalar"], [x, row], [x, row], softmax)
    p.compute("vector", ["vector"], [y, y], [y], chains)
    p.compute("scalar", ["scalar"], [y], [row], squares)
    costs, computes = Costs(target), [op for op in p.build().body.ops if op.name == "compute"]
    assert [costs.compute(op).ps for op in computes] == [
        compute_time(target, op) for op in computes
    ]
    square, total = computes[2].regions[0].ops
    apart = costs.cycles("scalar", "square", square) + costs.cycles("scalar", "sum", total)
    assert costs.compute(computes[2]).ps < (100 + apart) / 1.2e9 * 1e12


def _one(queue: str, engines: list[str], name: str) -> Function:
    p = Program("one")
    x = p.buffer("x", (16, 16), "bfloat16" if name == "cast" else "float32")
    if name == "dot":
        p.compute(queue, engines, [x], [x], lambda t, a: t("dot", a, a, a))
    else:
        p.compute(queue, engines, [x], [x], lambda t, a: t(name, a))
    return p.build()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_one("vec", ["vec"], "dot"), "no law for dot"),
        (_one("vec", ["gpu"], "neg"), "isn't an engine"),
        (_one("vec", ["mxu"], "neg"), "is in queue 'mxu'"),
    ],
)
def test_what_the_chip_cant_compute_is_refused(function: Function, text: str) -> None:
    with pytest.raises(IRError, match=text):
        simulate(function, CHIP)


def test_a_type_without_a_rate_is_refused() -> None:
    chip = toy_chip(engines__mxu__rates={"int8": number(2)})
    with pytest.raises(IRError, match="no rate"):
        simulate(_one("mxu", ["mxu"], "dot"), chip)


def test_a_dma_that_no_engine_does_is_refused() -> None:
    p = Program("way")
    x, tile = p.tensor("x", (16, 16)), p.buffer("tile", (16, 16))
    p.load("out", x, tile, (0, 0))
    with pytest.raises(IRError, match="from hbm to sram"):
        simulate(p.build(), CHIP)


# --- programs that hang --------------------------------------------------------------------------


def test_a_deadlock_names_queues_and_semaphores() -> None:
    p = Program("hang")
    tile = p.buffer("tile", (16, 16))
    one, other = p.semaphore("one"), p.semaphore("other")
    p.wait("vec", one)
    p.signal("vec", other)
    p.wait("mxu", other)
    p.signal("mxu", one)
    p.compute("vec", ["vec"], [tile], [tile], lambda t, a: t("neg", a))
    with pytest.raises(IRError) as caught:
        simulate(p.build(), CHIP)
    text = str(caught.value)
    assert "queue 'vec' at wait for 1 of semaphore 'one' (instruction 1 of 3)" in text
    assert "queue 'mxu' at wait for 1 of semaphore 'other'" in text


def test_a_signal_that_comes_too_seldom_hangs() -> None:
    p = Program("seldom")
    x, tile = p.tensor("x", (16, 16)), p.buffer("tile", (16, 16))
    full = p.semaphore("full", maximum=3)
    with p.loop(2, name="i"):
        p.load("in", x, tile, (0, 0))
        p.signal("in", full)
    p.wait("vec", full, 3)
    with pytest.raises(IRError, match="3 of semaphore 'full'"):
        simulate(p.build(), CHIP)
    with pytest.raises(RuntimeError, match="deadlock"):
        brute_force(p.build(), CHIP)


def test_laws_are_not_asked_for_what_does_not_flow() -> None:
    """A tile wholly outside its tensor costs its issue, and no law divides by its zero runs."""
    p = Program("outside")
    x, tile = p.tensor("x", (16, 16)), p.buffer("tile", (16, 16))
    p.load("in", x, tile, (1, 0))
    chip = toy_chip(dma__loader__efficiency={**law("bytes / runs"), "unit": "1"})
    assert simulate(p.build(), chip).ps == 2_000_000 + 7_000
