"""Dots, reductions, running sums and quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.dtypes import BlockFormat, DType, ElementType
from dure.ir.tile.contraction import accumulator_of
from dure.lang.elementwise import cast_tile, full, tile_type
from dure.lang.origins import check_pair
from dure.lang.promotion import common_dtype
from dure.lang.shapes import check_axis, reshape
from dure.lang.values import TileBase, builder, builtin, describe

if TYPE_CHECKING:
    from dure.lang.tile import Tile


@builtin
def dot(a: TileBase, b: TileBase, acc: TileBase | None = None) -> Tile:
    """``acc + a @ b`` for a (..., m, k), b (..., k, n); the accumulator is float32, for integers
    int32.
    """
    left = tile_type(a, "the left operand of dot")
    right = tile_type(b, "the right operand of dot")
    if left.rank < 2 or right.rank < 2:
        raise KernelError(
            f"dot of {describe(a)} and {describe(b)}",
            rule="dot takes tiles (..., m, k) and (..., k, n)",
            fix="add an axis, as in x[None, :]",
        )
    dtype = accumulator_of(left, right)
    shape = (*left.shape[:-1], right.shape[-1])
    start = full(shape, 0, dtype) if acc is None else acc
    check_pair(a.origins[-1], b.origins[-2])
    result = builder().emit("dot", [a, b, start], {})
    result.origins = (*a.origins[:-1], b.origins[-1])
    return result


def can_accumulate(a: object, b: object, acc: object) -> bool:
    """Whether ``acc + a @ b`` may be one dot that starts from ``acc``."""
    if not (isinstance(a, TileBase) and isinstance(b, TileBase) and isinstance(acc, TileBase)):
        return False
    if a.rank < 2 or b.rank < 2 or acc.dtype != accumulator_of(a.type, b.type):
        return False
    return acc.shape == (*a.shape[:-1], b.shape[-1])


@builtin
def quantize(x: TileBase, format: ElementType) -> Tile:
    """``x`` in blocks of int8 codes with a scale each, along the last axis."""
    tile_type(x, "the operand of quantize")
    if not isinstance(format, BlockFormat):
        raise KernelError(
            f"dl.quantize to {describe(format)}",
            rule="dl.quantize makes a block-quantized tile",
            fix="dl.quantize(x, dl.int8_block32)",
        )
    result = builder().emit("quantize", [x], {"format": str(format)})
    result.origins = x.origins
    return result


def _reduce(x: TileBase, axis: int | None, keepdims: bool, combiner: str) -> Tile:
    kind = tile_type(x, f"the operand of {combiner}")
    dtype = common_dtype((x,))
    if axis is None:
        if keepdims:
            shape = (1,) * kind.rank
            return reshape(_reduce(reshape(x, (kind.elements,)), 0, False, combiner), shape)
        return _reduce(reshape(x, (kind.elements,)), 0, False, combiner)
    place = check_axis(axis, x, combiner)
    if (
        combiner in ("sum", "prod") and (dtype.kind == "bool" or _narrow(dtype))
    ) or dtype.kind == "bool":
        dtype = dtypes.int32
    source = cast_tile(x, dtype)
    result = builder().emit("reduce", [source], {"axis": place, "combiner": combiner})
    result.origins = tuple(None if a == place else o for a, o in enumerate(x.origins))
    return result if keepdims else _dropped(result, place)


def _narrow(dtype: DType) -> bool:
    return dtype.is_integer and dtype.bits < 32


def _dropped(x: Tile, axis: int) -> Tile:
    origins = (*x.origins[:axis], *x.origins[axis + 1 :])
    result = builder().emit("reshape", [x], {"shape": (*x.shape[:axis], *x.shape[axis + 1 :])})
    result.origins = origins
    return result


@builtin
def sum(x: TileBase, axis: int | None = None, keepdims: bool = False) -> Tile:
    """The sum along an axis, or of everything; integers below 32 bits are summed in int32."""
    return _reduce(x, axis, keepdims, "sum")


@builtin
def max(x: TileBase, axis: int | None = None, keepdims: bool = False) -> Tile:
    """The largest element along an axis, or of everything."""
    return _reduce(x, axis, keepdims, "max")


@builtin
def min(x: TileBase, axis: int | None = None, keepdims: bool = False) -> Tile:
    """The smallest element along an axis, or of everything."""
    return _reduce(x, axis, keepdims, "min")


@builtin
def prod(x: TileBase, axis: int | None = None, keepdims: bool = False) -> Tile:
    """The product along an axis, or of everything."""
    return _reduce(x, axis, keepdims, "prod")


@builtin
def argmax(x: TileBase, axis: int, keepdims: bool = False) -> Tile:
    """The lowest index of the largest element along an axis, int32."""
    return _reduce(x, axis, keepdims, "argmax")


@builtin
def argmin(x: TileBase, axis: int, keepdims: bool = False) -> Tile:
    """The lowest index of the smallest element along an axis, int32."""
    return _reduce(x, axis, keepdims, "argmin")


@builtin
def cumsum(x: TileBase, axis: int = 0) -> Tile:
    """The running sum along an axis, the element itself included."""
    place = check_axis(axis, x, "cumsum")
    dtype = common_dtype((x,))
    if dtype.kind == "bool" or _narrow(dtype):
        dtype = dtypes.int32
    return builder().emit("cumsum", [cast_tile(x, dtype)], {"axis": place})


@builtin
def reduce(
    x: TileBase,
    axis: int,
    combine: Any,
    identity: object,
    keepdims: bool = False,
) -> Tile:
    """A reduction with ``combine(a, b)``, which is associative and has this identity."""
    place = check_axis(axis, x, "reduce")
    common_dtype((x,))
    if not callable(combine):
        raise KernelError(
            f"dl.reduce with {describe(combine)}",
            rule="dl.reduce combines with a function of two tiles",
            fix="dl.reduce(x, axis, lambda a, b: a + b, 0)",
        )
    if isinstance(identity, bool) or not isinstance(identity, int | float):
        raise KernelError(
            f"dl.reduce with the identity {describe(identity)}",
            rule="the identity of a reduction is a number: combine(identity, x) is x",
            fix="0 for a sum, 1 for a product, float('-inf') for a maximum",
        )
    result = builder().reduce_with(x, place, combine, identity)
    return result if keepdims else _dropped(result, place)
