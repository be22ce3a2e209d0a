"""Tensors in a chip's home memory, as bits that DMA reads and writes in place.

A :class:`Home` is one argument; a :class:`Box` says which elements of a tile lie where in it, by
the descriptor of a transfer.  Combining stores are kept and applied in the order of the cores, and
of each core's text, whenever they arrive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from dure.errors import IRError
from dure.ir.blocks import Blocks
from dure.ir.core import Op, Param, Value
from dure.ir.dtypes import Array, DType
from dure.ir.expr import evaluate
from dure.ir.interpret_memory import (
    Positions,
    Selection,
    box_of,
    positions,
    scatter_combined,
    select,
)
from dure.ir.types import TensorType
from dure.sim.arithmetic import Formats
from dure.sim.storage import (
    Raw,
    number_raw,
    number_values,
    raw_view,
    stored_planes,
    with_sums,
)

Index: TypeAlias = "tuple[slice, ...] | tuple[Positions, ...]"


@dataclass(frozen=True, slots=True)
class Box:
    """Elements of a tile (NumPy index ``tile``) and of a tensor (``memory``), one to one."""

    shape: tuple[int, ...]
    tile: Index
    memory: Index
    whole: bool


class Home:
    """An argument of the program: its bits, and how it may be used."""

    def __init__(self, param: Param, host: Array | Blocks, formats: Formats) -> None:
        self.name = param.value.name
        self.access = param.access
        self.type = param.value.tensor
        self.host = host
        self.formats = formats
        self.raws: tuple[Raw, ...] = tuple(
            raw_view(array) if _same_bits(dtype, array, own) else number_raw(dtype, array, own)
            for dtype, array, own in self._planes()
        )
        #: (core, position in its text), box and values of each combining store.
        self.combined: list[tuple[tuple[int, int], Selection, Array, str]] = []

    def reshaped(self, kind: TensorType) -> Home:
        """The same bits in another shape.  Raises :class:`IRError` where they have gaps."""
        assert isinstance(self.host, np.ndarray)
        found = copy(self)
        found.type = kind
        found.host = self.host.reshape([evaluate(extent, {}) for extent in kind.shape])
        found.raws = tuple(raw.reshape(found.host.shape) for raw in self.raws)
        found.combined = []
        pairs = [(self.host, found.host), *zip(self.raws, found.raws, strict=True)]
        if any(old.size and not np.shares_memory(old, new) for old, new in pairs):
            raise IRError(
                f"'{self.name}' lies in memory with gaps, and the program sees it as {kind}",
                rule="a tensor that is seen in another shape lies in row-major order",
                fix="pass numpy.ascontiguousarray(...)",
            )
        return found

    @property
    def axis(self) -> int:
        """The quantized axis, or -1."""
        return self.host.axis if isinstance(self.host, Blocks) else -1

    def _planes(self) -> list[tuple[DType, Array, Formats]]:
        """Type, host array and formats of each stored plane."""
        if isinstance(self.host, Blocks):
            planes = stored_planes(self.host.format)
            return [(p.dtype, self.host.planes[p.name], {}) for p in planes]
        return [(cast(DType, self.type.dtype), self.host, self.formats)]

    def finish(self) -> None:
        """Apply the combining stores, and give the host what it can't see through its own bits."""
        for _, selection, values, combine in sorted(self.combined, key=lambda entry: entry[0]):
            self._combine(selection, values, combine)
        self.combined.clear()
        if self.access == "in":
            return
        for raw, (dtype, host, formats) in zip(self.raws, self._planes(), strict=True):
            if not _same_bits(dtype, host, formats):
                host[...] = number_values(dtype, raw, formats)
        if isinstance(self.host, Blocks):
            for name, plane in with_sums(self.host).planes.items():
                if plane is not self.host.planes[name]:
                    self.host.planes[name][...] = plane

    def _combine(self, selection: Selection, values: Array, combine: str) -> None:
        assert isinstance(self.host, np.ndarray)
        dtype = cast(DType, self.type.dtype)
        if dtype not in self.formats:
            scatter_combined(self.host, selection, values, combine)
            return
        wide = number_values(dtype, self.raws[0], self.formats)
        scatter_combined(wide, selection, values, combine)
        self.raws[0][...] = number_raw(dtype, wide, self.formats)

    def filled(self, raw: Raw, dtype: DType, shape: tuple[int, ...], fill: float) -> Raw:
        """A tile's bits that are ``fill`` everywhere."""
        if not fill:
            return np.zeros(shape, raw.dtype)
        if isinstance(self.host, Blocks):
            raise IRError(
                f"a load of '{self.name}' of {self.type.dtype} with fill={fill}",
                rule="outside a block-quantized tensor a load yields zeros",
                fix="leave fill at 0",
            )
        one = np.asarray([fill], np.float64)
        with np.errstate(all="ignore"):
            wide = one if dtype.is_float else one.astype(np.int64)
            number = wide if dtype in self.formats else wide.astype(dtype.numpy)
        return np.full(shape, number_raw(dtype, number, self.formats)[0], raw.dtype)


