"""Skipping what repeats itself exactly.

A loop's body, once its pipeline is full, often does the same again and again, a fixed time later.
Where a replay is in a state that it was in before, with every time counted from now, and every
queue's stream goes on as it did then, all that follows is what followed then: the replay may jump
ahead over as many repetitions as the streams hold.  Nothing is estimated.  A state is the whole of
it (:mod:`dure.sim.state`).

States are looked at whenever one and the same transfer lands; after 1, 2, 4, ... of these looks
(as in Brent's cycle detection) the state is kept, and each is compared with those that were.  They
stay kept over a jump: the turns of an inner loop having been skipped, the next turn of the outer
one comes to the same states, and then all its turns are.  Of a program of phases, states are also
compared whenever one and the same phase is complete, a turn of its loop apart.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dure.ir.core import Op
from dure.sim.items import Transfer
from dure.sim.state import State, busy_until, states_of

if TYPE_CHECKING:
    from dure.sim.replay import Flight, Queue, Replay

#: The least number of events that is worth a jump.
WORTHWHILE = 100
#: Queues and semaphores of kept states, all together, and the fewest states; those that a state is
#: compared with at most.
_PARTS, _FEWEST, _COMPARED = 100_000, 64, 4


@dataclass(frozen=True, slots=True)
class _Kept:
    """A state, and what it was counted from."""

    quick: State
    whole: State
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
        self._kept: dict[State, deque[_Kept]] = {}
        parts = len(self.queues) + sum(map(len, replay.semaphores))
        self._most = max(_FEWEST, _PARTS // max(parts, 1))
        self._seen = 0
        self._next = 1
        #: The phase at whose end states are compared, the state at its last one, and the phases
        #: that were complete since; how many are, as far as was looked.
        self._phase: Op | None = None
        self._turn: _Kept | None = None
        self._once: set[Op] = set()
        self.complete = 0

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
        """Phases are complete: where the watched one is, a turn of its loop has gone by.  Gives the
        time after a jump, if there was one.
        """
        phases = self.replay.phases
        self.complete = phases.complete
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

    def _keep(self, quick: State, now: int) -> None:
        self._kept.setdefault(quick, deque(maxlen=_COMPARED)).append(self._state(quick, now))
        self._next = 2 * max(self._seen, self._next, 1)
        if len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]

    def _start_over(self) -> None:
        """What follows is something else: count anew from the next transfer that lands."""
        self._anchor, self._longest = None, None
        self._seen, self._next = 0, 1

    def _state(self, quick: State, now: int) -> _Kept:
        return _Kept(
            quick,
            self._whole(now),
            now,
            self.replay.events,
            tuple([q.position for q in self.queues]),
            tuple([busy_until(q, now) for q in self.queues]),
            Counter(self.replay.phases.spent),
        )

    def _quick(self, now: int) -> State:
        """A part of the state that is cheap to find."""
        replay = self.replay
        end = replay.flows.next_end()
        first = replay.starts[0][0] - now if replay.starts else -1
        return (first, len(replay.starts), -1 if end is None else end - now)

    def _whole(self, now: int) -> State:
        convoys = self.replay.convoys
        convoys.catch_up()
        found = states_of(self.replay, convoys.leaders, now)
        return (tuple([found[core] for core in convoys.leader]), self.replay.phases.state(now))

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
        for queue, at, before in zip(self.queues, kept.at, kept.busy, strict=True):
            queue.busy += times * (busy_until(queue, now) - before)
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
        replay.convoys.moved()
        self._start_over()
        return now + shift
