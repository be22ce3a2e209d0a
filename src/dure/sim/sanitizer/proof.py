"""The proof: every run of a program, over all interleavings, trip counts and run-time values.

A block takes a set of states to a set of states.  What a block does to a state depends on it and on
the few numbers that control in it depends on, so each such step is made once and remembered: a loop
of a thousand iterations whose states repeat after five is five steps.

A loop whose trip count is only known at run time is left after every number of iterations that its
unknown allows.  From some iteration on, all that decides how the body runs is either the same in
every later one, or depends on how far the end is; then states are compared with the unknown counted
from the iteration, and once no state is new, all later iterations are proved by induction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from dure.ir.core import Op
from dure.ir.dtypes import Array
from dure.ir.expr import Expr, Symbol, as_expr, bounds, linear, substitute, symbol, symbols
from dure.sim.sanitizer.control import (
    Decisions,
    Environment,
    Unknown,
    decide,
    decided,
    forget,
    holds,
    interval,
    known,
    names,
    parts,
    slope,
    unknown_of,
    value_of,
)
from dure.sim.sanitizer.findings import NotProved
from dure.sim.sanitizer.model import Model
from dure.sim.sanitizer.pieces import (
    Block,
    Branch,
    Control,
    Cut,
    Loop,
    Partial,
    Piece,
    Scalar,
    Straight,
)
from dure.sim.sanitizer.state import State, States, Work

Found: TypeAlias = frozenset[State]

#: Iterations of one loop that are run one by one.
ITERATIONS = 20000
#: Iterations of a loop with an unknown trip count before its states must repeat.
UNKNOWN_ITERATIONS = 512

#: The iteration, as a symbol, while forms are compared.
_AT = symbol("iteration'", "loop", 0)


class Proof:
    """Runs one model; ``indices`` are the index arguments' values, if they are given."""

    def __init__(
        self, model: Model, work: Work, states: States, indices: Mapping[str, Array] | None
    ) -> None:
        self.model = model
        self.work = work
        self.states = states
        self.indices = indices
        self.iterations = 0
        self.memo: dict[object, Found] = {}

    def start(self) -> State:
        """The state before the first op."""
        return self.states.intern(self.work.freeze(), ())

    def block(self, block: Block, state: State, environment: Environment) -> Found:
        """Every state that a block may end in."""
        key = (id(block), state, _known(block.needs, environment))
        found = self.memo.get(key)
        if found is None:
            # Other numbers, cores among them, that control treats alike give the same.
            alike = (id(block), state, None, self._treated(block, environment))
            found = self.memo.get(alike)
            if found is None:
                found = self.memo[alike] = self._block(block, state, environment)
            self.memo[key] = found
        return found

    def _treated(self, block: Block, environment: Environment) -> object:
        """What all that is known does to a block's control: a comparison's outcome where it is the
        same for all counters inside, else the expression that is left.
        """
        found: list[object] = []
        for control in block.controls:
            if all(n not in environment for n in names(control.expr)):
                continue
            if control.kind in ("trips", "exact"):
                found.append(value_of(control.expr, environment))
                continue
            left, relation, right = parts(control.expr)
            form = value_of(left - right, environment)
            low, high = (form, form) if isinstance(form, int) else bounds(form)
            outcome: object = form
            if relation in ("<", "<=") and low is not None and high is not None:
                first, last = holds(relation, low), holds(relation, high)
                if first == last and (first or control.kind == "truth"):
                    outcome = first
            found.append((control.kind, outcome))
        return tuple(found)

    def _block(self, block: Block, state: State, environment: Environment) -> Found:
        scope: dict[str, int | Expr] = dict(environment)
        for name in block.defines:
            scope.pop(name, None)
        work = self.work
        current: list[State] = [state]
        # While there is one state, and control is known, the work goes on without freezing it.
        live = False
        decisions = state.decisions
        for piece, over in zip(block.pieces, block.over, strict=True):
            if isinstance(piece, Scalar):
                scope[piece.op.symbols[0].name] = self._scalar(piece.op, scope)
                continue
            if not live and len(current) == 1:
                work.thaw(current[0].body)
                decisions, live = current[0].decisions, True
            if not (live and self._live(piece, decisions, scope)):
                if live:
                    current, live = [self.states.intern(work.freeze(), decisions)], False
                found = _union(self._piece(piece, s, scope) for s in current)
                current = list({self._without(s, over) for s in found})
        if live:
            current = [self.states.intern(work.freeze(), decisions)]
        return frozenset(self._without(s, block.defines) for s in current)

    def _live(self, piece: Piece, decisions: Decisions, environment: Environment) -> bool:
        """Run a piece on the work as it is, if it goes one known way without loops."""
        if isinstance(piece, Straight):
            self._straight(piece, environment)
            return True
        if isinstance(piece, Partial):
            outcomes = self._cuts(piece, decisions, environment)
            if len(outcomes) == 1 and outcomes[0][0] == decisions:
                self._issue(piece.op, self.model.box(piece.op, environment, outcomes[0][1]))
                return True
        elif isinstance(piece, Branch):
            taken = list(decide(decisions, piece.condition, environment))
            block = piece.then if taken[0][1] else piece.otherwise
            simple = all(isinstance(p, Straight) for p in block.pieces)
            if simple and len(taken) == 1 and taken[0][0] == decisions:
                for inner in block.pieces:
                    assert isinstance(inner, Straight)
                    self._straight(inner, environment)
                return True
        return False

    def _without(self, state: State, over: frozenset[str]) -> State:
        kept = forget(state.decisions, over)
        return state if kept == state.decisions else self.states.intern(state.body, kept)

    def _piece(self, piece: Piece, state: State, environment: Environment) -> Found:
        if isinstance(piece, Loop):
            return self._loop(piece, state, environment)
        if isinstance(piece, Branch):
            found: set[State] = set()
            for decisions, taken in decide(state.decisions, piece.condition, environment):
                begun = self.states.intern(state.body, decisions)
                found |= self.block(piece.then if taken else piece.otherwise, begun, environment)
            return frozenset(found)
        if isinstance(piece, Partial):
            return self._partial(piece, state, environment)
        assert isinstance(piece, Straight)
        self.work.thaw(state.body)
        self._straight(piece, environment)
        return frozenset((self.states.intern(self.work.freeze(), state.decisions),))

    def _partial(self, piece: Partial, state: State, environment: Environment) -> Found:
        found: set[State] = set()
        for decisions, whole in self._cuts(piece, state.decisions, environment):
            self.work.thaw(state.body)
            self._issue(piece.op, self.model.box(piece.op, environment, whole))
            found.add(self.states.intern(self.work.freeze(), decisions))
        return frozenset(found)

    def _cuts(
        self, piece: Partial, decisions: Decisions, environment: Environment
    ) -> list[tuple[Decisions, frozenset[int]]]:
        """The axes along which all of a load's tile may exist, with what that decides."""
        outcomes: list[tuple[Decisions, frozenset[int]]] = [(decisions, frozenset())]
        for axis, condition in piece.axes:
            outcomes = [
                (after, whole | {axis} if inside else whole)
                for before, whole in outcomes
                for after, inside in decide(before, condition, environment)
            ]
        return outcomes

    def _straight(self, piece: Straight, environment: Environment) -> None:
        work, model = self.work, self.model
        for op in piece.ops:
            if op.name == "rotate":
                for buffer in op.operands:
                    stages = int(model.buffers[buffer].attr("stages"))
                    work.turns[buffer] = (work.turns[buffer] + 1) % stages
            elif op.name == "dma_store":
                self._issue(op, model.store_box(op, environment))
            else:
                self._issue(op, "")
        work.check_progress()
        if piece.loop >= 0:
            work.next_iteration(piece.loop)

    def _issue(self, op: Op, cut: Cut) -> None:
        """An op comes to its queue, at the slots of now."""
        turns = self.work.turns
        slots = tuple([turns.get(v, -1) for v in op.operands])
        self.work.run(self.model.instruction(op, slots, cut))

    def _scalar(self, op: Op, environment: Environment) -> int:
        assert self.indices is not None
        root, views, _ = self.model.window(op.operands[0])
        values = self.indices.get(root.name)
        if values is None:
            raise NotProved(f"the values of '{root.name}' aren't given", op)
        place = [
            known(as_expr(e) + view, environment)
            for e, view in zip(op.attr("index"), views, strict=True)
        ]
        inside = all(p is not None and 0 <= p < n for p, n in zip(place, values.shape, strict=True))
        if not inside:
            raise NotProved(f"element {place} of '{root.name}' isn't there", op)
        return int(values[tuple(place)])  # type: ignore[arg-type]

    # --- loops -----------------------------------------------------------------------------------

    def _loop(self, loop: Loop, state: State, environment: Environment) -> Found:
        start, trips = value_of(loop.start, environment), value_of(loop.trips, environment)
        if isinstance(trips, int):
            return self._counted(loop, state, environment, start, trips)
        return _Unknowable(self, loop, environment, start, trips).run(state)

    def step(
        self, loop: Loop, states: Iterable[State], environment: Environment, at: int | Expr
    ) -> Found:
        """One iteration from each of the states."""
        self.iterations += 1
        inner = {**environment, loop.symbol: at}
        return _union(self.block(loop.body, s, inner) for s in states)

    def _counted(
        self, loop: Loop, state: State, environment: Environment, start: int | Expr, trips: int
    ) -> Found:
        current: Found = frozenset((state,))
        at = 0
        steps = 0
        while at < trips:
            stop = min(trips, self._alike(loop, environment, start, at, trips))
            seen: dict[Found, int] | None = {current: at}
            place = start + at * loop.step
            while at < stop:
                current = self.step(loop, current, environment, place)
                at, steps = at + 1, steps + 1
                if seen is None:
                    continue
                before = seen.get(current)
                if before is None:
                    seen[current] = at
                else:
                    at += (stop - at) // (at - before) * (at - before)
                    seen = None
            if steps > ITERATIONS:
                raise NotProved(f"a loop of {trips} iterations, no two alike", loop.op)
        return current

    def _alike(
        self, loop: Loop, environment: Environment, start: int | Expr, at: int, trips: int
    ) -> int:
        """How far, from an iteration, all that decides how the body runs stays the same."""
        counter = self._counter(loop)
        if loop.symbol not in loop.body.needs:
            return trips
        if not isinstance(start, int):
            return at + 1
        stop = trips
        for control in loop.body.controls:
            if loop.symbol not in names(control.expr):
                continue
            left, relation, right = parts(control.expr)
            form = left - right
            grows = self._grows(form, counter, environment)
            if control.kind in ("trips", "exact") or grows is None:
                return at + 1
            place = start + at * loop.step
            value = known(form, {**environment, loop.symbol: place})
            if value is None:
                return at + 1
            stop = min(stop, at + _lasts(control, relation, value, grows * loop.step))
        return max(stop, at + 1)

    def _counter(self, loop: Loop) -> Symbol:
        return loop.op.regions[0].symbols[0]

    def _grows(self, form: Expr, counter: Symbol, environment: Environment) -> int | None:
        """The form's slope in a counter with all else known, None where it isn't linear in it."""
        rest = {k: v for k, v in environment.items() if k != counter.name}
        found = value_of(form, rest)
        if isinstance(found, int):
            return 0
        if names(found) != frozenset((counter.name,)):
            return None
        return slope(found, next(iter(symbols(found))))


