"""Compute instructions: groups of tile ops become regions between buffers, on engines.

A :class:`Writer` knows where each tile value is stored, and makes the instruction that computes
others from them.  Constants and free reindexings are cloned into every instruction that uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from dure.compiler.chip.allocate import bytes_of, capacity, storage_bytes
from dure.compiler.chip.engines import Engines
from dure.compiler.chip.tree import Block, Buffer, Step, common
from dure.compiler.chip.usage import Usage, is_cheap
from dure.errors import IRError, KernelError
from dure.ir.core import Op, Region, Span, Value
from dure.ir.machine.compute import Operation, operation_of, works
from dure.ir.rewrite import clone_region
from dure.ir.types import TileType
from dure.sim.cost import Pass, duration, shared_values


class Writer:
    """Where values are, and the instructions that put them there."""

    def __init__(self, engines: Engines, usage: Usage) -> None:
        self.engines = engines
        self.usage = usage
        self.stored: dict[Value, list[Buffer]] = {}
        self.buffers: list[Buffer] = []
        self._between: dict[tuple[TileType, str], Buffer] = {}

    # --- storage ---------------------------------------------------------------------------------

    def buffer(
        self, kind: TileType, memory: str, block: Block, name: str, span: Span | None
    ) -> Buffer:
        """A new buffer that turns in ``block``."""
        made = Buffer(kind, memory, name, block, span)
        self.buffers.append(made)
        return made

    def alias(self, source: Buffer, kind: TileType) -> Buffer:
        """The same bytes as a tile of another shape."""
        for known in self.buffers:
            if known.alias_of is source and known.type == kind:
                return known
        made = Buffer(kind, source.memory, source.name, source.block, source.span, alias_of=source)
        self.buffers.append(made)
        return made

    def place(self, value: Value, buffer: Buffer) -> None:
        """``value`` is in this buffer, and nothing else is any more."""
        self.stored.setdefault(value, []).append(buffer)

    def find(self, value: Value, memories: Iterable[str]) -> Buffer | None:
        """A buffer of the value in one of the memories."""
        allowed = set(memories)
        return next((b for b in self.stored.get(value, ()) if b.memory in allowed), None)

    def same_bytes(self, memory: str, one: TileType, other: TileType) -> bool:
        """Whether two shapes of the same elements lie alike in a memory."""
        if self.engines.chip.memories[memory].partitions is None:
            return one.block is None
        columns = [kind.shape[-1] if kind.shape else 1 for kind in (one, other)]
        return one.block is None and columns[0] == columns[1]

    # --- instructions ----------------------------------------------------------------------------

    def compute(
        self,
        block: Block,
        ops: Sequence[Op],
        outputs: Sequence[tuple[Value, Buffer]],
        queue: str,
        accumulators: Iterable[str] = (),
    ) -> None:
        """One instruction that computes ``outputs`` by ``ops`` (in order) from what is stored.

        ``accumulators`` are memories that it reads besides those of its queue.
        """
        turns = any(op.name == "dot" for op in ops) or self.engines.doer(queue, "transpose")
        turns = turns or any(self.transposes(value) for value, _ in outputs)
        body = _Body(self, self.engines.reads[queue], frozenset(accumulators), block, bool(turns))
        for op in ops:
            body.add(op)
        yields = tuple(body.use(value) for value, _ in outputs)
        region = Region(tuple(body.args), tuple(body.ops), yields)
        touched = frozenset(b.memory for b in (*body.reads, *(b for _, b in outputs)))
        names = self.engines.names(queue, [o for o, _ in works(region)], touched)
        span = next((op.span for op in reversed(ops) if op.span is not None), None)
        step = Step(
            "compute",
            queue,
            body.reads,
            [buffer for _, buffer in outputs],
            {"engines": names, "reads": len(body.reads)},
            region=region,
            span=span if span is not None else _span_of(outputs),
        )
        block.items.append(step)

    def copy(self, block: Block, pairs: Sequence[tuple[Value, Buffer]], op: Op | None) -> None:
        """One instruction that stores values (constant, reindexed or stored elsewhere) anew; each
        that is transposed takes its own.
        """
        turned = [(v, b) for v, b in pairs if self.transposes(v)]
        for value, buffer in turned:
            self._transposed(value, buffer, block, op)
        pairs = [pair for pair in pairs if pair not in turned]
        if not pairs:
            return
        sources: list[Buffer] = []
        for value, _ in pairs:
            sources += self.stored.get(self.usage.base(value), ())[:1]
        reads, writes = {b.memory for b in sources}, {b.memory for _, b in pairs}
        queue = min(
            (
                q
                for q in self.engines.able(["copy"])
                if reads <= self.engines.reads[q] and writes <= self.engines.writes[q]
            ),
            key=lambda q: sum(_copy_cost(self.engines, value, q) for value, _ in pairs),
            default=None,
        )
        if queue is None:
            route = f"copy from {', '.join(reads) or 'nowhere'} to {', '.join(writes)}"
            raise self.engines.missing(route, op)
        self.compute(block, (), pairs, queue)

    def in_memory(self, value: Value, memories: frozenset[str], block: Block) -> Buffer:
        """A buffer of exactly this value in one of the memories, made if there is none."""
        found = self.find(value, memories)
        if found is not None:
            return found
        base = self.usage.base(value)
        for source in self.stored.get(base, ()):
            movable = source.memory in memories and self._only_reshaped(value)
            if movable and self.same_bytes(source.memory, source.type, value.tile):
                return self.alias(source, value.tile)
        memory = self._nearest(memories)
        made = self.buffer(value.tile, memory, block, value.name or base.name, None)
        maker = self.usage.makers.get(value)
        transposes = self.transposes(value)
        if transposes:
            self._transposed(value, made, block, maker)
        else:
            self.copy(block, [(value, made)], maker)
        self.place(value, made)
        return made

    def _transposed(self, value: Value, made: Buffer, block: Block, maker: Op | None) -> None:
        """Transpose into a buffer, the fastest way: at once, or, a matrix, on an engine that writes
        elsewhere with a copy from there.
        """
        source = self.stored.get(self.usage.base(value), [None])[0]
        found: list[tuple[float, str, str, str]] = []
        for queue in self.engines.able(["transpose"]):
            if source is not None and source.memory not in self.engines.reads[queue]:
                continue
            try:
                cost = _cost(self.engines, value, queue, "transpose")
            except IRError:
                continue  # an engine that doesn't take the type
            plain = self._swaps(value)
            for memory in sorted(self.engines.writes[queue]):
                if memory == made.memory:
                    found.append((cost, queue, "", memory))
                    continue
                for other in self.engines.able(["copy"]) if plain else ():
                    near = memory in self.engines.reads[other]
                    if near and made.memory in self.engines.writes[other]:
                        more = _cost(self.engines, value, other, "copy")
                        found.append((cost + more, queue, other, memory))
        if not found:
            raise self.engines.missing(f"transpose into {made.memory}", maker)
        _, queue, other, memory = min(found)
        if not other:
            self.compute(block, (), [(value, made)], queue)
            return
        between = self.between(value.tile, memory, block, made.span)
        self.compute(block, (), [(value, between)], queue)
        self.place(value, between)
        self.compute(block, (), [(value, made)], other)
        self.stored[value].remove(between)

    def between(self, kind: TileType, memory: str, block: Block, span: Span | None) -> Buffer:
        """Where a transposed tile lies until it is copied: one buffer for all of a type, as the
        engines that make and copy them do so one after another.
        """
        known = self._between.get((kind, memory))
        if known is None:
            known = self._between[kind, memory] = self.buffer(kind, memory, block, "turned", span)
        else:
            known.block = common(known.block, block)
        return known

    def join_between(self) -> None:
        """Let all tiles that pass through a memory do so through the same bytes, where it hasn't
        room for two slots of everything: what has bytes of its own may stay over a loop.
        """
        for memory in dict.fromkeys(name for _, name in self._between):
            found = [b for (_, name), b in self._between.items() if name == memory]
            rules = self.engines.chip.memories[memory]
            roots = [b for b in self.buffers if b.memory == memory and b.alias_of is None]
            if 2 * sum(storage_bytes(b.type, rules) for b in roots) <= capacity(rules):
                continue
            root = max(found, key=lambda b: bytes_of(b.type, rules))
            self.buffers.remove(root)
            self.buffers.insert(0, root)
            for buffer in found:
                if buffer is not root:
                    buffer.alias_of = root
                    root.block = common(root.block, buffer.block)

    def is_between(self, buffer: Buffer) -> bool:
        """Whether tiles only pass through a buffer."""
        return self._between.get((buffer.type, buffer.memory)) is buffer

    def _nearest(self, memories: frozenset[str]) -> str:
        scratchpad = self.engines.chip.scratchpad
        return scratchpad if scratchpad in memories else sorted(memories)[0]

    def _only_reshaped(self, value: Value) -> bool:
        return all(op.name == "reshape" for op in self._chain(value))

    def transposes(self, value: Value) -> bool:
        """Whether a value is another one transposed, as far as free ops go."""
        return any(op.name == "transpose" for op in self._chain(value))

    def _swaps(self, value: Value) -> bool:
        """Whether a value is another one with its last two axes swapped."""
        turns = [op for op in self._chain(value) if op.name == "transpose"]
        last = value.tile.rank - 1
        order = (*range(last - 1), last, last - 1)
        return len(turns) == 1 and tuple(turns[0].attr("order")) == order

    def _chain(self, value: Value) -> list[Op]:
        found: list[Op] = []
        maker = self.usage.makers.get(value)
        while maker is not None and is_cheap(maker) and maker.operands:
            found.append(maker)
            maker = self.usage.makers.get(maker.operands[0])
        return found


class _Body:
    """The region of one instruction while it is made."""

    def __init__(
        self,
        writer: Writer,
        memories: frozenset[str],
        accumulators: frozenset[str],
        block: Block,
        turns: bool,
    ) -> None:
        self.writer = writer
        self.turns = turns
        self.memories = memories
        self.accumulators = accumulators
        self.block = block
        self.reads: list[Buffer] = []
        self.args: list[Value] = []
        self.ops: list[Op] = []
        self.inside: dict[Value, Value] = {}

    def use(self, value: Value) -> Value:
        """The value inside the region: computed there, cloned, or read from a buffer."""
        found = self.inside.get(value)
        if found is not None:
            return found
        buffer = self.writer.find(value, self.memories)
        buffer = buffer or self.writer.find(value, self.accumulators)
        maker = self.writer.usage.makers.get(value)
        stuck = maker is not None and maker.name == "transpose" and not self.turns
        if buffer is None and maker is not None and is_cheap(maker) and not stuck:
            self.add(maker)
            return self.inside[value]
        if buffer is None:
            if not self.writer.stored.get(value) and not stuck:
                raise KernelError(
                    f"a tile '{value.name}' of {value.type} is used before it is computed",
                    where=maker.span.render() if maker is not None and maker.span else "",
                    rule="an instruction reads tiles that are stored",
                    fix="this is a defect of the compiler: please report the kernel",
                )
            buffer = self.writer.in_memory(value, self.memories, self.block)
        argument = Value(value.type, value.name)
        self.reads.append(buffer)
        self.args.append(argument)
        self.inside[value] = argument
        return argument

    def add(self, op: Op) -> None:
        """Put an op into the region, on the region's own values."""
        operands = tuple(self.use(o) for o in op.operands)
        results = tuple(Value(r.type, r.name) for r in op.results)
        regions = tuple(clone_region(r) for r in op.regions)
        self.ops.append(replace(op, operands=operands, results=results, regions=regions))
        self.inside.update(zip(op.results, results, strict=True))


