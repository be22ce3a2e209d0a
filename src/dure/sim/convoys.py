"""Core classes that do the same for a while are replayed once.

Classes differ somewhere in a program, but seldom everywhere: one has a tile less than others in one
phase, and the same to do in the next.  Classes in equal states (:mod:`dure.sim.state`), whose
streams go on alike, do the same at the same times: they compete for the same resources, and their
transfers have equal rates, whether they count as some groups of a few or as one of all.  So they
form a *convoy*.  The first of them, its leader, is replayed and stands for all; its transfers are
those of so many more cores.  Where the streams of some go on differently, they part, and each does
by itself what is left of what they had under way.  Nothing is estimated.

Classes come together when all have begun, and whenever a phase is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from dure.sim.items import Item
from dure.sim.state import busy_until, states_of
from dure.sim.stream import same

if TYPE_CHECKING:
    from dure.sim.replay import Flight, Queue, Replay

#: Transfers whose bytes flow, with what is left of each.
_Flowing: TypeAlias = Sequence[tuple[int, "Flight"]]

#: Instructions that are compared at once.
_COMPARED = 1024


class Convoys:
    """The convoys of a replay's core classes; at first each is one by itself.  ``devices`` are
    those of the classes: a convoy is of one.
    """

    def __init__(self, replay: Replay, devices: Sequence[int]) -> None:
        self.replay = replay
        self.devices = devices
        #: Of each class.
        self.leader = list(range(len(devices)))
        #: Whether classes may have come to equal states.
        self.due = False
        #: The queues of leaders whose convoys go on differently.
        self.parting: list[Queue] = []

    @property
    def leaders(self) -> list[int]:
        """The classes that are replayed."""
        return [core for core, leader in enumerate(self.leader) if core == leader]

    def further(self, queue: Queue) -> bool:
        """Whether a queue of a leader may go on, up to another ``stop``: all for which it stands
        do the same until then.  Where they don't, they are to part.
        """
        queue.go_to(queue.position)
        items, at = queue.items, queue.at
        others = [(o, there) for o, there in self._places(queue) if o is not items or there != at]
        if not others:
            queue.stop = len(items)
            return at < queue.stop
        parts = [o[there : there + _COMPARED] for o, there in (*others, (items, at))]
        alike = min([same(parts[-1], part) for part in parts])
        if not alike and any(parts):
            self.parting.append(queue)
        queue.stop = at + alike
        return alike > 0

    def _places(self, queue: Queue) -> Iterator[tuple[list[Item], int]]:
        """Where the queues are for which one stands."""
        for core in queue.cores:
            other = self.replay.queues[core][queue.number]
            yield other.stream.at(queue.position + other.ahead)

    # --- where followers are ---------------------------------------------------------------------

    def catch_up(self, cores: Iterable[int] | None = None) -> None:
        """Followers' queues are where their leaders' are, and were busy as long; of these classes,
        or of all.
        """
        now = self.replay.flows.now
        for queue, other in self._followers(cores):
            other.go_to(queue.position + other.ahead)
            other.busy = busy_until(queue, now) + other.more

    def moved(self, cores: Iterable[int] | None = None) -> None:
        """Followers' queues are elsewhere than their leaders took them."""
        now = self.replay.flows.now
        for queue, other in self._followers(cores):
            other.ahead = other.position - queue.position
            other.more = other.busy - busy_until(queue, now)

    def _followers(self, cores: Iterable[int] | None) -> Iterator[tuple[Queue, Queue]]:
        """Each follower's queues, after its leader's."""
        queues = self.replay.queues
        for core in range(len(self.leader)) if cores is None else cores:
            leader = self.leader[core]
            if core != leader:
                yield from zip(queues[leader], queues[core], strict=True)

    # --- coming together -------------------------------------------------------------------------

    def join(self) -> None:
        """Classes in equal states come together."""
        self.due = False
        leaders = self.leaders
        if len(leaders) == 1:
            return
        states = states_of(self.replay, leaders, self.replay.flows.now)
        joint: list[list[int]] = []
        for core in leaders:
            for others in joint:
                first = others[0]
                alike = self.devices[first] == self.devices[core] and states[first] == states[core]
                if alike and self._go_on_alike(first, core):
                    others.append(core)
                    break
            else:
                joint.append([core])
        self.catch_up()
        for cores in joint:
            if len(cores) > 1:
                self._join(cores)
        self.moved()

    def _go_on_alike(self, core: int, other: int) -> bool:
        """Whether the next instructions are the same."""
        queues = self.replay.queues
        for one, two in zip(queues[core], queues[other], strict=True):
            if _next(*one.stream.at(one.position)) != _next(*two.stream.at(two.position)):
                return False
        return True

    def _join(self, leaders: Sequence[int]) -> None:
        """All follow the first from now on."""
        flowing = self._take(leaders[0])
        for leader in leaders[1:]:
            self._drop(leader)
        self._lead([core for core, leader in enumerate(self.leader) if leader in leaders])
        self._flow(flowing)

    def _drop(self, core: int) -> None:
        """Nothing of a class is under way any more."""
        replay = self.replay
        self._take(core)
        for queue in replay.queues[core]:
            queue.busy = busy_until(queue, replay.flows.now)
            queue.flying.clear()
            queue.flowing, queue.held = 0, False
        for semaphore in replay.awake.intersection(replay.semaphores[core]):
            semaphore.rest()
            replay.awake.remove(semaphore)
        replay.phases.waiting = [q for q in replay.phases.waiting if q.core != core]
        replay.starts[:] = [entry for entry in replay.starts if entry[2].queue.core != core]
        heapify(replay.starts)
        for line in [line for line in replay.lines if line[0] == core]:
            del replay.lines[line]
        if replay.contention is not None:
            replay.contention.drop(core)

    # --- parting ---------------------------------------------------------------------------------

    def part(self) -> list[Queue]:
        """The convoys that go on differently part; gives the queues that may go on."""
        parting, self.parting = self.parting, []
        found: list[Queue] = []
        for core, waiting in groupby(sorted(parting, key=_core), key=_core):
            queues = list(waiting)
            parts: dict[int, list[int]] = {}
            for follower, place in zip(queues[0].cores, self._places(queues[0]), strict=True):
                parts.setdefault(_next(*place), []).append(follower)
            assert len(parts) > 1, "a convoy that goes on alike parts"
            self._part(core, list(parts.values()))
            leaders = [cores[0] for cores in parts.values()]
            found += [self.replay.queues[c][queue.number] for c in leaders for queue in queues]
        return found

    def part_all(self) -> None:
        """Each class is replayed by itself from now on."""
        for leader in self.leaders:
            cores = [core for core, other in enumerate(self.leader) if other == leader]
            if len(cores) > 1:
                self._part(leader, [[core] for core in cores])

    def _part(self, leader: int, parts: Sequence[Sequence[int]]) -> None:
        """A convoy goes on in parts, of which the first is the leader's."""
        all_cores = [core for cores in parts for core in cores]
        self.catch_up(all_cores)
        flowing = self._take(leader)
        for cores in parts[1:]:
            twins = self._copy(leader, cores[0])
            self._lead(cores)
            self._flow([(left, twins[flight]) for left, flight in flowing])
        self._lead(parts[0])
        self._flow(flowing)
        self.moved(all_cores)

    def _copy(self, core: int, other: int) -> dict[Flight, Flight]:
        """All that is under way of a class is, from now on, also of another; gives the other's
        transfers by the class's.
        """
        replay, now = self.replay, self.replay.flows.now
        twins: dict[Flight, Flight] = {}
        queues = dict(zip(replay.queues[core], replay.queues[other], strict=True))
        for queue, own in queues.items():
            own.time, own.done = max(own.time, queue.time), max(own.done, queue.done)
            own.held, own.flowing, own.since = queue.held, queue.flowing, now
            own.begun, own.ended = queue.begun, queue.ended
            twins |= {flight: flight.of(own) for flight in queue.flying}
            own.flying.extend(twins[flight] for flight in queue.flying)
        for semaphore, own in zip(replay.semaphores[core], replay.semaphores[other], strict=True):
            if semaphore in replay.awake:
                replay.awake.add(own)
                own.level, own.coming = semaphore.level, semaphore.coming
                own.arriving = semaphore.arriving.copy()
                own.waiter = None if semaphore.waiter is None else queues[semaphore.waiter]
        replay.phases.waiting += [queues[q] for q in replay.phases.waiting if q.core == core]
        for _, _, flight in sorted(replay.starts):
            if flight.queue.core == core:
                replay.start(twins[flight])
        for (of, dma, relation), line in list(replay.lines.items()):
            if of == core:
                replay.lines[other, dma, relation] = deque(twins[flight] for flight in line)
        if replay.contention is not None:
            replay.contention.part(replay.queues[core], replay.queues[other])
        return twins

    # --- both ------------------------------------------------------------------------------------

    def _lead(self, cores: Sequence[int]) -> None:
        """The first of these classes leads them."""
        for core in cores:
            self.leader[core] = cores[0]
        for queue in self.replay.queues[cores[0]]:
            queue.cores = tuple(cores)
            # It follows nobody any more.
            queue.ahead = queue.more = 0
            queue.go_to(queue.position)

    def _take(self, core: int) -> _Flowing:
        """What flows of a class, which doesn't any more."""
        flights = (flight for queue in self.replay.queues[core] for flight in queue.flying)
        groups = {f.group: None for f in flights if f.group is not None and f.end is None}
        flows = self.replay.flows
        return [entry for g in sorted(groups, key=_begun) for entry in flows.take(g)]

    def _flow(self, flowing: _Flowing) -> None:
        """It flows as what the class stands for now."""
        for left, flight in flowing:
            self.replay.flow(flight, left)


def _next(items: list[Item], at: int) -> int:
    """What tells the instruction at a place from others; 0 at the end."""
    return id(items[at]) if at < len(items) else 0


_core = attrgetter("core")
_begun = attrgetter("begun")
