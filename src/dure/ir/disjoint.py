"""The proof that grid instances are independent: no one stores what another stores or reads.

For each grid axis an axis of the argument is sought along which different program ids are apart:
its accesses start at ``c * id + rest``, and ``c`` is at least what the rests and the tile's extent
can make up.  Once ids of one grid axis are apart, the next is tried with that id equal on both
sides, so that ``(i * n + j) * tile`` is proved by way of i, then j.  An id may also be apart by way
of an index argument whose elements are declared unique, or be pinned by an if around every access.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dure.errors import IRError
from dure.ir.accesses import Accesses, AxisAccess, TensorAccess
from dure.ir.core import Function, Param
from dure.ir.expr import (
    Compare,
    Expr,
    FloorDiv,
    Logic,
    Sum,
    Symbol,
    as_expr,
    const,
    proves,
    substitute,
    symbol,
    symbols,
)


@dataclass(frozen=True, slots=True)
class Unproved:
    """Stores whose independence rests on the values of index arguments that aren't unique."""

    param: Param
    store: TensorAccess
    axes: tuple[Symbol, ...]


def check_disjoint(function: Function, accesses: Accesses) -> tuple[Unproved, ...]:
    """Prove that instances don't depend on one another.

    Gives the arguments for which that depends on the values of index arguments.  Raises
    :class:`IRError` at the store where it doesn't even do so.
    """
    open_questions: list[Unproved] = []
    for param in function.params:
        mine = [a for a in accesses.all if a.param is param]
        stores = [a for a in mine if a.kind == "store"]
        if not stores:
            continue
        left = _Proof(function, accesses, mine).unseparated()
        if not left:
            continue
        if not any(_indirect(axis, accesses) for a in mine for axis in a.axes):
            raise _overlap(param, stores[0], left)
        open_questions.append(Unproved(param, stores[0], tuple(left)))
    return tuple(open_questions)


def _indirect(axis: AxisAccess, accesses: Accesses) -> bool:
    return axis.entries is not None or any(s in accesses.symbols for s in symbols(axis.start))


def _overlap(param: Param, store: TensorAccess, left: Sequence[Symbol]) -> IRError:
    names = ", ".join(str(p) for p in left)
    return IRError(
        f"grid instances that differ in {names} may touch the same elements of "
        f"'{param.value.name}'",
        where=store.op.span.render() if store.op.span is not None else "",
        rule="grid instances are unordered: their stores are disjoint, and none reads what another "
        "stores",
        fix="index the store by every program id in steps of the tile's extent, store through a "
        "dl.Index(..., unique=True), or say combine=",
    )


