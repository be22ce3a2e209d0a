"""The steps of the walk through a program, made ready once.

Each gives a core's instructions, and tells :class:`~dure.sim.sites.Sites` what in it cores may
differ in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from dure.ir.core import Op, Value
from dure.ir.devices import device_id, sees_devices
from dure.ir.expr import Const, Expr, as_expr
from dure.ir.expr_code import Evaluator, compile_expr, names_of
from dure.machine.group import Group
from dure.sim.footprint import Reach
from dure.sim.items import BEGIN, END, MOVE, Item, Transfer, engine_of, refusal, transfer_maker
from dure.sim.sites import Env, SiteKey
from dure.sim.stream import Run
from dure.sim.whole_lists import all_there

if TYPE_CHECKING:
    from dure.sim.streams import Streams


#: The most instructions of a core that are laid out.
MOST = 4_000_000


class Node(ABC):
    """A step of the walk; ``needs`` are the names of the symbols that it hangs on, ``listed`` says
    that it also hangs on, or changes, what index lists hold.
    """

    needs: frozenset[str] = frozenset()
    listed = False

    @abstractmethod
    def trace(self, env: Env) -> None:
        """Append what is executed here to the queues' streams; set the symbols that it binds."""


class Plain(Node):
    """Instructions that are the same wherever they stand: some of each queue, in order."""

    def __init__(self, streams: Streams, op: Op, item: Item) -> None:
        self.out = streams.out
        self.items = {streams.queue(op): [item]}
        self.count = 1

    def join(self, other: Plain) -> None:
        """Go on with another's."""
        for queue, items in other.items.items():
            self.items.setdefault(queue, []).extend(items)
        self.count += other.count

    def trace(self, env: Env) -> None:
        for queue, items in self.items.items():
            self.out[queue] += items


class Loop(Node):
    """A loop and its body.

    Where nothing in the body hangs on the turn, all turns are the first again.
    """

    def __init__(self, streams: Streams, op: Op) -> None:
        start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
        self.start, self.stop, self.step = compile_expr(start), compile_expr(stop), op.attr("step")
        self.name = op.regions[0].symbols[0].name
        self.outermost = not streams.depth
        streams.depth += 1
        with streams.sites.loop(self.name, start, stop, self.step):
            self.body = streams.region(op.regions[0])
        streams.depth -= 1
        self.op, self.streams, self.out = op, streams, streams.out
        self.each = max(1, sum(_least(node) for node in self.body))
        inside = frozenset[str]().union(*(node.needs for node in self.body))
        self.needs = names_of(start) | names_of(stop) | (inside - {self.name})
        self.listed = any(node.listed for node in self.body)
        # Phases leave nothing behind that a later one hangs on.
        phases = [node for node in self.body if isinstance(node, Phase)]
        self.apart = len(phases) == len(self.body)
        self.alike = self.name not in inside and (self.apart or not self.listed)
        for phase in phases if self.outermost and self.apart else ():
            phase.whole = True

    def trace(self, env: Env) -> None:
        turns = range(self.start(env), self.stop(env), self.step)
        if self.alike and len(turns) > 1:
            self._repeat(env, turns)
            return
        self._check(len(turns) * self.each)
        for counter in turns:
            env[self.name] = counter
            for node in self.body:
                node.trace(env)

    def _repeat(self, env: Env, turns: range) -> None:
        """All turns from the first."""
        more = len(turns) - 1
        if self.outermost:
            self.streams.close()
        before, runs = [len(stream) for stream in self.out], self.streams.runs
        env[self.name] = turns[0]
        for node in self.body:
            node.trace(env)
        if self.outermost:
            if self.apart:
                self.streams.append(self.streams.since(runs), more)
            else:
                self.streams.close(len(turns))
            return
        self._check(more * (sum(map(len, self.out)) - sum(before)))
        for stream, start in zip(self.out, before, strict=True):
            if len(stream) > start:
                stream += stream[start:] * more

    def _check(self, more: int) -> None:
        if more + self.streams.laid_out > MOST:
            raise refusal(
                self.op,
                f"a core executes more than {MOST:,} instructions that differ",
                "a program is timed instruction by instruction",
                "take larger tiles, or a smaller problem",
            )


