"""Which vectors of a loop lie inside the tensors that it reads and writes.

Bounds that aren't proved are compared once, in front of a loop: up to a limit along the axis of the
vectors nothing is masked, and only what is behind it pays for masks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dure.ir.expr import as_expr, proves
from dure.targets.cpu.memory import Place
from dure.targets.cpu.writer import Reg, Writer, integer


@dataclass(frozen=True)
class Access:
    """A place that a loop reads or writes: for each of its axes the loop's axis that walks it.

    None is an axis that stays at its first element.
    """

    place: Place
    axes: tuple[int | None, ...]


class Bounds:
    """What isn't proved of a loop's accesses, for vectors of ``lanes`` along ``axis``."""

    def __init__(self, w: Writer, accesses: Iterable[Access], axis: int, lanes: int) -> None:
        self.w = w
        self.axis = axis
        self.open = [
            (access.place, own, walked)
            for access in accesses
            for own, walked in enumerate(access.axes)
            if access.place.axes[own].entries is None
            and not access.place.inside(own, lanes if walked == axis else 1)
        ]

    @property
    def ragged(self) -> bool:
        """Whether a walk across the vectors may begin in front of a tensor: its edges are on both
        sides, and it repays to look at each row by itself.
        """
        return any(
            walked not in (None, self.axis) and not proves(as_expr(0) <= place.axes[own].start)
            for place, own, walked in self.open
        )

    def limit(self, extents: Sequence[Reg], index: Sequence[Reg] | None = None) -> Reg:
        """Along the vectors' axis, how many of its ``extents`` elements lie inside of all tensors;
        0 where another axis leaves one, of all its extents or at ``index`` alone.
        """
        w = self.w
        limit, inside = extents[self.axis], None
        for place, own, walked in self.open:
            axis = place.axes[own]
            start = w.index(axis.start)
            if index is not None and walked is not None and walked != self.axis:
                start = w.add(start, w.mul(index[walked], integer(axis.stride)))
            room = w.sub(w.index(axis.size), start)
            room = w.floordiv(w.add(room, integer(axis.stride - 1)), integer(axis.stride))
            fits = w.compare("icmp sge", start, integer(0))
            if walked == self.axis:
                limit = w.minimum(limit, room)
            else:
                count = integer(1) if index is not None or walked is None else extents[walked]
                fits = w.binary("and", fits, w.compare("icmp sge", room, count))
            inside = fits if inside is None else w.binary("and", inside, fits)
        if inside is None:
            return limit
        return w.select(inside, w.maximum(limit, integer(0)), integer(0))

    def either(self, extents: Sequence[Reg], write: Callable[[], object]) -> None:
        """``write`` a loop for where all ``extents`` lie inside of all tensors, and one for where
        they don't.
        """
        if not self.open:
            write()
            return

        def kept() -> None:
            with self.kept():
                write()

        def masked() -> None:
            write()

        whole = self.w.compare("icmp sge", self.limit(extents), extents[self.axis])
        self.w.when(whole, kept, masked)

    @contextmanager
    def kept(self) -> Generator[None]:
        """What is written inside stays below the limit: nothing is masked there."""
        before = [(place, place.trusted) for place, _, _ in self.open]
        for place, own, _ in self.open:
            place.trusted |= {own}
        yield
        for place, trusted in reversed(before):
            place.trusted = trusted
