"""What index lists hold while a program is walked in text order.

The entries of a list whose values are known exist where they are not negative and lie inside the
tensor.  Of any other list all entries are taken to exist, anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dure.ir.core import Op, Value
from dure.ir.dtypes import Array

#: The values of an index list.
Entries: TypeAlias = "npt.NDArray[np.int64]"


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
        shape = buffer.tile.shape
        found: Entries = np.full(shape, fill, np.int64)
        here: list[npt.NDArray[np.intp]] = []
        there: list[Entries] = []
        for extent, (first, stride, size, start) in zip(shape, axes, strict=True):
            places = first + np.arange(extent, dtype=np.int64) * stride
            inside = np.flatnonzero((places >= 0) & (places < size))
            here.append(inside)
            there.append(places[inside] + start)
        found[np.ix_(*here)] = self.indices[name][np.ix_(*there)]
        self._held[self._address(buffer)] = found.reshape(-1)

    def present(self, buffer: Value, step: int, offset: int, size: int) -> tuple[int, int]:
        """(entries, elements) that exist along an axis of ``size`` that the buffer's list rules."""
        count = buffer.tile.shape[0]
        values = self._held.get(self._address(buffer)) if self._held else None
        if values is None or len(values) < count:
            return count, count * step
        entries = values[:count]
        first = entries * step + offset
        inside = np.clip(size - first, 0, step) - np.clip(-first, 0, step)
        elements = np.where(entries < 0, 0, np.maximum(inside, 0))
        return int(np.count_nonzero(elements)), int(elements.sum())
