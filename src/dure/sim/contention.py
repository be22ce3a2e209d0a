"""Computing beside transfers of the same core: both want the ports of one memory.

A memory with a ``contention`` takes that part of its speed from every instruction that reads or
writes it, as long as bytes of a DMA of the same core flow into or out of it; the DMA doesn't slow
down.  What takes the ports is bytes: a transfer over links, which are slower than its DMA, takes as
much less of the speed.  The rounding law (:mod:`dure.sim.flows`) says how that becomes whole
numbers.

So the end of such an instruction isn't known when it begins: it is an event of the replay, and
moves whenever the first transfer begins to flow or the last one ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from dure.machine.chip import Chip

if TYPE_CHECKING:
    from dure.sim.replay import Queue

#: What an instruction advances in a picosecond while nothing contends.
SPEED = 1 << 20


def losses_of(chip: Chip) -> dict[str, int]:
    """The memories with contention, and what of :data:`SPEED` each takes, by the rounding law."""
    return {
        name: int(Fraction(memory.contention.base) * SPEED)
        for name, memory in chip.memories.items()
        if memory.contention is not None
    }


class Computing:
    """An instruction under way: since ``since`` it has ``left`` of its work to do at ``speed``."""

    __slots__ = ("end", "left", "memories", "queue", "since", "speed", "start")

    def __init__(self, queue: Queue, memories: Sequence[str], start: int, ps: int) -> None:
        self.queue = queue
        self.memories = memories
        self.start = self.since = start
        self.left = ps * SPEED
        self.speed = SPEED
        self.end = 0

    def remaining(self, now: int) -> int:
        """What is left to do at ``now``."""
        return self.left - self.speed * max(now - self.since, 0)


class Contention:
    """All instructions that may contend; ``losses`` are by memory (:func:`losses_of`)."""

    def __init__(self, losses: Mapping[str, int]) -> None:
        self.losses = losses
        self._flowing: dict[tuple[int, str], int] = {}
        self._running: dict[int, list[Computing]] = {}
        # (when it ends, order of being known, what); an end that has moved stays and doesn't count.
        self._ends: list[tuple[int, int, Computing]] = []
        self._order = 0

    def begin(self, queue: Queue, memories: Sequence[str], time: int, ps: int) -> None:
        """A queue begins an instruction at ``time``, not before now."""
        made = Computing(queue, memories, time, ps)
        queue.computing = made
        self._running.setdefault(queue.core, []).append(made)
        self._aim(made)

    def next_end(self) -> int | None:
        """When the next instruction ends, if no transfer starts or ends before."""
        ends = self._ends
        while ends and ends[0][0] != ends[0][2].end:
            heappop(ends)
        return ends[0][0] if ends else None

    def ended(self, now: int) -> list[Computing]:
        """The instructions that end now."""
        found: list[Computing] = []
        while self.next_end() == now:
            made = heappop(self._ends)[2]
            made.end = -1
            made.queue.computing = None
            self._running[made.queue.core].remove(made)
            found.append(made)
        return found

    def flow(self, core: int, memory: str, now: int, change: int) -> None:
        """A transfer begins, or (negative) ends, to flow into or out of a core's memory; ``change``
        is its part of the contention, of :data:`SPEED`.
        """
        if memory not in self.losses:
            return
        before = self._flowing.get((core, memory), 0)
        self._flowing[core, memory] = before + change
        if min(before, SPEED) == min(before + change, SPEED):
            return
        for made in self._running.get(core, ()):
            if memory in made.memories:
                made.left = made.remaining(now)
                made.since = max(made.since, now)
                self._aim(made)

    def shift(self, time: int) -> None:
        """All that is under way happens so much later."""
        for entry in self._running.values():
            for made in entry:
                made.start += time
                made.since += time
                made.end += time
        running = [made for entry in self._running.values() for made in entry]
        self._ends = [(made.end, order, made) for order, made in enumerate(running)]
        self._order = len(running)
        heapify(self._ends)

    def part(self, queues: Sequence[Queue], others: Sequence[Queue]) -> None:
        """The queues of another core from now on do what a core's own do."""
        core, other = queues[0].core, others[0].core
        for (of, memory), flowing in list(self._flowing.items()):
            if of == core:
                self._flowing[other, memory] = flowing
        for made in self._running.get(core, ()):
            twin = copy(made)
            twin.queue = others[made.queue.number]
            twin.queue.computing = twin
            self._running.setdefault(other, []).append(twin)
            self._order += 1
            heappush(self._ends, (twin.end, self._order, twin))

    def drop(self, core: int) -> None:
        """Nothing of a core is under way any more."""
        for made in self._running.pop(core, ()):
            made.end = -1
            made.queue.computing = None
        for place in [place for place in self._flowing if place[0] == core]:
            del self._flowing[place]

    def _aim(self, made: Computing) -> None:
        """Find an instruction's speed, and when it ends at that."""
        core = made.queue.core
        lost = [
            self.losses[m] * min(self._flowing.get((core, m), 0), SPEED) // SPEED
            for m in made.memories
            if m in self.losses
        ]
        made.speed = SPEED - max(lost, default=0)
        made.end = made.since + -(-made.left // made.speed)
        self._order += 1
        heappush(self._ends, (made.end, self._order, made))
