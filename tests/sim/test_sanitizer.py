"""The sanitizer against an explorer of every interleaving: on random programs, on drawn faults,
and on trip counts that are only known at run time; and what its reports say.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from explorer import TooLarge, explore
from mutation import Mutant, mutant, mutants
from programs import Program, copy_program, matmul_program, number, toy_chip
from sanitizer_programs import (
    ROWS,
    SHAPE,
    correct_programs,
    edge_copy,
    epilogue,
    pipeline,
    random_program,
    unknown_pipeline,
)

from dure.ir.core import Function
from dure.ir.expr import as_expr
from dure.sim.sanitizer import Verdict, sanitize

CHIP = toy_chip()
#: The explorer's label of each kind of finding; kinds of conflicts are one.
LABELS = {
    "race": "conflict",
    "overlap": "conflict",
    "accumulator-early": "conflict",
    "uninitialised": "uninitialised",
    "deadlock": "deadlock",
    "semaphore-leak": "leak",
    "semaphore-overflow": "overflow",
}


def _found(verdict: Verdict) -> set[str]:
    return {LABELS[f.kind] for f in verdict.findings}


def _explored(function: Function, limit: int = 30000) -> set[str] | None:
    """The explorer's labels, None where there are too many interleavings."""
    try:
        labels = explore(function, CHIP, limit=limit)
    except TooLarge:
        return None
    return {"conflict" if label in ("race", "overlap") else label for label in labels}


def _check_kinds(found: set[str], labels: set[str]) -> None:
    """Both name the same faults, as far as one fault doesn't hide another.

    After a race what is read depends on timing; after a deadlock or an overflow the sanitizer ends.
    """
    if "conflict" in labels:
        found, labels = found - {"uninitialised"}, labels - {"uninitialised"}
    if found & {"deadlock", "overflow"}:
        assert found <= labels
    else:
        assert found == labels


@pytest.mark.parametrize("part", range(4))
def test_random_programs_agree_with_the_explorer(part: int) -> None:
    outcomes = Counter[bool]()
    for seed in range(part * 500, part * 500 + 500):
        function = random_program(seed)
        verdict, labels = sanitize(function, CHIP), _explored(function)
        assert labels is not None, seed
        assert verdict.ok == (not labels), (seed, verdict.render(), labels)
        _check_kinds(_found(verdict), labels)
        outcomes[verdict.ok] += 1
    assert min(outcomes[True], outcomes[False]) > 100


def _score(drawn: Iterable[Mutant]) -> Counter[str]:
    score = Counter[str]()
    for fault in drawn:
        labels = _explored(fault.function, 10000)
        if labels is None:
            continue
        verdict = sanitize(fault.function, CHIP)
        where = f"{fault.function.name}: {fault.kind} {fault.detail}"
        assert verdict.ok == (not labels), (where, verdict.render(), labels)
        score["harmful" if labels else "harmless"] += 1
    return score


def test_drawn_faults_are_found_and_harmless_ones_are_not() -> None:
    score = Counter[str]()
    for seed, function in enumerate(correct_programs()):
        score += _score(mutants(function, seed, 28))
    print(f"mutation: {score['harmful']} harmful faults, all found; {score['harmless']} harmless")
    assert score.total() >= 500
    assert score["harmful"] >= 300


def test_correct_programs_raise_no_alarm() -> None:
    programs = [*correct_programs(), *(pipeline(seed) for seed in range(100))]
    for function in programs:
        verdict = sanitize(function, CHIP)
        assert verdict.ok, (function.name, verdict.render())


@pytest.mark.parametrize(("high", "most"), [(4, 4), (10**6, 6)])
def test_unknown_trip_counts_are_proved_for_all_values(high: int, most: int) -> None:
    """The verdict over all values is right exactly where each single one is."""
    for seed in range(80):
        function = unknown_pipeline(seed, 0, high)
        fault = mutant(function, random.Random(seed)) if seed % 3 else None
        function = function if fault is None else fault.function
        verdict = sanitize(function, CHIP)
        harmful = False
        for trips in range(most + 1):
            values = {"lengths": np.full(4, trips, np.int32)}
            labels = explore(function, CHIP, values, limit=60000)
            assert sanitize(function, CHIP, indices=values).ok == (not labels)
            harmful = harmful or bool(labels)
            if harmful:
                break
        assert verdict.ok == (not harmful), (seed, verdict.render())


def test_the_work_does_not_grow_with_trip_counts() -> None:
    sizes = (4096, 16384, 65536)
    short, small, large = (sanitize(matmul_program(n, n, n, (64, 64, 64)), CHIP) for n in sizes)
    assert short.ok and small.ok and large.ok
    assert large.states == small.states and large.iterations == small.iterations
    # Short loops are run without looking at their states.
    assert short.states <= small.states and short.iterations <= small.iterations


def test_a_race_names_both_accesses_and_the_missing_edge() -> None:
    p = Program("racy")
    x, y = p.tensor("x", (8, 2)), p.tensor("y", (8, 2), access="out")
    tile = p.buffer("tile", SHAPE)
    p.load("in", x, tile, (0, 0))
    p.store("out", y, tile, (0, 0))
    (finding,) = sanitize(p.build(), CHIP).findings
    assert finding.kind == "race"
    assert [a.op.name for a in finding.accesses] == ["dma_load", "dma_store"]
    text = finding.render()
    assert "racy.py:1:1" in text and "dma_load x, tile" in text and "dma_store y, tile" in text
    assert "a signal on 'in' after the one and a wait on 'out' before the other" in text


