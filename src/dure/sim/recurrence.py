"""Skipping what repeats itself exactly.

A loop's body, once its pipeline is full, often does the same again and again, a fixed time later.
Where a replay is in a state that it was in before, with every time counted from now, and every
queue's stream goes on as it did then, all that follows is what followed then: the replay may jump
ahead over as many repetitions as the streams hold.  Nothing is estimated.  A state is the whole of
it: where each queue stands, what is in flight and how much of it is left, what the semaphores hold
and what is on its way to them.  A time that has passed counts as now, since whatever may still ask
for it happens later.

States are looked at whenever one and the same transfer lands; after 1, 2, 4, ... of these looks
(as in Brent's cycle detection) the state is kept, and each is compared with those that were.  They
stay kept over a jump: the turns of an inner loop having been skipped, the next turn of the outer
one comes to the same states, and then all its turns are.  Of a program of phases, states are also
compared whenever one and the same phase is complete, a turn of its loop apart.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from dure.ir.core import Op
from dure.sim.items import Transfer

if TYPE_CHECKING:
    from dure.sim.contention import Computing
    from dure.sim.flows import Flows
    from dure.sim.replay import Flight, Queue, Replay

_State: TypeAlias = tuple[object, ...]

#: The least number of events that is worth a jump.
WORTHWHILE = 100
#: Queues and semaphores of kept states, all together, and the fewest states; those that a state is
#: compared with at most.
_PARTS, _FEWEST, _COMPARED = 100_000, 64, 4


@dataclass(frozen=True, slots=True)
class _Kept:
    """A state, and what it was counted from."""

    quick: _State
    whole: _State
    now: int
    events: int
    at: tuple[int, ...]
    busy: tuple[int, ...]
    spent: Counter[Op]


class Recurrence:
    """Watches a replay and jumps ahead where it can."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.queues: list[Queue] = [q for queues in replay.queues for q in queues]
        self.due = False
        #: What is watched: a transfer of the queue that has most left of those that were in flight.
        self._anchor: tuple[Queue, Transfer] | None = None
        self._longest: Queue | None = None
        self._kept: dict[_State, deque[_Kept]] = {}
        parts = len(self.queues) + sum(map(len, replay.semaphores))
        self._most = max(_FEWEST, _PARTS // max(parts, 1))
        self._seen = 0
        self._next = 1
        #: The phase at whose end states are compared, the state at its last one, and the phases
        #: that were complete since.
        self._phase: Op | None = None
        self._turn: _Kept | None = None
        self._once: set[Op] = set()
        self._complete = 0

    def landed(self, flight: Flight) -> None:
        """A transfer has landed: the state is looked at when all that follows now has happened."""
        if self._anchor is None:
            if self._longest is None:
                others = (q for q in self.queues if q.flying)
                self._longest = max(others, key=lambda q: q.left, default=flight.queue)
            if flight.queue is self._longest:
                self._anchor = (flight.queue, flight.transfer)
        self.due = self.due or self._anchor == (flight.queue, flight.transfer)

    def completed(self, now: int) -> int:
        """Phases may be complete: where the watched one is, a turn of its loop has gone by.  Gives
        the time after a jump, if there was one.
        """
        phases = self.replay.phases
        if phases.complete == self._complete:
            return now
        self._complete = phases.complete
        self._start_over()
        op = phases.latest
        if op is None:
            return now
        if op is not self._phase and op in self._once:
            # It came twice without the watched one, whose loop is over.
            self._phase, self._turn = op, None
        if op is self._phase:
            self._once.clear()
        self._once.add(op)
        if op is not self._phase:
            return now
        before, self._turn = self._turn, self._state(self._quick(now), now)
        if before is None or before.whole != self._turn.whole:
            return now
        times = self._repetitions(before)
        if not times:
            return now
        self._turn = None
        return self._jump(before, now, times)

    def look(self, now: int) -> int:
        """Compare the state with kept ones; gives the time after a jump, if there was one."""
        self.due = False
        quick = self._quick(now)
        known = self._kept.get(quick)
        if known is not None:
            whole = self._whole(now)
            best, most, turns = None, 0, 0
            for kept in known:
                if kept.whole == whole:
                    times = self._repetitions(kept)
                    gain = times * (self.replay.events - kept.events)
                    if gain > most:
                        best, most, turns = kept, gain, times
            if best is not None and most >= WORTHWHILE:
                return self._jump(best, now, turns)
        self._seen += 1
        if self._seen >= self._next:
            self._keep(quick, now)
        return now

    def _keep(self, quick: _State, now: int) -> None:
        self._kept.setdefault(quick, deque(maxlen=_COMPARED)).append(self._state(quick, now))
        self._next = 2 * max(self._seen, self._next, 1)
        if len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]

    def _start_over(self) -> None:
        """What follows is something else: count anew from the next transfer that lands."""
        self._anchor, self._longest = None, None
        self._seen, self._next = 0, 1

    def _state(self, quick: _State, now: int) -> _Kept:
        return _Kept(
            quick,
            self._whole(now),
            now,
            self.replay.events,
            tuple([q.position for q in self.queues]),
            tuple([_busy(q, now) for q in self.queues]),
            Counter(self.replay.phases.spent),
        )

    def _quick(self, now: int) -> _State:
        """A part of the state that is cheap to find."""
        replay = self.replay
        end = replay.flows.next_end()
        first = replay.starts[0][0] - now if replay.starts else -1
        return (first, len(replay.starts), -1 if end is None else end - now)

    def _whole(self, now: int) -> _State:
        queues = [
            (
                max(q.time - now, 0),
                max(q.done - now, 0),
                q.held,
                q.flowing,
                None if q.computing is None else _computing(q.computing, now),
                tuple([_flight(f, self.replay.flows, now) for f in q.flying]),
            )
            for q in self.queues
        ]
        semaphores: list[object] = []
        awake = self.replay.awake
        for semaphore in sorted(awake, key=_number):
            semaphore.take_in(now)
            if semaphore.rests:
                awake.remove(semaphore)
                continue
            arriving = tuple([(t - now, n) for t, n in semaphore.arriving])
            waits = semaphore.waiter is not None
            semaphores.append((semaphore.number, semaphore.level, waits, arriving))
        return (tuple(queues), tuple(semaphores), self.replay.phases.state(now, self.queues))

    def _repetitions(self, kept: _Kept) -> int:
        """How often more all queues do what they did since then."""
        moved = [
            (queue, at, queue.position - at)
            for queue, at in zip(self.queues, kept.at, strict=True)
            if queue.position != at
        ]
        # One queue may do the same much longer than another, so that none is followed to its end.
        times = most = 1
        while moved and times == most:
            times = most = 8 * most
            for queue, at, period in moved:
                # A queue looks at the instruction that it stands at, so that must be the same too.
                same = queue.stream.alike(at, queue.position, times * period + 1)
                times = min(times, (same - 1) // period)
                if times <= 0:
                    return 0
        return times if moved else 0

    def _jump(self, kept: _Kept, now: int, times: int) -> int:
        replay, shift = self.replay, times * (now - kept.now)
        replay.events += times * (replay.events - kept.events)
        for queue, at, busy in zip(self.queues, kept.at, kept.busy, strict=True):
            queue.busy += times * (_busy(queue, now) - busy)
            if queue.left or queue.flying:
                queue.time += shift
                queue.done += shift
            queue.go_to(queue.position + times * (queue.position - at))
            queue.since += shift
            for flight in queue.flying:
                flight.start += shift
                flight.end = None if flight.end is None else flight.end + shift
                flight.signals = [(t + shift, s, n) for t, s, n in flight.signals]
        for semaphore in replay.awake:
            semaphore.arriving = deque([(t + shift, n) for t, n in semaphore.arriving])
        replay.starts[:] = [(t + shift, order, flight) for t, order, flight in replay.starts]
        ended = Counter({p: ps - kept.spent[p] for p, ps in replay.phases.spent.items()})
        for phase, ps in ended.items():
            replay.phases.spent[phase] += times * ps
        replay.phases.shift(shift, times * ended.total())
        replay.flows.now += shift
        if replay.contention is not None:
            replay.contention.shift(shift)
        self._start_over()
        return now + shift


_number = attrgetter("number")


def _busy(queue: Queue, now: int) -> int:
    return queue.busy + (now - queue.since if queue.flowing else 0)


def _computing(computing: Computing, now: int) -> _State:
    """What is still to come of an instruction under way."""
    return (max(computing.since - now, 0), computing.remaining(now))


def _flight(flight: Flight, flows: Flows[Flight], now: int) -> _State:
    """What is still to come of a transfer in flight."""
    signals = tuple([(max(t - now, 0), s, n) for t, s, n in flight.signals])
    if flight.end is not None:
        return (-1, max(flight.end - now, 0), signals)
    if flight.group is None:
        # Its instruction lies behind: what is compared of the queues' streams doesn't tell it.
        return (-2, max(flight.start - now, 0), flight.transfer, signals)
    contends = (flight.transfer.memory, flight.transfer.contends)
    left = flight.finish - flows.service(flight.group)
    return (flight.group.number, left, contends, signals)
