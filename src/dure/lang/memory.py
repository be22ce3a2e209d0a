"""Loads, stores, views and reads of index arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.dtypes import DType
from dure.ir.expr import Expr, as_expr
from dure.lang import indices
from dure.lang.origins import check_pair
from dure.lang.shapes import reshape, static_shape
from dure.lang.values import (
    Index,
    Origin,
    TensorBase,
    TileBase,
    as_tuple,
    builder,
    builtin,
    describe,
    is_index,
    plain,
)

if TYPE_CHECKING:
    from dure.lang.tensor import Tensor
    from dure.lang.tile import Tile


@dataclass(frozen=True, slots=True)
class Place:
    """Where along each axis of a tensor the elements of a load or store lie.

    ``index`` is None on an axis that a list rules; ``free`` axes may lie anywhere (the author said
    so by an offset, a stride or a fill).
    """

    shape: tuple[int, ...]
    index: tuple[Index | None, ...]
    lists: tuple[TileBase, ...]
    list_axes: tuple[int, ...]
    step: tuple[int, ...]
    offset: tuple[Index, ...]
    stride: tuple[int, ...]

    def attrs(self) -> dict[str, Any]:
        """The attributes of the IR op."""
        return {
            "index": tuple(None if i is None else as_expr(i) for i in self.index),
            "step": self.step,
            "offset": tuple(as_expr(o) for o in self.offset),
            "stride": self.stride,
            "list_axes": self.list_axes,
        }

    def moved(self, axis: int) -> bool:
        """Whether the author moved this axis's elements by an offset or a stride."""
        return self.offset[axis] != 0 or self.stride[axis] != 1


@builtin
def load(
    x: TensorBase,
    index: object,
    shape: object,
    *,
    fill: float | None = None,
    step: object = None,
    offset: object = None,
    stride: object = None,
) -> Tile:
    """The tile of ``shape`` at tile coordinates ``index``; what lies outside of ``x`` reads
    ``fill``.

    Along each axis, element t of the tile is element ``index * step + offset + t * stride`` of the
    tensor; ``step`` is the tile's extent unless given.  An entry of ``index`` may be a list: a 1-D
    int32 tile loaded from a ``dl.Index`` argument, each entry standing for ``step`` elements
    (extent // entries); a negative entry is absent.  ``fill`` is 0, for ``dl.Index`` arguments -1.
    """
    source = _tensor(x, "dl.load")
    place = _place("dl.load", source, index, static_shape(shape, "dl.load"), step, offset, stride)
    _check_inside("dl.load", source, place, free=fill is not None)
    number = (-1 if source.type.index is not None else 0) if fill is None else fill
    tile = builder().load(
        source, place.lists, {**place.attrs(), "shape": place.shape, "fill": _fill(number, source)}
    )
    tile.indices_of = source if source.type.index is not None else None
    if fill is None:
        tile.origins = _origins(source, place)
    return tile


@builtin
def store(
    x: TensorBase,
    index: object,
    tile: Any,
    *,
    combine: str | None = None,
    step: object = None,
    offset: object = None,
    stride: object = None,
) -> None:
    """Write ``tile`` at tile coordinates ``index`` (see :func:`load`); outside of ``x`` nothing
    happens.

    ``combine`` of "add", "max" or "min" joins it with what is there.
    """
    target = _tensor(x, "dl.store")
    if not isinstance(tile, TileBase):
        raise KernelError(
            f"dl.store of {describe(tile)}",
            rule="a store writes a tile",
            fix="make a tile with dl.full(shape, value, dtype)",
        )
    if tile.rank == 0:
        tile = reshape(tile, (1,) * target.rank)
    if tile.dtype != target.dtype:
        raise KernelError(
            f"dl.store of a tile of {tile.dtype} into '{target.name}' of {target.dtype}",
            rule="a store converts nothing",
            fix=f"write tile.to({target.name}.dtype)",
        )
    if target.type.index is not None:
        raise KernelError(
            f"dl.store into the index argument '{target.name}'",
            rule="an index argument is read only: its values are checked before the kernel runs",
            fix="declare the parameter as dl.Tensor",
        )
    place = _place("dl.store", target, index, tile.shape, step, offset, stride)
    _check_inside("dl.store", target, place, free=False)
    for mine, other in zip(tile.origins, _origins(target, place), strict=True):
        check_pair(mine, other)
    builder().store(target, tile, place.lists, {**place.attrs(), "combine": combine or ""})


def _tensor(x: object, name: str) -> TensorBase:
    if isinstance(x, TensorBase):
        return x
    if x is None:
        raise KernelError(
            f"{name} of a tensor that was passed as None",
            rule="an argument of None is absent",
            fix="guard it with `if x is not None:`, which is decided when the kernel is compiled",
        )
    raise KernelError(
        f"{name} of {describe(x)}",
        rule="the first operand of dl.load and dl.store is a tensor argument or a view of one",
        fix="pass the parameter itself",
    )


