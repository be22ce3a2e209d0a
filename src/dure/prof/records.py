"""An execution of a program on a chip, as records that know neither compiler nor simulator.

All times are whole picoseconds after the program was started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

QueueKind: TypeAlias = Literal["compute", "dma"]


@dataclass(frozen=True, slots=True)
class Source:
    """The author's line."""

    file: str
    line: int
    text: str

    @property
    def place(self) -> str:
        """File name and line."""
        return f"{self.file.rpartition('/')[2]}:{self.line}"


@dataclass(frozen=True, slots=True)
class Wait:
    """A queue that waited for ``semaphore``, which ``queue`` signals.

    ``cause`` is the instruction (its index) whose end signalled last; None where the semaphore's
    initial value was enough.
    """

    semaphore: str
    queue: str
    start: int
    end: int
    cause: int | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """An executed instruction of a core of class ``core_class``.

    A compute keeps its queue from ``start`` to ``end``.  A DMA keeps it from ``start`` to
    ``issued``; its bytes flow from ``flow`` (None: it has none) and it is complete at ``end``.
    ``waits`` are those that its queue executed just before.
    """

    core_class: int
    queue: str
    name: str
    source: Source | None
    start: int
    issued: int
    flow: int | None
    end: int
    bytes: int = 0
    flops: int = 0
    buffers: tuple[str, ...] = ()
    waits: tuple[Wait, ...] = ()

    @property
    def working(self) -> tuple[int, int]:
        """When it computes, or its bytes flow."""
        return (self.start if self.flow is None else self.flow), self.end


@dataclass(frozen=True, slots=True)
class Queue:
    """An in-order queue and the engines that it feeds."""

    name: str
    kind: QueueKind
    engines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CoreClass:
    """``multiplicity`` cores that all do the same; ``core`` has the coordinates of one."""

    multiplicity: int
    core: Mapping[str, int]

    @property
    def name(self) -> str:
        """How many, and which is shown."""
        place = ", ".join(f"{name} {at}" for name, at in self.core.items())
        cores = f"{self.multiplicity} core{'s' if self.multiplicity > 1 else ''}"
        return f"{cores} as core ({place})" if place else cores


