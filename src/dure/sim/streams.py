"""A machine program as streams of timed instructions, one a queue, for any core.

The program is made ready once (:class:`Streams`); :meth:`Streams.trace` then walks it with the
numbers of one core.  A DMA's bytes and runs follow from how many of its elements exist along each
axis, and from nothing else about where it lies; so a transfer is made once for each such tuple of
counts.

Index lists: the entries of a list whose values are known (``indices``) exist where they are not
negative and lie inside the tensor; of any other list all entries are taken to exist, anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from dure.errors import IRError
from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.dtypes import Array, int32
from dure.ir.expr import Const, Expr, as_expr, bounds
from dure.ir.expr_code import Evaluator, compile_expr, names_of
from dure.ir.types import TensorType
from dure.machine.chip import Chip, Dma
from dure.sim.cost import Costs, duration
from dure.sim.flows import UNIT, units_a_picosecond, weight_of
from dure.sim.footprint import Footprint, Reach, footprint

COMPUTE, WAIT, SIGNAL, MOVE = range(4)

#: (COMPUTE, op, ComputeCost), (MOVE, op, Transfer), (WAIT or SIGNAL, op, (semaphore, count))
Item: TypeAlias = tuple[int, Op, Any]
Env: TypeAlias = dict[str, int]
#: The number of a loop's turns, or of an axis's elements: what cores may differ in.
Observed: TypeAlias = list[int]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A DMA with its numbers: picoseconds of ``issue`` and ``delay`` (from issue to flow), what
    flows, its own ``limit``, the ``weight`` of its units at the home memory, and the bytes that the
    home memory gives or takes.
    """

    dma: str
    issue: int
    delay: int
    bytes: int
    units: int
    limit: int
    weight: int
    home: Fraction