def _span_of(outputs: Sequence[tuple[Value, Buffer]]) -> Span | None:
    return next((b.span for _, b in outputs if b.span is not None), None)


def vector_runs(writer: Writer, group: Sequence[Op]) -> list[tuple[str, list[Op]]]:
    """A group of ops cut into runs that one queue can do each, so that they take least time one
    after another.

    Raises :class:`TargetError` for an op that no queue has.
    """
    engines, ops, asked = writer.engines, list(group), _Runs(writer, group)
    # For the ops from each place on: picoseconds, and the queue and end of the first run.
    best: list[tuple[float, str, int]] = [(0.0, "", len(ops))] * (len(ops) + 1)
    for start in reversed(range(len(ops))):
        found: list[tuple[float, str, int]] = []
        for queue in engines.queues:
            for end, cost in enumerate(asked.costs(queue, start), start + 1):
                found.append((cost + best[end][0], queue, end))
        if not found:
            op = ops[start]
            raise engines.missing(f"do {op.name} ({operation_of(op)}) of {op.results[0].type}", op)
        best[start] = min(found, key=lambda entry: entry[0])
    runs: list[tuple[str, list[Op]]] = []
    start = 0
    while start < len(ops):
        _, queue, end = best[start]
        runs.append((queue, ops[start:end]))
        start = end
    return runs