def _least(node: Node) -> int:
    """The least number of instructions of a step, about."""
    return node.count if isinstance(node, Plain) else int(isinstance(node, Move))


class Phase(Node):
    """A phase: every queue of the program begins and ends it.  A ``whole`` one is a run of its own,
    which many cores, and turns of a loop, may have in common.
    """

    def __init__(self, streams: Streams, op: Op) -> None:
        self.streams, self.out, self.lists = streams, streams.out, streams.lists
        self.whole = not streams.depth
        ahead: tuple[str, ...] = op.attr("ahead")
        self.begins: list[Item] = [
            (BEGIN, op, op.attr("lag") if name in ahead else 0) for name in streams.queues
        ]
        self.end: Item = (END, op, 0)
        first = len(streams.sites.watched)
        before, streams.by_lists = streams.by_lists, False
        streams.depth += 1
        self.body = streams.region(op.regions[0])
        streams.depth -= 1
        if streams.by_lists:
            streams.listing.append(self)
        streams.by_lists |= before
        self.listed = any(node.listed for node in self.body)
        self.buffers = [inner.result for inner in op.regions[0].ops if inner.name == "buffer"]
        # What is read inside is nobody else's.
        self.needs = frozenset[str]().union(*(node.needs for node in self.body)) - streams.read
        cores = {symbol.name for symbol in streams.function.program_ids}
        #: The sites in it, where nothing else makes a difference to it; what was executed by those.
        self.sites: tuple[SiteKey, ...] | None = None
        if not self.listed and self.needs <= cores:
            self.sites = tuple(dict.fromkeys(streams.sites.watched[first:]))
        self.known: dict[tuple[int, ...], list[list[Run]]] = {}

    def trace(self, env: Env) -> None:
        for buffer in self.buffers:
            self.lists.reset(buffer)
        if not self.whole:
            self._lay_out(env)
            return
        streams = self.streams
        streams.close()
        if self.sites is None:
            self._lay_out(env)
            streams.close()
            return
        key = streams.sites.tables(env, self.sites)
        if key in self.known:
            streams.append(self.known[key])
            return
        before = streams.runs
        self._lay_out(env)
        streams.close()
        self.known[key] = streams.since(before)

    def _lay_out(self, env: Env) -> None:
        for stream, begin in zip(self.out, self.begins, strict=True):
            stream.append(begin)
        for node in self.body:
            node.trace(env)
        for stream in self.out:
            stream.append(self.end)


class Branch(Node):
    """Two bodies, of which one is run."""

    def __init__(self, streams: Streams, op: Op) -> None:
        condition = as_expr(op.attr("condition"))
        self.condition = compile_expr(condition)
        with streams.sites.branch(condition, True):
            self.then = streams.region(op.regions[0])
        with streams.sites.branch(condition, False):
            self.otherwise = streams.region(op.regions[1])
        both = (*self.then, *self.otherwise)
        self.listed = any(node.listed for node in both)
        self.needs = names_of(condition).union(*(node.needs for node in both))

    def trace(self, env: Env) -> None:
        for node in self.then if self.condition(env) else self.otherwise:
            node.trace(env)


class Rotate(Node):
    """Turns buffers of index lists; nothing else makes a difference to time."""

    listed = True

    def __init__(self, streams: Streams, buffers: Sequence[Value]) -> None:
        self.lists = streams.lists
        self.buffers = buffers

    def trace(self, env: Env) -> None:
        for buffer in self.buffers:
            self.lists.rotate(buffer)


