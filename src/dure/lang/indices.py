"""Arithmetic of index scalars: ints where they are known, expressions where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

from dure.errors import KernelError
from dure.ir import expr
from dure.ir.expr import Compare, Expr, Logic, as_expr
from dure.lang.values import Index, plain

_BINARY: dict[str, Callable[[Index, Index], Index]] = {
    "add": lambda a, b: as_expr(a) + b,
    "sub": lambda a, b: as_expr(a) - b,
    "mul": lambda a, b: as_expr(a) * b,
    "floordiv": lambda a, b: as_expr(a) // b,
    "mod": lambda a, b: as_expr(a) % b,
    "min": lambda a, b: expr.minimum(a, b),
    "max": lambda a, b: expr.maximum(a, b),
}
_SYMBOLS = {"div": "/", "pow": "**", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}


def binary(name: str, left: Index, right: Index) -> Index:
    """An arithmetic op of two index scalars, at least one of which is an expression."""
    if name in ("shl", "shr") and isinstance(right, int) and 0 <= right < 63:
        return binary("mul" if name == "shl" else "floordiv", left, 1 << right)
    if name == "pow" and isinstance(right, int) and 0 <= right <= 8:
        product: Index = 1
        for _ in range(right):
            product = binary("mul", product, left)
        return plain(product)
    function = _BINARY.get(name)
    if function is None:
        raise KernelError(
            f"'{_SYMBOLS.get(name, name)}' of the index scalars {left} and {right}",
            rule="index scalars have + - * // % min max and comparisons",
            fix="use // for a whole quotient; for a mask, compute with tiles (dl.arange)",
        )
    if name in ("floordiv", "mod"):
        low, _ = expr.bounds(expr.as_expr(right))
        if low is None or low <= 0:
            raise KernelError(
                f"division of an index scalar by {right}, which may be zero or negative",
                rule="the divisor of index scalars is positive",
                fix="divide by a tile size, or by max(divisor, 1)",
            )
    return plain(function(left, right))


def negate(value: Index) -> Index:
    """``-value``"""
    return plain(-value)


def compare(relation: str, left: Index, right: Index) -> Index | bool:
    """A comparison: a bool where it is decided, else a condition."""
    if relation in (">", ">="):
        relation, left, right = ("<" if relation == ">" else "<="), right, left
    found = plain(expr.compare(cast("expr.Relation", relation), left, right))
    return bool(found) if isinstance(found, int) else found


def is_condition(value: object) -> bool:
    """Whether ``value`` is a condition that is decided at run time."""
    return isinstance(value, Compare | Logic)


def logic(function: Literal["and", "or"], left: Index | bool, right: Index | bool) -> Index | bool:
    """``left and right`` or ``left or right`` of conditions."""
    found = plain(expr.logic(function, condition(left), condition(right)))
    return bool(found) if isinstance(found, int) else found


_OPPOSITES: dict[str, tuple[expr.Relation, bool]] = {
    "<": ("<=", True),
    "<=": ("<", True),
    "==": ("!=", False),
    "!=": ("==", False),
}


def invert(value: Index | bool) -> Index | bool:
    """``not value``"""
    if isinstance(value, Compare):
        relation, swap = _OPPOSITES[value.relation]
        left, right = (value.right, value.left) if swap else (value.left, value.right)
        return compare(relation, left, right)
    if isinstance(value, Logic):
        function = "or" if value.function == "and" else "and"
        parts = [invert(argument) for argument in value.arguments]
        total = parts[0]
        for part in parts[1:]:
            total = logic(function, total, part)
        return total
    if isinstance(value, Expr):
        return compare("==", value, 0)
    return not value


def condition(value: Index | bool) -> Index:
    """``value`` as a condition: a number holds where it is not zero."""
    if isinstance(value, Expr) and not isinstance(value, Compare | Logic):
        return expr.compare("!=", value, 0)
    return int(value) if isinstance(value, bool) else value


def select(chosen: Index | bool, yes: Index, no: Index) -> Index:
    """``yes if chosen else no`` as an expression."""
    if isinstance(chosen, bool):
        return yes if chosen else no
    return plain(expr.as_expr(no) + (expr.as_expr(yes) - no) * condition(chosen))


def cdiv(numerator: Index, divisor: Index) -> Index:
    """``ceil(numerator / divisor)``"""
    if isinstance(numerator, int) and isinstance(divisor, int):
        return -(-numerator // divisor)
    return binary("floordiv", plain(numerator + (divisor - 1)), divisor)


def absolute(value: Index) -> Index:
    """``abs(value)``"""
    return binary("max", value, negate(value)) if isinstance(value, Expr) else abs(value)