def test_two_transfers_of_one_queue_are_not_ordered() -> None:
    p = Program("flight")
    x = p.tensor("x", (8, 2))
    tile = p.buffer("tile", SHAPE)
    p.load("in", x, tile, (0, 0))
    p.load("in", x, tile, (1, 0))
    assert [f.kind for f in sanitize(p.build(), CHIP).findings] == ["race"]


def test_an_accumulator_read_early_is_named_so() -> None:
    function = epilogue()
    kinds = set[str]()
    for fault in mutants(function, 1, 200):
        if fault.kind == "drop_wait" and "summed" in fault.detail:
            kinds |= {f.kind for f in sanitize(fault.function, CHIP).findings}
    assert "accumulator-early" in kinds


def test_a_cut_load_leaves_bytes_unwritten() -> None:
    assert sanitize(edge_copy(), CHIP).ok
    # Nothing reads what isn't stored.
    assert sanitize(edge_copy(4, clear=False), CHIP).ok
    verdict = sanitize(edge_copy(3, clear=False), CHIP)
    assert [f.kind for f in verdict.findings] == ["uninitialised"]


def test_buffers_lie_in_their_memory() -> None:
    p = Program("large")
    p.buffer("tile", (256, 300))
    assert [f.kind for f in sanitize(p.build(), CHIP).findings] == ["out-of-bounds"]
    chip = toy_chip(memories__sram__partitions=number(128))
    p = Program("partitioned")
    p.buffer("tile", (128, 600), pitch=2400)
    assert [f.kind for f in sanitize(p.build(), chip).findings] == ["out-of-bounds"]


def test_malformed_programs_are_not_proved() -> None:
    p = Program("unreachable")
    x = p.tensor("x", (8, 2))
    tile = p.buffer("tile", SHAPE)
    p.load("out", x, tile, (0, 0))
    verdict = sanitize(p.build(), CHIP)
    assert [f.kind for f in verdict.findings] == ["not-proved"]
    assert "doesn't move from 'hbm' to 'sram'" in verdict.render()
    p = Program("two_signal")
    semaphore = p.semaphore("s", maximum=2)
    p.signal("in", semaphore)
    p.signal("out", semaphore)
    p.wait("vec", semaphore, 2)
    verdict = sanitize(p.build(), CHIP)
    assert not verdict.ok and "more than one queue signals" in verdict.render()
    p = Program("unknown")
    p.signal("nowhere", p.semaphore("s"))
    assert "unknown queue 'nowhere'" in sanitize(p.build(), CHIP).render()
    assert not sanitize(copy_program(cores=16), CHIP).ok


def _in_place(instances: bool, ordered: bool, apart: int = 0) -> Function:
    """Loads tile i of a tensor and stores tile i + ``apart`` of it, for each i."""
    p = Program("inplace")
    y = p.tensor("y", (16, 2), access="inout")
    first, second = p.buffer("first", SHAPE), p.buffer("second", SHAPE)
    loaded, stored = p.semaphore("loaded", 0, 8), p.semaphore("stored", 1, 1)
    made, free = p.semaphore("made", 0, 8), p.semaphore("free", 1, 1)
    with p.loop(3, name="i") as i:
        p.wait("in", free)
        p.load("in", y, first, (i, 0))
        p.signal("in", free)
        if ordered:
            p.signal("in", loaded)
            p.wait("out", loaded)
        p.wait("vec", stored)
        p.compute("vec", ["vec"], [], [second], lambda t: t.full(SHAPE, 0.0))
        p.signal("vec", made)
        p.wait("out", made)
        p.store("out", y, second, (i + apart, 0))
        p.signal("out", stored)
    function = p.build()
    if not instances:
        return function
    loop = function.body.ops[-1]
    marked = replace(loop, attrs={**loop.attrs, "instances": True})
    return function.with_body(replace(function.body, ops=(*function.body.ops[:-1], marked)))


def test_home_tensors_conflict_but_across_instances() -> None:
    assert sanitize(_in_place(False, True), CHIP).ok
    # The load of a later tile may meet the store of this one where they are the same elements.
    assert [f.kind for f in sanitize(_in_place(False, False), CHIP).findings] == ["race"]
    assert [f.kind for f in sanitize(_in_place(False, True, 1), CHIP).findings] == ["race"]
    assert [f.kind for f in sanitize(_in_place(True, False), CHIP).findings] == ["race"]
    # Different instances touch different elements, by the proof at the tile level.
    assert sanitize(_in_place(True, True, 1), CHIP).ok
    assert sanitize(_in_place(True, False, 1), CHIP).ok


def test_a_counter_that_starts_at_another_one_is_followed() -> None:
    """The inner loop's condition holds in some of the outer iterations alone."""
    p = Program("nested")
    x = p.tensor("x", (ROWS, 2))
    y = p.tensor("y", (ROWS, 2), access="out")
    tile = p.buffer("tile", SHAPE)
    done, own = p.semaphore("done", 0, 1), p.semaphore("own", 0, 1)
    p.load("in", x, tile, (0, 0))
    p.signal("in", done)
    p.wait("out", done)
    with p.loop(4, name="i") as i, p.loop(i + 1, start=i, name="j") as j, p.when(j < 3):
        p.store("out", y, tile, (j, 0))
        p.signal("out", own)
        p.wait("out", own)
    function = p.build()
    assert sanitize(function, CHIP).ok and not explore(function, CHIP)
    # Only the last iteration leaves the signal that nobody waits for.
    with p.loop(4, name="k") as k, p.loop(k + 1, start=k, name="m") as m, p.when(as_expr(3) <= m):
        p.signal("out", own)
    function = p.build()
    assert [f.kind for f in sanitize(function, CHIP).findings] == ["semaphore-leak"]
    assert explore(function, CHIP) == {"leak"}
