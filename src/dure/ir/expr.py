"""Integer index expressions over symbols with declared bounds.

An expression is interned: two expressions built the same way are the same object, so ``is``
compares structure.  Building one simplifies it: sums are kept as sorted linear forms over products,
divisions and remainders by constants are split when they are exact.  A symbol's bounds may
themselves be expressions (a program id lies below its grid), and :func:`proves` uses them to show
that an inequality holds for *every* value that the symbols can take.

All arithmetic is that of Python's unbounded integers: ``//`` floors and ``%`` is never negative for
a positive divisor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from dure.errors import IRError
from dure.ir.interval import Interval

IntLike: TypeAlias = "int | Expr"
Product: TypeAlias = "tuple[Expr, ...]"
SymbolKind: TypeAlias = Literal["size", "grid", "loop", "index", "stride"]
Relation: TypeAlias = Literal["<", "<=", "==", "!="]

_INTERNED: dict[object, Expr] = {}


class Expr:
    """Base of all index expressions.  Use :func:`const`, :func:`symbol` and Python's operators."""

    __slots__ = ()

    def __add__(self, other: IntLike) -> Expr:
        return _sum([(self, 1), (as_expr(other), 1)])

    __radd__ = __add__

    def __sub__(self, other: IntLike) -> Expr:
        return _sum([(self, 1), (as_expr(other), -1)])

    def __rsub__(self, other: IntLike) -> Expr:
        return _sum([(as_expr(other), 1), (self, -1)])

    def __neg__(self) -> Expr:
        return _sum([(self, -1)])

    def __mul__(self, other: IntLike) -> Expr:
        return _multiply(self, as_expr(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: IntLike) -> Expr:
        return _floordiv(self, as_expr(other))

    def __mod__(self, other: IntLike) -> Expr:
        divisor = as_expr(other)
        return self - _floordiv(self, divisor) * divisor

    def __rfloordiv__(self, other: int) -> Expr:
        return _floordiv(as_expr(other), self)

    def __lt__(self, other: IntLike) -> Expr:
        return compare("<", self, other)

    def __le__(self, other: IntLike) -> Expr:
        return compare("<=", self, other)

    def __gt__(self, other: IntLike) -> Expr:
        return compare("<", other, self)

    def __ge__(self, other: IntLike) -> Expr:
        return compare("<=", other, self)

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Const(Expr):
    """An integer."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Symbol(Expr):
    """A run-time integer: a size, program id, loop variable, or element of an index argument.

    ``low <= value <= high`` always holds; ``high`` of None means that no bound is known.
    """

    name: str
    kind: SymbolKind
    low: Expr
    high: Expr | None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Sum(Expr):
    """``constant + sum(coefficient * product)``, sorted, with no zero coefficient."""

    terms: tuple[tuple[Product, int], ...]
    constant: int

    def __str__(self) -> str:
        parts: list[str] = []
        for product, coefficient in self.terms:
            text = "*".join(_wrap(factor) for factor in product)
            if coefficient not in (1, -1):
                text = f"{text}*{abs(coefficient)}"
            parts.append(("- " if coefficient < 0 else "+ " if parts else "") + text)
        if self.constant:
            sign = "-" if self.constant < 0 else "+"
            parts.append(f"{sign} {abs(self.constant)}" if parts else str(self.constant))
        text = " ".join(parts)
        return "-" + text[2:] if text.startswith("- ") else text


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class FloorDiv(Expr):
    """``floor(numerator / divisor)``; the divisor is positive."""

    numerator: Expr
    divisor: Expr

    def __str__(self) -> str:
        return f"{_wrap(self.numerator)}//{_wrap(self.divisor)}"


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class MinMax(Expr):
    """The smallest (``min``) or largest (``max``) of two or more expressions."""

    function: Literal["min", "max"]
    arguments: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(str(a) for a in self.arguments)})"


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Compare(Expr):
    """1 where the relation holds, else 0."""

    relation: Relation
    left: Expr
    right: Expr

    def __str__(self) -> str:
        return f"({self.left} {self.relation} {self.right})"


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Logic(Expr):
    """Boolean ``and`` / ``or`` of conditions (0 or 1 each)."""

    function: Literal["and", "or"]
    arguments: tuple[Expr, ...]

    def __str__(self) -> str:
        return "(" + f" {self.function} ".join(str(a) for a in self.arguments) + ")"


def _wrap(expr: Expr) -> str:
    return f"({expr})" if isinstance(expr, Sum | FloorDiv) else str(expr)


def _intern(key: object, build: Callable[[], Expr]) -> Expr:
    found = _INTERNED.get(key)
    if found is None:
        # setdefault keeps interning safe when two threads build the same expression at once.
        found = _INTERNED.setdefault(key, build())
    return found


def const(value: int) -> Expr:
    """The integer ``value`` as an expression."""
    return _intern(("const", int(value)), lambda: Const(int(value)))


def as_expr(value: IntLike) -> Expr:
    """``value`` itself if it is an expression, else the constant."""
    return value if isinstance(value, Expr) else const(value)


def symbol(
    name: str, kind: SymbolKind = "size", low: IntLike = 0, high: IntLike | None = None
) -> Symbol:
    """The symbol of this name and bounds (both inclusive)."""
    low_expr, high_expr = as_expr(low), None if high is None else as_expr(high)
    key = ("symbol", name, kind, id(low_expr), id(high_expr))
    found = _intern(key, lambda: Symbol(name, kind, low_expr, high_expr))
    assert isinstance(found, Symbol)
    return found


_ORDER: dict[Expr, str] = {}


def _order(expr: Expr) -> str:
    """What factors and arguments are sorted by: their text."""
    found = _ORDER.get(expr)
    if found is None:
        found = _ORDER[expr] = str(expr)
    return found


def linear(expr: Expr) -> tuple[Iterable[tuple[Product, int]], int]:
    """The terms and the constant of an expression as a sum."""
    if isinstance(expr, Const):
        return (), expr.value
    if isinstance(expr, Sum):
        return expr.terms, expr.constant
    return (((expr,), 1),), 0


def _sum(parts: Iterable[tuple[Expr, int]]) -> Expr:
    constant, coefficients = 0, dict[Product, int]()
    for part, scale in parts:
        terms, offset = linear(part)
        constant += scale * offset
        for product, coefficient in terms:
            coefficients[product] = coefficients.get(product, 0) + scale * coefficient
    return _from_terms(coefficients, constant)


def _from_terms(coefficients: Mapping[Product, int], constant: int) -> Expr:
    kept = [(product, value) for product, value in coefficients.items() if value]
    if not kept:
        return const(constant)
    if len(kept) == 1 and not constant and kept[0][1] == 1 and len(kept[0][0]) == 1:
        return kept[0][0][0]
    terms = tuple(sorted(kept, key=lambda term: [_order(factor) for factor in term[0]]))
    key = ("sum", tuple((tuple(map(id, p)), c) for p, c in terms), constant)
    return _intern(key, lambda: Sum(terms, constant))


def _multiply(left: Expr, right: Expr) -> Expr:
    left_terms, left_constant = linear(left)
    right_terms, right_constant = linear(right)
    coefficients = dict[Product, int]()

    def accumulate(product: Product, coefficient: int) -> None:
        coefficients[product] = coefficients.get(product, 0) + coefficient

    for product, coefficient in left_terms:
        accumulate(product, coefficient * right_constant)
        for other, scale in right_terms:
            accumulate(tuple(sorted((*product, *other), key=_order)), coefficient * scale)
    for other, scale in right_terms:
        accumulate(other, scale * left_constant)
    return _from_terms(coefficients, left_constant * right_constant)


def _floordiv(numerator: Expr, divisor: Expr) -> Expr:
    if isinstance(divisor, Const):
        if divisor.value <= 0:
            raise IRError(
                f"division by {divisor.value} in an index expression",
                where=f"{numerator} // {divisor}",
                rule="the divisor of an index expression is positive",
                fix="divide by a tile size or another positive constant",
            )
        value = divisor.value
        if value == 1:
            return numerator
        terms, constant = linear(numerator)
        whole = {p: c // value for p, c in terms if c % value == 0}
        rest = _from_terms({p: c for p, c in terms if c % value}, constant % value)
        quotient = _from_terms(whole, constant // value)
        low, high = bounds(rest)
        if low is not None and high is not None and low // value == high // value:
            return quotient + low // value
        return quotient + _make_floordiv(rest, divisor)
    if isinstance(numerator, Const) and numerator.value == 0:
        return numerator
    if numerator is divisor:
        return const(1)
    return _make_floordiv(numerator, divisor)


def _make_floordiv(numerator: Expr, divisor: Expr) -> Expr:
    if isinstance(numerator, FloorDiv) and isinstance(numerator.divisor, Const):
        return _floordiv(numerator.numerator, numerator.divisor * divisor)
    key = ("floordiv", id(numerator), id(divisor))
    return _intern(key, lambda: FloorDiv(numerator, divisor))


def cdiv(numerator: IntLike, divisor: IntLike) -> Expr:
    """``ceil(numerator / divisor)``."""
    return (as_expr(numerator) + (as_expr(divisor) - 1)) // divisor


def minimum(*arguments: IntLike) -> Expr:
    """The smallest of the arguments."""
    return _minmax("min", arguments)


def maximum(*arguments: IntLike) -> Expr:
    """The largest of the arguments."""
    return _minmax("max", arguments)


def _minmax(function: Literal["min", "max"], arguments: Iterable[IntLike]) -> Expr:
    flat: list[Expr] = []
    for argument in map(as_expr, arguments):
        if isinstance(argument, MinMax) and argument.function == function:
            flat.extend(argument.arguments)
        else:
            flat.append(argument)
    kept: list[Expr] = []
    for candidate in flat:
        if any(_dominates(function, other, candidate) for other in kept):
            continue
        kept = [other for other in kept if not _dominates(function, candidate, other)]
        kept.append(candidate)
    if len(kept) == 1:
        return kept[0]
    ordered = tuple(sorted(kept, key=_order))
    key = (function, tuple(map(id, ordered)))
    return _intern(key, lambda: MinMax(function, ordered))


def _dominates(function: str, one: Expr, other: Expr) -> bool:
    """Whether ``one`` makes ``other`` superfluous, by numeric bounds: building stays cheap."""
    low, high = bounds(other - one)
    return low is not None and low >= 0 if function == "min" else high is not None and high <= 0


def compare(relation: Relation, left: IntLike, right: IntLike) -> Expr:
    """1 where ``left relation right`` holds, else 0; folded where the bounds decide it."""
    left, right = as_expr(left), as_expr(right)
    low, high = bounds(right - left)
    decided: bool | None = None
    if relation == "<":
        decided = True if low is not None and low > 0 else None
        decided = False if high is not None and high <= 0 else decided
    elif relation == "<=":
        decided = True if low is not None and low >= 0 else None
        decided = False if high is not None and high < 0 else decided
    else:
        apart = (low is not None and low > 0) or (high is not None and high < 0)
        decided = (relation == "!=") if apart else None
        if low == high == 0:
            decided = relation == "=="
    if decided is not None:
        return const(int(decided))
    key = ("compare", relation, id(left), id(right))
    return _intern(key, lambda: Compare(relation, left, right))


def logic(function: Literal["and", "or"], *arguments: IntLike) -> Expr:
    """Boolean ``and`` / ``or`` of conditions."""
    absorbing = 0 if function == "and" else 1
    kept: list[Expr] = []
    for argument in map(as_expr, arguments):
        if isinstance(argument, Const):
            if bool(argument.value) == bool(absorbing):
                return const(absorbing)
        elif argument not in kept:
            kept.append(argument)
    if len(kept) <= 1:
        return kept[0] if kept else const(1 - absorbing)
    key = (function, tuple(map(id, kept)))
    return _intern(key, lambda: Logic(function, tuple(kept)))


def bounds(expr: Expr) -> tuple[int | None, int | None]:
    """Numeric lower and upper bound (inclusive), None where there is none."""
    if isinstance(expr, Const):
        return expr.value, expr.value
    found = _BOUNDS.get(expr)
    if found is None:
        found = _BOUNDS[expr] = _bounds(expr)
    return found


_BOUNDS: dict[Expr, tuple[int | None, int | None]] = {}


def _bounds(expr: Expr) -> tuple[int | None, int | None]:
    match expr:
        case Symbol():
            return bounds(expr.low)[0], None if expr.high is None else bounds(expr.high)[1]
        case Sum():
            total = Interval(expr.constant, expr.constant)
            for product, coefficient in expr.terms:
                part = Interval(1, 1)
                for factor in product:
                    part = part.times(Interval(*bounds(factor)))
                total = total.plus(part.times(Interval(coefficient, coefficient)))
            return _together(expr, total)
        case FloorDiv():
            numerator, divisor = bounds(expr.numerator), bounds(expr.divisor)
            if divisor[0] is None or divisor[0] <= 0:
                return (0 if numerator[0] is not None and numerator[0] >= 0 else None), None
            ends = [divisor[0], divisor[1]]
            lows = [0 if d is None else numerator[0] // d for d in ends if numerator[0] is not None]
            highs = [
                0 if d is None else numerator[1] // d for d in ends if numerator[1] is not None
            ]
            return (min(lows) if lows else None), (max(highs) if highs else None)
        case MinMax():
            return _chosen(expr.function, [bounds(a) for a in expr.arguments])
        case _:
            return 0, 1


def _together(expr: Sum, known: Interval) -> tuple[int | None, int | None]:
    """Bounds of a sum, given those of its terms apart: what a minimum or maximum shares with the
    other terms counts once.
    """
    for (chosen, *others), coefficient in expr.terms:
        if others or not isinstance(chosen, MinMax):
            continue
        rest = expr - chosen * coefficient
        if not symbols(chosen) & symbols(rest):
            continue
        pairs = [bounds(rest + argument * coefficient) for argument in chosen.arguments]
        least = (chosen.function == "min") == (coefficient > 0)
        low, high = _chosen("min" if least else "max", pairs)
        lows = [b for b in (low, known.low) if b is not None]
        highs = [b for b in (high, known.high) if b is not None]
        return max(lows, default=None), min(highs, default=None)
    return known.low, known.high


def _chosen(
    function: str, pairs: Sequence[tuple[int | None, int | None]]
) -> tuple[int | None, int | None]:
    """Bounds of the least or the greatest of expressions with these bounds."""
    lows = [low for low, _ in pairs if low is not None]
    highs = [high for _, high in pairs if high is not None]
    whole_low, whole_high = len(lows) == len(pairs), len(highs) == len(pairs)
    if function == "min":
        return (min(lows) if whole_low else None), (min(highs) if highs else None)
    return (max(lows) if lows else None), (max(highs) if whole_high else None)


def substitute(expr: Expr, values: Mapping[Expr, IntLike]) -> Expr:
    """``expr`` with every symbol (or subexpression) in ``values`` replaced."""
    if expr in values:
        return as_expr(values[expr])
    match expr:
        case Sum():
            parts: list[tuple[Expr, int]] = [(const(expr.constant), 1)]
            for product, coefficient in expr.terms:
                whole = const(1)
                for factor in product:
                    whole = whole * substitute(factor, values)
                parts.append((whole, coefficient))
            return _sum(parts)
        case FloorDiv():
            return substitute(expr.numerator, values) // substitute(expr.divisor, values)
        case MinMax():
            return _minmax(expr.function, [substitute(a, values) for a in expr.arguments])
        case Compare():
            left, right = substitute(expr.left, values), substitute(expr.right, values)
            return compare(expr.relation, left, right)
        case Logic():
            return logic(expr.function, *(substitute(a, values) for a in expr.arguments))
        case _:
            return expr


def symbols(expr: Expr) -> set[Symbol]:
    """Every symbol that occurs in ``expr`` (not those of its symbols' bounds)."""
    match expr:
        case Symbol():
            return {expr}
        case Sum():
            return {s for product, _ in expr.terms for factor in product for s in symbols(factor)}
        case FloorDiv():
            return symbols(expr.numerator) | symbols(expr.divisor)
        case MinMax() | Logic():
            return {s for argument in expr.arguments for s in symbols(argument)}
        case Compare():
            return symbols(expr.left) | symbols(expr.right)
        case _:
            return set()


def evaluate(expr: IntLike, values: Mapping[str, int]) -> int:
    """The number that ``expr`` is when its symbols have these values (by name)."""
    if isinstance(expr, int):
        return expr
    match expr:
        case Const():
            return expr.value
        case Symbol():
            if expr.name not in values:
                raise IRError(
                    f"symbol '{expr.name}' has no value",
                    rule="an index expression is evaluated with a value for each of its symbols",
                    fix=f"bind '{expr.name}' (known: {', '.join(sorted(values)) or 'none'})",
                )
            return values[expr.name]
        case Sum():
            total = expr.constant
            for product, coefficient in expr.terms:
                for factor in product:
                    coefficient *= evaluate(factor, values)
                total += coefficient
            return total
        case FloorDiv():
            divisor = evaluate(expr.divisor, values)
            if divisor <= 0:
                raise IRError(
                    f"division by {divisor} in an index expression",
                    where=f"{expr} with {expr.divisor} = {divisor}",
                    rule="the divisor of an index expression is positive",
                    fix="declare a lower bound of 1 for what it is divided by",
                )
            return evaluate(expr.numerator, values) // divisor
        case MinMax():
            chosen = min if expr.function == "min" else max
            return chosen(evaluate(a, values) for a in expr.arguments)
        case Compare():
            left, right = evaluate(expr.left, values), evaluate(expr.right, values)
            return int(_RELATIONS[expr.relation](left, right))
        case Logic():
            parts = [bool(evaluate(a, values)) for a in expr.arguments]
            return int(all(parts) if expr.function == "and" else any(parts))
        case _:
            raise AssertionError(f"unknown expression {expr!r}")


_RELATIONS: dict[Relation, Callable[[int, int], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


@functools.lru_cache(maxsize=4096)
def proves(condition: Expr) -> bool:
    """Whether ``condition`` holds for every value of its symbols inside their bounds.

    Sound, not complete: False means *not proved*.  Code asks the same again and again: answers are
    remembered.
    """
    # Imported here: proofs are built on expressions.
    from dure.ir.proofs import proved

    return proved(condition)


@dataclass(frozen=True, slots=True)
class Range:
    """``range(start, stop, step)`` with symbolic ends and a positive constant step."""

    start: Expr
    stop: Expr
    step: int = 1
    trips: Expr = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trips", maximum(0, cdiv(self.stop - self.start, self.step)))
