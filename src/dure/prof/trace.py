"""An execution in the trace-event format that Perfetto and Chrome read.

One process for each core class, one thread for each compute queue.  A DMA queue has a thread of
what it issues and one for each transfer that is in flight with others: a slice from issue to
completion, in it the latency and the flow of bytes.  Waits are slices, an arrow leads from the
instruction that signalled to the one that waited; bandwidth and scratchpad use are counters.

The format counts in microseconds and its readers in whole nanoseconds: times are rounded to those,
exact ones (``start_ps``) are among the arguments.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from dure.prof.analysis import occupancy
from dure.prof.output import check_path, write
from dure.prof.records import Instruction, Profile, Queue, Wait

SUFFIXES = (".json", ".json.gz")

Event: TypeAlias = "dict[str, Any]"

#: The process of counters that all cores share.
_CHIP = 1


def trace(profile: Profile) -> dict[str, object]:
    """The execution as the one object that a trace file is."""
    events: list[Event] = [*_names(_CHIP, f"{profile.target}: {profile.title}", 0)]
    events += _launches(profile)
    for counter in profile.counters:
        unit, scale = ("GB/s", 1e-9) if counter.unit == "B/s" else (counter.unit, 1.0)
        events += _counter(_CHIP, f"{counter.name} {unit}", counter.points, scale)
    for number, _ in enumerate(profile.classes):
        events += _Process(profile, number).events()
    for memory in profile.memories:
        inside = [b for b in profile.buffers if b.memory == memory.name]
        events += _counter(_CHIP + 1, f"{memory.name} bytes", occupancy(inside), 1)
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "target": profile.target,
            "program": profile.title,
            "picoseconds": profile.total,
            **profile.facts,
        },
        "traceEvents": events,
    }


def write_trace(profile: Profile, path: Path) -> None:
    """Write the execution to a ``.json`` or ``.json.gz`` file."""
    check_path(path, SUFFIXES)
    data = json.dumps(trace(profile), separators=(",", ":")).encode()
    # A fixed time in the header: the same execution is the same file.
    write(path, gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def _us(ps: int) -> float:
    """Whole nanoseconds, in microseconds."""
    return round(ps / 1000) / 1000


def _names(process: int, name: str, order: int) -> Iterator[Event]:
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": order}}


def _launches(profile: Profile) -> Iterator[Event]:
    yield from _thread(_CHIP, 1, "launch")
    ends = [start for start, _ in profile.launches[1:]] + [profile.total]
    for (start, ready), end, program in zip(profile.launches, ends, profile.programs, strict=True):
        yield _slice(_CHIP, 1, program.name, start, end, {**program.facts})
        yield _slice(_CHIP, 1, "launch", start, ready, {})


def _counter(
    process: int,
    name: str,
    points: tuple[tuple[int, float], ...] | list[tuple[int, int]],
    by: float,
) -> Iterator[Event]:
    for at, value in points:
        yield {
            "ph": "C",
            "pid": process,
            "name": name,
            "ts": _us(at),
            "args": {"value": value * by},
        }


def _thread(process: int, thread: int, name: str) -> Iterator[Event]:
    for key, value in (
        ("thread_name", {"name": name}),
        ("thread_sort_index", {"sort_index": thread}),
    ):
        yield {"ph": "M", "pid": process, "tid": thread, "name": key, "args": value}


def _slice(
    process: int, thread: int, name: str, start: int, end: int, more: dict[str, object]
) -> Event:
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": name,
        "ts": _us(start),
        "dur": round(_us(end) - _us(start), 3),
        "args": {"start_ps": start, "end_ps": end, **more},
    }


class _Process:
    """The events of one core class."""

    def __init__(self, profile: Profile, core_class: int) -> None:
        self.profile = profile
        self.core_class = core_class
        self.pid = _CHIP + 1 + core_class
        self._threads = 0
        #: The thread in which an instruction's end is, and in which its beginning is.
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}

    def events(self) -> Iterator[Event]:
        """Names, slices, then arrows."""
        yield from _names(self.pid, self.profile.classes[self.core_class].name, self.pid)
        for queue in self.profile.queues:
            entries = self.profile.of(self.core_class, queue.name)
            if entries:
                yield from (
                    self._compute(queue, entries)
                    if queue.kind == "compute"
                    else self._dma(queue, entries)
                )
        yield from self._arrows()

    def _new(self) -> int:
        self._threads += 1
        return self._threads

    def _compute(self, queue: Queue, entries: list[tuple[int, Instruction]]) -> Iterator[Event]:
        thread = self._new()
        yield from _thread(self.pid, thread, f"{queue.name} ({', '.join(queue.engines)})")
        for number, entry in entries:
            self._starts[number] = self._ends[number] = thread
            yield from self._waits(thread, entry)
            yield _slice(self.pid, thread, entry.name, entry.start, entry.end, _arguments(entry))

    def _dma(self, queue: Queue, entries: list[tuple[int, Instruction]]) -> Iterator[Event]:
        issuing = self._new()
        yield from _thread(self.pid, issuing, f"{queue.name}: issue")
        lanes: list[tuple[int, int]] = []  # (when it is free, its thread)
        for number, entry in entries:
            self._starts[number] = issuing
            yield from self._waits(issuing, entry)
            yield _slice(self.pid, issuing, entry.name, entry.start, entry.issued, {})
            place = next(
                (n for n, (free, _) in enumerate(lanes) if free <= entry.start), len(lanes)
            )
            if place == len(lanes):
                lanes.append((0, self._new()))
                name = f"{queue.name}: in flight {len(lanes)}"
                yield from _thread(self.pid, lanes[place][1], name)
            thread = lanes[place][1]
            lanes[place] = entry.end, thread
            self._ends[number] = thread
            yield _slice(self.pid, thread, entry.name, entry.start, entry.end, _arguments(entry))
            if entry.flow is not None:
                yield _slice(self.pid, thread, "latency", entry.issued, entry.flow, {})
                yield _slice(self.pid, thread, "flow", entry.flow, entry.end, {})

    def _waits(self, thread: int, entry: Instruction) -> Iterator[Event]:
        for wait in entry.waits:
            if wait.end > wait.start:
                more: dict[str, object] = {"semaphore": wait.semaphore, "signalled by": wait.queue}
                name = f"wait {wait.semaphore}"
                yield _slice(self.pid, thread, name, wait.start, wait.end, more)

    def _arrows(self) -> Iterator[Event]:
        arrow = 0
        for number, entry in enumerate(self.profile.instructions):
            if entry.core_class != self.core_class:
                continue
            for wait in entry.waits:
                if wait.cause is not None:
                    arrow += 1
                    yield from self._arrow(arrow, wait, number, wait.cause)

    def _arrow(self, arrow: int, wait: Wait, number: int, cause: int) -> Iterator[Event]:
        entries = self.profile.instructions
        common = {
            "pid": self.pid,
            "cat": "semaphore",
            "name": wait.semaphore,
            "id": f"{self.core_class}.{arrow}",
        }
        start, end = _us(entries[cause].start), _us(entries[cause].end)
        # An arrow begins inside of a slice: a nanosecond before its end.
        begin = max(start, round(end - 0.001, 3))
        yield {"ph": "s", "tid": self._ends[cause], "ts": begin, **common}
        to = _us(entries[number].start)
        yield {"ph": "f", "bp": "e", "tid": self._starts[number], "ts": to, **common}


def _arguments(entry: Instruction) -> dict[str, object]:
    found: dict[str, object] = {"buffers": " ".join(entry.buffers)}
    if entry.source is not None:
        found["source"] = f"{entry.source.file}:{entry.source.line}"
        found["text"] = entry.source.text.strip()
    if entry.bytes:
        found["bytes"] = entry.bytes
    if entry.flops:
        found["flops"] = entry.flops
    return found
