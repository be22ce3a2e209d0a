"""Tensors in memory as the reference interpreter sees them: views, selections, who touched what.

A :class:`Memory` is a tensor argument with its contents and, where a kernel may write it, a record
of which grid instance read and stored each element.  From the record come the errors for reading
what was never written, and for instances that depend on one another.  A :class:`View` is a box of a
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dure.errors import IRError
from dure.ir.blocks import Blocks
from dure.ir.core import Op
from dure.ir.dtypes import Array
from dure.ir.expr import evaluate
from dure.ir.types import Access, TensorType

Positions: TypeAlias = "npt.NDArray[np.int64]"
Counts: TypeAlias = "npt.NDArray[np.int64]"

_NOBODY = -1
_SEVERAL = -2


@dataclass(frozen=True, slots=True)
class Selection:
    """Which elements of a tile lie where: for each axis positions in the tile and in the memory.

    Only elements that exist are listed; ``shape`` is that of the whole tile.
    """

    shape: tuple[int, ...]
    tile: tuple[Positions, ...]
    memory: tuple[Positions, ...]

    @property
    def whole(self) -> bool:
        """Whether every element of the tile exists."""
        return all(len(t) == extent for t, extent in zip(self.tile, self.shape, strict=True))

    def along(self, axis: int, per: int) -> Selection:
        """The selection of a plane that has one entry per ``per`` elements of ``axis``."""
        if per == 1:
            return self

        def divided(positions: tuple[Positions, ...]) -> tuple[Positions, ...]:
            return tuple(p[::per] // per if a == axis else p for a, p in enumerate(positions))

        shape = tuple(e // per if a == axis else e for a, e in enumerate(self.shape))
        return Selection(shape, divided(self.tile), divided(self.memory))


def positions(
    op: Op, shape: Sequence[int], sizes: Mapping[str, int], lists: Sequence[Array]
) -> list[Positions]:
    """Where along each axis of the tensor the elements of a load or store lie; -1 absent.

    ``shape`` is the tile's, ``lists`` the values of the op's index lists in order.
    """
    by_axis = dict(zip(op.attr("list_axes"), lists, strict=True))
    found: list[Positions] = []
    for axis, extent in enumerate(shape):
        step, offset = (evaluate(op.attr(key)[axis], sizes) for key in ("step", "offset"))
        counter = np.arange(extent, dtype=np.int64)
        if axis in by_axis:
            entries = by_axis[axis].astype(np.int64)
            entry = entries[counter // step]
            found.append(np.where(entry < 0, -1, entry * step + counter % step + offset))
        else:
            start = evaluate(op.attr("index")[axis], sizes) * step + offset
            found.append(start + counter * evaluate(op.attr("stride")[axis], sizes))
    return found


def select(
    shape: tuple[int, ...],
    positions: Sequence[Positions],
    start: Sequence[int],
    extents: Sequence[int],
) -> Selection:
    """The existing ones of the elements at these positions of a box, one array an axis.

    The box begins at ``start`` of its memory and has these ``extents``.
    """
    tile: list[Positions] = []
    memory: list[Positions] = []
    for position, begin, extent in zip(positions, start, extents, strict=True):
        inside = np.flatnonzero((position >= 0) & (position < extent))
        tile.append(inside)
        memory.append(position[inside] + begin)
    if any(len(entry) == 0 for entry in tile):
        # Nothing exists where one axis has nothing: no element of the others counts as touched.
        tile = [entry[:0] for entry in tile]
        memory = [entry[:0] for entry in memory]
    return Selection(shape, tuple(tile), tuple(memory))


def box_of(positions: Sequence[Positions]) -> tuple[slice, ...] | tuple[Positions, ...]:
    """A NumPy index of the product of positions: slices where every axis is a run, else an open
    mesh.
    """
    slices: list[slice] = []
    for entry in positions:
        if len(entry) > 1 and not np.all(np.diff(entry) == 1):
            return np.ix_(*positions)
        first = int(entry[0]) if len(entry) else 0
        slices.append(slice(first, first + len(entry)))
    return tuple(slices)


def gather(source: Array, selection: Selection, fill: float) -> Array:
    """The tile that a selection of ``source`` makes, ``fill`` where nothing exists."""
    if selection.whole:
        return np.array(source[box_of(selection.memory)])
    tile = np.full(selection.shape, np.asarray(fill, np.float64).astype(source.dtype))
    tile[box_of(selection.tile)] = source[box_of(selection.memory)]
    return tile


def scatter(target: Array, selection: Selection, tile: Array) -> None:
    """Write the existing elements of ``tile`` where they belong."""
    target[box_of(selection.memory)] = tile[box_of(selection.tile)]


_COMBINERS = {"add": np.add, "max": np.maximum, "min": np.minimum}


def scatter_combined(target: Array, selection: Selection, tile: Array, combine: str) -> None:
    """Combine the existing elements of ``tile`` into ``target``, one after another."""
    function = _COMBINERS[combine]
    compact = target.dtype.kind == "V" or target.dtype.itemsize < 4
    mesh = np.ix_(*selection.memory)
    values = tile[np.ix_(*selection.tile)]
    if not compact:
        function.at(target, mesh, values)
        return
    wide = np.int32 if target.dtype.kind in "iub" else np.float32
    # Rounding to the stored type after each addition is what one read-modify-write at a time does.
    flat = np.broadcast_arrays(*mesh)
    for place in np.ndindex(*values.shape):
        where = tuple(int(axis[place]) for axis in flat)
        found = function(target[where].astype(wide), values[place].astype(wide))
        target[where] = found.astype(target.dtype)


@dataclass(eq=False, slots=True)
class Memory:
    """A tensor argument: contents, how it may be used, and a record of its use by instances."""

    name: str
    type: TensorType
    access: Access
    contents: Array | Blocks
    writer: Counts = field(init=False)
    reader: Counts = field(init=False)
    combined: list[tuple[int, Selection, Array, str]] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.contents.shape if self.access != "in" else (0,)
        self.writer = np.full(shape, _NOBODY, np.int64)
        self.reader = np.full(shape, _NOBODY, np.int64)
        self.combined = []

    @property
    def shape(self) -> tuple[int, ...]:
        return self.contents.shape

    def load(self, selection: Selection, fill: float, instance: int) -> Array | Blocks:
        """A tile of the tensor.  Raises IRError for reading what this instance may not rely on."""
        if self.access != "in":
            self._record_read(box_of(selection.memory), instance)
        if isinstance(self.contents, Blocks):
            return self._load_blocks(self.contents, selection, fill)
        return gather(self.contents, selection, fill)

    def _load_blocks(self, blocks: Blocks, selection: Selection, fill: float) -> Blocks:
        if fill and not selection.whole:
            raise IRError(
                f"a load of a {blocks.format} tensor with fill={fill}",
                rule="outside a block-quantized tensor a load yields zeros",
                fix="leave fill at 0, or mask the tile with dl.where",
            )
        planes = {
            plane.name: gather(
                blocks.planes[plane.name], selection.along(blocks.axis, plane.per), 0
            )
            for plane in blocks.format.planes
        }
        return Blocks(blocks.format, blocks.axis, selection.shape, planes)

    def store(
        self, selection: Selection, tile: Array | Blocks, combine: str, instance: int
    ) -> None:
        """Write a tile.  Raises IRError where instances would depend on their order."""
        if self.access == "in":
            raise IRError(
                f"a store into '{self.name}', an argument that is only read",
                rule="a kernel stores into arguments that are out or inout",
                fix="declare the argument as an output, or store elsewhere",
            )
        if combine:
            assert isinstance(tile, np.ndarray), "combine of block-quantized values"
            self._combine(selection, tile, combine, instance)
            return
        self._check_distinct(selection)
        self._record_write(box_of(selection.memory), instance)
        if isinstance(self.contents, Blocks):
            assert isinstance(tile, Blocks)
            for plane in self.contents.format.planes:
                part = selection.along(self.contents.axis, plane.per)
                scatter(self.contents.planes[plane.name], part, tile.planes[plane.name])
        else:
            assert isinstance(tile, np.ndarray)
            scatter(self.contents, selection, tile)

    def _combine(self, selection: Selection, tile: Array, combine: str, instance: int) -> None:
        if self.access != "inout":
            raise IRError(
                f"a store with combine='{combine}' into '{self.name}', which holds nothing yet",
                rule="combine= reads what is there, so that its argument is inout",
                fix="declare the argument as inout and pass an array of the starting values",
            )
        self.combined.append((instance, selection, tile, combine))

    def finish(self) -> None:
        """Apply the combining stores, in the order of the instances whatever order they ran in."""
        assert isinstance(self.contents, np.ndarray) or not self.combined
        for _, selection, tile, combine in sorted(self.combined, key=lambda entry: entry[0]):
            assert isinstance(self.contents, np.ndarray)
            if np.any(self.writer[box_of(selection.memory)] != _NOBODY):
                raise IRError(
                    f"'{self.name}' is stored both with and without combine=",
                    rule="an element is either stored once or combined into",
                    fix="give every store of the element the same combine=",
                )
            scatter_combined(self.contents, selection, tile, combine)
        self.combined.clear()

    def _check_distinct(self, selection: Selection) -> None:
        for axis, positions in enumerate(selection.memory):
            if len(np.unique(positions)) != len(positions):
                raise IRError(
                    f"a store writes elements of axis {axis} of '{self.name}' twice",
                    rule="the entries of an index list that is stored through are unique",
                    fix="declare the list dl.Index(..., unique=True) and pass distinct entries, "
                    "or use combine=",
                )

    def _record_read(self, box: tuple[slice, ...] | tuple[Positions, ...], instance: int) -> None:
        writers = self.writer[box]
        if self.access == "out" and np.any(writers == _NOBODY):
            raise IRError(
                f"'{self.name}' is read before it is written",
                rule="an output holds nothing until the kernel stores into it",
                fix="store first, keep the value in a tile, or declare the argument as inout",
            )
        if np.any((writers != _NOBODY) & (writers != instance)):
            raise self._race("reads what another grid instance stored")
        readers = self.reader[box]
        self.reader[box] = np.where(
            (readers == _NOBODY) | (readers == instance), instance, _SEVERAL
        )

    def _record_write(self, box: tuple[slice, ...] | tuple[Positions, ...], instance: int) -> None:
        writers, readers = self.writer[box], self.reader[box]
        if np.any((writers != _NOBODY) & (writers != instance)):
            raise self._race("stores where another grid instance stored")
        if np.any((readers != _NOBODY) & (readers != instance)):
            raise self._race("stores what another grid instance reads")
        self.writer[box] = instance

    def _race(self, what: str) -> IRError:
        return IRError(
            f"a grid instance {what} ('{self.name}')",
            rule="grid instances are unordered, so that none may depend on another",
            fix="index the store by the program ids, use a unique index list, or say combine=",
        )


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """A box of a memory: where it starts and its extents, axis by axis."""

    memory: Memory
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, memory: Memory) -> View:
        """All of a memory."""
        return cls(memory, (0,) * len(memory.shape), memory.shape)

    def narrowed(self, axis: int, start: int, stop: int) -> View:
        """``self[start:stop]`` along an axis.  Raises IRError outside the bounds."""
        if not 0 <= start <= stop <= self.shape[axis]:
            raise IRError(
                f"view {start}:{stop} along axis {axis} of '{self.memory.name}', "
                f"which has {self.shape[axis]} elements there",
                rule="a view lies inside its tensor: 0 <= start <= stop <= size",
                fix="clip the ends of the view to the tensor's size",
            )
        begin, shape = list(self.start), list(self.shape)
        begin[axis] += start
        shape[axis] = stop - start
        return replace(self, start=tuple(begin), shape=tuple(shape))

    def select(self, shape: tuple[int, ...], positions: Sequence[Positions]) -> Selection:
        """The existing ones of the elements at these positions of the view, one array an axis."""
        return select(shape, positions, self.start, self.shape)
