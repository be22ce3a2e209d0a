"""What control depends on: numbers where they are known, intervals of unknowns where they aren't.

A condition that holds no unknown is a number.  One that does is a bound on one *unknown*, a linear
form of run-time values (``u``): ``u <= t``, ``u >= t`` or ``u == t``.  A state knows an interval of
each unknown that it has decided upon; a condition that the interval doesn't settle splits it.
Unknowns are independent of one another, which adds runs that can't happen, and leaves out none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dure.ir.expr import (
    Compare,
    Const,
    Expr,
    Logic,
    as_expr,
    bounds,
    evaluate,
    linear,
    substitute,
    symbols,
)

#: Values of symbols by name; an expression holds symbols that are only known at run time.
Environment: TypeAlias = Mapping[str, "int | Expr"]
#: An unknown and the interval it lies in, ends inclusive, None where it has no end.
Decision: TypeAlias = tuple[Expr, "int | None", "int | None"]
Decisions: TypeAlias = tuple[Decision, ...]


_NAMES: dict[Expr, frozenset[str]] = {}


def names(expr: Expr) -> frozenset[str]:
    """The names of the symbols of an expression."""
    found = _NAMES.get(expr)
    if found is None:
        found = _NAMES[expr] = frozenset(s.name for s in symbols(expr))
    return found


def value_of(expr: Expr, environment: Environment) -> int | Expr:
    """An expression with what is known put in: a number where all is."""
    if isinstance(expr, Const):
        return expr.value
    numbers: dict[str, int] = {}
    for name in names(expr):
        value = environment.get(name)
        if isinstance(value, int):
            numbers[name] = value
        else:
            break
    else:
        return evaluate(expr, numbers)
    put: dict[Expr, int | Expr] = {
        s: environment[s.name] for s in symbols(expr) if s.name in environment
    }
    found = substitute(expr, put)
    return found.value if isinstance(found, Const) else found


def known(expr: Expr, environment: Environment) -> int | None:
    """The number that an expression is, or None where that depends on run-time values."""
    found = value_of(expr, environment)
    return found if isinstance(found, int) else None


def leaves(condition: Expr) -> Iterator[Expr]:
    """The comparisons of a condition."""
    if isinstance(condition, Logic):
        for argument in condition.arguments:
            yield from leaves(argument)
    else:
        yield condition


@dataclass(frozen=True, slots=True)
class Unknown:
    """``expr == sign * unknown + offset``, with ``unknown`` in one canonical form."""

    unknown: Expr
    sign: int
    offset: int


def unknown_of(expr: Expr) -> Unknown:
    """An expression as a multiple (1 or -1) of an unknown, and a number."""
    terms, offset = linear(expr)
    first = next(iter(terms))[1]
    sign = 1 if first > 0 else -1
    return Unknown((expr - offset) * sign, sign, offset)


def interval(decisions: Decisions, unknown: Expr) -> tuple[int | None, int | None]:
    """What is known of an unknown."""
    for other, low, high in decisions:
        if other is unknown:
            return low, high
    return bounds(unknown)


def decided(decisions: Decisions, unknown: Expr, low: int | None, high: int | None) -> Decisions:
    """Decisions with the interval of an unknown replaced."""
    rest = [d for d in decisions if d[0] is not unknown]
    return tuple(sorted((*rest, (unknown, low, high)), key=lambda d: str(d[0])))


def forget(decisions: Decisions, defined: frozenset[str]) -> Decisions:
    """Decisions without those on symbols whose scope has ended."""
    if not decisions:
        return decisions
    return tuple(d for d in decisions if not names(d[0]) & defined)


def decide(
    decisions: Decisions, condition: Expr, environment: Environment
) -> Iterator[tuple[Decisions, bool]]:
    """Every outcome of a condition, each with what it decides."""
    found = _truth(condition, environment, decisions)
    if isinstance(found, bool):
        yield decisions, found
        return
    unknown, last = found
    low, high = interval(decisions, unknown)
    yield from decide(decided(decisions, unknown, low, last), condition, environment)
    yield from decide(decided(decisions, unknown, last + 1, high), condition, environment)


def _truth(
    condition: Expr, environment: Environment, decisions: Decisions
) -> bool | tuple[Expr, int]:
    """The outcome, or where to split an unknown's interval: behind a number."""
    if isinstance(condition, Logic):
        absorbing = condition.function == "or"
        split: tuple[Expr, int] | None = None
        for argument in condition.arguments:
            found = _truth(argument, environment, decisions)
            if isinstance(found, tuple):
                split = split or found
            elif found == absorbing:
                return absorbing
        return split or not absorbing
    left, relation, right = parts(condition)
    form = value_of(left - right, environment)
    if isinstance(form, int):
        return holds(relation, form)
    found = unknown_of(form)
    return _settle(found, relation, interval(decisions, found.unknown))


def parts(condition: Expr) -> tuple[Expr, str, Expr]:
    """A comparison's sides; an expression that isn't one is compared with 0."""
    if isinstance(condition, Compare):
        return condition.left, condition.relation, condition.right
    return condition, "!=", as_expr(0)


def holds(relation: str, form: int) -> bool:
    """Whether a form is in the relation to 0."""
    match relation:
        case "<":
            return form < 0
        case "<=":
            return form <= 0
        case "==":
            return form == 0
        case _:
            return form != 0


def _settle(
    form: Unknown, relation: str, ends: tuple[int | None, int | None]
) -> bool | tuple[Expr, int]:
    low, high = ends
    if relation in ("==", "!="):
        point = -form.offset * form.sign
        outside = (low is not None and point < low) or (high is not None and point > high)
        if outside:
            return relation == "!="
        if low == high == point:
            return relation == "=="
        return form.unknown, point - 1 if low != point else point
    # sign * u + offset < 0 or <= 0: u <= t for a positive sign, else u >= t.
    slack = 1 if relation == "<" else 0
    if form.sign > 0:
        last = -form.offset - slack
        if high is not None and high <= last:
            return True
        if low is not None and low > last:
            return False
        return form.unknown, last
    first = form.offset + slack
    if low is not None and low >= first:
        return True
    if high is not None and high < first:
        return False
    return form.unknown, first - 1


def slope(expr: Expr, symbol: Expr) -> int | None:
    """How much a form grows with a symbol that it is linear in, or None where it isn't."""
    total = 0
    for product, coefficient in linear(expr)[0]:
        inside = [f for f in product if f is symbol or symbol in symbols(f)]
        if not inside:
            continue
        if len(product) != 1 or product[0] is not symbol:
            return None
        total += coefficient
    return total