@dataclass(frozen=True, slots=True)
class Life:
    """A slot that held something, from the first write until the last read, in the first core
    class.
    """

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """``slots`` of ``slot_bytes`` at ``offset``; in each partition where the memory has them."""

    name: str
    memory: str
    type: str
    slots: int
    slot_bytes: int
    offset: int
    source: Source | None
    lives: tuple[Life, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory of a core: bytes there and bytes given to buffers, in each of ``partitions``."""

    name: str
    capacity: int
    used: int
    partitions: int = 1


@dataclass(frozen=True, slots=True)
class Counter:
    """A number over time: ``points`` are (when, value from then on); ``capacity`` its bound."""

    name: str
    unit: str
    capacity: float | None
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Resource:
    """A shared way for bytes: bytes a second that it carries, bytes, picoseconds at full speed."""

    name: str
    capacity: float
    bytes: int
    busy: int


@dataclass(frozen=True, slots=True)
class Roofline:
    """The chip's published peaks and where the program is below them.

    ``peaks`` are operations a second by type; ``peak`` is that of what the program computes in.
    ``bandwidth`` is the published one of the far memory ``memory``, ``attainable`` what the machine
    file gives it.  ``flops`` is what the definition needs, ``bytes`` what must move at least,
    ``moved`` what did.
    """

    peaks: Mapping[str, float]
    peak: float
    memory: str
    bandwidth: float
    attainable: float
    flops: int
    bytes: int
    moved: int
    seconds: float

    @property
    def bound_s(self) -> float:
        """The least seconds that the published peaks allow."""
        compute = self.flops / self.peak if self.flops else 0.0
        return max(compute, self.bytes / self.bandwidth)

    @property
    def fraction(self) -> float:
        """The part of the time that the peaks explain."""
        return self.bound_s / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Program:
    """A launched program as text; ``facts`` are what is known about it, by name."""

    name: str
    text: str
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator of a model's step, which runs ``count`` times (once a layer) and takes ``ps``
    each time, in the mean: from the end of the one before to its own.  Alone it takes ``alone``.

    ``flops`` and ``bytes`` are what its definition needs each time: operations, and weights and
    keys and values that must move; ``moved`` is what did.  ``fraction`` is the part of its time
    that the published peaks explain.
    """

    name: str
    kernel: str
    count: int
    ps: int
    alone: int
    bound: str
    flops: int
    bytes: int
    moved: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One execution: ``instructions`` in order of their start, and all that they ran on.

    ``launches`` are when each program was launched and when its first instructions could start.
    ``busy`` has the picoseconds of each queue of the busiest core class as its observer counts
    them, ``facts`` the lines of the headline and ``notes`` what a reader must know about the
    numbers.

    Of a model's step ``operators`` are all, and ``turns`` what ran when: (operator, start, end).
    ``overview`` are curves over ``whole``, the time of the step, of which the rest may show only
    ``window``.  All of these are empty where something else ran.
    """

    title: str
    target: str
    total: int
    launches: tuple[tuple[int, int], ...]
    bound: str
    classes: tuple[CoreClass, ...]
    queues: tuple[Queue, ...]
    instructions: tuple[Instruction, ...]
    buffers: tuple[Buffer, ...]
    memories: tuple[Memory, ...]
    counters: tuple[Counter, ...]
    resources: tuple[Resource, ...]
    roofline: Roofline
    programs: tuple[Program, ...]
    busy: Mapping[str, int]
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    operators: tuple[Operator, ...] = ()
    turns: tuple[tuple[int, int, int], ...] = ()
    overview: tuple[Counter, ...] = ()
    whole: int = 0
    window: tuple[int, int] | None = None

    def of(self, core_class: int, queue: str) -> list[tuple[int, Instruction]]:
        """A queue's instructions with their indices, in order."""
        return [
            (number, entry)
            for number, entry in enumerate(self.instructions)
            if entry.core_class == core_class and entry.queue == queue
        ]


def windowed(profile: Profile, start: int, end: int) -> Profile:
    """What happens in a part of the time, as an execution of its own; what a reader sees of the
    whole stays.
    """
    kept = [n for n, e in enumerate(profile.instructions) if start <= e.start and e.end <= end]
    places = {number: place for place, number in enumerate(kept)}
    return replace(
        profile,
        total=end - start,
        launches=tuple((a - start, b - start) for a, b in profile.launches if start <= a < end)
        or ((0, 0),),
        instructions=tuple(_within(profile.instructions[n], start, places) for n in kept),
        buffers=tuple(b for b in (_lived(b, start, end) for b in profile.buffers) if b.lives),
        counters=tuple(replace(c, points=_points(c, start, end)) for c in profile.counters),
        window=(start, end),
    )


def _within(entry: Instruction, start: int, places: Mapping[int, int]) -> Instruction:
    moved = _shifted(entry, -start, 0)
    waits = tuple(
        replace(w, start=max(0, w.start), cause=None if w.cause is None else places.get(w.cause))
        for w in moved.waits
    )
    return replace(moved, waits=waits)


def _lived(buffer: Buffer, start: int, end: int) -> Buffer:
    lives = tuple(
        Life(e.slot, max(0, e.start - start), min(end, e.end) - start)
        for e in buffer.lives
        if e.end > start and e.start < end
    )
    return replace(buffer, lives=lives)


def _points(counter: Counter, start: int, end: int) -> tuple[tuple[int, float], ...]:
    before = [value for at, value in counter.points if at <= start]
    inside = [(at - start, value) for at, value in counter.points if start < at < end]
    return ((0, before[-1] if before else 0.0), *inside)


def joined(profiles: Sequence[Profile]) -> Profile:
    """Launches one after another as one execution: each starts when the one before has ended.

    Core classes of equal number share a place; the roofline has the work of all.
    """
    first, *rest = profiles
    for other in rest:
        first = _appended(first, other)
    return first


def _appended(one: Profile, two: Profile) -> Profile:
    shift, base = one.total, len(one.instructions)
    number = len(one.programs) + 1
    moved = tuple(_shifted(entry, shift, base) for entry in two.instructions)
    buffers = tuple(
        replace(
            buffer,
            name=f"{buffer.name} ({number})",
            lives=tuple(Life(e.slot, e.start + shift, e.end + shift) for e in buffer.lives),
        )
        for buffer in two.buffers
    )
    roof = one.roofline
    return replace(
        one,
        total=one.total + two.total,
        launches=one.launches + tuple((a + shift, b + shift) for a, b in two.launches),
        bound=one.bound if one.total >= two.total else two.bound,
        classes=one.classes if len(one.classes) >= len(two.classes) else two.classes,
        queues=one.queues + tuple(q for q in two.queues if q not in one.queues),
        instructions=one.instructions + moved,
        buffers=one.buffers + buffers,
        memories=_memories(one.memories, two.memories),
        counters=_counters(one, two),
        resources=_resources(one.resources, two.resources),
        roofline=replace(
            roof,
            flops=roof.flops + two.roofline.flops,
            bytes=roof.bytes + two.roofline.bytes,
            moved=roof.moved + two.roofline.moved,
            seconds=roof.seconds + two.roofline.seconds,
        ),
        programs=one.programs + two.programs,
        busy={
            name: one.busy.get(name, 0) + two.busy.get(name, 0) for name in {**one.busy, **two.busy}
        },
        notes=tuple(dict.fromkeys((*one.notes, *two.notes))),
    )


def _shifted(entry: Instruction, by: int, base: int) -> Instruction:
    waits = tuple(
        Wait(w.semaphore, w.queue, w.start + by, w.end + by, _plus(w.cause, base))
        for w in entry.waits
    )
    return replace(
        entry,
        start=entry.start + by,
        issued=entry.issued + by,
        flow=_plus(entry.flow, by),
        end=entry.end + by,
        waits=waits,
    )


def _plus(value: int | None, by: int) -> int | None:
    return None if value is None else value + by


def _memories(one: Sequence[Memory], two: Sequence[Memory]) -> tuple[Memory, ...]:
    """What both use, each as much as the one that uses more."""
    found = {memory.name: memory for memory in one}
    for memory in two:
        used = found[memory.name].used if memory.name in found else 0
        found[memory.name] = replace(memory, used=max(memory.used, used))
    return tuple(found.values())


def _counters(one: Profile, two: Profile) -> tuple[Counter, ...]:
    later = {counter.name: counter for counter in two.counters}
    found = [
        replace(
            counter,
            points=counter.points
            + tuple((at + one.total, value) for at, value in later.pop(counter.name).points),
        )
        if counter.name in later
        else counter
        for counter in one.counters
    ]
    found += [
        replace(counter, points=tuple((at + one.total, value) for at, value in counter.points))
        for counter in later.values()
    ]
    return tuple(found)


def _resources(one: Sequence[Resource], two: Sequence[Resource]) -> tuple[Resource, ...]:
    later = {resource.name: resource for resource in two}
    found: list[Resource] = []
    for entry in one:
        more = later.pop(entry.name, None)
        if more is not None:
            entry = replace(entry, bytes=entry.bytes + more.bytes, busy=entry.busy + more.busy)
        found.append(entry)
    return (*found, *later.values())
