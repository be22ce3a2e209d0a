"""Conditions that a kernel relies on: proved when it is compiled, or at its launch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dure.errors import KernelError
from dure.ir.expr import (
    Compare,
    Const,
    Expr,
    FloorDiv,
    Logic,
    MinMax,
    Sum,
    Symbol,
    as_expr,
    proves,
    substitute,
    symbol,
    symbols,
)


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition that depends on sizes, and the error where it fails.

    ``assumptions`` are the conditions of the run-time ifs around it.
    """

    condition: Expr
    assumptions: tuple[Expr, ...]
    error: KernelError

    @property
    def is_equality(self) -> bool:
        """Whether it asks for two equal extents."""
        return isinstance(self.condition, Compare) and self.condition.relation == "=="

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise the error unless the condition holds for these sizes, whatever the other symbols
        are.
        """
        if holds(self.condition, sizes):
            return
        found: dict[Expr, Expr] = {}
        condition = _at(self.condition, sizes, found)
        if proved(condition, [_at(a, sizes, found) for a in self.assumptions]):
            return
        error = self.error
        what = self._with_numbers(error.what, sizes)
        raise KernelError(what, where=error.where, rule=error.rule, fix=error.fix)

    def _with_numbers(self, what: str, sizes: Mapping[str, int]) -> str:
        """The error's text with numbers for sizes; those that it doesn't name are added."""
        used = sorted({s.name for s in _all_symbols(self.condition)} & set(sizes))
        unnamed: list[str] = []
        for name in used:
            replaced = re.sub(rf"(?<!['\w.]){re.escape(name)}(?!['\w.])", str(sizes[name]), what)
            if replaced == what:
                unnamed.append(f"{name} = {sizes[name]}")
            what = replaced
        return f"{what} (with {', '.join(unnamed)})" if unnamed else what


def _all_symbols(expr: Expr) -> set[Symbol]:
    """The symbols of an expression and of its symbols' bounds."""
    found: set[Symbol] = set()
    pending: list[Expr] = [expr]
    while pending:
        for one in symbols(pending.pop()):
            if one not in found:
                found.add(one)
                pending.append(one.low)
                if one.high is not None:
                    pending.append(one.high)
    return found


def _at(expr: Expr, sizes: Mapping[str, int], found: dict[Expr, Expr]) -> Expr:
    """``expr`` with the sizes as numbers, in the bounds of the other symbols too."""
    for one in symbols(expr):
        if one in found:
            continue
        if one.name in sizes:
            found[one] = as_expr(sizes[one.name])
        else:
            low = _at(one.low, sizes, found)
            high = None if one.high is None else _at(one.high, sizes, found)
            found[one] = symbol(one.name, one.kind, low, high)
    return substitute(expr, found)


def holds(condition: Expr, sizes: Mapping[str, int]) -> bool:
    """Whether a condition holds for these sizes, by interval arithmetic: quick, not complete."""
    match condition:
        case Const():
            return bool(condition.value)
        case Compare(relation="<" | "<=" | "=="):
            low, high = _interval(condition.right - condition.left, sizes)
            if condition.relation == "==":
                return low == high == 0
            return low >= (1 if condition.relation == "<" else 0)
        case Logic(function="and"):
            return all(holds(argument, sizes) for argument in condition.arguments)
        case _:
            return False


def _interval(expr: Expr, sizes: Mapping[str, int]) -> tuple[float, float]:
    """The lowest and highest value of an expression for these sizes."""
    match expr:
        case Const():
            return expr.value, expr.value
        case Symbol():
            if expr.name in sizes:
                return sizes[expr.name], sizes[expr.name]
            high = math.inf if expr.high is None else _interval(expr.high, sizes)[1]
            return _interval(expr.low, sizes)[0], high
        case Sum():
            total: tuple[float, float] = (expr.constant, expr.constant)
            for product, coefficient in expr.terms:
                part: tuple[float, float] = (coefficient, coefficient)
                for factor in product:
                    part = _times(part, _interval(factor, sizes))
                total = (total[0] + part[0], total[1] + part[1])
            return total
        case FloorDiv():
            ends = _interval(expr.numerator, sizes)
            divisor = _interval(expr.divisor, sizes)
            if divisor[0] != divisor[1] or divisor[0] <= 0:
                return -math.inf, math.inf
            return _divided(ends[0], divisor[0]), _divided(ends[1], divisor[0])
        case MinMax():
            chosen = min if expr.function == "min" else max
            parts = [_interval(argument, sizes) for argument in expr.arguments]
            return chosen(p[0] for p in parts), chosen(p[1] for p in parts)
        case _:
            return 0, 1


def _times(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    corners = [0 if x == 0 or y == 0 else x * y for x in one for y in other]
    return min(corners), max(corners)


def _divided(value: float, divisor: float) -> float:
    return value // divisor if math.isfinite(value) else value


def proved(condition: Expr, assumptions: Sequence[Expr]) -> bool:
    """Whether the condition holds for all values of its symbols for which the assumptions hold."""
    if proves(condition):
        return True
    if impossible(assumptions):
        return True
    known = [fact for assumption in assumptions for fact in _nonnegative(assumption)]
    if not known:
        return False
    goals = list(_nonnegative(condition))
    return bool(goals) and all(_follows(goal, known) for goal in goals)


def impossible(assumptions: Sequence[Expr]) -> bool:
    """Whether the code under these conditions never runs."""
    return any(isinstance(a, Const) and not a.value for a in assumptions)


def _follows(goal: Expr, known: Sequence[Expr]) -> bool:
    zero = as_expr(0)
    candidates = [goal, *(goal - fact for fact in known)]
    candidates += [goal - a - b for i, a in enumerate(known) for b in known[i + 1 :]]
    return any(proves(zero <= candidate) for candidate in candidates)


def _nonnegative(condition: Expr) -> Iterable[Expr]:
    """Expressions that are all nonnegative where the condition holds (and only there)."""
    match condition:
        case Compare(relation="<"):
            yield condition.right - condition.left - 1
        case Compare(relation="<="):
            yield condition.right - condition.left
        case Compare(relation="=="):
            yield condition.right - condition.left
            yield condition.left - condition.right
        case Logic(function="and"):
            for argument in condition.arguments:
                yield from _nonnegative(argument)
        case _:
            return