class _Unknowable:
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

    def _state(self, state: State, decisions: object) -> State:
        return self.proof.states.intern(state.body, decisions)  # type: ignore[arg-type]

    def _exit(self, state: State, decisions: object, settled: int | None) -> State:
        """A state after the loop; one of a later iteration stands for all that are like it."""
        kept = decisions
        if settled is not None:
            # u == sign * (trips - offset), and the trips are at least ``settled``.
            unknown = self.form.unknown
            assert self.form.sign > 0
            first = settled - self.form.offset
            low, high = bounds(unknown)
            low = first if low is None else max(low, first)
            kept = decided(kept, unknown, low, high)  # type: ignore[arg-type]
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
            return grows + (factor or 0) == 0 or self._open(form, relation, at)
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

    def _open(self, form: Expr, relation: str, at: int) -> bool:
        """Whether a comparison of the iteration with another unknown has both outcomes; then no
        later iteration has one that this one hasn't, once what was decided is forgotten.
        """
        now = substitute(form, {_AT: at})
        unknown = {s.name for s in symbols(now) if s.name not in self.environment}
        low, high = bounds(now)
        if low is None or high is None or relation in ("==", "!="):
            return False
        self.loose |= unknown
        return holds(relation, low) != holds(relation, high)

    def _steady(self, control: Control, relation: str, value: int, grows: int) -> bool:
        """Whether a comparison stays as it is while its form grows from a value."""
        length = _lasts(control, relation, value, grows)
        return length == _FOREVER or (self.most is not None and length >= self.most)

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


