"""An execution as columns of numbers that a page of a bounded size can hold.

Up to :data:`EXACT` instructions are kept as they are.  Of more, those in a queue that are shorter
and closer together than a reader could tell apart become one block (of transfers, those of the same
line); waits shorter than that are left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, TypeAlias

from dure.prof.records import Instruction, Life, Profile, Source

#: Instructions that are kept as they are.
EXACT = 12_000
#: What a reader can tell apart, as a part of the whole time, where there are more.
PARTS = 3_000
#: Points of a curve.
POINTS = 1_500
#: Core classes whose instructions are kept.
CLASSES = 8

Columns: TypeAlias = "dict[str, Any]"


class Names:
    """Texts (or sources) by number."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def of(self, entry: str | Source | None) -> int:
        """The number of an entry, -1 of None."""
        return -1 if entry is None else self._numbers.setdefault(entry, len(self._numbers))

    def all(self) -> list[Any]:
        """The entries in the order of their numbers."""
        return list(self._numbers)


def resolution(profile: Profile) -> int:
    """The picoseconds below which neighbours become one; 0 where all is kept."""
    return profile.total // PARTS if len(profile.instructions) > EXACT else 0


def tracks(profile: Profile, names: Names, sources: Names) -> list[Columns]:
    """Each queue of each core class as columns.

    ``start`` holds the distances from the start before, ``length``, ``issued`` and ``flow``
    (-1: no bytes flow) count from the start; ``count`` is the instructions in a block; ``waits``
    are (block, semaphore, start, end, block of the cause in its track, its track).
    """
    fine = resolution(profile)
    found: list[Columns] = []
    places: dict[int, tuple[int, int]] = {}
    pending: list[tuple[Columns, int, Instruction]] = []
    for core_class in range(min(len(profile.classes), CLASSES)):
        for number, queue in enumerate(profile.queues):
            entries = profile.of(core_class, queue.name)
            if not entries:
                continue
            track = _track(core_class, number)
            for members in _blocks(entries, fine, queue.kind == "dma"):
                block = len(track["start"])
                _add(track, [entry for _, entry in members], names, sources)
                for index, entry in members:
                    places[index] = len(found), block
                    pending.append((track, block, entry))
            found.append(_distances(track))
    for track, block, entry in pending:
        for wait in entry.waits:
            if wait.end - wait.start > fine:
                home, cause = (-1, -1) if wait.cause is None else places[wait.cause]
                row = [block, names.of(wait.semaphore), wait.start, wait.end, cause, home]
                track["waits"].append(row)
    return found


def _track(core_class: int, queue: int) -> Columns:
    columns = ("start", "length", "issued", "flow", "name", "source", "bytes", "count", "waits")
    return {"class": core_class, "queue": queue, **{name: [] for name in columns}}


def _blocks(
    entries: Sequence[tuple[int, Instruction]], fine: int, moving: bool
) -> list[list[tuple[int, Instruction]]]:
    """Instructions that become one, in the order of the first of each."""
    found: list[list[tuple[int, Instruction]]] = []
    growing: dict[object, list[tuple[int, Instruction]]] = {}
    for pair in entries:
        entry = pair[1]
        key = (entry.name, entry.source) if moving else None
        block = growing.get(key)
        if block is not None and entry.end - entry.start <= fine:
            close = entry.start - block[-1][1].end <= fine // 4
            if close and entry.end - block[0][1].start <= 2 * fine:
                block.append(pair)
                continue
        growing[key] = [pair]
        found.append(growing[key])
    return found


def _add(track: Columns, block: Sequence[Instruction], names: Names, sources: Names) -> None:
    first = block[0]
    longest = max(block, key=lambda entry: entry.end - entry.start)
    flows = [entry.flow for entry in block if entry.flow is not None]
    track["start"].append(first.start)
    track["length"].append(max(entry.end for entry in block) - first.start)
    track["issued"].append(first.issued - first.start)
    track["flow"].append(flows[0] - first.start if flows else -1)
    track["name"].append(names.of(longest.name))
    track["source"].append(sources.of(longest.source))
    track["bytes"].append(sum(entry.bytes for entry in block))
    track["count"].append(len(block))


def _distances(track: Columns) -> Columns:
    starts: list[int] = track["start"]
    track["start"] = [at - before for before, at in zip([0, *starts], starts, strict=False)]
    return track


def lives(found: Sequence[Life], fine: int) -> list[tuple[int, int, int]]:
    """(slot, start, end) in the order of slots; what is closer together than can be told is one."""
    kept: list[tuple[int, int, int]] = []
    for life in found:
        if kept and fine:
            slot, start, end = kept[-1]
            if slot == life.slot and life.start - end <= fine:
                kept[-1] = slot, start, max(end, life.end)
                continue
        kept.append((life.slot, life.start, life.end))
    return kept


def curve(
    points: Sequence[tuple[int, float]], total: int, *, highest: bool = False
) -> list[tuple[int, float]]:
    """A curve of steps with at most :data:`POINTS` points: averages over equal times, or the
    highest values.
    """
    if len(points) <= POINTS:
        return list(points)
    times = [at for at, _ in points]
    found: list[tuple[int, float]] = []
    for part in range(POINTS):
        start, end = total * part // POINTS, total * (part + 1) // POINTS
        first = max(bisect_right(times, start) - 1, 0)
        last = max(bisect_right(times, end - 1), first + 1)
        inside = points[first:last]
        if highest:
            found.append((start, max(value for _, value in inside)))
            continue
        marks = [max(at, start) for at, _ in inside] + [end]
        area = sum(
            value * (marks[place + 1] - marks[place]) for place, (_, value) in enumerate(inside)
        )
        found.append((start, area / max(end - start, 1)))
    return found
