"""A row of a tile in vectors: which are wide, which are masked, where the first one starts.

A store that crosses a cache line takes twice as long, and arrays seldom begin on one.  So where a
row is stored to a tensor, whole vectors start at the first element that lies on a multiple of their
size: one masked vector stores what is in front of it, and masked ones what is left behind the last.
No vector reaches past the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dure.targets.cpu.bounds import Bounds
from dure.targets.cpu.memory import Place
from dure.targets.cpu.writer import Reg, Writer, integer

#: A row of fewer elements is short: a masked vector in front of it doesn't repay.
LONG = 256
_FIRST = integer(0)


@dataclass(frozen=True)
class Row:
    """What is in a row from ``start`` on: ``body(position, lanes)`` is written for vectors of
    ``lanes`` that cover it up to ``used``, which is ``static`` elements behind the start at most.

    Masks of ``bounds`` are left to vectors beyond ``limit``, if there is one.  ``together``
    registers are one vector where nothing is masked.
    """

    w: Writer
    lanes: int
    static: int
    used: Reg
    bounds: Bounds
    limit: Reg | None
    body: Callable[[Reg, int], None]
    together: int = 1
    start: Reg = _FIRST

    @property
    def main(self) -> int:
        """The elements of whole vectors."""
        return self.static - self.static % self.lanes

    @property
    def stop(self) -> Reg:
        """Where whole vectors end: none is needed behind it."""
        main, first, used = self.main, self.start.literal, self.used.literal
        if first is None or used is None:
            return self.w.minimum(self.used, self.w.add(self.start, integer(main)))
        return integer(first + min(main, -(-(used - first) // self.lanes) * self.lanes))

    def write(self) -> None:
        """Vectors from the first element on."""
        if self.main:
            self._inside(self.start)
            self._walk(self._end(self.start), self.stop, self.lanes)
        at, rest = self.main, self.static - self.main
        while rest:
            piece = 1 << (rest.bit_length() - 1)
            self.body(self.w.add(self.start, integer(at)), piece)
            at, rest = at + piece, rest - piece

    def can_align(self) -> bool:
        """Whether :meth:`write_aligned` covers the row, and repays."""
        return self.main == self.static >= LONG and self.together > 1

    def write_aligned(self, place: Place, first: Reg) -> None:
        """Vectors that store to a multiple of their size; the first element goes to ``first``."""
        w, lanes, size = self.w, self.lanes, place.dtype.bits // 8
        behind = w.binary("and", w.cast("ptrtoint", first, "i64"), integer(lanes * size - 1))
        ahead = w.mod(w.floordiv(w.sub(integer(lanes * size), behind), integer(size)), lanes)
        head = w.minimum(w.add(self.start, ahead), self.stop)
        last = w.add(self.start, integer(self.main - lanes))

        def front(position: Reg, _: list[Reg]) -> list[Reg]:
            with place.only(position, head):
                self.body(position, lanes)
            return []

        def back(position: Reg, _: list[Reg]) -> list[Reg]:
            with place.only(position, self.stop):
                self.body(w.minimum(position, last), lanes)
            return []

        def streamed() -> None:
            with place.streamed(lanes * size):
                self._inside(head)

        w.loop(self.start, head, lanes, front)
        if place.far is None:
            self._inside(head)
        else:
            w.when(place.far, streamed, lambda: self._inside(head))
        w.loop(self._end(head), self.stop, lanes, back)

    @property
    def _width(self) -> int:
        """The elements of a vector where nothing is masked."""
        wide = self.together * self.lanes
        return wide if self.main >= wide else self.lanes

    def _end(self, start: Reg) -> Reg:
        """Where the vectors from ``start`` on end that need no mask.

        What is left of several registers is little: it shares the loop with masks.
        """
        w, inside = self.w, self.stop
        if self.limit is None and self._width == self.lanes:
            return start
        if self.limit is not None:
            inside = w.maximum(w.minimum(inside, self.limit), start)
            inside = w.sub(inside, w.mod(w.sub(inside, start), self.lanes))
        if self._width == self.lanes:
            return inside
        return w.sub(inside, w.mod(w.sub(inside, start), self._width))

    def _inside(self, start: Reg) -> None:
        """The vectors that need no mask."""
        with self.bounds.kept():
            self._walk(start, self._end(start), self._width)

    def _walk(self, start: Reg, stop: Reg, width: int) -> None:
        def step(position: Reg, _: list[Reg]) -> list[Reg]:
            self.body(position, width)
            return []

        self.w.loop(start, stop, width, step)
