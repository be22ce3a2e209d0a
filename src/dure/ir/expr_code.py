"""Index expressions as Python functions: :func:`~dure.ir.expr.evaluate`, made ready once.

A program evaluates the same few expressions thousands of times.  :func:`compile_expr` turns one
into closures over its parts, a few times faster than walking it.  A symbol without a value raises
``KeyError``; otherwise the number (or the error) is that of ``evaluate``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import TypeAlias

from dure.errors import IRError
from dure.ir.expr import (
    Compare,
    Const,
    Expr,
    FloorDiv,
    IntLike,
    Logic,
    MinMax,
    Product,
    Relation,
    Sum,
    Symbol,
    as_expr,
    symbols,
)

Evaluator: TypeAlias = Callable[[Mapping[str, int]], int]

_RELATIONS: Mapping[Relation, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


def compile_expr(expression: IntLike) -> Evaluator:
    """A function from the values of an expression's symbols, by name, to its number."""
    expr = as_expr(expression)
    match expr:
        case Const():
            value = expr.value
            return lambda _: value
        case Symbol():
            return itemgetter(expr.name)
        case Sum():
            return _sum(expr)
        case FloorDiv():
            return _quotient(expr)
        case MinMax():
            chosen: Callable[..., int] = min if expr.function == "min" else max
            parts = [compile_expr(a) for a in expr.arguments]
            if len(parts) == 2:
                first, second = parts
                return lambda values: chosen(first(values), second(values))
            return lambda values: chosen(part(values) for part in parts)
        case Compare():
            relation = _RELATIONS[expr.relation]
            left, right = compile_expr(expr.left), compile_expr(expr.right)
            return lambda values: int(relation(left(values), right(values)))
        case Logic():
            together: Callable[..., bool] = all if expr.function == "and" else any
            conditions = [compile_expr(a) for a in expr.arguments]
            return lambda values: int(together([c(values) for c in conditions]))
        case _:
            raise AssertionError(f"unknown expression {expr!r}")


def _sum(expr: Sum) -> Evaluator:
    constant = expr.constant
    if len(expr.terms) == 1:
        product, coefficient = expr.terms[0]
        only = _product(product)
        if coefficient == 1:
            return lambda values: only(values) + constant
        return lambda values: only(values) * coefficient + constant
    if len(expr.terms) == 2:
        (product, a), (other, b) = expr.terms
        first, second = _product(product), _product(other)
        return lambda values: first(values) * a + second(values) * b + constant
    terms = [(_product(product), coefficient) for product, coefficient in expr.terms]

    def total(values: Mapping[str, int]) -> int:
        found = constant
        for factor, coefficient in terms:
            found += factor(values) * coefficient
        return found

    return total


def _product(product: Product) -> Evaluator:
    factors = [compile_expr(factor) for factor in product]
    if len(factors) == 1:
        return factors[0]
    if len(factors) == 2:
        first, second = factors
        return lambda values: first(values) * second(values)

    def multiplied(values: Mapping[str, int]) -> int:
        found = 1
        for factor in factors:
            found *= factor(values)
        return found

    return multiplied


def _quotient(expr: FloorDiv) -> Evaluator:
    numerator = compile_expr(expr.numerator)
    if isinstance(expr.divisor, Const) and expr.divisor.value > 0:
        number = expr.divisor.value
        return lambda values: numerator(values) // number
    divisor = compile_expr(expr.divisor)

    def quotient(values: Mapping[str, int]) -> int:
        by = divisor(values)
        if by <= 0:
            raise IRError(
                f"division by {by} in an index expression",
                where=f"{expr} with {expr.divisor} = {by}",
                rule="the divisor of an index expression is positive",
                fix="declare a lower bound of 1 for what it is divided by",
            )
        return numerator(values) // by

    return quotient


def missing(error: KeyError, values: Mapping[str, int]) -> IRError:
    """The error for a symbol that has no value."""
    name = str(error.args[0])
    return IRError(
        f"symbol '{name}' has no value",
        rule="an index expression is evaluated with a value for each of its symbols",
        fix=f"bind '{name}' (known: {', '.join(sorted(values)) or 'none'})",
    )


def names_of(expression: IntLike) -> frozenset[str]:
    """The names of the symbols that an expression evaluates."""
    expr: Expr = as_expr(expression)
    return frozenset(s.name for s in symbols(expr))
