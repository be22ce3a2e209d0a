"""How long a machine program takes on a chip, and what it spends the time on.

:func:`simulate` traces one core of each class (:mod:`dure.sim.streams`, :mod:`dure.sim.classes`)
and replays the classes together (:mod:`dure.sim.replay`), sharing bandwidth by one written rounding
law (:mod:`dure.sim.flows`).  The chip's launch overhead is added once.

What bounds a program, by law: of the whole time, the part that the busiest queue of engines
computes (*compute*); that a memory would take for its bytes at full bandwidth, or that the busiest
DMA queue has bytes flowing (*memory*); and the same for fabrics and links (*link*).  The largest
part is the bound, unless it is below :data:`BOUND`: then the time goes into waiting for one
another (*latency*).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, islice
from math import ceil
from pathlib import PurePath
from typing import Literal, TypeAlias

from dure.errors import TargetError
from dure.ir.core import Function, Op
from dure.ir.dtypes import Array
from dure.machine.chip import Chip
from dure.machine.group import Way
from dure.machine.quantity import Quantity
from dure.sim.classes import CoreClass, core_classes
from dure.sim.contention import Contention
from dure.sim.cost import ComputeCost, Costs, duration
from dure.sim.expand import core_ids
from dure.sim.flows import UNIT, WEIGHT, Flows, units_a_picosecond, weight_of
from dure.sim.items import COMPUTE, MOVE, Item, Transfer
from dure.sim.replay import Flight, Groups, Happened, Queue, Replay, deadlock
from dure.sim.stream import Stream
from dure.sim.streams import Streams

Bound: TypeAlias = Literal["compute", "memory", "link", "latency"]

#: The least part of the time that bounds a program.
BOUND = 0.6


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """A shared way for bytes: bytes a second that it carries, bytes that it did, and the
    picoseconds that these would take at full bandwidth.

    Of a resource that each core has, the use is that of one core of the busiest class.
    """

    capacity: float
    bytes: int
    busy: int


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait: for ``semaphore``, which ``queue`` signals, from ``start`` until ``end``."""

    semaphore: str
    queue: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Span:
    """An instruction as it was executed by a core of class ``core_class``.  All times are in
    picoseconds after the launch.

    A DMA is issued at ``start``, its bytes flow from ``flow``, and it is complete at ``end``.
    ``waits`` are those that its queue executed just before.
    """

    core_class: int
    queue: str
    op: Op
    start: int
    end: int
    flow: int | None
    label: str
    buffers: tuple[str, ...]
    waits: tuple[Wait, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of a program.  ``ps`` includes the launch.

    ``events`` are the starts and ends of transfers; ``instructions`` what was replayed, over the
    classes (a core of each).  ``busy`` has the picoseconds of each queue and engine of the busiest
    class: computing, or with bytes flowing.  ``bytes`` are those that the home memory gave and
    took, ``flops`` those of all cores' instructions.  ``rates`` are the bytes a second that flow
    through each resource of the chip, and the first class's own, as (from when on, how many); they
    are kept with the spans.  ``phases`` has the picoseconds that each phase of the program took,
    from the end of the one before to its own, all turns together.
    """

    ps: int
    events: int
    instructions: int
    classes: tuple[CoreClass, ...]
    busy: Mapping[str, int]
    resources: Mapping[str, ResourceUse]
    bound: Bound
    flops: int
    bytes: int
    launch: int
    spans: list[Span] = field(default_factory=list[Span])
    rates: Mapping[str, list[tuple[int, float]]] = field(
        default_factory=dict[str, list[tuple[int, float]]]
    )
    phases: Mapping[Op, int] = field(default_factory=dict[Op, int])

    @property
    def ns(self) -> float:
        """Nanoseconds."""
        return self.ps / 1000


def simulate(
    function: Function,
    chip: Chip,
    *,
    indices: Mapping[str, Array] | None = None,
    record: bool = False,
    full: bool = False,
    costs: Costs | None = None,
) -> Timing:
    """The time of a machine program.

    ``indices`` are the values of index arguments by name; a program that reads scalars from one
    needs them, index lists count as full of entries without.  ``record`` keeps every instruction as
    a :class:`Span`; ``full`` simulates every core by itself.  ``costs`` (of the same chip) is worth
    passing where many programs are timed.

    Raises :class:`IRError` for a program that hangs or that the chip can't execute.
    """
    streams = Streams(function, chip, costs or Costs(chip), indices or {})
    # The first core comes first: it refuses what is too long, before cores are compared.
    traced = [streams.trace(core) for core in islice(core_ids(function), 1)]
    classes = core_classes(function, chip, streams, full)
    traced += [streams.trace(c.core) for c in classes[1:]]
    ways = _Ways(chip, classes, streams)
    flows = Flows[Flight]([units_a_picosecond(c) for c in ways.capacities])
    replay = Replay(
        traced,
        [s.attr("initial") for s in streams.semaphore_ops],
        duration(chip, chip.sync.latency),
        {name: int(dma.outstanding.base) for name, dma in chip.dma.items()},
        flows,
        Groups(flows, ways.uses),
        record,
        [entry.device for entry in classes],
        Contention(streams.losses) if streams.losses else None,
        frozenset(name for name, dma in chip.dma.items() if dma.serial),
        full,
    )
    flows.log = [] if record else None
    makespan = replay.run()
    # The last name is what PHASE, -1, counts as.
    names = [*(s.name or f"semaphore {i}" for i, s in enumerate(streams.semaphores)), "phase"]
    stuck = replay.stuck()
    if stuck:
        raise deadlock(stuck, streams.queues, names)
    tally = _tallies(traced)
    launch = duration(chip, chip.launch)
    total = makespan + launch
    busiest = _busiest(replay.queues)
    busy = _busy(streams.queues, replay.queues, tally, busiest)
    resources = ways.used(tally, busiest)
    return Timing(
        ps=total,
        events=replay.events,
        instructions=sum(len(stream) for queues in traced for stream in queues),
        classes=classes,
        busy=busy,
        resources=resources,
        bound=_bound(chip, total, busy, resources),
        flops=sum(t.flops * c.multiplicity for t, c in zip(tally, classes, strict=True)),
        bytes=ceil(
            sum((t.home * c.multiplicity for t, c in zip(tally, classes, strict=True)), Fraction())
        ),
        launch=launch,
        spans=_spans(streams, replay.queues, names, launch) if record else [],
        rates=ways.rates(flows.log or (), launch),
        phases=replay.phases.spent,
    )


class _Tally:
    """What instructions amount to, whenever they are executed."""

    def __init__(self) -> None:
        self.engines: Counter[str] = Counter()
        self.flops = 0
        #: Bytes by DMA engine, and those at the home memory.
        self.bytes: Counter[str] = Counter()
        self.homes: dict[str, Fraction] = {}
        #: Bytes by the relation of the device that takes them.
        self.sent: Counter[int] = Counter()

    @property
    def home(self) -> Fraction:
        """All bytes at the home memory."""
        return sum(self.homes.values(), Fraction())

    def add(self, item: Item, times: int) -> None:
        """An instruction, so many times."""
        kind, op, more = item
        if kind == COMPUTE:
            cost: ComputeCost = more
            for name, ps in cost.engines.items():
                self.engines[name] += ps * times
            self.flops += op.definition.cost(op).flops * times
        elif kind == MOVE:
            transfer: Transfer = more
            self.bytes[transfer.dma] += transfer.bytes * times
            self.sent[transfer.relation] += transfer.bytes * times
            self._home(transfer.dma, transfer.home * times)

    def gather(self, other: _Tally, times: int) -> None:
        """All of another, so many times."""
        self.flops += other.flops * times
        for name, ps in other.engines.items():
            self.engines[name] += ps * times
        for name, count in other.bytes.items():
            self.bytes[name] += count * times
            self._home(name, other.homes[name] * times)
        for relation, count in other.sent.items():
            self.sent[relation] += count * times

    def _home(self, name: str, count: Fraction) -> None:
        self.homes[name] = self.homes.get(name, Fraction()) + count


def _tallies(traced: Iterable[Sequence[Stream]]) -> list[_Tally]:
    """The tallies of cores; runs that they have in common are looked through once."""
    known: dict[int, _Tally] = {}
    found: list[_Tally] = []
    for queues in traced:
        turns: Counter[int] = Counter()
        for run, times in chain.from_iterable(queue.runs for queue in queues):
            turns[id(run)] += times
            if id(run) not in known:
                known[id(run)] = own = _Tally()
                items = dict(zip(map(id, run), run, strict=True))
                for key, count in Counter(map(id, run)).items():
                    own.add(items[key], count)
        found.append(whole := _Tally())
        for run, times in turns.items():
            whole.gather(known[run], times)
    return found


class _Ways:
    """The resources of each class's DMA engines, by number."""

    def __init__(self, chip: Chip, classes: Sequence[CoreClass], streams: Streams) -> None:
        self.chip = chip
        self.classes = classes
        self.group = streams.group
        #: Whether device 0 stands for all.
        self.folded = all(entry.device == 0 for entry in classes)
        self.capacities: list[float] = []
        self._numbers: dict[tuple[str, int], int] = {}
        #: Name in the machine file -> its engines
        self.engines: dict[str, list[str]] = {}
        used = [n for n, dma in chip.dma.items() if not {*dma.queues}.isdisjoint(streams.queues)]
        for name in used:
            self.engines[f"dma.{name}"] = [name]
            for way in chip.dma[name].route:
                path, _, rate = _resource(chip, way)
                if rate is not None:
                    self.engines.setdefault(path, []).append(name)
        self._uses: dict[tuple[int, str, int], list[tuple[int, int | None, int]]] = {}
        relations = range(1 if self.group is None else self.group.count)
        for core in range(len(classes)):
            for name in used:
                for relation in relations:
                    self._uses[core, name, relation] = self._of(core, name, relation)

    def uses(self, core: int, name: str, relation: int) -> Sequence[tuple[int, int | None, int]]:
        """What the transfers of a class and a DMA engine use: (resource, weight or None for the
        transfer's own, how many cores do so).
        """
        return self._uses[core, name, relation]

    def _of(self, core: int, name: str, relation: int) -> list[tuple[int, int | None, int]]:
        dma, entry = self.chip.dma[name], self.classes[core]
        own = self._number(f"dma.{name}", core, self.chip.bytes_a_second(dma.bandwidth))
        found: list[tuple[int, int | None, int]] = [(own, WEIGHT, 1)]
        for way in dma.route:
            path, scope, rate = _resource(self.chip, way)
            if rate is None:
                continue
            capacity, home = self.chip.bytes_a_second(rate), way == self.chip.home
            weight = None if home else WEIGHT
            if scope == "chip":
                owner = self._owner(entry.device, relation if home else 0)
                found.append((self._number(path, owner, capacity), weight, entry.multiplicity))
            else:
                found.append((self._number(path, core, capacity), weight, 1))
        links: dict[int, Fraction] = {}
        for (way, device), part in self._route(entry.device, relation).items():
            assert self.group is not None
            path = f"links.{self.group.name}.{way}"
            number = self._number(path, self._owner(device, 0), self.group.capacity)
            links[number] = links.get(number, Fraction()) + part
        found += [(n, weight_of(part), entry.multiplicity) for n, part in links.items()]
        return found

    def _route(self, device: int, relation: int) -> Mapping[Way, Fraction]:
        return {} if self.group is None else self.group.route(device, relation)

    def _owner(self, device: int, relation: int) -> int:
        """The number by which the resources go of the device at a relation from one."""
        if self.folded or self.group is None:
            return -1
        return -1 - self.group.other(device, relation)

    def _number(self, path: str, core: int, capacity: float) -> int:
        found = self._numbers.get((path, core))
        if found is None:
            found = self._numbers[path, core] = len(self.capacities)
            self.capacities.append(capacity)
        return found

    def used(self, tally: Sequence[_Tally], busiest: int) -> dict[str, ResourceUse]:
        """The use of each resource, the chip's by all cores, a core's by one of the busiest."""
        found: dict[str, ResourceUse] = {}
        for path, engines in self.engines.items():
            number = self._numbers.get((path, -1))
            if number is not None:
                parts = [
                    (t, c.multiplicity)
                    for t, c in zip(tally, self.classes, strict=True)
                    if c.device == 0
                ]
            elif (path, busiest) in self._numbers:
                number, parts = self._numbers[path, busiest], [(tally[busiest], 1)]
            else:
                continue
            total = Fraction()
            for entry, times in parts:
                for name in engines:
                    home = path == f"memories.{self.chip.home}"
                    total += times * (
                        entry.homes.get(name, Fraction()) if home else entry.bytes[name]
                    )
            capacity = self.capacities[number]
            busy = ceil(total * 10**12 / Fraction(capacity))
            found[path] = ResourceUse(capacity, ceil(total), busy)
        return found | self._linked(tally)

    def _linked(self, tally: Sequence[_Tally]) -> dict[str, ResourceUse]:
        """The use of the busiest way of the links between devices."""
        if self.group is None:
            return {}
        carried: dict[Way, Fraction] = {}
        for entry, of in zip(tally, self.classes, strict=True):
            for relation, count in entry.sent.items():
                for (way, device), part in self._route(of.device, relation).items():
                    key = way, 0 if self.folded else device
                    carried[key] = carried.get(key, Fraction()) + part * count * of.multiplicity
        most = max(carried.values(), default=Fraction())
        capacity = self.group.capacity
        busy = ceil(most * 10**12 / Fraction(capacity))
        return {f"links.{self.group.name}": ResourceUse(capacity, ceil(most), busy)}

    def rates(
        self, log: Sequence[tuple[int, Mapping[int, int]]], launch: int
    ) -> dict[str, list[tuple[int, float]]]:
        """Bytes a second of each resource over time: the chip's, or the first class's own."""
        found: dict[str, list[tuple[int, float]]] = {}
        for (path, core), number in self._numbers.items():
            if core > 0 or core < -1 or not log:
                continue
            points = found[path] = [(0, 0.0)]
            for at, used in log:
                rate = used.get(number, 0) * 10**12 / (WEIGHT * UNIT)
                if points[-1][0] == at + launch:
                    points.pop()
                if not points or points[-1][1] != rate:
                    points.append((at + launch, rate))
        return found


def _resource(chip: Chip, name: str) -> tuple[str, str, Quantity | None]:
    """A name of a route: its path in the machine file, its scope and its bandwidth."""
    if name in chip.memories:
        memory = chip.memories[name]
        return f"memories.{name}", memory.scope, memory.bandwidth
    if name in chip.fabrics:
        return f"fabrics.{name}", chip.fabrics[name].scope, chip.fabrics[name].bandwidth
    if name in chip.links:
        return f"links.{name}", "chip", chip.links[name].bandwidth
    raise TargetError(
        f"'{name}' on a DMA's route is neither a memory nor a fabric of {chip.name}",
        rule="a route names memories, fabrics and links",
        fix="name one of " + ", ".join([*chip.memories, *chip.fabrics, *chip.links]),
    )


def _busiest(queues: Sequence[Sequence[Queue]]) -> int:
    """The class with the busiest queue."""
    most = [max((q.busy for q in entry), default=0) for entry in queues]
    return most.index(max(most)) if most else 0


def _busy(
    names: Sequence[str], queues: Sequence[Sequence[Queue]], tally: Sequence[_Tally], busiest: int
) -> dict[str, int]:
    if not queues:
        return {}
    found = dict(tally[busiest].engines)
    # A queue of the same name as its engine counts, with what its instructions cost to issue.
    return found | {names[queue.number]: queue.busy for queue in queues[busiest]}


def _bound(
    chip: Chip, total: int, busy: Mapping[str, int], resources: Mapping[str, ResourceUse]
) -> Bound:
    computing = {engine.queue for engine in chip.engines.values()}
    moving = chip.transfer_queues
    parts: dict[Bound, int] = {"compute": 0, "memory": 0, "link": 0}
    for name, ps in busy.items():
        if name in computing:
            parts["compute"] = max(parts["compute"], ps)
        elif name in moving:
            parts["memory"] = max(parts["memory"], ps)
    for path, use in resources.items():
        kind: Bound = "memory" if path.startswith(("memories", "dma")) else "link"
        parts[kind] = max(parts[kind], use.busy)
    linked = max((u.busy for p, u in resources.items() if p.startswith("links")), default=0)
    if linked >= BOUND * total:
        # The queue that sends is busy as long as the link is, and for that reason.
        parts["memory"] = 0
    bound = max(parts, key=lambda kind: parts[kind])
    return bound if parts[bound] >= BOUND * total else "latency"


def _spans(
    streams: Streams, queues: Sequence[Sequence[Queue]], semaphores: Sequence[str], launch: int
) -> list[Span]:
    """The replay as spans, in order of their start."""
    signalling = streams.signalling()
    found: list[Span] = []
    for core, entry in enumerate(queues):
        for queue in entry:
            for happened in queue.happened:
                waits = tuple(
                    Wait(semaphores[n], signalling.get(n, ""), launch + start, launch + end)
                    for n, start, end in happened.waits
                )
                found.append(_span(core, streams.queues[queue.number], happened, waits, launch))
    return sorted(found, key=lambda span: (span.start, span.core_class, span.queue))


def _span(core: int, queue: str, happened: Happened, waits: tuple[Wait, ...], launch: int) -> Span:
    op = happened.item[1]
    flow = None if happened.flow is None else launch + happened.flow
    buffers = tuple(dict.fromkeys(value.name for value in op.operands))
    return Span(
        core,
        queue,
        op,
        launch + happened.start,
        launch + happened.end,
        flow,
        _label(op),
        buffers,
        waits,
    )


def _label(op: Op) -> str:
    """What an instruction does, and where the author wrote it."""
    name = op.name
    if op.regions:
        inner = [o.name for o in op.regions[0].ops]
        name = "dot" if "dot" in inner else inner[-1] if inner else "copy"
    if op.span is None:
        return name
    return f"{name} {PurePath(op.span.file).name}:{op.span.line}"
