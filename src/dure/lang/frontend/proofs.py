"""Conditions that a kernel relies on: proved when it is compiled, or at its launch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dure.errors import KernelError
from dure.ir.expr import (
    Compare,
    Const,
    Expr,
    Logic,
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

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise the error unless the condition holds for these sizes, whatever the other symbols
        are.
        """
        found: dict[Expr, Expr] = {}
        condition = _at(self.condition, sizes, found)
        if proved(condition, [_at(a, sizes, found) for a in self.assumptions]):
            return
        used = sorted({s.name for s in _all_symbols(self.condition)} & set(sizes))
        text = ", ".join(f"{name} = {sizes[name]}" for name in used)
        error = self.error
        what = f"{error.what} (with {text})" if text else error.what
        raise KernelError(what, where=error.where, rule=error.rule, fix=error.fix)


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