def _same_bits(dtype: DType, host: Array, formats: Formats) -> bool:
    """Whether the chip reads the host's own bits.  A plane's values may lie in a wider type."""
    return dtype not in formats and host.dtype == dtype.numpy


@dataclass(frozen=True, slots=True)
class Window:
    """A tensor operand: its home, and the views between them, outermost first."""

    home: Home
    views: tuple[Op, ...]

    def bounds(self, sizes: Mapping[str, int]) -> tuple[list[int], list[int]]:
        """Start and extents in the home tensor.  Raises :class:`IRError` for a view outside."""
        extents = list(self.home.host.shape)
        start = [0] * len(extents)
        for view in self.views:
            axis: int = view.attr("axis")
            low, high = (evaluate(view.attr(end), sizes) for end in ("start", "stop"))
            if not 0 <= low <= high <= extents[axis]:
                raise IRError(
                    f"view {low}:{high} along axis {axis} of '{self.home.name}', which has "
                    f"{extents[axis]} elements there",
                    where=view.span.render() if view.span is not None else "",
                    rule="a view lies inside its tensor: 0 <= start <= stop <= size",
                    fix="clip the ends of the view to the tensor's size",
                )
            start[axis] += low
            extents[axis] = high - low
        return start, extents


def window_of(value: Value, homes: Mapping[Value, Home], views: Mapping[Value, Op]) -> Window:
    """The window that a tensor operand is."""
    chain: list[Op] = []
    while value not in homes:
        chain.insert(0, views[value])
        value = views[value].operands[0]
    return Window(homes[value], tuple(chain))


def boxes(
    op: Op,
    window: Window,
    shape: tuple[int, ...],
    pers: Sequence[int],
    sizes: Mapping[str, int],
    lists: Sequence[Array],
) -> list[Box]:
    """Where the elements of a transfer lie, for each plane (``pers``: elements an entry)."""
    start, extents = window.bounds(sizes)
    if not lists:
        runs = [_run(op, axis, shape, start, extents, sizes) for axis in range(len(shape))]
        known = [run for run in runs if run is not None]
        if len(known) == len(runs):
            return [_sliced(shape, known, window.home.axis, per) for per in pers]
    selection = selection_of(op, window, shape, sizes, lists)
    return [_meshed(selection.along(window.home.axis, per)) for per in pers]


def selection_of(
    op: Op,
    window: Window,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    lists: Sequence[Array],
) -> Selection:
    """The elements of a transfer, position by position."""
    return select(shape, positions(op, shape, sizes, lists), *window.bounds(sizes))


@dataclass(frozen=True, slots=True)
class _Run:
    """``count`` elements of an axis: the tile's from ``tile``, the tensor's ``stride`` apart."""

    tile: int
    memory: int
    count: int
    stride: int


def _run(
    op: Op,
    axis: int,
    shape: tuple[int, ...],
    start: Sequence[int],
    extents: Sequence[int],
    sizes: Mapping[str, int],
) -> _Run | None:
    """The elements of an axis that exist, or None where they don't go up."""
    index, step, offset, stride = (
        evaluate(op.attr(key)[axis], sizes) for key in ("index", "step", "offset", "stride")
    )
    if stride < 1:
        return None
    first = index * step + offset
    low = max(0, -(first // stride))
    high = min(shape[axis], -((first - extents[axis]) // stride))
    return _Run(low, start[axis] + first + low * stride, max(0, high - low), stride)


def _sliced(shape: tuple[int, ...], runs: Sequence[_Run], quantized: int, per: int) -> Box:
    tile: list[slice] = []
    memory: list[slice] = []
    own: list[int] = []
    exists = all(run.count for run in runs)
    for axis, (run, extent) in enumerate(zip(runs, shape, strict=True)):
        each = per if axis == quantized else 1
        count = -(-run.count // each) if exists else 0
        own.append(extent // each)
        tile.append(slice(run.tile // each, run.tile // each + count))
        first = run.memory // each if count else 0
        memory.append(
            slice(first, first + (count - 1) * run.stride + 1 if count else 0, run.stride)
        )
    whole = all(cut.stop - cut.start == extent for cut, extent in zip(tile, own, strict=True))
    return Box(tuple(own), tuple(tile), tuple(memory), whole)


def _meshed(selection: Selection) -> Box:
    shape = selection.shape
    tile: Any = box_of(selection.tile)
    memory: Any = box_of(selection.memory)
    return Box(shape, tile, memory, selection.whole)
