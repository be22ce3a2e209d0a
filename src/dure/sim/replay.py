"""The event-driven replay of instruction streams.

A queue executes its stream in order.  What only hangs on known times is computed at once, ahead of
the clock: computing, waiting for a signal that is on its way, issuing.  The clock stands only at
events of transfers: one starts to flow, or ends.  So where nothing is shared this is an exact
replay of the dependencies.

- a compute keeps its queue busy for its cost, or longer where it contends with transfers
  (:mod:`dure.sim.contention`);
- a wait takes the signals in the order in which they arrive, and goes on when the last that it
  needs has;
- a DMA is issued when fewer than ``outstanding`` of its queue's transfers are in flight, keeps the
  queue busy for ``issue``, and its bytes flow after ``delay``.  It is complete when they have
  flowed and all earlier transfers of the queue are complete; one without bytes, as soon as it is
  issued and they are.  Of a ``serial`` engine, bytes flow when those of its earlier transfers with
  the same device have;
- a signal fires when all that its queue issued before is complete, without keeping the queue, and
  arrives ``sync.latency`` later;
- phases are begun and ended as :mod:`dure.sim.phases` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import cast

from dure.errors import IRError
from dure.ir.core import Op
from dure.sim.contention import Computing, Contention
from dure.sim.convoys import Convoys
from dure.sim.cost import ComputeCost
from dure.sim.flows import Flows, Group
from dure.sim.items import BEGIN, COMPUTE, MOVE, SIGNAL, WAIT, Item, Transfer
from dure.sim.phases import Phases
from dure.sim.recurrence import Recurrence
from dure.sim.rests import Rests
from dure.sim.stream import Stream


@dataclass(slots=True)
class Happened:
    """One executed instruction: ``flow`` is when a transfer's bytes began to flow; ``waits`` are
    those that its queue executed just before: (semaphore, from, until).
    """

    item: Item
    start: int
    end: int
    flow: int | None
    waits: tuple[tuple[int, int, int], ...]


@dataclass(eq=False, slots=True)
class Queue:
    """A queue of a core class, and how far it has come: it is at ``items[at]``, where the items
    are those of a turn of a run of its stream, and the first has the position ``start`` there.  It
    goes on up to ``stop`` in them; then it is looked what follows.

    It stands for the queues of the classes ``cores``, which follow it (:mod:`dure.sim.convoys`).
    Of one that follows, ``ahead`` and ``more`` say how many instructions further it is, and how
    many picoseconds longer it was busy, than the one that stands for it.

    ``time``: when it is done with what it has executed; ``done``: when its last transfer completed;
    ``busy``: picoseconds of computing, or with bytes flowing; ``begun`` and ``ended``: phases.
    """

    core: int
    number: int
    stream: Stream
    items: list[Item] = field(default_factory=list[Item])
    start: int = 0
    at: int = 0
    stop: int = 0
    time: int = 0
    done: int = 0
    busy: int = 0
    flowing: int = 0
    since: int = 0
    held: bool = False
    flying: deque[Flight] = field(default_factory=deque["Flight"])
    happened: list[Happened] = field(default_factory=list[Happened])
    waits: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    computing: Computing | None = None
    begun: int = 0
    ended: int = 0
    cores: tuple[int, ...] = ()
    ahead: int = 0
    more: int = 0

    def __post_init__(self) -> None:
        self.cores = (self.core,)
        self.go_to(0)

    @property
    def position(self) -> int:
        """How many instructions it has executed."""
        return self.start + self.at

    @property
    def left(self) -> int:
        """How many it has not."""
        return len(self.stream) - self.start - self.at

    def go_to(self, position: int) -> None:
        """Stand at a position of the stream."""
        self.items, self.at = self.stream.at(position)
        self.start = position - self.at
        self.stop = len(self.items) if len(self.cores) == 1 else self.at


#: In the place of a semaphore: the end of a phase.
PHASE = -1


@dataclass(eq=False, slots=True)
class Flight:
    """A transfer in flight: when its bytes ``start`` to flow and did ``end``, the group in which
    they do and the group's service at which they ``finish``, and the signals that fire when it is
    complete: (when the queue came to it, semaphore, count), or the phase that ends.
    """

    queue: Queue
    transfer: Transfer
    signals: list[tuple[int, int, int | Op]]
    start: int = 0
    end: int | None = None
    group: Group[Flight] | None = None
    finish: int = 0
    record: Happened | None = None

    def of(self, queue: Queue) -> Flight:
        """The same transfer of another queue."""
        return Flight(queue, self.transfer, self.signals.copy(), self.start, self.end)


@dataclass(eq=False, slots=True)
class _Semaphore:
    """``level``: what has been taken in and not yet been waited for; ``coming``: what is in
    ``arriving``, (when, how much), in order; ``initial``: what it begins with; ``number``: of the
    core class's.
    """

    core: int
    number: int
    level: int
    initial: int
    coming: int = 0
    arriving: deque[tuple[int, int]] = field(default_factory=deque[tuple[int, int]])
    waiter: Queue | None = None

    @property
    def rests(self) -> bool:
        """Whether it is as in the beginning."""
        return self.waiter is None and not self.arriving and self.level == self.initial

    def rest(self) -> None:
        """Be as in the beginning."""
        self.waiter, self.level, self.coming = None, self.initial, 0
        self.arriving.clear()

    def take_in(self, now: int) -> None:
        """Take in what has arrived."""
        while self.arriving and self.arriving[0][0] <= now:
            count = self.arriving.popleft()[1]
            self.coming -= count
            self.level += count


class Replay:
    """All core classes' streams, run together.

    ``groups`` has the :class:`Group` that a transfer flows in;
    ``outstanding`` is by DMA engine; ``contention`` is there where a memory has any;
    ``serial`` are DMA engines whose transfers flow one after another; ``devices`` are the classes';
    ``apart`` replays each class by itself, whatever it does.
    """

    def __init__(
        self,
        streams: Sequence[Sequence[Stream]],
        initial: Sequence[int],
        latency: int,
        outstanding: dict[str, int],
        flows: Flows[Flight],
        groups: Groups,
        record: bool,
        devices: Sequence[int],
        contention: Contention | None = None,
        serial: frozenset[str] = frozenset(),
        apart: bool = False,
    ) -> None:
        self.queues = [
            [Queue(core, number, stream) for number, stream in enumerate(queues)]
            for core, queues in enumerate(streams)
        ]
        self.semaphores = [
            [_Semaphore(core, number, level, level) for number, level in enumerate(initial)]
            for core in range(len(streams))
        ]
        #: Those that may not be as in the beginning.
        self.awake: set[_Semaphore] = set()
        self.latency = latency
        self.outstanding = outstanding
        self.flows = flows
        self.groups = groups
        self.record = record
        self.contention = contention
        self.serial = serial
        self.phases = Phases(sum(map(len, self.queues)), latency)
        #: By core class and serial DMA engine: transfers in flight, in the order of their issue.
        self.lines: dict[tuple[int, str, int], deque[Flight]] = {}
        self.events = 0
        self._ready = [queue for queues in self.queues for queue in queues]
        self.starts: list[tuple[int, int, Flight]] = []
        self._order = count()
        self.convoys = Convoys(self, devices)
        self.convoys.due = self._joining = not (record or apart)

    def run(self) -> int:
        """Run to the end; gives when it is."""
        flows, starts, contention = self.flows, self.starts, self.contention
        ready, phases = self._ready, self.phases
        recurrence = None if self.record else Recurrence(self)
        rests = None if self.record else Rests(self)
        now = 0
        while True:
            if ready or phases.known != phases.complete:
                now = self._all_go_on(now, rests)
            if recurrence is not None:
                if recurrence.due:
                    now = recurrence.look(now)
                if recurrence.complete != phases.complete:
                    now = recurrence.completed(now)
            end = flows.next_end()
            if starts and (end is None or starts[0][0] < end):
                end = starts[0][0]
            if contention is not None:
                computed = contention.next_end()
                if computed is not None and (end is None or computed < end):
                    end = computed
            if end is None:
                break
            now = end
            for flight in flows.advance(now):
                self._landed(flight, now)
                if recurrence is not None:
                    recurrence.landed(flight)
            while starts and starts[0][0] == now:
                self._take_off(heappop(starts)[2], now)
            if contention is not None:
                for computing in contention.ended(now):
                    self._computed(computing, now)
        self.convoys.catch_up()
        queues = [queue for queues in self.queues for queue in queues]
        return max((max(queue.time, queue.done) for queue in queues), default=0)

    def _all_go_on(self, now: int, rests: Rests | None) -> int:
        """Execute all that can be now; gives the time, which is later after a phase like an earlier
        one.
        """
        ready, phases, convoys = self._ready, self.phases, self.convoys
        while True:
            while ready:
                self._go_on(ready.pop())
            if convoys.parting:
                ready += convoys.part()
                continue
            if phases.known == phases.complete:
                break
            if rests is not None:
                now = rests.look(now)
            ready += phases.go_on()
            convoys.due = self._joining
        if convoys.due:
            convoys.join()
        return now

    def stuck(self) -> list[Queue]:
        """The queues that did not come to their end."""
        return [q for queues in self.queues for q in queues if q.left]

    def _go_on(self, queue: Queue) -> None:
        """Execute a queue's instructions until one can't be yet."""
        items, at, stop, time = queue.items, queue.at, queue.stop, queue.time
        record = self.record
        number: int
        change: int
        semaphores = self.semaphores[queue.core]
        while True:
            if at >= stop:
                queue.at = at
                further = self._further(queue)
                items, at, stop = queue.items, queue.at, queue.stop
                if not further:
                    break
            item = items[at]
            kind, _, more = item
            if kind == WAIT:
                number, change = more
                until = self._wait(semaphores[number], change)
                if until < 0:
                    semaphores[number].waiter = queue
                    break
                if record:
                    queue.waits.append((number, time, max(time, until)))
                if until > time:
                    time = until
            elif kind == SIGNAL:
                number, change = more
                if queue.flying:
                    queue.flying[-1].signals.append((time, number, change))
                else:
                    self._signal(semaphores[number], max(time, queue.done), change)
            elif kind == MOVE:
                free = self._issue(queue, item, time)
                if free < 0:
                    break
                time = free
            elif kind == COMPUTE:
                cost: ComputeCost = more
                ps = cost.ps
                if cost.memories and ps and self.contention is not None:
                    self.contention.begin(queue, cost.memories, time, ps)
                    break
                if record:
                    self._happened(queue, item, time, time + ps)
                time += ps
                queue.busy += ps
            elif kind == BEGIN:
                until = self.phases.begin(queue, more)
                if until < 0:
                    break
                if record:
                    queue.waits.append((PHASE, time, max(time, until)))
                time = max(time, until)
            elif queue.flying:
                queue.flying[-1].signals.append((time, PHASE, item[1]))
            else:
                self.phases.end(queue, max(time, queue.done), item[1])
            at += 1
        queue.at, queue.time = at, time

    def _further(self, queue: Queue) -> bool:
        """Whether a queue goes on from its ``stop``, to another one."""
        if len(queue.cores) > 1:
            return self.convoys.further(queue)
        queue.go_to(queue.position)
        return queue.at < queue.stop

    def _computed(self, computing: Computing, now: int) -> None:
        """An instruction that may have contended has ended."""
        queue = computing.queue
        if self.record:
            self._happened(queue, queue.items[queue.at], computing.start, now)
        queue.busy += now - computing.start
        queue.at += 1
        queue.time = now
        self._ready.append(queue)

    def _wait(self, semaphore: _Semaphore, count: int) -> int:
        """Take ``count``: when the last of it arrives, or -1 where that isn't known yet."""
        until = 0
        self.awake.add(semaphore)
        level = semaphore.level
        if level < count:
            if level + semaphore.coming < count:
                return -1
            while level < count:
                until, more = semaphore.arriving.popleft()
                semaphore.coming -= more
                level += more
        semaphore.level = level - count
        return until

    def _signal(self, semaphore: _Semaphore, time: int, count: int) -> None:
        self.awake.add(semaphore)
        semaphore.arriving.append((time + self.latency, count))
        semaphore.coming += count
        if semaphore.waiter is not None:
            self._ready.append(semaphore.waiter)
            semaphore.waiter = None

    def _issue(self, queue: Queue, item: Item, time: int) -> int:
        """Issue a DMA: when the queue is free again, or -1 where it must be held back."""
        transfer: Transfer = item[2]
        flying = queue.flying
        if len(flying) >= self.outstanding[transfer.dma]:
            queue.held = True
            return -1
        free = time + transfer.issue
        flight = Flight(queue, transfer, [])
        if self.record:
            flight.record = self._happened(queue, item, time, free)
        if transfer.units:
            flying.append(flight)
            if transfer.dma in self.serial:
                line = queue.core, transfer.dma, transfer.relation
                self.lines.setdefault(line, deque()).append(flight)
            self.events += len(queue.cores)
            flight.start = free + transfer.delay
            self.start(flight)
        elif flying:
            flight.end = free
            flying.append(flight)
        else:
            queue.done = max(queue.done, free)
        return free

    def start(self, flight: Flight) -> None:
        """A transfer's bytes are to flow when it starts; of several at once, first come first."""
        heappush(self.starts, (flight.start, next(self._order), flight))

    def _take_off(self, flight: Flight, now: int) -> None:
        queue, transfer = flight.queue, flight.transfer
        if transfer.dma in self.serial:
            line = self.lines[queue.core, transfer.dma, transfer.relation]
            if flight.group or line[0] is not flight:
                return
        self.flow(flight, transfer.units)
        if not queue.flowing:
            queue.since = now
        queue.flowing += 1
        if self.contention is not None:
            self.contention.flow(queue.core, transfer.memory, now, transfer.contends)
        if flight.record is not None:
            flight.record.flow = now

    def flow(self, flight: Flight, units: int) -> None:
        """So much of a transfer is to flow from now on."""
        flight.group = self.groups.of(flight.queue.cores, flight.transfer)
        flight.finish = self.flows.start(flight.group, units, flight)

    def _landed(self, flight: Flight, now: int) -> None:
        """A transfer's bytes have flowed; complete what now is complete, in order."""
        queue = flight.queue
        self.events += len(queue.cores)
        flight.end = now
        queue.flowing -= 1
        if self.contention is not None:
            transfer = flight.transfer
            self.contention.flow(queue.core, transfer.memory, now, -transfer.contends)
        if not queue.flowing:
            queue.busy += now - queue.since
        flying, semaphores = queue.flying, self.semaphores[queue.core]
        while flying and flying[0].end is not None:
            first = flying.popleft()
            queue.done = done = max(queue.done, first.end or 0)
            if first.record is not None:
                first.record.end = done
            for time, number, more in first.signals:
                if isinstance(more, Op):
                    self.phases.end(queue, max(time, done), more)
                else:
                    self._signal(semaphores[number], max(time, done), more)
            if queue.held:
                queue.held = False
                queue.time = max(queue.time, done)
                self._ready.append(queue)
        if flight.transfer.dma in self.serial:
            line = self.lines[queue.core, flight.transfer.dma, flight.transfer.relation]
            line.popleft()
            if line and line[0].start <= now:
                self._take_off(line[0], now)

    def _happened(self, queue: Queue, item: Item, start: int, end: int) -> Happened:
        made = Happened(item, start, end, None, tuple(queue.waits))
        queue.waits.clear()
        queue.happened.append(made)
        return made


