"""Loads and stores of a tile program as transfers between a tensor and a buffer.

What a DMA leaves out where a tile hangs over its tensor's edge is written first: once in each slot
of a ring where every turn leaves out the same, else at the turns that do leave something out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dure.compiler.chip.engines import Engines
from dure.compiler.chip.instructions import Writer
from dure.compiler.chip.tree import (
    Block,
    Branch,
    Buffer,
    Item,
    Loop,
    Rotate,
    Semaphore,
    Step,
    Sync,
    Tree,
)
from dure.compiler.chip.usage import Usage
from dure.ir.core import Op, Value
from dure.ir.expr import Const, Expr, as_expr, compare, logic, maximum, minimum, proves, symbol
from dure.ir.types import TensorType

_DESCRIPTOR = ("index", "step", "offset", "stride", "list_axes")


@dataclass
class Transfers:
    """Makes the transfers of one program; parameters named in ``ahead`` are loaded on the queue
    that a DMA engine has for that, and those in ``near`` lie in the memory in front of home.
    """

    engines: Engines
    usage: Usage
    writer: Writer
    ahead: frozenset[str]
    near: frozenset[Value]
    turn: int = 0
    #: Rings whose tiles hang over an edge in the same way at every turn.
    filled: list[tuple[Op, Buffer, str]] = field(default_factory=list[tuple[Op, Buffer, str]])
    views: dict[Value, Value] = field(default_factory=dict[Value, Value])

    def load(self, op: Op, block: Block) -> list[Buffer]:
        """Load a tile: the buffers that have it then, one where it is read and one where it is an
        index list.
        """
        chip = self.engines.chip
        value = op.result
        memories = [chip.scratchpad]
        if value in self.usage.lists:
            only = all(
                isinstance(c, Op) and c.name in ("load", "store")
                for c in self.usage.consumers[value]
            )
            memories = (
                [chip.lists]
                if only or chip.lists == chip.scratchpad
                else [
                    chip.lists,
                    chip.scratchpad,
                ]
            )
        lists = [self.list_of(o, block) for o in op.operands[1:]]
        found: list[Buffer] = []
        for memory in memories:
            engine = chip.dma[self._dma(self._place(op), memory, op)]
            buffer = self.writer.buffer(
                value.tile, memory, block, value.name or op.operands[0].name, op.span
            )
            attrs = {k: op.attr(k) for k in (*_DESCRIPTOR, "fill")}
            attrs["filling"] = engine.fills
            outside = None if engine.fills else self._outside(op)
            queue = engine.ahead if engine.ahead and self._runs_ahead(op) else engine.queue
            buffer.ahead = queue == engine.ahead
            self._transfer(op, queue, lists, buffer, attrs, block, outside)
            found.append(buffer)
        return found

    def view(self, op: Op) -> None:
        """A view of a tensor lies where that does."""
        source = op.operands[0]
        self.views[op.result] = self.views.get(source, source)

    def _place(self, op: Op) -> str:
        """The memory in which the tensor of a load or store lies."""
        tensor = op.operands[0]
        chip = self.engines.chip
        return chip.near if self.views.get(tensor, tensor) in self.near else chip.home

    def _runs_ahead(self, op: Op) -> bool:
        """Whether a load may go before what its program waits for."""
        tensor = op.operands[0]
        return self.views.get(tensor, tensor).name in self.ahead and len(op.operands) == 1

    def _transfer(
        self,
        op: Op,
        queue: str,
        lists: list[Buffer],
        buffer: Buffer,
        attrs: dict[str, Any],
        block: Block,
        outside: Expr | None,
    ) -> None:
        """A load; where it may leave out some of its tile, the tile is filled first.

        Only a turn that does leave something out waits for that.
        """

        def load() -> Step:
            return Step(
                *("dma_load", queue, list(lists), [buffer], dict(attrs), op.operands[0]),
                lists=lists,
                span=op.span,
            )

        if outside is None:
            block.items.append(load())
            return
        if isinstance(outside, Const):
            if self._same_cut(op):
                self.filled.append((op, buffer, queue))
            else:
                self._fill(op, buffer, block)
            block.items.append(load())
            return
        cut = Block(parent=block, repeated=block.repeated)
        self._fill(op, buffer, cut)
        cut.items.append(load())
        whole = Block([load()], block, block.repeated)
        block.items.append(Branch(outside, cut, whole, op.span))

    def _dma(self, source: str, target: str, op: Op) -> str:
        engines = self.engines.dma(source, target)
        if not engines:
            raise self.engines.missing(f"move from {source} to {target}", op)
        self.turn += 1
        return engines[self.turn % len(engines)]

    def list_of(self, value: Value, block: Block) -> Buffer:
        """The buffer of an index list."""
        return self.writer.in_memory(value, frozenset({self.engines.chip.lists}), block)

    def _fill(self, op: Op, buffer: Buffer, block: Block) -> None:
        """Write what a DMA leaves out at the tensor's edge, before it comes."""
        kind = buffer.type
        constant = Op(
            "full",
            (),
            (Value(kind, "fill"),),
            {
                "shape": kind.shape,
                "value": op.attr("fill"),
                "dtype": kind.dtype,
                "quantized_axis": kind.quantized_axis,
            },
            span=op.span,
        )
        self.usage.makers[constant.result] = constant
        self.writer.copy(block, [(constant.result, buffer)], op)

    def _same_cut(self, op: Op) -> bool:
        """Whether a load leaves out the same part of its tile at every turn."""
        if op.attr("list_axes"):
            return False
        tensor = op.operands[0].tensor
        for axis, extent in enumerate(op.attr("shape")):
            start = as_expr(op.attr("index")[axis]) * op.attr("step")[axis]
            start = start + op.attr("offset")[axis]
            last = start + as_expr(op.attr("stride")[axis]) * (extent - 1)
            inside = proves(as_expr(0) <= start) and proves(last < tensor.shape[axis])
            if not inside and not isinstance(start, Const):
                return False
            if not inside and not isinstance(tensor.shape[axis], Const):
                return False
        return True

    def fill_ahead(self, tree: Tree) -> None:
        """Fill what no transfer of a ring ever writes, once in each slot, before anything else."""
        items: list[Item] = []
        handed: dict[tuple[str, str], Semaphore] = {}
        for op, buffer, queue in self.filled:
            inside = Block(parent=tree.body, repeated=True, loop=True)
            self._fill(op, buffer, inside)
            filler = inside.items[-1]
            assert isinstance(filler, Step)
            inside.items.insert(0, Rotate([buffer]))
            counter = symbol(f"slot{len(items)}", "loop", 0, None)
            loop = Loop(counter, as_expr(0), as_expr(1), 1, inside, {}, op.span)
            tree.over_slots.append((loop, buffer))
            items.append(loop)
            ends = (filler.queue, queue)
            handed.setdefault(ends, Semaphore(*ends, 0, f"{buffer.name}_edge"))
        for semaphore in handed.values():
            items.append(Sync("signal", semaphore.signals, semaphore))
            items.append(Sync("wait", semaphore.waits, semaphore))
        tree.body.items[:0] = items

    def _outside(self, op: Op) -> Expr | None:
        """When a load leaves out some of its tile; None where it never does."""
        tensor = op.operands[0].type
        assert isinstance(tensor, TensorType)
        lists = dict(zip(op.attr("list_axes"), op.operands[1:], strict=True))
        conditions: list[Expr] = []
        for axis, extent in enumerate(op.attr("shape")):
            offset, step = (as_expr(op.attr(k)[axis]) for k in ("offset", "step"))
            size = tensor.shape[axis]
            if axis in lists:
                low, high = self._entries(lists[axis])
                inside = high is not None and proves(high * step + step + offset <= size)
                if low is None or not proves(as_expr(0) <= low) or not inside:
                    return as_expr(1)
                continue
            first = as_expr(op.attr("index")[axis]) * step + offset
            last = first + as_expr(op.attr("stride")[axis]) * (extent - 1)
            if not proves(last < size):
                conditions.append(compare("<=", size, last))
            if not proves(as_expr(0) <= first):
                conditions.append(compare("<", first, 0))
        return logic("or", *conditions) if conditions else None

    def _entries(self, value: Value) -> tuple[Expr | None, Expr | None]:
        """The declared range of an index list's entries, with what fills it beyond its end."""
        maker = self.usage.makers.get(self.usage.base(value))
        if maker is None or maker.name != "load":
            return None, None
        declared = maker.operands[0].tensor.index
        if declared is None:
            return None, None
        low, high = declared
        if self._outside(maker) is not None:
            fill = int(maker.attr("fill"))
            low, high = minimum(low, fill), maximum(high, fill)
        return low, high

    def store(self, op: Op, block: Block) -> None:
        """Store a tile that is computed."""
        tensor, value = op.operands[0], op.operands[1]
        lists = [self.list_of(o, block) for o in op.operands[2:]]
        buffer = self.writer.in_memory(value, self.engines.storable(), block)
        dma = self._dma(buffer.memory, self._place(op), op)
        attrs = {k: op.attr(k) for k in (*_DESCRIPTOR, "combine")}
        block.items.append(
            Step(
                "dma_store",
                self.engines.chip.dma[dma].queue,
                [buffer, *lists],
                list[Buffer](),
                attrs,
                tensor=tensor,
                lists=lists,
                span=op.span,
            )
        )