#: Longer than any loop.
_FOREVER = 1 << 62


def _constant(relation: str, value: int, grows: int) -> int:
    """How many iterations a comparison with 0 stays as it is, this one counted, while its form
    grows by ``grows`` from ``value``.
    """
    if grows == 0:
        return _FOREVER
    if relation in ("==", "!="):
        if value == 0:
            return 1
        away = (value > 0) == (grows > 0)
        return _FOREVER if away or value % grows else -value // grows
    # f < 0 is f <= -1: compare with the largest value for which it holds.
    last = -1 if relation == "<" else 0
    if value <= last:
        return _FOREVER if grows < 0 else (last - value) // grows + 1
    return _FOREVER if grows > 0 else (value - last - 1) // -grows + 1


def _lasts(control: Control, relation: str, value: int, grows: int) -> int:
    """How many iterations a control stays as it is, whose form grows from a value."""
    if control.kind != "cut" or holds(relation, value):
        return _constant(relation, value, grows)
    # Partly outside of its tensor a transfer moves more or less each time; wholly outside, nothing.
    outside = control.span - value
    return _constant("<=", outside, -grows) if outside <= 0 or grows == 0 else 1


def _known(needs: Iterable[str], environment: Environment) -> object:
    return tuple([(n, environment[n]) for n in sorted(needs) if n in environment])


def _union(found: Iterable[Found]) -> Found:
    parts = list(found)
    return parts[0] if len(parts) == 1 else frozenset[State]().union(*parts)


def core_environments(model: Model) -> Iterable[dict[str, int | Expr]]:
    """The values of program ids, one for each way that control can depend on them."""
    function = model.function
    extents = [known(e, {}) for e in function.grid]
    needed = [s.name in model.body.needs for s in function.program_ids]
    places: list[dict[str, int | Expr]] = [{}]
    for program_id, extent, used in zip(function.program_ids, extents, needed, strict=True):
        if extent is None:
            raise NotProved("a grid of cores that isn't a number")
        places = [{**p, program_id.name: at} for p in places for at in range(extent if used else 1)]
    return places
