"""Where the time of an execution went: queues, stalls, source lines, and the critical path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dure.prof.records import Buffer, Instruction, Profile


@dataclass(frozen=True, slots=True)
class QueueUse:
    """A queue's time: ``busy`` computing or with bytes flowing; ``waiting`` for semaphores while it
    isn't busy; ``stalls`` is all time in waits by (semaphore, queue that signals it).
    """

    core_class: int
    queue: str
    instructions: int
    busy: int
    waiting: int
    bytes: int
    flops: int
    stalls: dict[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class Stall:
    """A wait that took time, by the index of the instruction that came after it."""

    instruction: int
    semaphore: str
    queue: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LineUse:
    """What an author's line (or dure itself) costs in a queue: ``time`` is summed over
    instructions, so that transfers in flight together count each.
    """

    queue: str
    name: str
    place: str
    text: str
    count: int
    time: int
    critical: int


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of the critical path: what the end of the execution was waiting for at that time.

    ``what`` is launch, compute, issue, latency (between issue and first byte), transfer, signal
    (on its way between queues) or idle.
    """

    start: int
    end: int
    what: str
    instruction: int | None


def merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of intervals, in order."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def queue_uses(profile: Profile) -> list[QueueUse]:
    """Every queue of every core class, the busiest first within a class."""
    found: list[QueueUse] = []
    for number, _ in enumerate(profile.classes):
        uses = [_use(profile, number, queue.name) for queue in profile.queues]
        found += sorted((u for u in uses if u.instructions), key=lambda u: -u.busy)
    return found


def _use(profile: Profile, core_class: int, queue: str) -> QueueUse:
    entries = [entry for _, entry in profile.of(core_class, queue)]
    busy = merged(e.working for e in entries if e.queue == queue and e.end > e.start)
    waits = [w for e in entries for w in e.waits if w.end > w.start]
    stalls: dict[tuple[str, str], int] = {}
    for wait in waits:
        key = wait.semaphore, wait.queue
        stalls[key] = stalls.get(key, 0) + wait.end - wait.start
    both = length(merged([*busy, *((w.start, w.end) for w in waits)]))
    ordered = dict(sorted(stalls.items(), key=lambda item: -item[1]))
    return QueueUse(
        core_class,
        queue,
        len(entries),
        length(busy),
        both - length(busy),
        sum(e.bytes for e in entries),
        sum(e.flops for e in entries),
        ordered,
    )


def longest_stalls(profile: Profile, count: int = 10) -> list[Stall]:
    """The waits that took longest."""
    found = [
        Stall(number, wait.semaphore, wait.queue, wait.start, wait.end)
        for number, entry in enumerate(profile.instructions)
        for wait in entry.waits
        if wait.end > wait.start
    ]
    return sorted(found, key=lambda s: (s.start - s.end, s.start))[:count]


def by_line(profile: Profile, path: Iterable[Step]) -> list[LineUse]:
    """Instructions by queue, what they do and the author's line, those on the critical path and
    long ones first.
    """
    times: dict[tuple[str, str, str, str], list[int]] = {}
    for entry in profile.instructions:
        row = times.setdefault(_line(entry), [0, 0, 0])
        start, end = entry.working
        row[0] += 1
        row[1] += end - start
    for step in path:
        if step.instruction is not None:
            times[_line(profile.instructions[step.instruction])][2] += step.end - step.start
    rows = [LineUse(*key, *row) for key, row in times.items()]
    return sorted(rows, key=lambda row: (-row.critical, -row.time))


def _line(entry: Instruction) -> tuple[str, str, str, str]:
    source = entry.source
    place, text = (source.place, source.text.strip()) if source is not None else ("", "")
    return entry.queue, entry.name, place, text


def critical_path(profile: Profile) -> list[Step]:
    """What the end waited for, from the end back to the launch: the steps cover all of the time.

    An instruction started when its last wait ended, or when its queue was free of the one before;
    a DMA also when one of its queue's transfers in flight had completed.  The first of a launch
    started when all of the launch before had ended.
    """
    entries = profile.instructions
    previous, ends = _previous(profile), _ends(profile)
    moving = {queue.name for queue in profile.queues if queue.kind == "dma"}
    steps: list[Step] = []
    until = profile.total
    for launched, ready in reversed(profile.launches):
        mine = [n for n, entry in enumerate(entries) if launched <= entry.start < until]
        number = max(mine, key=lambda n: entries[n].end, default=None)
        reached = until
        waited = False
        while number is not None and entries[number].start >= launched:
            entry = entries[number]
            end = min(entry.end, reached)
            steps.append(Step(end, reached, "signal" if waited else "idle", None))
            steps += reversed(_parts(entry, number, end, entry.queue in moving))
            reached, waited = min(reached, entry.start), _waited(entry)
            number = _cause(entry, number, previous, ends)
        steps.append(Step(min(ready, reached), reached, "idle", None))
        steps.append(Step(launched, min(ready, reached), "launch", None))
        until = launched
    return [step for step in reversed(steps) if step.end > step.start]


def _waited(entry: Instruction) -> bool:
    return any(w.end == entry.start and w.end > w.start for w in entry.waits)


def _cause(
    entry: Instruction,
    number: int,
    previous: dict[int, int],
    ends: dict[tuple[int, str, int], int],
) -> int | None:
    """The instruction whose end let this one start."""
    for wait in entry.waits:
        if wait.end == entry.start and wait.end > wait.start and wait.cause is not None:
            return wait.cause
    freed = ends.get((entry.core_class, entry.queue, entry.start))
    if freed is not None and freed < number:
        return freed
    return previous.get(number)


def _previous(profile: Profile) -> dict[int, int]:
    """The instruction before each in its queue."""
    last: dict[tuple[int, str], int] = {}
    found: dict[int, int] = {}
    for number, entry in enumerate(profile.instructions):
        key = entry.core_class, entry.queue
        if key in last:
            found[number] = last[key]
        last[key] = number
    return found


def _ends(profile: Profile) -> dict[tuple[int, str, int], int]:
    """Instructions by core class, queue and end."""
    return {
        (entry.core_class, entry.queue, entry.end): number
        for number, entry in enumerate(profile.instructions)
    }


def _parts(entry: Instruction, number: int, until: int, moving: bool) -> list[Step]:
    """An instruction up to a time, as steps."""
    if not moving:
        return [Step(entry.start, until, "compute", number)]
    flow = entry.end if entry.flow is None else entry.flow
    marks = [
        (entry.start, entry.issued, "issue"),
        (entry.issued, flow, "latency"),
        (flow, entry.end, "transfer"),
    ]
    return [Step(a, min(b, until), what, number) for a, b, what in marks if a < min(b, until)]


def occupancy(buffers: Iterable[Buffer]) -> list[tuple[int, int]]:
    """Bytes that hold something over time, as (when, bytes from then on)."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        for life in buffer.lives:
            changes[life.start] = changes.get(life.start, 0) + buffer.slot_bytes
            changes[life.end] = changes.get(life.end, 0) - buffer.slot_bytes
    level, points = 0, [(0, 0)]
    for at, change in sorted(changes.items()):
        level += change
        if at == points[-1][0]:
            points[-1] = (at, level)
        elif change:
            points.append((at, level))
    return points
