"""What index lists hold while a program is walked in text order.

The entries of a list whose values are known exist where they are not negative and lie inside the
tensor.  Of any other list all entries are taken to exist, anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dure.ir.core import Op, Value
from dure.ir.dtypes import Array


@dataclass(frozen=True, slots=True)
class Entries:
    """The values of an index list, the least and the greatest of them."""

    entries: list[int]
    low: int
    high: int


class Lists:
    """The lists in a core's buffers, by memory and address; ``indices`` are the values of index
    arguments by name.
    """

    def __init__(self, indices: Mapping[str, Array]) -> None:
        self.indices = {name: np.asarray(a).astype(np.int64) for name, a in indices.items()}
        self.buffers: dict[Value, Op] = {}
        self._turns: dict[Value, int] = {}
        self._held: dict[tuple[str, int], Entries] = {}

    def clear(self) -> None:
        """Back to the start of a walk."""
        self._held.clear()
        self._turns.clear()

    def reset(self, buffer: Value) -> None:
        """A buffer as it is at the start of its phase."""
        self._turns.pop(buffer, None)

    def rotate(self, buffer: Value) -> None:
        """Turn a buffer to its next slot."""
        stages = self.buffers[buffer].attr("stages")
        self._turns[buffer] = (self._turns.get(buffer, 0) + 1) % stages

    def _address(self, buffer: Value) -> tuple[str, int]:
        op = self.buffers[buffer]
        return op.attr("memory"), op.attr("offset") + self._turns.get(buffer, 0) * op.attr("pitch")

    def forget(self, buffer: Value) -> None:
        """Something unknown is written to the buffer."""
        if self._held:
            self._held.pop(self._address(buffer), None)

    def load(
        self,
        buffer: Value,
        name: str,
        axes: Sequence[tuple[int, int, int, int]],
        fill: int,
    ) -> None:
        """A part of an index argument is loaded: along each axis from the view's element
        ``first``, ``stride`` apart, of a view of ``size`` that starts at ``start``:
        (first, stride, size, start).
        """
        self._held[self._address(buffer)] = _held(self._values(buffer, name, axes, fill))

    def _values(
        self, buffer: Value, name: str, axes: Sequence[tuple[int, int, int, int]], fill: int
    ) -> list[int]:
        shape, source = buffer.tile.shape, self.indices[name]
        *outer, (first, stride, size, start) = axes
        extent = shape[-1]
        single = all(n == 1 and 0 <= a[0] < a[2] for n, a in zip(shape, outer, strict=False))
        if single and stride == 1 and first >= 0 and first + extent <= size:
            # One row, all of it there: the usual case.
            row = source[tuple([a[0] + a[3] for a in outer])]
            return row[start + first : start + first + extent].tolist()
        found = np.full(shape, fill, np.int64)
        here: list[npt.NDArray[np.intp]] = []
        there: list[npt.NDArray[np.int64]] = []
        for extent, (first, stride, size, start) in zip(shape, axes, strict=True):
            places = first + np.arange(extent, dtype=np.int64) * stride
            inside = np.flatnonzero((places >= 0) & (places < size))
            here.append(inside)
            there.append(places[inside] + start)
        found[np.ix_(*here)] = source[np.ix_(*there)]
        return found.reshape(-1).tolist()

    def present(self, buffer: Value, step: int, offset: int, size: int) -> tuple[int, int]:
        """(entries, elements) that exist along an axis of ``size`` that the buffer's list rules."""
        count = buffer.tile.shape[0]
        held = self._held.get(self._address(buffer)) if self._held else None
        if held is None or len(held.entries) < count:
            return count, count * step
        first, last = held.low * step + offset, held.high * step + offset
        if held.low >= 0 and first >= 0 and last + step <= size:
            return count, count * step
        elements = [
            max(0, min(entry * step + offset + step, size) - max(entry * step + offset, 0))
            for entry in held.entries[:count]
            if entry >= 0
        ]
        return sum(n > 0 for n in elements), sum(elements)


def _held(entries: list[int]) -> Entries:
    return Entries(entries, min(entries), max(entries))
