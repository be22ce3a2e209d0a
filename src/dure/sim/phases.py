"""When phases are complete in a replay, and when queues may begin the next.

A phase is complete when every queue of every core class has ended it, and known to be a signal's
way later.  Queues go on when all of them have come as far as they can (:meth:`Phases.go_on`), so
that a replay can be looked at between two phases.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from dure.ir.core import Op

if TYPE_CHECKING:
    from dure.sim.replay import Queue

#: Completed phases whose times are kept; a queue that lags further behind asks for none of them.
_KEPT = 64


class Phases:
    """Phases by their number in the order of their execution.

    ``count`` is how many queues there are together, ``latency`` what a signal takes.
    """

    def __init__(self, count: int, latency: int) -> None:
        self.count = count
        self.latency = latency
        #: How many are complete, of how many that is known, and when the last of them were.
        self.complete = 0
        self.known = 0
        self.times: deque[int] = deque(maxlen=_KEPT)
        self.latest: Op | None = None
        #: Of each that some queue has ended: queues that haven't, and the last end so far.
        self.open: deque[list[int]] = deque()
        self.waiting: list[Queue] = []
        #: By phase, the picoseconds from the end of the one before to its own, all turns together.
        self.spent: Counter[Op] = Counter()
        self._ops: deque[Op] = deque()
        self._last = 0

    def begin(self, queue: Queue, lag: int) -> int:
        """When a queue may begin its next phase, or -1 where that isn't known yet."""
        number = queue.begun - lag
        if number > self.known:
            self.waiting.append(queue)
            return -1
        queue.begun += 1
        behind = self.complete - number
        if number <= 0 or behind >= len(self.times):
            return 0
        return self.times[-1 - behind] + self.latency

    def end(self, queue: Queue, time: int, op: Op) -> None:
        """A queue has ended a phase."""
        place = queue.ended - self.complete
        queue.ended += 1
        if place == len(self.open):
            self.open.append([self.count, 0])
            self._ops.append(op)
        entry = self.open[place]
        entry[0] -= len(queue.cores)
        entry[1] = max(entry[1], time)
        while self.open and not self.open[0][0]:
            self.completed(self.open.popleft()[1], self._ops.popleft())

    def completed(self, at: int, op: Op) -> None:
        """All queues have ended the next phase, the last one then."""
        self.latest = op
        self.spent[op] += at - self._last
        self._last = at
        self.times.append(at)
        self.complete += 1

    def go_on(self) -> list[Queue]:
        """All that are complete are known to be; gives the queues that may go on for it."""
        self.known = self.complete
        woken, self.waiting = self.waiting, []
        return sorted(woken, key=lambda q: (q.core, q.number))

    def state(self, now: int) -> tuple[object, ...]:
        """What is still to come, counted from now."""
        return (
            tuple([max(t + self.latency - now, 0) for t in self.times if t + self.latency > now]),
            tuple([(missing, max(time - now, 0)) for missing, time in self.open]),
        )

    def shift(self, by: int, ended: int) -> None:
        """All times are later; so much of that is the time of phases that have ended meanwhile."""
        self.times = deque((t + by for t in self.times), maxlen=_KEPT)
        self._last += ended
        for entry in self.open:
            entry[1] += by