class _Runs:
    """What runs of a group's ops would cost."""

    def __init__(self, writer: Writer, ops: Sequence[Op]) -> None:
        self.writer = writer
        self.engines = writer.engines
        self.ops = ops
        self.operations: list[Operation] = [operation_of(op, writer.usage.makers) for op in ops]
        self.shared = self._shared()
        self.copying = self.engines.able(["copy"])
        self.cycles: dict[tuple[str, int], float] = {}

    def _shared(self) -> set[Value]:
        """What others than one op of the group need, for engines that pass on what they make."""
        if not self.engines.chip.passes:
            return set()
        usage, inside = self.writer.usage, set(self.ops)
        made = [r for op in self.ops for r in op.results]
        needed = (v for v in made if any(c not in inside for c in usage.consumers[v]))
        return shared_values(self.ops, needed, usage.makers)

    def costs(self, queue: str, start: int) -> Iterator[float]:
        """The picoseconds of the op at a place on a queue, of it and the next, and so on, as far as
        the queue's engines do them in one instruction.

        What the queue can't reach where it is stored is copied to it, and counts as one copy more;
        so does what it can't write to the scratchpad.
        """
        engines, usage, chip = self.engines, self.writer.usage, self.engines.chip
        reads, near = engines.reads[queue], chip.scratchpad in engines.writes[queue]
        issue, copies = 0.0, 0.0
        works: dict[str, float] = {}
        own = engines.queues[queue]
        passes = {n: Pass(chip.engines[n], usage.makers, self.shared) for n in own}
        far: set[Value] = set()
        for place in range(start, start + self._length(queue, start)):
            op, operation = self.ops[place], self.operations[place]
            name = engines.doer(queue, operation)
            assert name is not None
            engine = chip.engines[name]
            clock = float((engine.clock or chip.clock).base)
            issue = max(issue, float(duration(chip, engine.issue, engine.clock)))
            if operation != "none":
                cycles = passes[name].add(operation, op, self._cycles(name, place))
                works[name] = works.get(name, 0.0) + cycles / clock * 1e12
            for value in map(usage.base, op.operands):
                stored = self.writer.stored.get(value, ())
                if stored and value not in far and all(b.memory not in reads for b in stored):
                    far.add(value)
                    copies += self._copied(value)
            away = 0.0 if near else sum(map(self._copied, op.results))
            yield issue + max(works.values(), default=0.0) + copies + away

    def _cycles(self, name: str, place: int) -> float:
        key = name, place
        if key not in self.cycles:
            costs = self.engines.costs
            self.cycles[key] = costs.cycles(name, self.operations[place], self.ops[place])
        return self.cycles[key]

    def _copied(self, value: Value) -> float:
        return max((_copy_cost(self.engines, value, q) for q in self.copying), default=0.0)

    def _length(self, queue: str, start: int) -> int:
        """How many of the ops from a place on the queue's engines do in one instruction."""
        engines, writer = self.engines, self.writer
        turns = engines.doer(queue, "transpose") is not None
        inside: set[Value] = set()
        count = 0
        limit: float = float("inf")
        for op, operation in zip(self.ops[start:], self.operations[start:], strict=True):
            name = engines.doer(queue, operation)
            if name is None:
                break
            chain = engines.chip.engines[name].chain
            if chain is not None:
                limit = min(limit, chain.base)
            # What is computed here and used transposed must be stored in between.
            stuck = not turns and any(
                writer.usage.base(o) in inside and writer.transposes(o) for o in op.operands
            )
            if count >= limit or stuck:
                break
            inside.update(op.results)
            count += 1
        return count


def _copy_cost(engines: Engines, value: Value, queue: str) -> float:
    """The picoseconds of copying a tile on a queue that can."""
    return _cost(engines, value, queue, "copy")


def _cost(
    engines: Engines, value: Value, queue: str, operation: Literal["copy", "transpose"]
) -> float:
    """The picoseconds of copying a tile, or of transposing one into it, on a queue that can."""
    chip = engines.chip
    name = engines.doer(queue, operation)
    assert name is not None
    cycles = engines.costs.cycles(name, operation, Op("reshape", (value,), (value,)))
    engine = chip.engines[name]
    issue = float(duration(chip, engine.issue, engine.clock))
    return issue + cycles / float((engine.clock or chip.clock).base) * 1e12