class Streams:
    """A program made ready for tracing.  ``queues`` and ``semaphores`` are named by number."""

    def __init__(
        self, function: Function, chip: Chip, costs: Costs, indices: Mapping[str, Array]
    ) -> None:
        self.function = function
        self.chip = chip
        self.costs = costs
        self.indices = indices
        self.queues: list[str] = []
        self.semaphores: list[Value] = []
        self.semaphore_ops: list[Op] = []
        self.out: list[list[Item]] = []
        self.lists: dict[tuple[str, int], Array] = {}
        self.turns: dict[Value, int] = {}
        self.buffers: dict[Value, Op] = {}
        self._views: dict[Value, tuple[Value, tuple[Expr, ...]]] = {}
        self._roots: dict[str, frozenset[str]] = {
            s.name: frozenset({s.name}) for s in function.program_ids
        }
        self._cores = frozenset(self._roots)
        self._nodes = self._region(function.body)
        #: Whether cores can differ at all.
        self.varies = any(node.depends for node in self._nodes)

    # --- walking ---------------------------------------------------------------------------------

    def trace(self, core: Mapping[str, int]) -> list[list[Item]]:
        """What each queue of a core executes."""
        self._reset()
        env = dict(core)
        for node in self._nodes:
            node.trace(env)
        return list(self.out)

    def signature(self, core: Mapping[str, int]) -> tuple[int, ...]:
        """What cores may differ in: cores of one signature have equal streams."""
        self._reset()
        env, seen = dict(core), Observed()
        for node in self._nodes:
            if node.depends or node.binds:
                node.observe(env, seen)
        return tuple(seen)

    def _reset(self) -> None:
        self.out[:] = [[] for _ in self.queues]
        self.lists.clear()
        self.turns = dict.fromkeys(self.turns, 0)

    def signalling(self) -> dict[int, str]:
        """The queue that signals each semaphore."""
        numbers = {value: number for number, value in enumerate(self.semaphores)}
        return {
            numbers[op.operands[0]]: str(op.attr("queue"))
            for op in walk(self.function.body)
            if op.name == "signal"
        }

    # --- making ready ----------------------------------------------------------------------------

    def roots(self, expr: Expr) -> frozenset[str]:
        """The ids, loop variables and index reads that an expression hangs on."""
        found = frozenset[str]()
        for name in names_of(expr):
            found |= self._roots.get(name, frozenset())
        return found

    def varying(self, *exprs: Expr) -> frozenset[str]:
        """The roots of expressions that differ between cores; none of the others."""
        found = frozenset[str]()
        for expr in exprs:
            roots = self.roots(expr)
            if roots & self._cores:
                found |= roots
        return found

    def place(self, tensor: Value) -> tuple[Value, tuple[Expr, ...]]:
        """The argument that a tensor is a view of, and where in it the view starts."""
        return self._views.get(tensor, (tensor, (as_expr(0),) * tensor.tensor.rank))

    def queue(self, op: Op) -> int:
        """The number of an op's queue."""
        name = str(op.attr("queue"))
        if name not in self.queues:
            self.queues.append(name)
            self.out.append([])
        return self.queues.index(name)

    def _region(self, region: Region) -> list[_Node]:
        nodes = [self._node(op) for op in region.ops]
        return [node for node in nodes if node is not None]

    def _node(self, op: Op) -> _Node | None:
        match op.name:
            case "for":
                return self._loop(op)
            case "if":
                return _Branch(self, op, [self._region(r) for r in op.regions])
            case "buffer":
                self.buffers[op.result] = op
                self.turns[op.result] = 0
            case "semaphore":
                self.semaphores.append(op.result)
                self.semaphore_ops.append(op)
            case "rotate":
                return _Rotate(self, op) if self.indices else None
            case "view":
                root, starts = self.place(op.operands[0])
                axis = op.attr("axis")
                shifted = [s + op.attr("start") if a == axis else s for a, s in enumerate(starts)]
                self._views[op.result] = root, tuple(shifted)
            case "index_load":
                exprs = [as_expr(e) for e in op.attr("index")]
                exprs += self.place(op.operands[0])[1]
                self._roots[op.symbols[0].name] = frozenset().union(*map(self.roots, exprs))
                return _Scalar(self, op)
            case "compute":
                return _Plain(self, op, (COMPUTE, op, self.costs.compute(op)))
            case "wait" | "signal":
                number = self.semaphores.index(op.operands[0])
                kind = WAIT if op.name == "wait" else SIGNAL
                return _Plain(self, op, (kind, op, (number, op.attr("count"))))
            case "dma_load" | "dma_store":
                return _Move(self, op)
            case _:
                raise _error(op, f"'{op.name}' can't be timed", "a machine program holds only its "
                             "level's ops", "lower it to machine ops")  # fmt: skip
        return None

    def _loop(self, op: Op) -> _Loop:
        start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
        name = op.regions[0].symbols[0].name
        self._roots[name] = frozenset({name}) | self.roots(start) | self.roots(stop)
        return _Loop(self, op, self._region(op.regions[0]))

    def everything(self) -> frozenset[str]:
        """All roots: what hangs on the state of the walk itself."""
        return frozenset(self._roots)


class _Node:
    """A step of the walk.  ``depends``: the roots of what it observes that differs between cores;
    ``binds``: it gives a symbol a value, which what follows may need.
    """

    depends: frozenset[str] = frozenset()
    binds = False

    def trace(self, env: Env) -> None:
        raise NotImplementedError

    def observe(self, env: Env, seen: Observed) -> None:
        raise NotImplementedError


class _Plain(_Node):
    """An instruction that is the same wherever it stands."""

    def __init__(self, streams: Streams, op: Op, item: Item) -> None:
        self.out, self.queue, self.item = streams.out, streams.queue(op), item

    def trace(self, env: Env) -> None:
        self.out[self.queue].append(self.item)


class _Loop(_Node):
    def __init__(self, streams: Streams, op: Op, body: list[_Node]) -> None:
        start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
        self.start, self.stop, self.step = compile_expr(start), compile_expr(stop), op.attr("step")
        self.name = op.regions[0].symbols[0].name
        self.body = body
        inside = frozenset[str]().union(*(node.depends for node in body))
        self.turning = self.name in inside
        self.counted = bool(streams.varying(start, stop))
        self.watched = [node for node in body if node.depends or node.binds]
        self.depends = streams.varying(start, stop)
        if inside:
            # Whether it turns at all decides what is observed inside.
            self.depends |= (inside - {self.name}) | streams.roots(start) | streams.roots(stop)

    def trace(self, env: Env) -> None:
        for counter in range(self.start(env), self.stop(env), self.step):
            env[self.name] = counter
            for node in self.body:
                node.trace(env)

    def observe(self, env: Env, seen: Observed) -> None:
        turns = range(self.start(env), self.stop(env), self.step)
        if self.counted:
            seen.append(len(turns))
        for counter in turns if self.turning else turns[:1]:
            env[self.name] = counter
            for node in self.watched:
                node.observe(env, seen)