def _fill(value: object, source: TensorBase) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KernelError(
            f"fill={describe(value)}",
            rule="fill is a number known when the kernel is compiled",
            fix="use dl.where for anything else",
        )
    if isinstance(source.dtype, DType) and not source.dtype.is_float and value != int(value):
        raise KernelError(
            f"fill={value} for '{source.name}' of {source.dtype}",
            rule="the fill is a number of the tensor's type",
            fix="use a whole number",
        )
    return value


def _place(
    name: str,
    source: TensorBase,
    index: object,
    shape: tuple[int, ...],
    step: object,
    offset: object,
    stride: object,
) -> Place:
    entries = _per_axis(f"the index of {name}", index, source)
    if len(shape) != source.rank:
        raise KernelError(
            f"{name} of a tile of {len(shape)} axes {shape} and {describe(source)}",
            rule="tile and tensor have the same number of axes",
            fix="use extents of 1, and reshape the tile",
        )
    lists: list[TileBase] = []
    axes: list[int] = []
    scalars: list[Index | None] = []
    steps: list[int] = []
    given = _optional("step", step, source)
    for axis, entry in enumerate(entries):
        extent = shape[axis]
        if isinstance(entry, TileBase):
            lists.append(_list(name, entry))
            axes.append(axis)
            scalars.append(None)
            extent = _entry_extent(name, extent, entry.shape[0])
        else:
            scalars.append(_scalar(name, entry, axis))
        steps.append(_static(f"step of {name}", given[axis], extent))
    offsets = tuple(
        0 if o is None else _scalar(f"the offset of {name}", o, axis)
        for axis, o in enumerate(_optional("offset", offset, source))
    )
    strides = tuple(_static(f"stride of {name}", s, 1) for s in _optional("stride", stride, source))
    return Place(shape, tuple(scalars), tuple(lists), tuple(axes), tuple(steps), offsets, strides)


def _per_axis(what: str, value: object, source: TensorBase) -> tuple[object, ...]:
    entries = as_tuple(value)
    if len(entries) != source.rank:
        raise KernelError(
            f"{what} has {len(entries)} entries for {describe(source)}",
            rule="there is one entry for each axis of the tensor",
            fix=f"give {source.rank} entries",
        )
    return entries


def _optional(what: str, value: object, source: TensorBase) -> tuple[object, ...]:
    return (None,) * source.rank if value is None else _per_axis(what, value, source)