class _Proof:
    """The proof for one argument."""

    def __init__(
        self, function: Function, accesses: Accesses, mine: Sequence[TensorAccess]
    ) -> None:
        self.accesses = accesses
        self.uniform = frozenset(function.symbols)
        self.mine = list(mine)
        self.values: dict[Expr, Expr] = {}
        self.ids: list[Symbol] = []
        self.original: dict[Symbol, Symbol] = {}
        for entry, extent in zip(function.program_ids, function.grid, strict=True):
            for part in self._split(entry, extent):
                self.original[part] = entry
                self.ids.append(part)
        self.equal: set[Symbol] = set()

    def unseparated(self) -> list[Symbol]:
        """The program ids that may differ between instances that touch the same element."""
        pairs = [
            (a, b)
            for a in self.mine
            for b in self.mine
            if "store" in (a.kind, b.kind) and not _combined(a, b)
        ]
        left = [p for p in self.ids if not proves(as_expr(p.high or 1) <= p.low)]
        progress = bool(pairs)
        while progress and left:
            apart = next((p for p in left if self._pinned(p) or self._apart(p, pairs)), None)
            progress = apart is not None
            if apart is not None:
                self.equal.add(apart)
                left.remove(apart)
        return list(dict.fromkeys(self.original[p] for p in left)) if pairs else []

    # --- program ids that are cut in two ---------------------------------------------------------

    def _split(self, entry: Symbol, extent: Expr) -> list[Symbol]:
        """``id // n`` and ``id % n`` as two ids, where the accesses are written with them."""
        cuts = {
            atom
            for access in self.mine
            for start in _starts(access)
            for atom in _atoms(start)
            if isinstance(atom, FloorDiv)
            and atom.numerator is entry
            and symbols(atom.divisor) <= self.uniform
        }
        if len(cuts) != 1:
            return [entry]
        (cut,) = cuts
        assert isinstance(cut, FloorDiv)
        major = symbol(f"{entry.name}//", "grid", 0, (extent - 1) // cut.divisor)
        minor = symbol(f"{entry.name}%", "grid", 0, cut.divisor - 1)
        self.values[cut] = major
        self.values[entry] = major * cut.divisor + minor
        return [major, minor]

    def _resolved(self, expr: Expr) -> Expr:
        if not self.values:
            return expr
        cuts: dict[Expr, Expr] = {k: v for k, v in self.values.items() if isinstance(k, FloorDiv)}
        return substitute(substitute(expr, cuts), self.values)

    # --- ids apart -------------------------------------------------------------------------------

    def _apart(self, entry: Symbol, pairs: Iterable[tuple[TensorAccess, TensorAccess]]) -> bool:
        found = list(pairs)
        rank = len(found[0][0].axes)
        return any(
            all(self._axes_apart(entry, a.axes[axis], b.axes[axis]) for a, b in found)
            for axis in range(rank)
        )

    def _axes_apart(self, entry: Symbol, one: AxisAccess, other: AxisAccess) -> bool:
        """Whether ``one`` lies wholly above ``other`` where its id is the larger, or apart by
        unique indices.
        """
        if one.entries is not None or other.entries is not None:
            return self._lists_apart(entry, one, other)
        key = self._key(entry, one.start)
        if key is None or self._key(entry, other.start) is not key:
            return False
        mine, theirs = self._linear(one.start, key), self._linear(other.start, key)
        if mine is None or theirs is None or mine[0] is not theirs[0]:
            return False
        step = mine[0] if proves(const(0) <= mine[0]) else -mine[0]
        gap = step + mine[1] - self._primed(theirs[1])
        return proves(self._resolved(other.span) <= gap)

    def _key(self, entry: Symbol, start: Expr) -> Symbol | None:
        """What stands for the id in this start: the id, or a unique index read by way of it."""
        resolved = self._resolved(start)
        if entry in symbols(resolved):
            return entry
        for found in sorted(symbols(resolved), key=str):
            read = self.accesses.symbols.get(found)
            # Negative elements are absent and may repeat.
            present = read is not None and proves(const(0) <= found.low)
            if read is not None and present and self._reads_apart(entry, read, read):
                return found
        return None

    def _reads_apart(self, entry: Symbol, one: TensorAccess, other: TensorAccess) -> bool:
        """Whether reads of a unique index argument by different ids read different elements."""
        if one.param is not other.param or not one.param.value.tensor.unique:
            return False
        return any(
            a.entries is None and b.entries is None and self._axes_apart(entry, a, b)
            for a, b in zip(one.axes, other.axes, strict=True)
        )

    def _lists_apart(self, entry: Symbol, one: AxisAccess, other: AxisAccess) -> bool:
        if one.entries is None or other.entries is None:
            return False
        same = one.step is other.step and one.start is other.start
        return same and self._reads_apart(entry, one.entries, other.entries)

    def _linear(self, start: Expr, key: Symbol) -> tuple[Expr, Expr] | None:
        """``(c, rest)`` with start = c * key + rest, c uniform and rest free of key."""
        resolved = self._resolved(start)
        terms = resolved.terms if isinstance(resolved, Sum) else (((resolved,), 1),)
        coefficient = const(0)
        for product, number in terms:
            if product.count(key) == 1:
                part = const(number)
                for factor in product:
                    part = part if factor is key else part * factor
                coefficient = coefficient + part
        rest = resolved - coefficient * key
        if key in symbols(rest) or not symbols(coefficient) <= self.uniform:
            return None
        return coefficient, rest

    def _primed(self, expr: Expr) -> Expr:
        """``expr`` in another instance: what varies gets a name of its own there."""
        return substitute(expr, {s: self._other(s) for s in symbols(expr)})

    def _other(self, entry: Symbol) -> Expr:
        if entry in self.uniform or entry in self.equal:
            return entry
        low = self._primed(entry.low)
        high = None if entry.high is None else self._primed(entry.high)
        return symbol(f"{entry.name}'", entry.kind, low, high)

    # --- ids pinned by conditions ----------------------------------------------------------------

    def _pinned(self, entry: Symbol) -> bool:
        """Whether every access happens for one value of the id only."""
        found = {self._value_of(entry, access) for access in self.mine}
        return len(found) == 1 and None not in found

    def _value_of(self, entry: Symbol, access: TensorAccess) -> Expr | None:
        for condition in _conjuncts(access.conditions):
            if not isinstance(condition, Compare):
                continue
            left, right = condition.left, condition.right
            if condition.relation == "==" and entry in (left, right):
                value = right if left is entry else left
                if symbols(value) <= self.uniform:
                    return value
            limit = right if condition.relation == "<=" else right - 1
            if condition.relation in ("<", "<=") and left is entry and proves(limit <= entry.low):
                return entry.low
        return None


def _combined(one: TensorAccess, other: TensorAccess) -> bool:
    """Stores with the same combine= may meet: their order is fixed."""
    if one.kind != "store" or other.kind != "store":
        return False
    return bool(one.op.attr("combine")) and one.op.attr("combine") == other.op.attr("combine")


def _conjuncts(conditions: Iterable[Expr]) -> Iterable[Expr]:
    for condition in conditions:
        if isinstance(condition, Logic) and condition.function == "and":
            yield from _conjuncts(condition.arguments)
        else:
            yield condition


def _starts(access: TensorAccess) -> Iterable[Expr]:
    for axis in access.axes:
        yield axis.start
        if axis.entries is not None:
            yield from _starts(axis.entries)


def _atoms(expr: Expr) -> Iterable[Expr]:
    """The factors of a sum's products."""
    if isinstance(expr, Sum):
        for product, _ in expr.terms:
            yield from product
    else:
        yield expr
