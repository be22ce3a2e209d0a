"""Elementwise operations on tiles, index scalars and Python numbers, with promotion and
broadcasting.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.dtypes import DType
from dure.ir.expr import Expr
from dure.ir.tile.elementwise import integer_range
from dure.ir.types import TileType
from dure.lang import indices
from dure.lang.origins import check_meeting, merged
from dure.lang.promotion import common_dtype
from dure.lang.values import Index, TensorBase, TileBase, builder, describe

if TYPE_CHECKING:
    from dure.lang.tile import Tile

#: IR op -> what Python does with two plain numbers.
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": operator.mod,
    "pow": lambda a, b: a**b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "min": min,
    "max": max,
}
COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "<": ("lt", operator.lt),
    "<=": ("le", operator.le),
    ">": ("gt", operator.gt),
    ">=": ("ge", operator.ge),
    "==": ("eq", operator.eq),
    "!=": ("ne", operator.ne),
}


def binary(name: str, left: object, right: object) -> Any:
    """A binary operation of any two values of a kernel."""
    if isinstance(left, TileBase) or isinstance(right, TileBase):
        return _binary_tiles(name, left, right)
    if isinstance(left, Expr) or isinstance(right, Expr):
        if _whole(left) and _whole(right) and name != "div":
            return indices.binary(name, cast("Index", left), cast("Index", right))
        return _binary_tiles(name, left, right)
    _no_tensor(name, left, right)
    return BINARY[name](left, right)


def compare(relation: str, left: object, right: object) -> Any:
    """A comparison of any two values of a kernel."""
    if isinstance(left, TileBase) or isinstance(right, TileBase):
        if left is None or right is None:
            return relation == "!="
        return elementwise(COMPARISONS[relation][0], left, right)
    if isinstance(left, Expr) or isinstance(right, Expr):
        if _whole(left) and _whole(right):
            return indices.compare(relation, cast("Index", left), cast("Index", right))
        if isinstance(left, float) or isinstance(right, float):
            return elementwise(COMPARISONS[relation][0], left, right)
    return COMPARISONS[relation][1](left, right)


def _whole(value: object) -> bool:
    return isinstance(value, int | Expr)


def _no_tensor(name: str, *operands: object) -> None:
    for operand in operands:
        if isinstance(operand, TensorBase):
            raise KernelError(
                f"'{name}' of {describe(operand)}",
                rule="arithmetic takes tiles; a tensor stays in memory until a tile is loaded",
                fix=f"dl.load({operand.name}, index, shape)",
            )


def _binary_tiles(name: str, left: object, right: object) -> Tile:
    dtype = common_dtype((left, right), divides=name == "div")
    if name == "pow":
        return _power(left, right, dtype)
    if name in ("floordiv", "mod") and dtype.is_float:
        quotient = unary("floor", elementwise("div", left, right))
        return quotient if name == "floordiv" else left - quotient * right
    if dtype.kind == "bool" and name in ("add", "sub", "mul", "min", "max", "shl", "shr"):
        dtype = dtypes.int32
    return elementwise(name, left, right, dtype=dtype)


def _power(left: object, right: object, dtype: DType) -> Tile:
    """A small whole exponent is a product, as NumPy and Triton's users write it."""
    if isinstance(left, TileBase) and isinstance(right, int | float) and right in (1, 2, 3, 4):
        base = cast("Any", left)
        square = base * base if right > 1 else base
        return {1: base, 2: square, 3: square * base, 4: square * square}[int(right)]
    if not dtype.is_float:
        raise KernelError(
            f"'**' of {describe(left)} and {describe(right)}",
            rule="** takes floats, or a whole exponent from 1 to 4",
            fix="convert the base with .to(dl.float32)",
        )
    if isinstance(right, float) and right == 0.5:
        return unary("sqrt", left)
    return elementwise("pow", left, right, dtype=dtype)


def unary(name: str, x: object, python: Callable[[float], float] | None = None) -> Any:
    """A function of one operand: of a tile, or of a Python number by ``python``."""
    if python is not None and isinstance(x, int | float):
        return python(x)
    dtype = common_dtype((x,))
    if python is not None and not dtype.is_float:
        dtype = dtypes.float32
    return elementwise(name, x, dtype=dtype)


def elementwise(name: str, *operands: object, dtype: DType | None = None) -> Tile:
    """Convert the operands to one type, broadcast them to one shape, and emit the op."""
    kind = common_dtype(operands, divides=name == "div") if dtype is None else dtype
    shape = broadcast_shape([o.shape for o in operands if isinstance(o, TileBase)], name)
    tiles = [as_tile(o, shape, kind) for o in operands]
    check_meeting(tiles)
    result = builder().emit(name, tiles, {})
    result.origins = merged(tiles)
    result.weak = not any(isinstance(o, TileBase) and not o.weak for o in operands)
    return result


