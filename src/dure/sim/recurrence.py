"""Skipping what repeats itself exactly.

A loop's body, once its pipeline is full, often does the same again and again, a fixed time later.
Where a replay is in a state that it was in before, with every time counted from now, and every
queue's stream goes on as it did then, all that follows is what followed then: the replay may jump
ahead over as many repetitions as the streams hold.  Nothing is estimated.  A state is the whole of
it: where each queue stands, what is in flight and how much of it is left, what the semaphores hold
and what is on its way to them.  A time that has passed counts as now, since whatever may still ask
for it happens later.

States are compared whenever one and the same transfer lands, with one kept from before, which is
replaced after 1, 2, 4, ... comparisons (Brent's cycle detection).  Of a program of phases, states
are also compared whenever one and the same phase is complete, a turn of its loop apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, count, islice
from operator import is_not
from typing import TYPE_CHECKING, TypeAlias

from dure.ir.core import Op
from dure.sim.items import Transfer

if TYPE_CHECKING:
    from dure.sim.contention import Computing
    from dure.sim.replay import Flight, Queue, Replay

_State: TypeAlias = tuple[object, ...]

#: The least number of events that is worth a jump.  A loop inside a loop repeats itself seldom
#: enough to stay below; the kept state is then met again a turn of the outer loop later.
WORTHWHILE = 100


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
        self._anchor: tuple[Queue, Transfer] | None = None
        self._kept: _Kept | None = None
        self._seen = 0
        self._next = 1
        #: The phase at whose end states are compared, and the state at its last one.
        self._phase: Op | None = None
        self._turn: _Kept | None = None
        self._complete = 0
        self._once: set[Op] = set()

    def landed(self, flight: Flight) -> None:
        """A transfer has landed: the state is looked at when all that follows now has happened."""
        if self._anchor is None:
            longest = max(self.queues, key=lambda q: len(q.stream) - q.at if q.flying else -1)
            if flight.queue is longest:
                self._anchor = (longest, flight.transfer)
        self.due = self.due or self._anchor == (flight.queue, flight.transfer)

    def completed(self, now: int) -> int:
        """Phases may be complete: where the watched one is, a turn of its loop has gone by.  Gives
        the time after a jump, if there was one.
        """
        phases = self.replay.phases
        if phases.complete == self._complete:
            return now
        self._complete = phases.complete
        op = phases.latest
        if self._phase is None and op in self._once:
            self._phase = op
        if op is not None:
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
        """Compare the state with the kept one; gives the time after a jump, if there was one."""
        self.due = False
        kept = self._kept
        quick = self._quick(now)
        if kept is not None and quick == kept.quick and self._whole(now) == kept.whole:
            times = self._repetitions(kept)
            if times * (self.replay.events - kept.events) >= WORTHWHILE:
                return self._jump(kept, now, times)
        self._seen += 1
        if self._seen >= self._next:
            self._keep(quick, now)
        return now

    def _keep(self, quick: _State, now: int) -> None:
        self._kept = self._state(quick, now)
        self._next = 2 * max(self._seen, self._next, 1)

    def _state(self, quick: _State, now: int) -> _Kept:
        return _Kept(
            quick,
            self._whole(now),
            now,
            self.replay.events,
            tuple([q.at for q in self.queues]),
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
                tuple([_flight(f, now) for f in q.flying]),
            )
            for q in self.queues
        ]
        semaphores = [
            (s.level, s.waiter is None, tuple([(max(t - now, 0), n) for t, n in s.arriving]))
            for entry in self.replay.semaphores
            for s in entry
        ]
        return (tuple(queues), tuple(semaphores), self.replay.phases.state(now, self.queues))

    def _repetitions(self, kept: _Kept) -> int:
        """How often more all queues do what they did since then."""
        times = 1 << 62
        for queue, at in zip(self.queues, kept.at, strict=True):
            period = queue.at - at
            if period:
                same = _repeats(queue.stream, at, period)
                # A queue looks at the instruction that it stands at, so that must be the same too.
                times = min(times, (same - 1) // period)
        return max(times, 0) if times < 1 << 62 else 0

    def _jump(self, kept: _Kept, now: int, times: int) -> int:
        replay, shift = self.replay, times * (now - kept.now)
        replay.events += times * (replay.events - kept.events)
        for queue, at, busy in zip(self.queues, kept.at, kept.busy, strict=True):
            queue.busy += times * (_busy(queue, now) - busy)
            if queue.at < len(queue.stream) or queue.flying:
                queue.time += shift
                queue.done += shift
            queue.at += times * (queue.at - at)
            queue.since += shift
            for flight in queue.flying:
                flight.start += shift
                flight.end = None if flight.end is None else flight.end + shift
                flight.signals = [(t + shift, s, n) for t, s, n in flight.signals]
        for entry in replay.semaphores:
            for semaphore in entry:
                semaphore.arriving = type(semaphore.arriving)(
                    (t + shift, n) for t, n in semaphore.arriving
                )
        replay.starts[:] = [(t + shift, order, flight) for t, order, flight in replay.starts]
        for phase, ps in list(replay.phases.spent.items()):
            replay.phases.spent[phase] += times * (ps - kept.spent[phase])
        replay.phases.shift(shift)
        replay.flows.now += shift
        if replay.contention is not None:
            replay.contention.shift(shift)
        self._kept, self._anchor, self._seen, self._next = None, None, 0, 1
        return now + shift


def _busy(queue: Queue, now: int) -> int:
    return queue.busy + (now - queue.since if queue.flowing else 0)


def _computing(computing: Computing, now: int) -> _State:
    """What is still to come of an instruction under way."""
    return (max(computing.since - now, 0), computing.remaining(now))


def _flight(flight: Flight, now: int) -> _State:
    """What is still to come of a transfer in flight."""
    signals = tuple([(max(t - now, 0), s, n) for t, s, n in flight.signals])
    if flight.end is not None:
        return (-1, max(flight.end - now, 0), signals)
    if flight.group is None:
        return (-2, max(flight.start - now, 0), signals)
    return (flight.group.number, flight.finish - flight.group.service, signals)


def _repeats(stream: Sequence[object], start: int, period: int) -> int:
    """How many entries from ``start`` on are the same as those a period later."""
    later = islice(stream, start + period, None)
    differ = map(is_not, islice(stream, start, None), later)
    return next(compress(count(), differ), max(0, len(stream) - start - period))
