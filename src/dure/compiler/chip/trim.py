"""Products no longer than their tensors.

A tile size is a power of two.  Where all that a dot sums of both operands is shorter, and every
turn leaves out the same rest, the tiles are cut to what is there: nothing is filled in, and nothing
is multiplied by zero.
"""

from __future__ import annotations

from dataclasses import replace

from dure.compiler.chip.usage import Usage, is_free, usage_of
from dure.ir.core import Function, Op, Value, infer
from dure.ir.dtypes import BlockFormat
from dure.ir.expr import Const, as_expr, bounds
from dure.ir.rewrite import Rewritten, Scope, rewrite


def trim(function: Function) -> Function:
    """The same program with shorter tiles where a dot allows it."""
    usage = usage_of(function)

    def dot(op: Op, scope: Scope) -> Rewritten | None:
        lengths = {_length(op, place, usage) for place in (0, 1)}
        length = lengths.pop()
        if lengths or length is None or length >= op.operands[0].tile.shape[-1]:
            return None
        ops: list[Op] = []
        left = _shortened(op.operands[0], op.operands[0].tile.rank - 1, length, usage, ops)
        right = _shortened(op.operands[1], op.operands[1].tile.rank - 2, length, usage, ops)
        made = infer("dot", [left, right, op.operands[2]], span=op.span)
        return Rewritten((*ops, made), made.results)

    return rewrite(function, [("dot", dot)])


def _length(op: Op, place: int, usage: Usage) -> int | None:
    """How much of an operand's K exists at every turn; None where that isn't known."""
    value = op.operands[place]
    axis = value.tile.rank - 1 - place
    while True:
        maker = usage.makers.get(value)
        if maker is None:
            return None
        if maker.name == "transpose" and is_free(maker):
            value, axis = maker.operands[0], maker.attr("order")[axis]
            continue
        if maker.name != "load" or maker.attr("list_axes"):
            return None
        return _exists(maker, axis)


def _exists(load: Op, axis: int) -> int | None:
    kind = load.operands[0].tensor
    start = as_expr(load.attr("index")[axis]) * load.attr("step")[axis] + load.attr("offset")[axis]
    size, stride = as_expr(kind.shape[axis]), as_expr(load.attr("stride")[axis])
    plain = not isinstance(kind.dtype, BlockFormat) and load.attr("fill") == 0
    if not plain or bounds(start) != (0, 0) or stride is not as_expr(1):
        return None
    return size.value if isinstance(size, Const) and size.value > 0 else None


def _shortened(value: Value, axis: int, length: int, usage: Usage, ops: list[Op]) -> Value:
    """The value with ``length`` elements along an axis."""
    maker = usage.makers[value]
    if maker.name == "transpose":
        order: tuple[int, ...] = maker.attr("order")
        source = _shortened(maker.operands[0], order[axis], length, usage, ops)
        made = infer("transpose", [source], maker.attrs, span=maker.span)
    else:
        shape = tuple(length if a == axis else e for a, e in enumerate(maker.attr("shape")))
        made = infer("load", maker.operands, {**maker.attrs, "shape": shape}, span=maker.span)
    made = replace(made, results=(Value(made.result.type, maker.result.name),))
    ops.append(made)
    return made.result
