"""Proofs that a condition on index expressions holds for every value of their symbols."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from dure.ir.expr import (
    Compare,
    Const,
    Expr,
    FloorDiv,
    Logic,
    MinMax,
    Product,
    Sum,
    Symbol,
    bounds,
    const,
    linear,
    substitute,
)


class Prover:
    """Shows ``expr >= 0`` by replacing symbols, divisions and minima with their worst case.

    The search tries the replacements in every order, each expression once, and gives up after
    ``STEPS`` expressions.
    """

    DEPTH: ClassVar[int] = 12
    STEPS: ClassVar[int] = 300

    @classmethod
    def nonnegative(cls, expr: Expr) -> bool:
        """Whether ``expr >= 0`` was proved."""
        return cls._search(expr, 0, set())

    @classmethod
    def _search(cls, expr: Expr, depth: int, seen: set[Expr]) -> bool:
        low, _ = bounds(expr)
        if low is not None and low >= 0:
            return True
        if isinstance(expr, Const) or expr in seen:
            return False
        if depth >= cls.DEPTH or len(seen) >= cls.STEPS:
            return False
        seen.add(expr)
        return any(
            all(cls._search(part, depth + 1, seen) for part in parts) for parts in cls._weaken(expr)
        )

    @classmethod
    def _weaken(cls, expr: Expr) -> Iterable[list[Expr]]:
        """Sets of expressions: if all of one set are nonnegative, so is ``expr``."""
        terms, _ = linear(expr)
        counts = dict[Expr, int]()
        for product, _ in terms:
            for factor in product:
                _count_parts(factor, counts)
        for product, coefficient in terms:
            for atom in dict.fromkeys(product):
                if product.count(atom) > 1 or not cls._rest_nonnegative(product, atom):
                    continue
                elsewhere = counts[atom] > 1
                others = const(1)
                for factor in product:
                    others = others if factor is atom else others * factor
                yield from cls._weaken_atom(expr, atom, coefficient, others, elsewhere)

    @classmethod
    def _rest_nonnegative(cls, product: Product, atom: Expr) -> bool:
        rest = [factor for factor in product if factor is not atom]
        return all((bounds(factor)[0] or -1) >= 0 or bounds(factor)[0] == 0 for factor in rest)

    @classmethod
    def _weaken_atom(
        cls, expr: Expr, atom: Expr, coefficient: int, others: Expr, elsewhere: bool
    ) -> Iterable[list[Expr]]:
        """Lower bounds of ``expr``, which holds ``atom`` as ``atom * coefficient * others``."""
        match atom:
            case MinMax():
                split = [substitute(expr, {atom: argument}) for argument in atom.arguments]
                if (coefficient > 0) == (atom.function == "min"):
                    yield split
                elif not elsewhere:
                    yield from ([case] for case in split)
            case FloorDiv() if isinstance(atom.divisor, Const) and not elsewhere:
                for numerator, value in _quotients(expr, atom, atom.divisor.value):
                    # value * floor(n / value) lies in [n - value + 1, n].
                    worst = numerator - (value - 1) if coefficient > 0 else numerator
                    if coefficient % value == 0:
                        change = worst * (coefficient // value) - atom * coefficient
                        yield [expr + change * others]
                    else:
                        # An integer is nonnegative if value times it is above -value.
                        rest = (expr - atom * coefficient * others) * value
                        yield [rest + worst * coefficient * others + (value - 1)]
            case Symbol() if not elsewhere:
                worst = atom.low if coefficient > 0 else atom.high
                if worst is not None:
                    yield [substitute(expr, {atom: worst})]
            case _:
                return


def _quotients(expr: Expr, atom: FloorDiv, divisor: int) -> Iterable[tuple[Expr, int]]:
    """What the atom is the floored quotient of, by which number: n // 12 is also (n // 4) // 3,
    where n // 4 is in the expression.
    """
    for product, _ in linear(expr)[0]:
        for other in product:
            if isinstance(other, FloorDiv) and other.numerator is atom.numerator:
                inner = other.divisor.value if isinstance(other.divisor, Const) else divisor
                if inner < divisor and divisor % inner == 0:
                    yield other, divisor // inner
    yield atom.numerator, divisor


def _count_parts(expr: Expr, counts: dict[Expr, int]) -> None:
    """Add to ``counts`` how often each part of ``expr``, itself included, occurs in it."""
    counts[expr] = counts.get(expr, 0) + 1
    match expr:
        case Sum():
            for product, _ in expr.terms:
                for factor in product:
                    _count_parts(factor, counts)
        case FloorDiv():
            _count_parts(expr.numerator, counts)
            _count_parts(expr.divisor, counts)
        case MinMax() | Logic():
            for argument in expr.arguments:
                _count_parts(argument, counts)
        case Compare():
            _count_parts(expr.left, counts)
            _count_parts(expr.right, counts)
        case _:
            return


def proved(condition: Expr) -> bool:
    """Whether ``condition`` holds for every value of its symbols inside their bounds.

    Sound, not complete: False means *not proved*.
    """
    match condition:
        case Const():
            return bool(condition.value)
        case Compare(relation="<"):
            return Prover.nonnegative(condition.right - condition.left - 1)
        case Compare(relation="<="):
            return Prover.nonnegative(condition.right - condition.left)
        case Compare(relation="=="):
            difference = condition.right - condition.left
            return Prover.nonnegative(difference) and Prover.nonnegative(-difference)
        case Compare(relation="!="):
            difference = condition.right - condition.left
            return Prover.nonnegative(difference - 1) or Prover.nonnegative(-difference - 1)
        case Logic(function="and"):
            return all(proved(argument) for argument in condition.arguments)
        case Logic(function="or"):
            return any(proved(argument) for argument in condition.arguments)
        case _:
            return (bounds(condition)[0] or 0) > 0
