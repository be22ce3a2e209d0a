"""Conflicts between transfers in the home memory.

Only tensors that the program stores to can conflict.  Two transfers conflict unless their boxes are
provably disjoint, given what is the same for both: the core, and the iteration of the loops around
both that hasn't changed between them.  Iterations of a loop with ``instances`` are different grid
instances, which the tile level has proved disjoint; so are cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from dure.ir.core import Op, Region
from dure.ir.expr import Expr, Symbol, bounds, linear, proves, substitute, symbol, symbols
from dure.ir.expr_code import compile_expr
from dure.sim.sanitizer.control import slope
from dure.sim.sanitizer.findings import Finding, Place
from dure.sim.sanitizer.model import Model
from dure.sim.sanitizer.pieces import Transfer

#: Values of symbols that are tried together at most.
_TRIED = 1 << 15


class HomeRules:
    """Says which transfers conflict; answers are kept."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.transfers = sorted(model.transfers.of.values(), key=lambda t: t.number)
        self.known: dict[tuple[int, int, int], bool] = {}
        self.within: dict[int, tuple[int, ...]] = {}

    def inside(self, loop: int) -> tuple[int, ...]:
        """Transfers inside a loop."""
        found = self.within.get(loop)
        if found is None:
            op = self.model.loops[loop]
            found = tuple(t.number for t in self.transfers if op in t.loops)
            self.within[loop] = found
        return found

    def matters(self, number: int, loop: int) -> bool:
        """Whether a later transfer may conflict with one, now (``loop`` of -1) or once that loop,
        or one around it, has gone on.
        """
        key = (number, -1, loop)
        found = self.known.get(key)
        if found is None:
            at = [loop, *range(max(loop, 0))] if loop >= 0 else [-1, *range(len(self.model.loops))]
            found = self.known[key] = any(
                self.conflict(number, other.number, turn) for turn in at for other in self.transfers
            )
        return found

    def conflict(self, first: int, second: int, loop: int) -> bool:
        """Whether two transfers may touch the same elements, one at least writing.

        ``loop`` is the outermost loop whose iteration has changed since the first, or -1.
        """
        key = (first, second, loop)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._conflict(
                self.transfers[first], self.transfers[second], loop
            )
        return found

    def _conflict(self, a: Transfer, b: Transfer, loop: int) -> bool:
        shaped = self.model.transfers.shaped
        if not (a.store or b.store):
            return False
        if a.root is not b.root:
            # Of one tensor in two shapes nothing is known to lie apart.
            return shaped.get(a.root, a.root) is shaped.get(b.root, b.root)
        common = [x for x in a.loops if x in b.loops]
        changed = self.model.loops[loop] if loop >= 0 else None
        if changed in common:
            assert changed is not None
            if changed.attrs.get("instances"):
                return False
            common = common[: common.index(changed)]
            counter = changed.regions[0].symbols[0]
        else:
            counter = None
        fixed = self._fixed(common)
        pairs = [
            (start, other, n)
            for n, (start, other) in enumerate(zip(a.starts, b.starts, strict=True))
        ]
        for start, other, n in pairs:
            if start is None or other is None:
                continue
            if _apart(start, a.reach[n], other, b.reach[n], fixed):
                return False
            if a.strides[n] == b.strides[n] and _between(start, other, a.strides[n], fixed):
                return False
            same = start is other and a.reach[n] == b.reach[n]
            if same and counter is not None and _moves(start, a.reach[n], counter, fixed):
                return False
            if a.reach[n] == b.reach[n] == 1 and _differ(start, other, counter, fixed):
                return False
        return True

    def _fixed(self, common: Sequence[Op]) -> frozenset[Symbol]:
        """Symbols with one value for both transfers."""
        function = self.model.function
        found = {*function.program_ids, *function.symbols}
        regions = [function.body, *(x.regions[0] for x in common)]
        for region in regions:
            found.update(region.symbols)
            found.update(s for op in _once(region) for s in op.symbols)
        return frozenset(found)

    def finding(self, first: int, second: int, queues: Sequence[str]) -> Finding:
        """The race between two transfers."""
        a, b = (self._place(self.transfers[n]) for n in (first, second))
        return Finding(
            "race",
            f"two transfers of tensor '{a.buffer}' aren't ordered, and may touch the same elements",
            (a, b),
            missing=f"a signal on '{a.queue}' after the one and a wait on '{b.queue}' before the "
            "other would order them",
        )

    def _place(self, transfer: Transfer) -> Place:
        op = transfer.op
        return Place(op, str(op.attrs["queue"]), transfer.root.name, 0, "", 0, 0, transfer.store)