def _static(what: str, value: object, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise KernelError(
            f"the {what} is {describe(value)}",
            rule="steps and strides are positive integers known when the kernel is compiled",
            fix="put what changes at run time into the index or the offset",
        )
    return value


def _scalar(name: str, entry: object, axis: int) -> Index:
    if is_index(entry):
        return cast("Index", entry)
    raise KernelError(
        f"{name} with {describe(entry)} as index of axis {axis}",
        rule="an index is an integer, program id, loop variable, size or element of a dl.Index",
        fix="compute it from those with + - * // % min max",
    )


def _list(name: str, entry: TileBase) -> TileBase:
    if entry.rank != 1 or entry.dtype is not dtypes.int32 or entry.indices_of is None:
        computed = "" if entry.indices_of is not None else " that was computed in the kernel"
        raise KernelError(
            f"{name} with {describe(entry)}{computed} as an index",
            rule="an index list is a 1-D int32 tile loaded unchanged from a dl.Index argument",
            fix="load it from a dl.Index parameter, and reshape it to one axis",
        )
    return entry


def _entry_extent(name: str, extent: int, entries: int) -> int:
    if extent % entries:
        raise KernelError(
            f"{name} of an extent of {extent} by a list of {entries} entries",
            rule="each entry of an index list stands for the same number of elements",
            fix=f"use an extent that is a multiple of {entries}",
        )
    return extent // entries


def _check_inside(name: str, source: TensorBase, place: Place, *, free: bool) -> None:
    """Require that no tile index can lie outside of the tensor, unless the author allowed it."""
    for axis, index in enumerate(place.index):
        if index is None:
            _check_list(name, source, place, axis)
            continue
        if free or place.moved(axis):
            continue
        extent, step = source.extents[axis], place.step[axis]
        _require_range(name, source, axis, index, indices.cdiv(extent, step), step)


def _require_range(
    name: str, source: TensorBase, axis: int, index: Index, tiles: Index, step: int
) -> None:
    unit = f"elements in tiles of {step}" if step > 1 else "elements"
    builder().require(
        indices.compare("<=", 0, index),
        KernelError(
            f"{name} of '{source.name}' at index {index} along axis {axis}, which can be negative",
            rule="a tile index is never negative",
            fix="use max(index, 0), or say offset= and fill= where tiles hang over the edge",
        ),
    )
    last = (
        plain(indices.binary("max", as_expr(tiles) - 1, 0))
        if isinstance(tiles, Expr)
        else max(tiles - 1, 0)
    )
    builder().require(
        indices.compare("<=", index, last),
        KernelError(
            f"{name} of '{source.name}' at index {index} along axis {axis}, which can lie outside: "
            f"the axis has {source.extents[axis]} {unit}",
            rule="a tile index is below the number of tiles along its axis",
            fix="bound the index by dl.cdiv(size, tile), pass arrays whose shapes agree, or give a "
            "load fill= if it may read beyond the end",
        ),
    )


def _check_list(name: str, source: TensorBase, place: Place, axis: int) -> None:
    """The declared range of a list's entries lies inside the axis."""
    if place.moved(axis):
        return
    entries = place.lists[place.list_axes.index(axis)].indices_of
    assert entries is not None and entries.type.index is not None
    step = place.step[axis]
    tiles = indices.cdiv(source.extents[axis], step)
    high = plain(entries.type.index[1])
    builder().require(
        indices.compare("<", high, tiles),
        KernelError(
            f"{name} of '{source.name}' by entries of '{entries.name}' of up to {high} along axis "
            f"{axis}, which has {tiles} times {step} elements",
            rule="the declared range of an index argument lies inside of what it addresses",
            fix=f"declare '{entries.name}' with a smaller upper bound, or None for whatever fits",
        ),
    )


def _origins(source: TensorBase, place: Place) -> tuple[Origin | None, ...]:
    return tuple(
        None
        if index is None or not builder().marks(index)
        else Origin(
            (index, place.step[axis], place.offset[axis], place.stride[axis]),
            source.extents[axis],
            source.name,
            axis,
        )
        for axis, index in enumerate(place.index)
    )


def subscript(x: TensorBase, key: object) -> Any:
    """``x[start:stop]``, ``x[:, a:b]``: views; ``table[s, j]``: an index argument's element."""
    entries = as_tuple(key)
    if any(e is Ellipsis or e is None for e in entries) or len(entries) > x.rank:
        raise KernelError(
            f"{describe(x)} is indexed with {describe(key)}",
            rule="a tensor is cut with slices, an index argument is read with one index an axis",
            fix="use x[start:stop] or x[:, a:b]; extents of 1 come from dl.load",
        )
    if all(isinstance(e, slice) for e in entries):
        view: TensorBase = x
        for axis, entry in enumerate(entries):
            view = _view(view, axis, cast("slice[Any, Any, Any]", entry))
        return view
    if len(entries) == x.rank and all(is_index(e) for e in entries):
        return _element(x, tuple(cast("Index", e) for e in entries))
    raise KernelError(
        f"{describe(x)} is indexed with {', '.join(map(describe, entries))}",
        rule="a tensor is cut with slices, an index argument is read with one index an axis",
        fix="load a tile of it with dl.load(x, index, shape)",
    )


def _view(x: TensorBase, axis: int, cut: slice[Any, Any, Any]) -> Tensor | TensorBase:
    bounds = (cast("object", cut.start), cast("object", cut.stop))
    if cut.step is not None:
        raise KernelError(
            f"a view of '{x.name}' with a step",
            rule="a view is a run of consecutive elements",
            fix="load with stride=",
        )
    for bound in bounds:
        if bound is not None and not is_index(bound):
            raise KernelError(
                f"a view of '{x.name}' bounded by {describe(bound)}",
                rule="a view's bounds are index scalars",
                fix="use program ids, loop variables, sizes or elements of a dl.Index argument",
            )
    extent = x.extents[axis]
    start, stop = (cast("Index | None", b) for b in bounds)
    start = 0 if start is None else _from_end(start, extent)
    stop = extent if stop is None else _from_end(stop, extent)
    if start == 0 and stop is extent:
        return x
    name = f"a view [{start}:{stop}] of axis {axis} of '{x.name}'"
    builder().require(
        indices.compare("<=", 0, start),
        KernelError(
            f"{name}, whose start can be negative",
            rule="a view starts inside of its tensor",
            fix="use max(start, 0)",
        ),
    )
    builder().require(
        indices.compare("<=", stop, extent),
        KernelError(
            f"{name} of {extent} elements, whose end can lie outside",
            rule="a view ends inside of its tensor",
            fix=f"use min(stop, {x.name}.shape[{axis}])",
        ),
    )
    return builder().view(x, axis, start, stop)


def _from_end(bound: Index, extent: Index) -> Index:
    return plain(as_expr(extent) + bound) if isinstance(bound, int) and bound < 0 else bound


def _element(x: TensorBase, index: Sequence[Index]) -> Index:
    if x.type.index is None:
        raise KernelError(
            f"an element of {describe(x)} as an index scalar",
            rule="run-time indices are program ids, loop variables, sizes, dl.Index elements",
            fix=f"declare the parameter as {x.name}: dl.Index(low, high), or load a tile",
        )
    for axis, (entry, extent) in enumerate(zip(index, x.extents, strict=True)):
        error = KernelError(
            f"'{x.name}' is read at index {entry} along axis {axis}, which has {extent} elements",
            rule="an index argument is read inside of its bounds",
            fix="bound the index by its shape",
        )
        builder().require(indices.compare("<=", 0, entry), error)
        builder().require(indices.compare("<", entry, extent), error)
    return builder().index_load(x, index)
