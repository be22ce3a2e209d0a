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
from dure.sim.sanitizer.model import (
    Block,
    Branch,
    Control,
    Instruction,
    Loop,
    Model,
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
        self.instructions: dict[object, Instruction] = {}

    def start(self) -> State:
        """The state before the first op."""
        return self.states.intern(self.work.freeze(), ())

    def block(self, block: Block, state: State, environment: Environment) -> Found:
        """Every state that a block may end in."""
        key = (id(block), state, _known(block.needs, environment))
        found = self.memo.get(key)
        if found is None:
            current: Found = frozenset((state,))
            scope: dict[str, int | Expr] = dict(environment)
            for name in block.defines:
                scope.pop(name, None)
            for piece in block.pieces:
                if isinstance(piece, Scalar):
                    if self.indices is not None:
                        scope[piece.op.symbols[0].name] = self._scalar(piece.op, scope)
                    continue
                current = _union(self._piece(piece, s, scope) for s in current)
            found = self.memo[key] = frozenset(self._leave(block, s) for s in current)
        return found

    def _leave(self, block: Block, state: State) -> State:
        kept = forget(state.decisions, block.defines)
        return state if kept == state.decisions else self.states.intern(state.body, kept)

    def _piece(self, piece: Piece, state: State, environment: Environment) -> Found:
        if isinstance(piece, Straight):
            return self._straight(piece, state, environment)
        if isinstance(piece, Branch):
            found: set[State] = set()
            for decisions, taken in decide(state.decisions, piece.condition, environment):
                begun = self.states.intern(state.body, decisions)
                found |= self.block(piece.then if taken else piece.otherwise, begun, environment)
            return frozenset(found)
        assert isinstance(piece, Loop)
        return self._loop(piece, state, environment)

    def _straight(self, piece: Straight, state: State, environment: Environment) -> Found:
        key = (id(piece), state, _known(piece.needs, environment))
        found = self.memo.get(key)
        if found is not None:
            return found
        work = self.work
        work.thaw(state.body)
        turns = work.turns
        for op in piece.ops:
            if op.name == "rotate":
                for buffer in op.operands:
                    stages = int(self.model.buffers[buffer].attr("stages"))
                    turns[buffer] = (turns[buffer] + 1) % stages
                continue
            slots = tuple([turns.get(v, -1) for v in op.operands])
            transfer = self.model.transfers.get(op)
            cut = "" if transfer is None else self.model.cut(op, environment)
            made = (op, slots, cut)
            instruction = self.instructions.get(made)
            if instruction is None:
                instruction = self.model.instruction(op, slots, cut)
                self.instructions[made] = instruction
            work.run(instruction)
        work.check_progress()
        if piece.loop >= 0:
            work.next_iteration(piece.loop)
        after = frozenset((self.states.intern(work.freeze(), state.decisions),))
        self.memo[key] = after
        return after

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

    def _decisive(self) -> int:
        """An iteration from which on the unknown is large for every condition on it."""
        own = names(self.form.unknown)
        sizes = [
            abs(linear(left - right)[1])
            for left, _, right in (parts(c.expr) for c in self.proof.model.body.controls)
            if own & names(left - right)
        ]
        return min(64, 1 + abs(self.form.offset) + max(sizes, default=0))

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
        if grows is None or factor is None:
            return False
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
