"""The times of a step that records: where each worker stamps the cycle at which it ended what.

What a step executes is known when its code is written, so that each event has its place: worker
``w`` writes word ``w * stamp_count + place``.  Place 0 is when it began.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from dure.ir.core import Region
from dure.targets.cpu.context import ContextLayout, Event
from dure.targets.cpu.writer import Reg, Writer, integer

_CONTEXT = Reg("ptr", "%context")
_WORKER = Reg("i64", "%worker")
#: What ends with a stamp.
_STAMPED = frozenset({"launch", "copy", "barrier"})
#: Words of a pair of cache lines, which belong to one worker.
_LINE = 16


class Stamps:
    """Writes the stamps of one step's code, in the order of its text."""

    def __init__(self, writer: Writer, layout: ContextLayout, body: Region) -> None:
        self._writer, self._layout = writer, layout
        layout.stamps = layout.take(1)
        layout.stamp_count = -(-(1 + _executed(body)) // _LINE) * _LINE
        w = writer
        base = w.load("ptr", w.offset(_CONTEXT, integer(8 * layout.stamps)), 8)
        own = w.mul(_WORKER, integer(8 * layout.stamp_count))
        #: Where the innermost repeat's turn has its stamps, and how many were written there.
        self._base: Reg = w.offset(base, own)
        self._next: int = 0
        #: Of the repeats around: (count, stamps a turn), and the place of a first turn's first.
        self._turns: tuple[tuple[int, int], ...] = ()
        self._first: int = 0
        self._stamp()

    def ended(self, what: str, number: int = -1, because: str = "") -> None:
        """The worker ends an event here."""
        place = self._first + self._next
        self._layout.events.append(Event(what, number, place, self._turns, because))
        self._stamp()

    def _stamp(self) -> None:
        w = self._writer
        now = w.call("i64", "llvm.readcyclecounter")
        w.store(now, w.offset(self._base, integer(8 * self._next)), 8)
        self._next += 1

    @contextmanager
    def turn(self, number: Reg, count: int, body: Region) -> Generator[None]:
        """What is written inside is turn ``number`` of ``count`` of a repeat."""
        w, each = self._writer, _executed(body)
        outside = self._base, self._next, self._turns, self._first
        begin = w.add(integer(8 * self._next), w.mul(number, integer(8 * each)))
        self._first += self._next
        self._base, self._next = w.offset(self._base, begin), 0
        self._turns = (*self._turns, (count, each))
        yield
        self._base, self._next, self._turns, self._first = outside
        self._next += count * each


def _executed(region: Region) -> int:
    """The events of a region, turns of repeats counted."""
    found = 0
    for op in region.ops:
        found += op.name in _STAMPED
        if op.name == "repeat":
            found += int(op.attr("count")) * _executed(op.regions[0])
    return found
