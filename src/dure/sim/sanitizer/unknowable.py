"""Loops whose trip count is only known at run time.

From an iteration on, whose control depends only on how far the end is, states are counted from the
iteration, and once no state is new, all later iterations are proved by induction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dure.ir.expr import Expr, as_expr, bounds, linear, substitute, symbol, symbols
from dure.sim.sanitizer.control import (
    Decisions,
    Environment,
    Unknown,
    decide,
    decided,
    holds,
    interval,
    names,
    parts,
    slope,
    unknown_of,
)
from dure.sim.sanitizer.findings import NotProved
from dure.sim.sanitizer.lasting import FOREVER, lasts
from dure.sim.sanitizer.pieces import Block, Control, Loop, blocks
from dure.sim.sanitizer.state import Found, State

if TYPE_CHECKING:
    from dure.sim.sanitizer.proof import Proof

#: Iterations of a loop with an unknown trip count before its states must repeat.
UNKNOWN_ITERATIONS = 512

#: The iteration, as a symbol, while forms are compared.
_AT = symbol("iteration'", "loop", 0)


class Unknowable:
    """A loop whose trip count is only known at run time."""

    def __init__(
        self, proof: Proof, loop: Loop, environment: Environment, start: int | Expr, trips: Expr
    ) -> None:
        self.proof = proof
        self.loop = loop
        self.environment = environment
        self.start = start
        self.trips = trips
        self.form: Unknown = unknown_of(trips)
        self.most = bounds(trips)[1]
        self.terms = dict(linear(self.form.unknown)[0])
        self.decisive = self._decisive()
        #: Iterations of the loops inside.
        self.inside = frozenset(_iterations(loop.body))
        #: Symbols in other unknowns that control compares with the iteration.
        self.loose: set[str] = set()

    def _decisive(self) -> int:
        """An iteration from which on the unknown is large for every condition on it."""
        most = 0
        for control in self.proof.model.body.controls:
            left, _, right = parts(control.expr)
            form = self._in_iterations(left - right)
            if form is not None and self._factor(form)[0]:
                most = max(most, abs(linear(form)[1]))
        return min(64, 1 + abs(self.form.offset) + most)

    def run(self, state: State) -> Found:
        """Every state that the loop may end in."""
        frontier: set[State] = {state}
        exits: set[State] = set()
        seen: set[object] = set()
        settled: int | None = None
        at = 0
        while frontier:
            if settled is None and at >= self.decisive and self._settled(at):
                settled = at
            inside: set[State] = set()
            if settled is not None and self.loose:
                frontier = {self._state(s, self._tightened(s.decisions)) for s in frontier}
            for current in frontier:
                more = as_expr(at) < self.trips
                for decisions, goes_on in decide(current.decisions, more, self.environment):
                    if goes_on:
                        inside.add(self._state(current, decisions))
                    else:
                        exits.add(self._exit(current, decisions, settled))
            if settled is not None:
                inside = {s for s in inside if self._new(s, at, seen)}
            place = self.start + at * self.loop.step
            frontier = set(self.proof.step(self.loop, inside, self.environment, place))
            at += 1
            if at > UNKNOWN_ITERATIONS:
                raise NotProved(
                    "a loop whose trip count is only known at run time, and whose body isn't the "
                    "same in every iteration",
                    self.loop.op,
                )
        return frozenset(exits)

    def _state(self, state: State, decisions: Decisions) -> State:
        return self.proof.states.intern(state.body, decisions)

    def _exit(self, state: State, decisions: Decisions, settled: int | None) -> State:
        """A state after the loop; one of a later iteration stands for all that are like it."""
        kept = decisions
        if settled is not None:
            # u == sign * (trips - offset), and the trips are at least ``settled``.
            unknown = self.form.unknown
            assert self.form.sign > 0
            first = settled - self.form.offset
            low, high = bounds(unknown)
            low = first if low is None else max(low, first)
            kept = decided(kept, unknown, low, high)
        return self._state(state, kept)

    def _tightened(self, decisions: Decisions) -> Decisions:
        """Decisions without those that a later iteration makes again, for other numbers."""
        return tuple(
            d for d in decisions if d[0] is self.form.unknown or not names(d[0]) & self.loose
        )

    def _new(self, state: State, at: int, seen: set[object]) -> bool:
        """Whether a state, with its unknown counted from the iteration, is new."""
        unknown = self.form.unknown
        low, high = interval(state.decisions, unknown)
        top = bounds(unknown)[1]
        rest = tuple(d for d in state.decisions if d[0] is not unknown)
        key = (
            state.body,
            rest,
            None if low is None else low - at,
            None if high is None or high == top else high - at,
        )
        if key in seen:
            return False
        seen.add(key)
        return True

    # --- when iterations are alike ---------------------------------------------------------------

    def _settled(self, at: int) -> bool:
        """Whether, from an iteration on, the body's control depends only on how far the end is."""
        return self.form.sign > 0 and all(
            self._same(control, at) for control in self.loop.body.controls
        )

    def _same(self, control: Control, at: int) -> bool:
        left, relation, right = parts(control.expr)
        form = self._in_iterations(left - right)
        if form is None:
            return False
        grows = slope(form, _AT)
        factor, rest = self._factor(form)
        if grows is None:
            return False
        if grows and (rest or factor is None) and control.kind in ("truth", "cut"):
            return grows + (factor or 0) == 0 or self._goes_on(control, form, relation, at, grows)
        if factor is None:
            return not grows and control.kind in ("truth", "cut")
        if grows + factor == 0:
            # The same after both move on by one; what else is in it is known where it is used.
            return True
        if rest or control.kind in ("trips", "exact"):
            return False
        offset = linear(form)[1]
        if factor == 0:
            return self._steady(control, relation, grows * at + offset, grows)
        if grows == 0:
            # Inside the body the trips are more than the iteration.
            least = at + 1 - self.form.offset
            return self._steady(control, relation, factor * least + offset, factor)
        return False

    def _goes_on(self, control: Control, form: Expr, relation: str, at: int, grows: int) -> bool:
        """Whether a comparison of the iteration with what else is not known stays as it is.

        Where that is the iteration of a loop inside, each of its turns must have the same outcome,
        now and later.  Where it isn't, both outcomes will do: then no later iteration has one that
        this one hasn't, once what was decided is forgotten.
        """
        now = substitute(form, {_AT: at})
        low, high = bounds(now)
        if low is None or high is None or relation in ("==", "!="):
            return False
        both = holds(relation, low) != holds(relation, high)
        if names(now) & self.inside:
            steady = all(self._steady(control, relation, end, grows) for end in (low, high))
            return steady and not both
        self.loose |= {n for n in names(now) if n not in self.environment}
        return both

    def _steady(self, control: Control, relation: str, value: int, grows: int) -> bool:
        """Whether a comparison stays as it is while its form grows from a value."""
        length = lasts(control, relation, value, grows)
        return length == FOREVER or (self.most is not None and length >= self.most)

    def _in_iterations(self, form: Expr) -> Expr | None:
        """A form with the loop's counter replaced by its start and the iteration."""
        name = self.loop.symbol
        put: dict[Expr, int | Expr] = {}
        for s in symbols(form):
            if s.name == name:
                put[s] = self.start + _AT * self.loop.step
            elif s.name in self.environment:
                put[s] = self.environment[s.name]
        return substitute(form, put) if put else form

    def _factor(self, form: Expr) -> tuple[int | None, bool]:
        """How often the loop's unknown is in a form (None: some of it is), and whether anything
        else is, the iteration apart.
        """
        terms = {p: c for p, c in linear(form)[0] if p != (_AT,)}
        unknown = symbols(self.form.unknown)
        ratios = {
            (c // self.terms[p], c % self.terms[p]) for p, c in terms.items() if p in self.terms
        }
        rest = {p for p in terms if p not in self.terms}
        if any(unknown & symbols(f) for p in rest for f in p):
            return None, True
        if not ratios:
            return 0, bool(rest)
        complete = sum(p in terms for p in self.terms) == len(self.terms)
        if len(ratios) != 1 or not complete:
            return None, True
        ((factor, remainder),) = ratios
        return (factor, bool(rest)) if remainder == 0 else (None, True)


def _iterations(block: Block) -> Iterator[str]:
    for piece in block.pieces:
        if isinstance(piece, Loop):
            yield piece.iteration.name
        for inner in blocks(piece):
            yield from _iterations(inner)
