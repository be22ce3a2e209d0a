"""The proof: every run of a program, over all interleavings, trip counts and run-time values.

A block takes a set of states to a set of states.  What a block does to a state depends on it and on
the few numbers that control in it depends on, so each such step is made once and remembered: a loop
of a thousand iterations whose states repeat after five is five steps.  Where there is one way to
go, turns of short loops, and turns while a long ring fills, are run without looking at the states.

A loop whose trip count is only known at run time is left after every number of iterations that its
unknown allows.  From some iteration on, all that decides how the body runs is either the same in
every later one, or depends on how far the end is; then states are compared with the unknown counted
from the iteration, and once no state is new, all later iterations are proved by induction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dure.ir.core import Op
from dure.ir.dtypes import Array
from dure.ir.expr import Expr, Symbol, as_expr, bounds, substitute, symbol, symbols
from dure.sim.sanitizer.control import (
    Decisions,
    Environment,
    decide,
    forget,
    holds,
    known,
    names,
    parts,
    slope,
    value_of,
)
from dure.sim.sanitizer.findings import NotProved
from dure.sim.sanitizer.lasting import lasts
from dure.sim.sanitizer.model import Model
from dure.sim.sanitizer.pieces import (
    Block,
    Branch,
    Cut,
    Loop,
    Partial,
    Piece,
    Scalar,
    Straight,
)
from dure.sim.sanitizer.state import Found, State, States, Work
from dure.sim.sanitizer.unknowable import Unknowable

#: Iterations of one loop that are run one by one.
ITERATIONS = 20000
#: Turns of a loop that are run without looking for states that repeat, at most; and turns that are
#: looked at before some aren't.
_SHORT, _LOOKED = 128, 8


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
            low, high = (form, form) if isinstance(form, int) else self._bounds(form, environment)
            outcome: object = form
            if relation in ("<", "<=") and low is not None and high is not None:
                first, last = holds(relation, low), holds(relation, high)
                if first == last and (first or control.kind == "truth"):
                    outcome = first
            found.append((control.kind, outcome))
        return tuple(found)

    def _bounds(self, form: Expr, environment: Environment) -> tuple[int | None, int | None]:
        """The bounds of a form, with as many iterations of the loops inside as there are."""
        put: dict[Expr, int | Expr] = {}
        for at in symbols(form):
            trips = self.model.iterations.get(at)
            count = None if trips is None else value_of(trips, environment)
            if isinstance(count, int):
                put[at] = symbol(at.name, "loop", 0, max(0, count - 1))
        return bounds(substitute(form, put) if put else form)

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
                self._issue(
                    piece.op, self.model.transfers.box(piece.op, environment, outcomes[0][1])
                )
                return True
        elif isinstance(piece, Branch):
            block = self._taken(piece, decisions, environment)
            if block is not None and self._one_way(block, decisions, environment):
                for inner in block.pieces:
                    gone = self._live(inner, decisions, environment)
                    assert gone
                return True
        elif isinstance(piece, Loop):
            start, trips = value_of(piece.start, environment), value_of(piece.trips, environment)
            if not isinstance(trips, int) or trips > _SHORT:
                return False
            if self._goes_one_way(piece, decisions, environment, start, 0, trips):
                self._turns(piece, decisions, environment, start, range(trips))
                return True
        return False

    def _goes_one_way(
        self,
        loop: Loop,
        decisions: Decisions,
        environment: Environment,
        start: int | Expr,
        first: int,
        stop: int,
    ) -> bool:
        """Whether these turns of a loop without loops inside can be run on the work as it is."""
        if first < stop and forget(decisions, loop.body.defines) != decisions:
            return False
        while first < stop:
            inner = {**environment, loop.symbol: start + first * loop.step}
            if not self._one_way(loop.body, decisions, inner):
                return False
            first = self._alike(loop, environment, start, first, stop)
        return True

    def _one_way(self, block: Block, decisions: Decisions, environment: Environment) -> bool:
        """Whether a block without loops goes one known way, and decides nothing."""
        for piece in block.pieces:
            if isinstance(piece, Partial):
                if [found for found, _ in self._cuts(piece, decisions, environment)] != [decisions]:
                    return False
            elif isinstance(piece, Branch):
                inner = self._taken(piece, decisions, environment)
                if inner is None or not self._one_way(inner, decisions, environment):
                    return False
            elif not isinstance(piece, Straight):
                return False
        return True

    def _taken(self, piece: Branch, decisions: Decisions, environment: Environment) -> Block | None:
        """The block that a branch surely takes; None where there is a choice, or where the block
        reads numbers of its own.
        """
        outcomes = list(decide(decisions, piece.condition, environment))
        block = piece.then if outcomes[0][1] else piece.otherwise
        sure = len(outcomes) == 1 and outcomes[0][0] == decisions
        return block if sure and not block.defines else None

    def _turns(
        self,
        loop: Loop,
        decisions: Decisions,
        environment: Environment,
        start: int | Expr,
        turns: range,
    ) -> None:
        """Run turns that go one way on the work."""
        for turn in turns:
            inner = {**environment, loop.symbol: start + turn * loop.step}
            for piece in loop.body.pieces:
                gone = self._live(piece, decisions, inner)
                assert gone

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
            self._issue(piece.op, self.model.transfers.box(piece.op, environment, whole))
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
                self._issue(op, model.transfers.store_box(op, environment))
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
        root, views, _ = self.model.transfers.window(op.operands[0])
        values = self.indices.get(root.name)
        if values is None:
            raise NotProved(f"the values of '{root.name}' aren't given", op)
        place = [
            known(as_expr(e) + view, environment)
            for e, view in zip(op.attr("index"), views, strict=True)
        ]
        extents = zip(place, values.shape, strict=True)
        inside = tuple(p for p, n in extents if p is not None and 0 <= p < n)
        if len(inside) < len(place):
            raise NotProved(f"element {place} of '{root.name}' isn't there", op)
        return int(values[inside])

    # --- loops -----------------------------------------------------------------------------------

    def _loop(self, loop: Loop, state: State, environment: Environment) -> Found:
        start, trips = value_of(loop.start, environment), value_of(loop.trips, environment)
        if isinstance(trips, int):
            return self._counted(loop, state, environment, start, trips)
        return Unknowable(self, loop, environment, start, trips).run(state)

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
        steps = ways = 0
        while at < trips:
            if trips - at <= _SHORT and len(current) != ways:
                # What was to be decided may have been, and each state goes one way from here.
                ways = len(current)
                after = self._unseen(loop, current, environment, start, range(at, trips))
                if after is not None:
                    return after
            stop = min(trips, self._alike(loop, environment, start, at, trips))
            seen: dict[Found, int] | None = {current: at}
            place = start + at * loop.step
            looked, run = 0, _LOOKED
            while at < stop:
                if looked == _LOOKED and seen is not None:
                    # A long ring fills before anything repeats: meanwhile nothing is compared.
                    run, looked = 2 * run, 0
                    turns = range(at, min(at + run, stop))
                    after = self._unseen(loop, current, environment, start, turns)
                    if after is not None:
                        current = after
                        at, steps = turns.stop, steps + len(turns)
                        continue
                current = self.step(loop, current, environment, place)
                at, steps, looked = at + 1, steps + 1, looked + 1
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

    def _unseen(
        self,
        loop: Loop,
        current: Found,
        environment: Environment,
        start: int | Expr,
        turns: range,
    ) -> Found | None:
        """So many turns, whose states aren't kept; None where some state has no one way to go."""
        span = (start, turns.start, turns.stop)
        if not all(self._goes_one_way(loop, s.decisions, environment, *span) for s in current):
            return None
        self.iterations += len(turns)
        found: set[State] = set()
        for state in current:
            self.work.thaw(state.body)
            self._turns(loop, state.decisions, environment, start, turns)
            found.add(self.states.intern(self.work.freeze(), state.decisions))
        return frozenset(found)

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
            stop = min(stop, at + lasts(control, relation, value, grows * loop.step))
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