def as_tile(value: object, shape: tuple[int, ...], dtype: DType) -> Tile:
    """``value`` as a tile of this shape and type."""
    if isinstance(value, TileBase):
        return broadcast_to(cast_tile(value, dtype), shape)
    return full(shape, value, dtype)


def full(shape: tuple[int, ...], value: object, dtype: DType) -> Tile:
    """A tile of one number; an index scalar's value is known when the kernel runs."""
    if isinstance(value, TileBase):
        return broadcast_to(cast_tile(value, dtype), shape)
    if not isinstance(value, bool | int | float | Expr):
        raise KernelError(
            f"a tile filled with {describe(value)}",
            rule="a tile is filled with a number or an index scalar",
            fix="pass a Python number",
        )
    if isinstance(value, Expr):
        if dtype.kind == "bool":
            number = full(shape, value, dtypes.int32)
            return elementwise("ne", number, 0)
    else:
        value = _number(value, dtype)
    return builder().emit("full", (), {"shape": shape, "dtype": dtype, "value": value})


def _number(value: int | float, dtype: DType) -> float:
    """A Python number that the type can hold."""
    if dtype.kind == "bool":
        return bool(value)
    if not dtype.is_integer:
        return _float(value)
    low, high = integer_range(dtype)
    if not (math.isfinite(value) and value == int(value)):
        raise KernelError(
            f"the number {value} in a tile of {dtype}",
            rule="a number that a tile adopts fits its type",
            fix=f"convert the tile with .to(dl.float32), or use a whole number in [{low}, {high}]",
        )
    if not low <= value <= high:
        raise KernelError(
            f"the number {int(value)} in a tile of {dtype}",
            rule=f"{dtype} holds numbers from {low} to {high}",
            fix="convert the tile to a wider type with .to(dtype)",
        )
    return int(value)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise KernelError(
            "an integer that is too large for a float",
            rule="a number that a tile adopts fits its type",
            fix="use a smaller number, or float('inf')",
        ) from None


def cast_tile(tile: TileBase, dtype: DType) -> Tile:
    """``tile`` in another plain type; the same tile if it has that type."""
    if tile.dtype == dtype:
        return cast("Tile", tile)
    if tile.type.block is not None:
        result = builder().emit("dequantize", [tile], {"dtype": dtype})
    else:
        result = builder().emit("cast", [tile], {"dtype": dtype})
    result.origins = tile.origins
    return result


def broadcast_shape(shapes: Sequence[tuple[int, ...]], name: str) -> tuple[int, ...]:
    """NumPy's rule: aligned at the right, extents agree or are 1."""
    rank = max((len(s) for s in shapes), default=0)
    total: list[int] = []
    for axis in range(-rank, 0):
        extents = {s[axis] for s in shapes if len(s) >= -axis} - {1}
        if len(extents) > 1:
            raise KernelError(
                f"'{name}' of tiles of {' and '.join(map(str, shapes))}",
                rule="shapes are aligned at the right; extents agree or are 1",
                fix="transpose or reshape one of them, or add an axis as in x[:, None]",
            )
        total.append(extents.pop() if extents else 1)
    return tuple(total)


def broadcast_to(tile: TileBase, shape: tuple[int, ...]) -> Tile:
    """``tile`` repeated to a shape that it fits."""
    if tile.shape == shape:
        return cast("Tile", tile)
    if broadcast_shape([tile.shape, shape], "broadcast_to") != shape:
        raise KernelError(
            f"broadcast of {describe(tile)} to {shape}",
            rule="an axis is repeated where the tile's extent is 1",
            fix="reshape the tile so that its extents are 1 or those wanted",
        )
    missing = len(shape) - tile.rank
    if missing:
        widened = builder().emit("reshape", [tile], {"shape": (1,) * missing + tile.shape})
        widened.origins = (None,) * missing + tile.origins
        tile = widened
    if tile.shape == shape:
        return cast("Tile", tile)
    result = builder().emit("broadcast", [tile], {"shape": shape})
    result.origins = tuple(
        origin if have == want else None
        for origin, have, want in zip(tile.origins, tile.shape, shape, strict=True)
    )
    return result


def tile_type(value: object, what: str) -> TileType:
    """The type of a tile, or an error that says what was found instead."""
    if not isinstance(value, TileBase):
        raise KernelError(
            f"{what} is {describe(value)}, not a tile",
            rule="tile operations take tiles",
            fix="load a tile with dl.load(x, index, shape) or make one with dl.full",
        )
    return value.type
