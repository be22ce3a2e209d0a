"""How long a loop takes whose tiles arrive in a ring of slots: a small replay of the ring alone.

A slot is loaded, computed on and loaded again.  Its transfer is issued when the slot is free and
the queue is, flows after the latency, and shares the bandwidth with the others that flow (or, of a
``serial`` engine, waits for them); computing is in order.  After some turns the ring comes round at
a steady pace, which is taken for the rest.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

#: Turns that are replayed; the second half of them gives the pace of the others.
_REPLAYED = 64


@dataclass(frozen=True, slots=True)
class Ring:
    """``slots`` slots; picoseconds that a turn computes (``turn``), that its transfer keeps the
    queue (``issue``) and waits (``latency``), what it adds to the flow of all (``flow``), and the
    least that it flows itself (``alone``).  At most ``outstanding`` are on their way.
    """

    slots: int
    turn: float
    issue: float
    latency: float
    flow: float
    alone: float
    serial: bool
    outstanding: float

    def time(self, turns: float) -> float:
        """Picoseconds from the first issue to the end of the last turn."""
        count = min(_REPLAYED, max(1, round(turns)))
        ends = self._ends(count)
        pace = (ends[-1] - ends[count // 2 - 1]) / (count - count // 2) if count > 1 else ends[-1]
        pace = max(pace, self.turn, self.issue, self.flow)
        return ends[-1] + max(0.0, turns - count) * pace

    def _ends(self, count: int) -> list[float]:
        """When each of the first turns has been computed."""
        ends: list[float] = []
        asked: deque[float] = deque([0.0] * min(self.slots, count))
        starts: deque[float] = deque()
        flowing: deque[float] = deque()
        free = now = service = 0.0
        while len(ends) < count:
            while asked and len(starts) + len(flowing) < max(1.0, self.outstanding):
                free = max(free, asked.popleft(), now) + self.issue
                starts.append(free + self.latency)
            # ``service`` is how many transfers one that flows since the beginning would have made.
            beside = 1 if self.serial else len(flowing)
            whole = max(self.alone, beside * self.flow)
            arrives = now + (flowing[0] - service) * whole if flowing else math.inf
            if starts and starts[0] < arrives:
                start = starts.popleft()
                service += (start - now) / whole if flowing else 0.0
                now = start
                behind = flowing[-1] if self.serial and flowing else service
                flowing.append(behind + 1)
            else:
                service, now = flowing.popleft(), arrives
                ends.append(max(now, ends[-1] if ends else 0.0) + self.turn)
                if len(ends) + self.slots <= count:
                    asked.append(ends[-1])
        return ends