def _once(region: Region) -> Iterator[Op]:
    """The ops that are executed at most once in a turn of a region: not those of loops inside."""
    for op in region.ops:
        yield op
        if op.name == "if":
            for branch in op.regions:
                yield from _once(branch)


def _apart(a: Expr, a_span: int, b: Expr, b_span: int, fixed: frozenset[Symbol]) -> bool:
    """Whether two runs of elements are disjoint whatever the symbols that aren't fixed are."""
    other = _renamed(b, fixed)
    return proves(a + a_span <= other) or proves(other + b_span <= a)


def _renamed(expr: Expr, fixed: frozenset[Symbol]) -> Expr:
    """An expression with symbols of its own for those that aren't fixed."""
    put: dict[Expr, Expr | int] = {
        s: symbol(s.name + "'", s.kind, s.low, s.high) for s in symbols(expr) if s not in fixed
    }
    return substitute(expr, put) if put else expr


def _between(a: Expr, b: Expr, stride: int, fixed: frozenset[Symbol]) -> bool:
    """Whether two runs with gaps never meet: their starts differ by no multiple of the stride."""
    terms, offset = linear(a - _renamed(b, fixed))
    return offset % stride != 0 and all(c % stride == 0 for _, c in terms)


def _moves(start: Expr, span: int, counter: Symbol, fixed: frozenset[Symbol]) -> bool:
    """Whether a run of elements moves past itself from one value of a counter to the next."""
    step = slope(start, counter)
    if step is None:
        return False
    room = abs(step)
    for other in symbols(start):
        if other is counter or other in fixed:
            continue
        factor, (low, high) = slope(start, other), bounds(other)
        if factor is None or low is None or high is None:
            return False
        room -= abs(factor) * (high - low)
    return room >= span


def _differ(a: Expr, b: Expr, counter: Symbol | None, fixed: frozenset[Symbol]) -> bool:
    """Whether two elements differ for all values of the symbols, which are tried: those that are
    fixed are the same for both, and the counter, where there is one, isn't.

    That is how devices are told apart: their numbers are few, and go round.
    """
    names = symbols(a) | symbols(b)
    if counter is not None and counter not in names:
        return False
    held = [s for s in names if s in fixed and s is not counter]
    free = [s for s in names if s not in fixed and s is not counter]
    ranges = {s: _values(s) for s in names}
    if prod(max(1, len(found)) for found in ranges.values()) > _TRIED:
        return False
    if not all(ranges.values()):
        return False
    first, second = compile_expr(a), compile_expr(b)
    turns = [0] if counter is None else ranges[counter]
    for values in product(*(ranges[s] for s in held)):
        known = {s.name: value for s, value in zip(held, values, strict=True)}
        taken: dict[int, set[int]] = {}
        others: dict[int, set[int]] = {}
        for turn, *rest in product(turns, *(ranges[s] for s in free)):
            here = known | {s.name: value for s, value in zip(free, rest, strict=True)}
            if counter is not None:
                here[counter.name] = turn
            taken.setdefault(first(here), set()).add(turn)
            others.setdefault(second(here), set()).add(turn)
        for element, when in taken.items():
            met = others.get(element, set())
            if met and (counter is None or len(when | met) > 1):
                return False
    return True


def _values(entry: Symbol) -> range:
    """The values of a symbol, none where its bounds aren't numbers."""
    low, high = bounds(entry)
    return range(0) if low is None or high is None else range(low, high + 1)