class _Branch(_Node):
    def __init__(self, streams: Streams, op: Op, branches: list[list[_Node]]) -> None:
        condition: Expr = as_expr(op.attr("condition"))
        self.condition = compile_expr(condition)
        self.branches = branches
        self.depends = streams.varying(condition)
        self.chosen = bool(self.depends)
        for node in (*branches[0], *branches[1]):
            self.depends |= node.depends
        if self.depends:
            # Which branch is taken decides what is observed, so its own roots count as well.
            self.depends |= streams.roots(condition)

    def trace(self, env: Env) -> None:
        for node in self.branches[0 if self.condition(env) else 1]:
            node.trace(env)

    def observe(self, env: Env, seen: Observed) -> None:
        taken = 0 if self.condition(env) else 1
        if self.chosen:
            seen.append(taken)
        for node in self.branches[taken]:
            if node.depends or node.binds:
                node.observe(env, seen)


class _Rotate(_Node):
    """Turns buffers; only what lists hold makes a difference to time."""

    def __init__(self, streams: Streams, op: Op) -> None:
        self.streams = streams
        self.buffers = op.operands
        if any(b.tile.dtype is int32 for b in self.buffers):
            self.depends = streams.everything()

    def trace(self, env: Env) -> None:
        turns = self.streams.turns
        for buffer in self.buffers:
            turns[buffer] = (turns[buffer] + 1) % self.streams.buffers[buffer].attr("stages")

    def observe(self, env: Env, seen: Observed) -> None:
        self.trace(env)


class _Scalar(_Node):
    """Binds a symbol to an element of an index argument."""

    binds = True

    def __init__(self, streams: Streams, op: Op) -> None:
        root, starts = streams.place(op.operands[0])
        places = [as_expr(e) + s for e, s in zip(op.attr("index"), starts, strict=True)]
        self.op, self.root = op, root.name
        self.places = [compile_expr(e) for e in places]
        self.name = op.symbols[0].name
        limits = root.tensor.index
        assert limits is not None
        self.low, self.high = map(compile_expr, limits)
        found = streams.indices.get(root.name)
        if found is None:
            raise _error(
                op,
                f"the program reads scalars from '{root.name}', whose values aren't given",
                "a program with run-time indices is timed with their values",
                f"pass indices={{'{root.name}': array}}",
            )
        self.values: Array = np.asarray(found)

    def trace(self, env: Env) -> None:
        place = tuple([p(env) for p in self.places])
        if any(not 0 <= p < n for p, n in zip(place, self.values.shape, strict=True)):
            raise _error(
                self.op,
                f"element {place} of '{self.root}', which has the shape {self.values.shape}",
                "a scalar read of an index argument lies inside it",
                "bound the index by the argument's shape",
            )
        number = int(self.values[place])
        if not self.low(env) <= number <= self.high(env):
            raise _error(
                self.op,
                f"'{self.root}' holds {number} at {place}",
                f"its elements are declared to lie in [{self.low(env)}, {self.high(env)}]",
                "pass indices inside the range",
            )
        env[self.name] = number

    def observe(self, env: Env, seen: Observed) -> None:
        self.trace(env)


