"""Mathematical functions of tiles, and choosing between tiles."""

from __future__ import annotations

import builtins
import math
from typing import TYPE_CHECKING, Any, cast

from dure.ir import dtypes
from dure.ir.expr import Expr
from dure.lang import indices
from dure.lang.elementwise import as_tile, binary, broadcast_shape, full, unary
from dure.lang.origins import check_meeting, merged
from dure.lang.promotion import common_dtype
from dure.lang.values import TileBase, builder, builtin

if TYPE_CHECKING:
    from dure.lang.tile import Tile


@builtin
def exp(x: Any) -> Any:
    """``e ** x``"""
    return unary("exp", x, math.exp)


@builtin
def exp2(x: Any) -> Any:
    """``2 ** x``"""
    return unary("exp2", x, lambda v: 2.0**v)


@builtin
def log(x: Any) -> Any:
    """The natural logarithm."""
    return unary("log", x, math.log)


@builtin
def log2(x: Any) -> Any:
    """The logarithm to the base 2."""
    return unary("log2", x, math.log2)


@builtin
def sqrt(x: Any) -> Any:
    """The square root."""
    return unary("sqrt", x, math.sqrt)


@builtin
def rsqrt(x: Any) -> Any:
    """``1 / sqrt(x)``"""
    return unary("rsqrt", x, lambda v: 1.0 / math.sqrt(v))


@builtin
def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return unary("tanh", x, math.tanh)


@builtin
def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``"""
    return unary("sigmoid", x, lambda v: 1.0 / (1.0 + math.exp(-v)))


@builtin
def erf(x: Any) -> Any:
    """The error function."""
    return unary("erf", x, math.erf)


@builtin
def sin(x: Any) -> Any:
    """The sine of an angle in radians."""
    return unary("sin", x, math.sin)


@builtin
def cos(x: Any) -> Any:
    """The cosine of an angle in radians."""
    return unary("cos", x, math.cos)


@builtin
def floor(x: Any) -> Any:
    """The largest whole number that is not above ``x``, in x's type."""
    return unary("floor", x, math.floor)


@builtin
def ceil(x: Any) -> Any:
    """The smallest whole number that is not below ``x``, in x's type."""
    return unary("ceil", x, math.ceil)


@builtin
def round(x: Any) -> Any:
    """The nearest whole number, ties to even, in x's type."""
    return unary("round", x, lambda v: float(builtins.round(v)))


@builtin
def abs(x: Any) -> Any:
    """The absolute value."""
    if isinstance(x, Expr):
        return indices.absolute(x)
    return x.__abs__()


@builtin
def maximum(a: Any, b: Any) -> Any:
    """The larger of both, element by element."""
    return binary("max", a, b)


@builtin
def minimum(a: Any, b: Any) -> Any:
    """The smaller of both, element by element."""
    return binary("min", a, b)


@builtin
def where(condition: Any, a: Any, b: Any) -> Tile:
    """``a`` where the condition holds, else ``b``, element by element."""
    dtype = common_dtype((a, b))
    shape = broadcast_shape(
        [t.shape for t in (condition, a, b) if isinstance(t, TileBase)], "where"
    )
    if isinstance(condition, TileBase):
        chosen: Any = condition
        if condition.dtype != dtypes.bool_:
            chosen = cast("Any", condition) != 0
        chosen = as_tile(chosen, shape, dtypes.bool_)
    else:
        chosen = full(shape, condition, dtypes.bool_)
    tiles = [chosen, as_tile(a, shape, dtype), as_tile(b, shape, dtype)]
    check_meeting(tiles)
    result = builder().emit("where", tiles, {})
    result.origins = merged(tiles)
    return result
