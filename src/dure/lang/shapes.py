"""Making tiles and moving their elements about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.dtypes import DType, ElementType
from dure.lang.elementwise import broadcast_to as _broadcast_to
from dure.lang.elementwise import full as _full
from dure.lang.elementwise import tile_type
from dure.lang.values import Origin, TileBase, as_tuple, builder, builtin, describe

if TYPE_CHECKING:
    from dure.lang.tile import Tile


def static_shape(shape: object, what: str) -> tuple[int, ...]:
    """A tile's shape: positive integers known when the kernel is compiled."""
    found: list[int] = []
    for extent in as_tuple(shape):
        if isinstance(extent, bool) or not isinstance(extent, int):
            raise KernelError(
                f"{what} has the extent {describe(extent)}",
                rule="a tile's shape is known when the kernel is compiled",
                fix="use numbers and dl.const parameters for extents; sizes go into indices",
            )
        if extent <= 0:
            raise KernelError(
                f"{what} has the extent {extent}",
                rule="a tile's extents are positive",
                fix="use an extent of at least 1",
            )
        found.append(extent)
    if math.prod(found) > MOST_ELEMENTS:
        raise KernelError(
            f"{what} has the shape {tuple(found)}, which is {math.prod(found)} elements",
            rule=f"a tile has at most {MOST_ELEMENTS} elements: it is what one core holds at once",
            fix="use smaller tiles, and a loop or a larger grid",
        )
    return tuple(found)


#: A tile of more elements is a mistake, not a tile.
MOST_ELEMENTS = 2**24


def plain_dtype(dtype: object, what: str) -> DType:
    """``dtype`` as a plain number type."""
    if isinstance(dtype, DType):
        return dtype
    raise KernelError(
        f"{what} has the dtype {describe(dtype)}",
        rule="its type is a plain number type of dure.lang",
        fix=f"one of {', '.join('dl.' + name for name in dtypes.DTYPES)}",
    )


@builtin
def full(shape: object, value: object, dtype: ElementType) -> Tile:
    """A tile of ``value`` everywhere; ``value`` may be an index scalar."""
    return _full(static_shape(shape, "dl.full"), value, plain_dtype(dtype, "dl.full"))


@builtin
def zeros(shape: object, dtype: ElementType) -> Tile:
    """A tile of zeros."""
    return _full(static_shape(shape, "dl.zeros"), 0, plain_dtype(dtype, "dl.zeros"))


@builtin
def ones(shape: object, dtype: ElementType) -> Tile:
    """A tile of ones."""
    return _full(static_shape(shape, "dl.ones"), 1, plain_dtype(dtype, "dl.ones"))


@builtin
def arange(size: int, dtype: ElementType = dtypes.int32) -> Tile:
    """``0, 1, ..., size - 1``"""
    (extent,) = static_shape(size, "dl.arange")
    return builder().emit("iota", (), {"size": extent, "dtype": plain_dtype(dtype, "dl.arange")})


@builtin
def broadcast_to(x: Any, shape: object) -> Tile:
    """``x`` repeated along axes of extent 1, by NumPy's rule."""
    wanted = static_shape(shape, "dl.broadcast_to")
    if not isinstance(x, TileBase) and isinstance(x, int | float):
        return _full(wanted, x, dtypes.float32 if isinstance(x, float) else dtypes.int32)
    tile_type(x, "the operand of broadcast_to")
    return _broadcast_to(x, wanted)


@builtin
def reshape(x: TileBase, shape: object) -> Tile:
    """The same elements in row-major order in another shape; one extent may be -1."""
    kind = tile_type(x, "the operand of reshape")
    extents = list(as_tuple(shape))
    if extents.count(-1) == 1:
        rest = math.prod(static_shape([e for e in extents if e != -1], "reshape"))
        extents[extents.index(-1)] = kind.elements // rest
    wanted = static_shape(extents, "reshape")
    if wanted == x.shape:
        return cast("Tile", x)
    result = builder().emit("reshape", [x], {"shape": wanted})
    result.indices_of = x.indices_of
    result.origins = _moved_units(x, wanted)
    return result


def _moved_units(x: TileBase, shape: tuple[int, ...]) -> tuple[Origin | None, ...]:
    """Origins survive a reshape that only adds or drops axes of extent 1."""
    kept = [o for o, extent in zip(x.origins, x.shape, strict=True) if extent != 1]
    if [e for e in x.shape if e != 1] != [e for e in shape if e != 1]:
        return (None,) * len(shape)
    rest = iter(kept)
    return tuple(None if extent == 1 else next(rest) for extent in shape)


@builtin
def transpose(x: TileBase, order: Sequence[int] | None = None) -> Tile:
    """``x`` with its axes in another order; without one, the last two are swapped."""
    rank = tile_type(x, "the operand of transpose").rank
    if order is None:
        if rank < 2:
            raise KernelError(
                f"the transpose of {describe(x)}",
                rule="a transpose swaps the last two axes",
                fix="add an axis first, as in x[None, :]",
            )
        order = (*range(rank - 2), rank - 1, rank - 2)
    axes = tuple(_axis(a, rank, "transpose") for a in as_tuple(order))
    result = builder().emit("transpose", [x], {"order": axes})
    result.origins = tuple(x.origins[a] for a in axes)
    return result


@builtin
def expand_dims(x: TileBase, axis: int) -> Tile:
    """``x`` with a new axis of extent 1 at ``axis`` of the result."""
    rank = tile_type(x, "the operand of expand_dims").rank
    place = _axis(axis, rank + 1, "expand_dims")
    result = reshape(x, (*x.shape[:place], 1, *x.shape[place:]))
    result.origins = (*x.origins[:place], None, *x.origins[place:])
    return result


def _axis(axis: object, rank: int, name: str) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
        raise KernelError(
            f"{name} along axis {describe(axis)} of {rank} axes",
            rule=f"an axis is an integer from {-rank} to {rank - 1}",
            fix="name an axis that the tile has",
        )
    return axis % rank


def check_axis(axis: object, x: TileBase, name: str) -> int:
    """``axis`` of a tile, counted from the front."""
    return _axis(axis, tile_type(x, f"the operand of {name}").rank, name)


def subscript(x: TileBase, key: object) -> Tile:
    """``x[:, None]`` and the like: a tile takes new axes and whole axes only."""
    shape: list[int] = []
    origins: list[Origin | None] = []
    axis = 0
    entries = as_tuple(key)
    missing = x.rank - sum(1 for e in entries if e is not None and e is not Ellipsis)
    for entry in entries:
        if entry is None:
            shape.append(1)
            origins.append(None)
            continue
        whole = entry == slice(None)
        taken = missing if entry is Ellipsis else 1
        if not (whole or entry is Ellipsis) or axis + taken > x.rank:
            raise KernelError(
                f"{describe(x)} is indexed with {describe(entry)}",
                rule="a tile takes ':' and None as indices; its elements aren't addressed",
                fix="load the part that you need with dl.load, or choose with dl.where",
            )
        shape.extend(x.shape[axis : axis + taken])
        origins.extend(x.origins[axis : axis + taken])
        axis += taken
    shape.extend(x.shape[axis:])
    origins.extend(x.origins[axis:])
    result = reshape(x, tuple(shape))
    if result is not x:
        result.origins = tuple(origins)
    return result