class Scalar(Node):
    """Binds a symbol to an element of an index argument."""

    def __init__(self, streams: Streams, op: Op) -> None:
        root, starts = streams.place(op.operands[0])
        places = [as_expr(e) + s for e, s in zip(op.attr("index"), starts, strict=True)]
        self.op, self.root = op, root.name
        self.places = [compile_expr(e) for e in places]
        self.name = op.symbols[0].name
        limits = root.tensor.index
        assert limits is not None
        self.low, self.high = map(compile_expr, limits)
        self.needs = frozenset[str]().union(*map(names_of, (*places, *limits)))
        found = streams.lists.indices.get(root.name)
        if found is None:
            raise refusal(
                op,
                f"the program reads scalars from '{root.name}', whose values aren't given",
                "a program with run-time indices is timed with their values",
                f"pass indices={{'{root.name}': array}}",
            )
        self.values = found
        streams.sites.read(self.name, places, self.trace)
        streams.read.add(self.name)

    def trace(self, env: Env) -> None:
        place = tuple([p(env) for p in self.places])
        if any(not 0 <= p < n for p, n in zip(place, self.values.shape, strict=True)):
            raise refusal(
                self.op,
                f"element {place} of '{self.root}', which has the shape {self.values.shape}",
                "a scalar read of an index argument lies inside it",
                "bound the index by the argument's shape",
            )
        number = int(self.values[place])
        if not self.low(env) <= number <= self.high(env):
            raise refusal(
                self.op,
                f"'{self.root}' holds {number} at {place}",
                f"its elements are declared to lie in [{self.low(env)}, {self.high(env)}]",
                "pass indices inside the range",
            )
        env[self.name] = number