class _Axis:
    """How many elements of one axis of a transfer exist."""

    def __init__(self, start: Expr, stride: int, extent: int, size: Expr) -> None:
        self.start, self.size = compile_expr(start), compile_expr(size)
        self.stride, self.extent = stride, extent

    def __call__(self, env: Env) -> int:
        first, size, stride = self.start(env), self.size(env), self.stride
        if stride < 0:
            first, stride = size - 1 - first, -stride
        elif stride == 0:
            return self.extent if 0 <= first < size else 0
        low = 0 if first >= 0 else -(first // stride)
        high = min(self.extent, -((first - size) // stride))
        return max(0, high - low)


def _whole(start: Expr, stride: int, extent: int, size: Expr) -> bool:
    """Whether all elements of an axis exist, whatever the symbols are."""
    low, high = bounds(start)
    least = bounds(size)[0]
    if low is None or high is None or least is None or stride < 0:
        return False
    return low >= 0 and high + (extent - 1) * stride < least


class _Move(_Node):
    """A DMA: its counts, and the transfers that they make."""

    def __init__(self, streams: Streams, op: Op) -> None:
        self.streams, self.op = streams, op
        self.out, self.queue = streams.out, streams.queue(op)
        self.root, starts = streams.place(op.operands[0])
        view: TensorType = op.operands[0].tensor
        shape, steps = op.operands[1].tile.shape, op.attr("step")
        self.lists: dict[int, Value] = dict(zip(op.attr("list_axes"), op.operands[2:], strict=True))
        self.fixed: list[Reach] = []
        self.moving: list[tuple[int, _Axis]] = []
        self.varying: list[_Axis] = []
        self.starts: list[tuple[Evaluator, Evaluator]] = []
        for axis, extent in enumerate(shape):
            stride = 1 if axis in self.lists else op.attr("stride")[axis]
            step, offset = as_expr(steps[axis]), as_expr(op.attr("offset")[axis])
            size = as_expr(view.shape[axis])
            if axis in self.lists:
                self.fixed.append(Reach(extent, 1, extent // steps[axis]))
                self.starts.append((compile_expr(offset), compile_expr(size)))
                continue
            start = as_expr(op.attr("index")[axis]) * step + offset
            count = _Axis(start, stride, extent, size)
            self.starts.append((compile_expr(start + starts[axis]), compile_expr(size)))
            if isinstance(start, Const) and isinstance(size, Const):
                self.fixed.append(Reach(count({}), stride))
                continue
            if _whole(start, stride, extent, size):
                self.fixed.append(Reach(extent, stride))
                continue
            self.fixed.append(Reach(extent, stride))
            self.moving.append((axis, count))
            roots = streams.varying(start, size)
            if roots:
                self.varying.append(count)
                self.depends |= roots
        self.axes = [count for _, count in self.moving]
        self.known: dict[tuple[object, ...], Item] = {}
        self.engine = _engine(streams.chip, streams.buffers, op)
        self.make = _maker(streams.chip, self.engine, op, self.root.tensor)
        self.listing = op.name == "dma_load" and self.root.name in streams.indices
        if streams.indices and (self.lists or self.listing):
            self.depends = streams.everything()

    def trace(self, env: Env) -> None:
        key: tuple[object, ...] = tuple([axis(env) for axis in self.axes])
        if self.listing:
            self._fill_list(env)
        if self.lists and self.streams.lists:
            key = (*key, *self._entries(env))
        item = self.known.get(key)
        if item is None:
            item = self.known[key] = (MOVE, self.op, self._transfer(key))
        self.out[self.queue].append(item)

    def observe(self, env: Env, seen: Observed) -> None:
        for axis in self.varying:
            seen.append(axis(env))
        if self.listing:
            self._fill_list(env)
        if self.lists and self.streams.lists:
            for entries, elements in self._entries(env):
                seen += (entries, elements)

    def _transfer(self, key: tuple[object, ...]) -> Transfer:
        reach = list(self.fixed)
        counts = key[: len(self.moving)]
        for (axis, _), count in zip(self.moving, counts, strict=True):
            assert isinstance(count, int)
            reach[axis] = Reach(count, reach[axis].stride)
        for axis, found in zip(self.lists, key[len(self.moving) :], strict=False):
            assert isinstance(found, tuple)
            reach[axis] = Reach(found[1], 1, found[0])
        return self.make(reach)

    # --- index lists whose values are known ------------------------------------------------------

    def _address(self, buffer: Value) -> tuple[str, int]:
        op = self.streams.buffers[buffer]
        turn = self.streams.turns[buffer]
        return op.attr("memory"), op.attr("offset") + turn * op.attr("pitch")

    def _fill_list(self, env: Env) -> None:
        """What this load of an index argument puts into its buffer."""
        shape = self.op.operands[1].tile.shape
        if self.lists:
            self.streams.lists.pop(self._address(self.op.operands[1]), None)
            return
        values = np.asarray(self.streams.indices[self.root.name])
        fill = int(self.op.attr("fill")) if self.op.attr("filling") else -1
        found = np.full(shape, fill, np.int64)
        places = list[Array]()
        for axis, extent in enumerate(shape):
            start, size = (f(env) for f in self.starts[axis])
            first = self._first(axis, env)
            steps = np.arange(extent) * self.op.attr("stride")[axis]
            inside = (first + steps >= 0) & (first + steps < size)
            places.append(np.where(inside, start + steps, -1))
        mesh = np.ix_(*(np.flatnonzero(p >= 0) for p in places))
        found[mesh] = values[np.ix_(*(p[p >= 0] for p in places))]
        self.streams.lists[self._address(self.op.operands[1])] = found.reshape(-1)

    def _first(self, axis: int, env: Env) -> int:
        """Where this axis starts, counted from the view's start."""
        moving = dict(self.moving)
        if axis in moving:
            return moving[axis].start(env)
        index, step = as_expr(self.op.attr("index")[axis]), self.op.attr("step")[axis]
        return compile_expr(index * step + self.op.attr("offset")[axis])(env)

    def _entries(self, env: Env) -> list[tuple[int, int]]:
        """(entries, elements) that exist along each axis that a list rules."""
        found: list[tuple[int, int]] = []
        for axis, buffer in self.lists.items():
            step, count = self.op.attr("step")[axis], buffer.tile.shape[0]
            values = self.streams.lists.get(self._address(buffer))
            if values is None or len(values) < count:
                found.append((count, count * step))
                continue
            entries = values[:count]
            offset, size = (f(env) for f in self.starts[axis])
            first = entries * step + offset
            inside = np.clip(size - first, 0, step) - np.clip(-first, 0, step)
            inside = np.where(entries < 0, 0, np.maximum(inside, 0))
            found.append((int(np.count_nonzero(inside)), int(inside.sum())))
        return found


def _engine(chip: Chip, buffers: Mapping[Value, Op], op: Op) -> str:
    """The DMA engine of the op's queue that goes its way."""
    memory = str(buffers[op.operands[1]].attr("memory"))
    way = (chip.home, memory) if op.name == "dma_load" else (memory, chip.home)
    queue = op.attr("queue")
    for name, dma in chip.dma.items():
        if dma.queue == queue and way in dma.moves:
            return name
    engines = [f"'{d.queue}'" for d in chip.dma.values() if way in d.moves]
    raise _error(
        op,
        f"a DMA in queue '{queue}' from {way[0]} to {way[1]}",
        f"a DMA of {chip.name} moves bytes between the memories that its engine reaches",
        f"use queue {' or '.join(engines)}" if engines else "go by way of another memory",
    )


def _maker(
    chip: Chip, name: str, op: Op, tensor: TensorType
) -> Callable[[Sequence[Reach]], Transfer]:
    """What makes an op's transfers from their reach."""
    dma = chip.dma[name]
    issue, latency = duration(chip, dma.issue), duration(chip, dma.latency)
    descriptor = 0 if dma.descriptor is None else duration(chip, dma.descriptor)
    granule = 1 if dma.granule is None else int(dma.granule.base)
    share = Fraction(*op.attr("share"))
    lists = op.attr("list_axes")

    def make(reach: Sequence[Reach]) -> Transfer:
        found = footprint(tensor, reach, granule)
        if not found.bytes:
            return Transfer(name, issue, 0, 0, 0, 1, 0, Fraction())
        entries = 1
        for axis in lists:
            entries *= reach[axis].entries
        delay = latency + descriptor * (entries - 1)
        limit = _limit(chip, dma, found)
        home = found.granules * share
        weight = weight_of(home / found.bytes)
        units = found.bytes * UNIT
        return Transfer(name, issue, delay, found.bytes, units, limit, weight, home)

    return make


def _limit(chip: Chip, dma: Dma, found: Footprint) -> int:
    stream = chip.bytes_a_second(dma.stream or dma.bandwidth)
    if dma.efficiency is None:
        return units_a_picosecond(stream)
    values = {name: number.base for name, number in dma.numbers.items()}
    run = found.bytes / found.runs
    values |= {"bytes": found.bytes, "run": run, "runs": found.runs}
    return units_a_picosecond(max(0.0, stream * dma.efficiency(values)))


def _error(op: Op, what: str, rule: str, fix: str) -> IRError:
    return IRError(what, where=op.span.render() if op.span is not None else "", rule=rule, fix=fix)
