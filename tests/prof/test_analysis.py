"""Where time went: queues, the critical path, occupancy; exact on an execution made by hand, and
consistent with the simulator on real ones.
"""

from __future__ import annotations

from itertools import pairwise

from dure.library.answer import Answer
from dure.prof import analysis
from dure.prof.records import Profile, joined


def test_the_critical_path_by_hand(by_hand: Profile) -> None:
    steps = [(s.what, s.start, s.end, s.instruction) for s in analysis.critical_path(by_hand)]
    assert steps == [
        ("launch", 0, 100, None),
        ("issue", 100, 110, 0),
        ("latency", 110, 150, 0),
        ("transfer", 150, 300, 0),
        ("signal", 300, 320, None),
        ("compute", 320, 520, 1),
        ("signal", 520, 540, None),
        ("issue", 540, 550, 2),
        ("latency", 550, 600, 2),
        ("transfer", 600, 700, 2),
        ("signal", 700, 720, None),
        ("compute", 720, 1000, 3),
    ]


def test_queues_by_hand(by_hand: Profile) -> None:
    matrix, load = analysis.queue_uses(by_hand)
    assert (matrix.queue, matrix.busy, matrix.waiting) == ("matrix", 480, 420)
    assert (load.queue, load.busy, load.bytes) == ("in", 250, 8192)
    assert load.waiting == 540 - 110 - (300 - 150)  # while the first load flows it is busy
    assert matrix.stalls == {("full", "in"): 420}
    assert [s.end - s.start for s in analysis.longest_stalls(by_hand, 2)] == [430, 220]


def test_occupancy_by_hand(by_hand: Profile) -> None:
    points = analysis.occupancy(by_hand.buffers)
    assert points == [(0, 0), (100, 256), (520, 0), (540, 256), (1000, 0)]


def test_joined_launches_follow_one_another(by_hand: Profile) -> None:
    both = joined([by_hand, by_hand])
    assert both.total == 2000
    assert both.launches == ((0, 100), (1000, 1100))
    assert both.busy == {"matrix": 960, "in": 500}
    again = both.instructions[4:]
    assert [e.start for e in again] == [e.start + 1000 for e in by_hand.instructions]
    assert [w.cause for e in again for w in e.waits] == [4, 5, 6]
    steps = analysis.critical_path(both)
    assert [s.end for s in steps[:-1]] == [s.start for s in steps[1:]]
    assert sum(s.end - s.start for s in steps if s.what == "launch") == 200
    assert sum(s.end - s.start for s in steps) == 2000


def test_spans_are_what_the_timing_counts(simulated: tuple[Answer, Profile]) -> None:
    answer, made = simulated
    assert made.total == answer.ps
    uses = analysis.queue_uses(made)
    if len(answer.parts) == 1:
        timing = answer.parts[0].timing
        instructions = sum(u.instructions for u in uses)
        assert instructions == len(made.instructions)
        total = sum(e.flops * made.classes[e.core_class].multiplicity for e in made.instructions)
        assert total == timing.flops
    # The timing's queues are those of the busiest class.
    best = max(
        range(len(made.classes)), key=lambda n: max(u.busy for u in uses if u.core_class == n)
    )
    for use in uses:
        if use.core_class == best:
            assert use.busy == made.busy[use.queue]


def test_the_critical_path_covers_the_time(simulated: tuple[Answer, Profile]) -> None:
    _, made = simulated
    steps = analysis.critical_path(made)
    assert steps[0].start == 0
    assert steps[-1].end == made.total
    assert all(a.end == b.start for a, b in pairwise(steps))
    assert sum(s.end - s.start for s in steps if s.what == "idle") == 0


def test_causes_end_before_what_they_cause(simulated: tuple[Answer, Profile]) -> None:
    _, made = simulated
    caused = 0
    for entry in made.instructions:
        for wait in entry.waits:
            assert wait.start <= wait.end <= entry.start
            if wait.cause is not None:
                cause = made.instructions[wait.cause]
                assert (cause.core_class, cause.queue) == (entry.core_class, wait.queue)
                assert cause.end <= wait.end
                caused += 1
    assert caused


def test_lives_stay_in_their_slots(simulated: tuple[Answer, Profile]) -> None:
    _, made = simulated
    used = {memory.name: memory.used for memory in made.memories}
    for buffer in made.buffers:
        assert buffer.lives
        assert buffer.offset + buffer.slots * buffer.slot_bytes <= used[buffer.memory]
        for one, two in pairwise(buffer.lives):
            assert 0 <= one.start < one.end <= made.total
            assert one.slot < two.slot or one.end <= two.start
    for memory in made.memories:
        inside = [b for b in made.buffers if b.memory == memory.name]
        points = analysis.occupancy(inside)
        assert points[-1][1] == 0
        assert 0 < max(level for _, level in points) <= memory.used


def test_counters_carry_the_bytes(simulated: tuple[Answer, Profile]) -> None:
    _, made = simulated
    resources = {resource.name: resource for resource in made.resources}
    counter = next(c for c in made.counters if c.name == f"memories.{made.roofline.memory}")
    moved = sum(value * (after[0] - at) / 1e12 for (at, value), after in pairwise(counter.points))
    assert counter.capacity is not None
    # A transfer ends at a whole picosecond, after its last byte.
    least = resources[counter.name].bytes
    assert least - 1 <= moved <= least + len(counter.points) * counter.capacity / 1e12
    assert max(value for _, value in counter.points) <= counter.capacity
