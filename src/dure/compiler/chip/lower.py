"""Tile IR to a tree of instructions between buffers.

Pure ops wait until something needs a stored value (a dot, a store, control) and are then computed
together, so that a chain of them is one instruction where the engines allow.  What a loop carries
has one buffer, which the body updates in place where no one still needs the old value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dure.compiler.chip.balance import balance
from dure.compiler.chip.engines import Engines
from dure.compiler.chip.instructions import Writer, vector_runs
from dure.compiler.chip.pack import pack
from dure.compiler.chip.transfers import Transfers
from dure.compiler.chip.tree import (
    Block,
    Branch,
    Buffer,
    Loop,
    Step,
    Structure,
    Tree,
)
from dure.compiler.chip.usage import Consumer, Usage, is_cheap, usage_of
from dure.ir.core import Function, Op, Region, Value
from dure.ir.expr import as_expr, compare, proves
from dure.ir.rewrite import eliminate_dead_code
from dure.machine.chip import Chip


def lower(
    function: Function,
    chip: Chip,
    ahead: frozenset[str] = frozenset(),
    near: frozenset[int] = frozenset(),
) -> Tree:
    """The instructions of a legalised tile program whose grid counts cores.

    Arguments named in ``ahead`` are loaded on the queue that a DMA engine has for that; those whose
    numbers are in ``near`` lie in the memory in front of home.
    Raises :class:`~dure.errors.DureError` with the author's line for what the chip can't do.
    """
    function = eliminate_dead_code(function)
    values = frozenset(function.params[n].value for n in near)
    work = _Lowering(function, Engines(chip), ahead, values)
    work.region(function.body, work.body)
    work.flush(work.body)
    work.writer.join_between()
    tree = Tree(work.body, work.writer.buffers)
    pack(tree, work.engines)
    balance(tree, work.engines)
    work.transfers.fill_ahead(tree)
    return tree


@dataclass
class _Lowering:
    function: Function
    engines: Engines
    ahead: frozenset[str] = frozenset()
    near: frozenset[Value] = frozenset()
    usage: Usage = field(init=False)
    writer: Writer = field(init=False)
    transfers: Transfers = field(init=False)
    body: Block = field(init=False)

    def __post_init__(self) -> None:
        self.usage = usage_of(self.function)
        self.writer = Writer(self.engines, self.usage)
        parts = self.engines, self.usage, self.writer
        self.transfers = Transfers(*parts, self.ahead, self.near)
        self.body = Block()
        self.pending: list[Op] = []
        self.done: set[Consumer] = set()
        #: Where a value should go, if whoever is there isn't needed any more.
        self.wanted: dict[Value, Buffer] = {}
        self.occupant: dict[Buffer, Value] = {}
        self.loaded: set[Buffer] = set()
        #: Accumulators that their dot starts: the constant, and the loop.
        self.begins: dict[Value, tuple[Value, Op]] = {}
        #: What loops carry, by the block that renews it.
        self.renewed: dict[Value, Block] = {}
        #: The innermost loop that carries something in a buffer.
        self.carried: dict[Buffer, Block | None] = {}
        #: What loops carry and a dot makes at each turn.
        self.products: set[Value] = set()

    # --- the walk --------------------------------------------------------------------------------

    def region(self, region: Region, block: Block) -> None:
        """Lower the ops of a region into a block."""
        for op in region.ops:
            match op.name:
                case "view" | "index_load":
                    block.items.append(Structure(op))
                    if op.name == "view":
                        self.transfers.view(op)
                case "load":
                    for buffer in self.transfers.load(op, block):
                        self.loaded.add(buffer)
                        self.put(op.result, buffer)
                case "store":
                    self.needs([op.operands[1]], block)
                    self.transfers.store(op, block)
                case "dot":
                    self.dot(op, block)
                case "for":
                    self.loop(op, block)
                case "if":
                    self.branch(op, block)
                case _:
                    if not is_cheap(op):
                        self.pending.append(op)
                    elif op.name == "transpose":
                        self.turned(op, block)
                    continue
            self.done.add(op)

    def remaining(self, value: Value, besides: Sequence[Consumer] = ()) -> set[Consumer]:
        """Who still needs a value."""
        return self.usage.consumers.get(value, set()) - self.done - set(besides)

    # --- pure ops --------------------------------------------------------------------------------

    def flush(self, block: Block) -> None:
        """Compute what waits."""
        group, self.pending = self.pending, []
        for queue, run in self._runs(group):
            outputs: list[tuple[Value, Buffer]] = []
            for result in (r for op in run for r in op.results if self.remaining(r, run)):
                target = self.destination(result, run, queue, block)
                outputs += [(result, target)]
            if outputs:
                self.writer.compute(block, run, outputs, queue)
            self.done.update(run)
            for value, buffer in outputs:
                self.put(value, buffer)
            for value, buffer in outputs:
                self._fetched(value, buffer, block)

    def _runs(self, group: Sequence[Op]) -> Iterator[tuple[str, list[Op]]]:
        """Runs of ops that a queue does in one instruction each.  None makes two tiles that only
        pass through a memory: they may do so through the same bytes.
        """
        for queue, run in vector_runs(self.writer, group):
            start, passing = 0, False
            for place, op in enumerate(run):
                passes = any(self.passes(r, queue) for r in op.results)
                if passes and passing:
                    yield queue, run[start:place]
                    start = place
                passing = passing or passes
            yield queue, run[start:]

    def _fetched(self, value: Value, buffer: Buffer, block: Block) -> None:
        """Copy what a dot reads to where its engine does, where it was made: not in each turn of a
        loop that the dot is in.
        """
        for consumer in self.usage.consumers.get(value, ()):
            if not isinstance(consumer, Op) or consumer.name != "dot":
                continue
            reads = frozenset(self.engines.chip.engines[self.engines.dot(consumer)[0]].reads)
            read = value in map(self.usage.base, consumer.operands[:2])
            if read and buffer.memory not in reads:
                self.writer.in_memory(value, reads, block)
        if self.writer.is_between(buffer):
            self.writer.stored[value].remove(buffer)

    def _only_fetched(self, value: Value, memory: str) -> bool:
        """Whether all that need a value are dots that read it elsewhere."""
        for consumer in self.usage.consumers[value]:
            if not isinstance(consumer, Op) or consumer.name != "dot":
                return False
            near = memory in self.engines.chip.engines[self.engines.dot(consumer)[0]].reads
            if near or value not in map(self.usage.base, consumer.operands[:2]):
                return False
        return True

    def turned(self, op: Op, block: Block) -> None:
        """Turn a stored tile that a loop carries on transposed as soon as there is room for it.

        What stands before it in the text comes first, which others may wait for.
        """
        value = op.result
        target, base = self.wanted.get(value), self.usage.base(value)
        if target is not None and self.writer.stored.get(base) and self.free(target, ()):
            self.flush(block)
            self.writer.copy(block, [(value, target)], op)
            self.put(value, target)
            # The loop needs what was turned only for that.
            for consumer in self.usage.consumers[value]:
                if isinstance(consumer, Region):
                    others = (v for v in consumer.yields if v is not value)
                    if base not in map(self.usage.base, others):
                        self.usage.consumers[base].discard(consumer)

    def put(self, value: Value, buffer: Buffer) -> None:
        """``value`` takes a buffer over."""
        self.writer.place(value, buffer)
        self.occupant[buffer.root] = value

    def destination(self, value: Value, run: Sequence[Op], queue: str, block: Block) -> Buffer:
        """The buffer that a computed value goes to."""
        writable = self.engines.writes[queue]
        wanted = self.wanted.get(value)
        if wanted is not None and wanted.memory in writable and self.free(wanted, run):
            return wanted
        memory, maker = self.reached(value, queue), self.usage.makers.get(value)
        if self.passes(value, queue):
            return self.writer.between(value.tile, memory, block, _span(maker))
        if memory != self.engines.chip.scratchpad and maker is not None:
            for operand in maker.operands:
                source = self.writer.find(operand, [memory])
                if source is None or self.remaining(operand, run):
                    continue
                if source.type == value.type and self.owned(operand, source, block):
                    return source
        return self.writer.buffer(
            value.tile, memory, block, value.name or (maker.name if maker else ""), _span(maker)
        )

    def reached(self, value: Value, queue: str) -> str:
        """The memory that a queue makes a value in: where it is wanted, or as near as it can."""
        memory, writable = self.memory_of(value), self.engines.writes[queue]
        if memory in writable:
            return memory
        scratchpad = self.engines.chip.scratchpad
        return scratchpad if scratchpad in writable else sorted(writable)[0]

    def passes(self, value: Value, queue: str) -> bool:
        """Whether a tile that a queue turns only passes through the memory that it turns it in."""
        maker, memory = self.usage.makers.get(value), self.reached(value, queue)
        if maker is None or maker.name != "transpose" or memory == self.engines.chip.scratchpad:
            return False
        return self._only_fetched(value, memory)

    def free(self, buffer: Buffer, besides: Sequence[Consumer]) -> bool:
        """Whether no one but ``besides`` needs what a buffer holds."""
        occupant = self.occupant.get(buffer.root)
        return occupant is None or not self.remaining(occupant, besides)

    def owned(self, value: Value, buffer: Buffer, block: Block) -> bool:
        """Whether a block may overwrite a value once it is used: it is made anew at every turn."""
        if buffer in self.loaded or buffer.alias_of is not None:
            return False
        carried = self.carried.get(buffer.root) is block
        return buffer.block is block or self.renewed.get(value) is block or carried

    def memory_of(self, value: Value) -> str:
        """Where a value's consumers want it: in a dot's accumulators, or the scratchpad."""
        for consumer in self.usage.consumers.get(value, ()):
            if not isinstance(consumer, Op) or consumer.name != "dot":
                continue
            if self.usage.base(consumer.operands[2]) is value:
                return self.engines.dot(consumer)[2].accumulators[0]
        return self.engines.chip.scratchpad

    def needs(self, values: Sequence[Value], block: Block) -> None:
        """Flush if one of the values, or what it is made of, waits."""
        waiting = {r for op in self.pending for r in op.results}
        if any(self.usage.base(v) in waiting for v in values):
            self.flush(block)

    # --- dots ------------------------------------------------------------------------------------

    def dot(self, op: Op, block: Block) -> None:
        left, right, accumulator = op.operands
        name, engine, rules = self.engines.dot(op)
        memory = rules.accumulators[0]
        target = self.wanted.get(op.result)
        constant = self.usage.is_constant(accumulator)
        if target is not None and target.memory not in rules.accumulators:
            target = None
        if target is not None and not constant and accumulator not in self.writer.stored:
            self.wanted.setdefault(accumulator, target)
        self._operands_first([left, right], engine.queue, block)
        self.needs([left, right, accumulator], block)
        held = self.occupant.get(target.root) if target is not None else None
        if held is not None and any(held in o.operands for o in self.pending):
            self.flush(block)
        for operand in (left, right):
            self._operand(operand, frozenset(engine.reads), block)
        if not constant:
            source = self.writer.in_memory(accumulator, frozenset(rules.accumulators), block)
            own = self.owned(accumulator, source, block) and not self.remaining(accumulator, [op])
            if source is not target and target is None and own and source.type == op.result.type:
                target = source
        if target is not None and not self.free(target, [op]):
            target = None
        if target is None:
            target = self.writer.buffer(
                op.result.tile, memory, block, op.result.name or "product", op.span
            )
        begin = self.begins.get(accumulator)
        if begin is None or self.renewed.get(accumulator) is not block:
            self._product(op, op.operands, target, name, block)
        else:
            self._first_or_not(op, begin, target, name, block)
        self.done.add(op)
        self.put(op.result, target)

    def _operands_first(self, operands: Sequence[Value], queue: str, block: Block) -> None:
        """Compute a dot's operands apart from what waits for the result of another dot.

        In one instruction they would wait for it too, and this dot's engine with them.
        """
        found = {self.usage.base(v) for v in operands}
        first: list[Op] = []
        rest: list[Op] = []
        for op in reversed(self.pending):
            if found.isdisjoint(op.results):
                rest.append(op)
                continue
            first.append(op)
            found.update(self.usage.base(o) for o in op.operands)
        first.reverse()
        if not first or self._waits(first) or not self._waits(rest):
            return
        if all(other != queue for other, _ in vector_runs(self.writer, first)):
            self.pending = first
            self.flush(block)
            self.pending = rest[::-1]

    def _waits(self, ops: Sequence[Op]) -> bool:
        """Whether one of the ops reads what a dot makes."""
        read = {self.usage.base(o) for op in ops for o in op.operands}
        return any(v in self.products or self._made_by_dot(v) for v in read)

    def _product(
        self, op: Op, operands: tuple[Value, ...], target: Buffer, name: str, block: Block
    ) -> None:
        """One dot instruction into ``target``."""
        engine = self.engines.chip.engines[name]
        assert engine.dot is not None
        self.writer.compute(
            block,
            [replace(op, operands=operands)],
            [(op.result, target)],
            engine.queue,
            accumulators=engine.dot.accumulators,
        )
        step = block.items[-1]
        assert isinstance(step, Step)
        others = tuple(n for n in step.attrs["engines"] if n != name)
        step.attrs["engines"] = (name, *others)

    def _first_or_not(
        self, op: Op, begin: tuple[Value, Op], target: Buffer, name: str, block: Block
    ) -> None:
        """A dot that starts its accumulator at the loop's first turn, and continues it later."""
        initial, loop = begin
        counter, start = loop.regions[0].symbols[0], as_expr(loop.attr("start"))
        first = Block(parent=block, repeated=block.repeated)
        self._product(op, (*op.operands[:2], initial), target, name, first)
        if proves(as_expr(loop.attr("stop")) <= start + loop.attr("step")):
            block.items += first.items
            return
        later = Block(parent=block, repeated=block.repeated)
        self._product(op, op.operands, target, name, later)
        block.items.append(Branch(compare("==", counter, start), first, later, op.span))

    def _operand(self, value: Value, memories: frozenset[str], block: Block) -> None:
        """Make sure that a dot's operand, or what it is reindexed from, is where it is read."""
        base = self.usage.base(value)
        if self.usage.is_constant(value) or self._broadcast(value):
            self.writer.in_memory(value, memories, block)
        elif self.writer.find(base, memories) is None:
            self.writer.in_memory(base, memories, block)

    def _broadcast(self, value: Value) -> bool:
        maker = self.usage.makers.get(value)
        while maker is not None and is_cheap(maker) and maker.operands:
            if maker.name == "broadcast":
                return True
            maker = self.usage.makers.get(maker.operands[0])
        return False

    # --- control ---------------------------------------------------------------------------------

    def loop(self, op: Op, block: Block) -> None:
        region = op.regions[0]
        carried = self._carried(op, block)
        body = Block([], block, True, True, bool(op.attrs.get("instances")))
        outer = {buffer.root: self.carried.get(buffer.root) for buffer in carried}
        for argument, buffer in zip(region.args, carried, strict=True):
            self.put(argument, buffer)
            self.renewed[argument] = body
            self.carried[buffer.root] = body
        self.products.update(
            a for a, v in zip(region.args, region.yields, strict=True) if self._made_by_dot(v)
        )
        for value, buffer in zip(region.yields, carried, strict=True):
            self._want(value, buffer)
        self.region(region, body)
        self._yield(region, carried, body, op)
        attrs = {k: v for k, v in op.attrs.items() if k == "instances"}
        start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
        block.items.append(
            Loop(region.symbols[0], start, stop, op.attr("step"), body, attrs, op.span)
        )
        self.done.add(region)
        self.carried |= outer
        for result, buffer in zip(op.results, carried, strict=True):
            self.put(result, buffer)

    def _want(self, value: Value, buffer: Buffer) -> None:
        """Have a value in a buffer, and what a loop that makes it, turn by turn, starts from."""
        self.wanted[value] = buffer
        maker = self.usage.makers.get(value)
        if maker is not None and maker.name == "for":
            initial = maker.operands[maker.results.index(value)]
            if initial.type == buffer.type:
                self.wanted.setdefault(initial, buffer)

    def _carried(self, op: Op, block: Block) -> list[Buffer]:
        """The buffers of what a loop carries, with their first values."""
        region = op.regions[0]
        found: list[Buffer] = []
        copies: dict[str, list[tuple[Value, Buffer]]] = {}
        self.needs([v for v in op.operands if v not in self.writer.stored], block)
        # What waits may read values that the loop updates in place.
        self.flush(block)
        for initial, argument, last, result in zip(
            op.operands, region.args, region.yields, op.results, strict=True
        ):
            memory = self._carried_memory(argument, last)
            if self._begins(op, initial, argument, last):
                self.begins[argument] = (initial, op)
                found.append(
                    self.writer.buffer(argument.tile, memory, block, argument.name, op.span)
                )
                continue
            source = self.writer.find(initial, [memory])
            own = source is not None and self.owned(initial, source, block)
            if own and source not in found and not self.remaining(initial, [op]):
                assert source is not None
                found.append(source)
                continue
            made = self.wanted.get(result)
            if made is None or made.memory != memory or made in found or not self.free(made, [op]):
                made = self.writer.buffer(argument.tile, memory, block, argument.name, op.span)
            copies.setdefault(memory, []).append((initial, made))
            found.append(made)
        for pairs in copies.values():
            self.writer.copy(block, pairs, op)
        return found

    def _begins(self, op: Op, initial: Value, argument: Value, last: Value) -> bool:
        """Whether a loop carries an accumulator that its one dot can start by itself."""
        maker = self.usage.makers.get(last)
        if maker is None or maker.name != "dot" or maker.operands[2] is not argument:
            return False
        inside = any(maker is inner for inner in op.regions[0].ops)
        alone = self.usage.consumers.get(argument, set()) == {maker}
        runs = proves(as_expr(op.attr("start")) < as_expr(op.attr("stop")))
        return inside and alone and runs and self.usage.is_constant(initial)

    def _carried_memory(self, argument: Value, last: Value) -> str:
        maker = self.usage.makers.get(last)
        if maker is not None and maker.name == "dot":
            return self.engines.dot(maker)[2].accumulators[0]
        if maker is not None and maker.name == "for":
            place = maker.results.index(last)
            inner = maker.regions[0]
            return self._carried_memory(inner.args[place], inner.yields[place])
        if maker is not None and maker.name == "if":
            place = maker.results.index(last)
            made = [r.yields[place] for r in maker.regions]
            dots = [v for v in made if self._made_by_dot(v)]
            if dots:
                return self._carried_memory(argument, dots[0])
        return self.memory_of(argument)

    def _made_by_dot(self, value: Value) -> bool:
        maker = self.usage.makers.get(value)
        return maker is not None and maker.name == "dot"

    def _yield(self, region: Region, targets: Sequence[Buffer], block: Block, op: Op) -> None:
        """Bring what a region yields into its buffers, all at once where they are copied."""
        self.flush(block)
        copies: dict[tuple[str, ...], list[tuple[Value, Buffer]]] = {}
        for value, target in zip(region.yields, targets, strict=True):
            held = self.occupant.get(target.root)
            if held is value:
                continue
            base = self.usage.base(value)
            sources = tuple(b.memory for b in self.writer.stored.get(base, ())[:1])
            copies.setdefault((*sources, target.memory), []).append((value, target))
        for pairs in copies.values():
            self.writer.copy(block, pairs, op)
            for value, target in pairs:
                self.put(value, target)

    def branch(self, op: Op, block: Block) -> None:
        for place, result in enumerate(op.results):
            # Where both branches add to the same accumulator, it may be where the sum is wanted.
            makers = [self.usage.makers.get(region.yields[place]) for region in op.regions]
            sums = {m.operands[2] if m is not None and m.name == "dot" else None for m in makers}
            if len(sums) == 1 and result in self.wanted and None not in sums:
                for value in sums:
                    assert value is not None
                    self.wanted.setdefault(value, self.wanted[result])
        self.flush(block)
        members = [_members(region) for region in op.regions]
        targets = [self._chosen(op, place, members, block) for place in range(len(op.results))]
        stored, occupant = self.writer.stored, self.occupant
        inner: list[Block] = []
        for region, own in zip(op.regions, members, strict=True):
            # What one branch stores the other doesn't have, and neither needs what the other does.
            self.writer.stored = {v: list(buffers) for v, buffers in stored.items()}
            self.occupant = dict(occupant)
            self.done.update(*members)
            self.done -= own
            body = Block(parent=block, repeated=block.repeated)
            for value, target in zip(region.yields, targets, strict=True):
                self.wanted[value] = target
            self.region(region, body)
            self._yield(region, targets, body, op)
            inner.append(body)
        self.writer.stored, self.occupant = stored, occupant
        self.done.update(*members)
        condition = as_expr(op.attr("condition"))
        block.items.append(Branch(condition, inner[0], inner[1], op.span))
        for result, target in zip(op.results, targets, strict=True):
            self.put(result, target)

    def _chosen(self, op: Op, place: int, members: Sequence[set[Consumer]], block: Block) -> Buffer:
        """The buffer of a branch's result: where it is wanted, or of what a branch leaves as it is,
        if whoever is there isn't needed afterwards; else a new one.
        """
        result = op.results[place]
        inside: list[Consumer] = [consumer for own in members for consumer in own]
        wanted = self.wanted.get(result)
        if wanted is not None and wanted.type == result.type and self.free(wanted, inside):
            return wanted
        memory = self.engines.chip.scratchpad
        kept = [region.yields[place] for region in op.regions]
        makers = [self.usage.makers.get(value) for value in kept]
        if all(m is not None and m.name == "dot" for m in makers):
            # What both add to, if that is the same.
            kept = [m.operands[2] for m in makers if m is not None]
            memory = self._carried_memory(kept[0], op.regions[0].yields[place])
            kept = kept[:1] if kept[0] is kept[-1] else []
        for value in kept:
            for buffer in self.writer.stored.get(value, ()):
                alone = self.occupant.get(buffer.root) is value and self.free(buffer, inside)
                if alone and self.owned(value, buffer, block):
                    return buffer
        return self.writer.buffer(result.tile, memory, block, result.name or "chosen", op.span)


def _members(region: Region) -> set[Consumer]:
    """All that a region consumes values with."""
    found: set[Consumer] = {region}
    for op in region.ops:
        found.add(op)
        for inner in op.regions:
            found |= _members(inner)
    return found


def _span(op: Op | None) -> Any:
    return op.span if op is not None else None