class _Axis:
    """How many elements of one axis of a transfer exist."""

    def __init__(self, start: Expr, stride: int, extent: int, size: Expr) -> None:
        self.start, self.size = compile_expr(start), compile_expr(size)
        self.stride, self.extent = stride, extent

    def __call__(self, env: Mapping[str, int]) -> int:
        first, size, stride = self.start(env), self.size(env), self.stride
        if stride < 0:
            first, stride = size - 1 - first, -stride
        elif stride == 0:
            return self.extent if 0 <= first < size else 0
        low = 0 if first >= 0 else -(first // stride)
        high = min(self.extent, -((first - size) // stride))
        return max(0, high - low)


class Move(Node):
    """A DMA: its counts, and the transfers that they make."""

    def __init__(self, streams: Streams, op: Op) -> None:
        self.op, self.lists = op, streams.lists
        self.out, self.queue = streams.out, streams.queue(op)
        self.root, starts = streams.place(op.operands[0])
        self.buffer = op.operands[1]
        self.relation: Evaluator | None = None
        #: Whether axis 0 is the number of a device.
        self.across = sees_devices(self.root.tensor, starts[0], streams.function)
        if streams.group is not None and self.across:
            self._devices(streams, streams.group)
        axes = dict(zip(tuple[int, ...](op.attr("list_axes")), op.operands[2:], strict=True))
        self.ruled = [(a, v) for a, v in axes.items() if v not in streams.whole]
        self.fixed: list[Reach] = []
        self.moving: list[tuple[int, _Axis]] = []
        self.limits: list[tuple[int, Evaluator, Evaluator]] = []
        for axis, extent in enumerate(self.buffer.tile.shape):
            self._axis(streams, axis, extent, axes.get(axis))
        self.known: dict[tuple[object, ...], Item] = {}
        engine = engine_of(streams.chip, self.lists.buffers, op)
        memory = str(self.lists.buffers[self.buffer].attr("memory"))
        self.make = transfer_maker(
            streams.chip, engine, op, self.root.tensor, memory, streams.group
        )
        self.fills = op.name == "dma_load" and streams.follows(self.buffer)
        self.listing: list[tuple[Evaluator, int, Evaluator, Evaluator]] = []
        if self.fills and self.root.name in self.lists.indices and not axes:
            self.listing = _listing(streams, op)
            self.needs |= _listing_names(streams, op)
        streams.by_lists |= bool(self.lists.indices and self.ruled)
        self.listed = self.fills or bool(self.ruled)

    def _devices(self, streams: Streams, group: Group) -> None:
        """Which device's memory is meant, as seen from the core's own."""
        own = device_id(streams.function)
        assert own is not None
        target = as_expr(self.op.attr("index")[0]) + as_expr(self.op.attr("offset")[0])
        if target is own:
            return
        self.needs |= names_of(target) | {own.name}
        name, which = own.name, compile_expr(target)

        def relation(env: Mapping[str, int]) -> int:
            other = which(env)
            if not 0 <= other < group.count:
                raise refusal(
                    self.op,
                    f"a transfer with device {other} of {group.count}",
                    "a device's number lies between 0 and the number of devices less 1",
                    "take the number modulo the number of devices",
                )
            return group.relation(env[name], other)

        self.relation = relation
        streams.sites.watch((target, own), relation, "device")

    @property
    def constant(self) -> bool:
        """Whether it is the same wherever it stands."""
        return not (self.moving or self.listed or self.relation is not None)

    def _axis(self, streams: Streams, axis: int, extent: int, ruled: Value | None) -> None:
        op = self.op
        if axis == 0 and self.across:
            self.fixed.append(Reach(1, 1))
            return
        step, offset = int(op.attr("step")[axis]), as_expr(op.attr("offset")[axis])
        size = as_expr(op.operands[0].tensor.shape[axis])
        if ruled in streams.whole:
            count = ruled.tile.shape[0]
            self.fixed.append(Reach(count * step, 1, count))
            return
        if ruled is not None:
            self.fixed.append(Reach(extent, 1, extent // step))
            self.limits.append((step, compile_expr(offset), compile_expr(size)))
            self.needs |= names_of(offset) | names_of(size)
            return
        start, stride = (
            as_expr(op.attr("index")[axis]) * step + offset,
            int(op.attr("stride")[axis]),
        )
        count = _Axis(start, stride, extent, size)
        if isinstance(start, Const) and isinstance(size, Const):
            self.fixed.append(Reach(count({}), stride))
            return
        self.fixed.append(Reach(extent, stride))
        if all_there(start, stride, extent, size):
            return
        self.moving.append((axis, count))
        self.needs |= names_of(start) | names_of(size)
        streams.sites.watch((start, size), count, stride, extent)

    def trace(self, env: Env) -> None:
        self.out[self.queue].append(self.item(env))

    def item(self, env: Env) -> Item:
        """The transfer that it makes."""
        key: tuple[object, ...] = tuple([axis(env) for _, axis in self.moving])
        if self.ruled:
            key = (*key, *self._entries(env))
        if self.fills:
            self._fill(env)
        relation = 0 if self.relation is None else self.relation(env)
        item = self.known.get((relation, key))
        if item is None:
            item = self.known[relation, key] = (MOVE, self.op, self._transfer(key, relation))
        return item

    def _transfer(self, key: tuple[object, ...], relation: int) -> Transfer:
        reach = list(self.fixed)
        counts = cast("tuple[int, ...]", key[: len(self.moving)])
        for (axis, _), count in zip(self.moving, counts, strict=True):
            reach[axis] = Reach(count, reach[axis].stride)
        entries = cast("tuple[tuple[int, int], ...]", key[len(self.moving) :])
        for (axis, _), (number, elements) in zip(self.ruled, entries, strict=True):
            reach[axis] = Reach(elements, 1, number)
        return self.make(reach, relation)

    def _entries(self, env: Env) -> list[tuple[int, int]]:
        return [
            self.lists.present(buffer, step, offset(env), size(env))
            for (_, buffer), (step, offset, size) in zip(self.ruled, self.limits, strict=True)
        ]

    def _fill(self, env: Env) -> None:
        """What this load does to the index list in its buffer."""
        if not self.listing:
            self.lists.forget(self.buffer)
            return
        axes = [(first(env), n, size(env), start(env)) for first, n, size, start in self.listing]
        fill = int(self.op.attr("fill")) if self.op.attr("filling") else -1
        self.lists.load(self.buffer, self.root.name, axes, fill)


def _listing_names(streams: Streams, op: Op) -> frozenset[str]:
    """The symbols in :func:`_listing`."""
    _, starts = streams.place(op.operands[0])
    found = [*starts, *op.attr("index"), *op.attr("offset"), *op.operands[0].tensor.shape]
    return frozenset[str]().union(*(names_of(as_expr(e)) for e in found))


def _listing(streams: Streams, op: Op) -> list[tuple[Evaluator, int, Evaluator, Evaluator]]:
    """Where a load of an index argument reads, as :meth:`Lists.load` wants it."""
    _, starts = streams.place(op.operands[0])
    found: list[tuple[Evaluator, int, Evaluator, Evaluator]] = []
    for axis, start in enumerate(starts):
        first = as_expr(op.attr("index")[axis]) * op.attr("step")[axis] + op.attr("offset")[axis]
        size = compile_expr(op.operands[0].tensor.shape[axis])
        found.append((compile_expr(first), op.attr("stride")[axis], size, compile_expr(start)))
    return found