class Groups:
    """The group of the transfers of core classes together: by limit and weight at the home memory,
    given the resources that a class's transfers use, by DMA engine and relation: (resource, parts
    of a transfer's weight there or None for the home memory's, multiplicity).
    """

    def __init__(
        self,
        flows: Flows[Flight],
        uses: Callable[[int, str, int], Sequence[tuple[int, int | None, int]]],
    ) -> None:
        self.flows = flows
        self.uses = uses
        self._known: dict[tuple[tuple[int, ...], str, int, int, int], Group[Flight]] = {}

    def of(self, cores: tuple[int, ...], transfer: Transfer) -> Group[Flight]:
        """The group of a transfer that each of these classes makes."""
        key = (cores, transfer.dma, transfer.limit, transfer.weight, transfer.relation)
        found = self._known.get(key)
        if found is None:
            uses = tuple(
                (resource, (transfer.weight if weight is None else weight) * times)
                for resource, weight, times in self._together(cores, transfer)
                if transfer.weight or weight is not None
            )
            found = self._known[key] = self.flows.group(transfer.limit, uses)
        return found

    def _together(
        self, cores: Sequence[int], transfer: Transfer
    ) -> Iterator[tuple[int, int | None, int]]:
        """What the classes use together; of what each has for itself, what the first does."""
        uses = [self.uses(core, transfer.dma, transfer.relation) for core in cores]
        for ways in zip(*uses, strict=True):
            resource, weight, _ = ways[0]
            yield resource, weight, sum(times for used, _, times in ways if used == resource)


def deadlock(stuck: Sequence[Queue], queues: Sequence[str], semaphores: Sequence[str]) -> IRError:
    """The error of a replay that can't go on."""
    lines: list[str] = []
    where = ""
    for queue in stuck:
        if queue.core != stuck[0].core:
            continue
        kind, op, more = queue.items[queue.at]
        place = f"instruction {queue.position + 1} of {len(queue.stream)}"
        known = kind in (MOVE, BEGIN)
        what = f"'{op.name}'" if known else f"wait for {_taken(more, semaphores)}"
        where = where or _where(op)
        lines.append(f"queue '{queues[queue.number]}' at {what} ({place})")
    return IRError(
        "the program hangs: " + "; ".join(lines),
        where=where,
        rule="every wait has its signal: from a queue that gets to it, as often as it waits",
        fix="signal what is waited for, or start the semaphore higher",
    )


def _taken(more: object, semaphores: Sequence[str]) -> str:
    number, count = cast("tuple[int, int]", more)
    return f"{count} of semaphore '{semaphores[number]}'"


def _where(op: Op) -> str:
    return op.span.render() if op.span is not None else ""
