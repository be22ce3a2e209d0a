"""Simplifications of tile programs that keep every bit."""

from __future__ import annotations

from collections.abc import Sequence

from dure.ir.core import Function, Op, Region, infer
from dure.ir.expr import Const, as_expr, compare, proves
from dure.ir.rewrite import (
    Pattern,
    Rewritten,
    Scope,
    clone_region,
    eliminate_common_subexpressions,
    eliminate_dead_code,
    rewrite,
)


def _unchanged(op: Op, scope: Scope) -> Rewritten | None:
    """A cast, reshape, broadcast or transpose to what its operand already is."""
    (source,) = op.operands
    moves = op.name == "transpose" and tuple(op.attr("order")) != tuple(range(source.tile.rank))
    if moves or source.type != op.result.type:
        return None
    return Rewritten((), (source,))


def _reshape_twice(op: Op, scope: Scope) -> Rewritten | None:
    """``reshape(reshape(x))`` is ``reshape(x)``."""
    inner = scope.maker(op.operands[0])
    if inner is None or inner.name != "reshape":
        return None
    new = infer("reshape", inner.operands, op.attrs, span=op.span)
    return Rewritten((new,), new.results)


def _transpose_twice(op: Op, scope: Scope) -> Rewritten | None:
    """Two transposes are one."""
    inner = scope.maker(op.operands[0])
    if inner is None or inner.name != "transpose":
        return None
    first, second = inner.attr("order"), op.attr("order")
    order = tuple(first[axis] for axis in second)
    new = infer("transpose", inner.operands, {"order": order}, span=op.span)
    return Rewritten((new,), new.results)


def _undone(op: Op, scope: Scope) -> Rewritten | None:
    """``neg(neg(x))`` and ``not(not(x))`` are ``x``."""
    inner = scope.maker(op.operands[0])
    if inner is None or inner.name != op.name:
        return None
    return Rewritten((), inner.operands)


def _decided(op: Op, scope: Scope) -> Rewritten | None:
    """An if whose condition is the same for all sizes is one of its branches."""
    condition = as_expr(op.attr("condition"))
    if proves(condition):
        branch = op.regions[0]
    elif proves(compare("==", condition, 0)):
        branch = op.regions[1]
    else:
        return None
    inside = clone_region(branch)
    return Rewritten(inside.ops, inside.yields)


def unrolled_once(op: Op, scope: Scope) -> Rewritten | None:
    """A loop that runs once, from where values of the program say, is its body."""
    start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
    (region,) = op.regions
    if isinstance(start, Const) or not proves(compare("==", stop - start, 1)):
        return None
    values = dict(zip(region.args, op.operands, strict=True))
    inside = Region((), region.ops, region.yields)
    inside = clone_region(inside, values, {region.symbols[0]: start})
    return Rewritten(inside.ops, inside.yields)


#: Patterns that shorten a program and change no bit of its results.
PATTERNS: tuple[Pattern, ...] = (
    ("cast", _unchanged),
    ("reshape", _unchanged),
    ("broadcast", _unchanged),
    ("transpose", _unchanged),
    ("reshape", _reshape_twice),
    ("transpose", _transpose_twice),
    ("neg", _undone),
    ("not", _undone),
    ("if", _decided),
)


def simplify(function: Function, more: Sequence[Pattern] = ()) -> Function:
    """Patterns to a fixpoint, ``more`` of them too, then common subexpressions and dead code."""
    function = rewrite(function, (*PATTERNS, *more))
    return eliminate_dead_code(eliminate_common_subexpressions(function))
