"""The scheduled tree written down as a machine program (:mod:`dure.ir.machine`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dure.ir.machine as _declares_machine_ops
from dure.compiler.chip.tree import (
    Block,
    Branch,
    Buffer,
    Item,
    Loop,
    Rotate,
    Semaphore,
    Step,
    Structure,
    Sync,
    Tree,
    steps,
)
from dure.ir.core import Function, Op, Region, Value, infer
from dure.ir.types import TileType
from dure.machine.chip import Chip

assert _declares_machine_ops


def emit(
    function: Function, tree: Tree, chip: Chip, near: frozenset[int] = frozenset()
) -> Function:
    """The machine function of a tree; ``function`` is the tile program that it came from, and
    ``near`` its arguments that lie in the memory in front of home.
    """
    work = _Emitter(chip)
    top = [work.buffer(b) for b in tree.buffers if work.is_used(b, tree)]
    top += [work.semaphore(n, s) for n, s in enumerate(tree.semaphores)]
    body = Region((), (*top, *work.block(tree.body)))
    attrs = {**function.attrs, "target": chip.name}
    if near:
        attrs["near"] = tuple(function.params[n].value.name for n in sorted(near))
    return replace(function, level="machine", body=body, symbols=(), attrs=attrs)


class _Emitter:
    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.buffers: dict[Buffer, Value] = {}
        self.semaphores: dict[Semaphore, Value] = {}
        self.used: set[Buffer] = set()

    def is_used(self, buffer: Buffer, tree: Tree) -> bool:
        """Whether some instruction touches the buffer."""
        if not self.used:
            for step in steps(tree.body):
                touched = (*step.reads, *step.writes, *step.lists)
                self.used.update((*touched, *(b.root for b in touched)))
        return buffer in self.used

    def buffer(self, buffer: Buffer) -> Op:
        """The declaration of a buffer."""
        kind: TileType = buffer.type
        attrs: dict[str, Any] = {
            "memory": buffer.memory,
            "offset": buffer.offset,
            "shape": kind.shape,
            "dtype": kind.dtype,
            "stages": buffer.stages,
            "pitch": buffer.pitch,
            "quantized_axis": kind.quantized_axis,
        }
        same = [] if buffer.alias_of is None else [self.buffers[buffer.root]]
        made = infer("buffer", same, attrs, span=buffer.span, hint=_identifier(buffer.name))
        self.buffers[buffer] = made.result
        return made

    def semaphore(self, number: int, semaphore: Semaphore) -> Op:
        """The declaration of a semaphore."""
        maximum = int(self.chip.sync.maximum.base)
        attrs = {"initial": semaphore.initial, "maximum": maximum}
        made = infer("semaphore", [], attrs, hint=_identifier(f"s{number}_{semaphore.why}"))
        self.semaphores[semaphore] = made.result
        return made

    def block(self, block: Block) -> list[Op]:
        """The ops of a block."""
        return [op for item in block.items for op in self.item(item)]

    def item(self, item: Item) -> list[Op]:
        match item:
            case Structure():
                return [item.op]
            case Rotate():
                turning = [v for b, v in self.buffers.items() if b.root in item.buffers]
                return [Op("rotate", tuple(turning), ())] if turning else []
            case Sync():
                attrs = {"queue": item.queue, "count": 1}
                return [
                    Op(item.kind, (self.semaphores[item.semaphore],), (), attrs, span=item.span)
                ]
            case Loop():
                attrs = {"start": item.start, "stop": item.stop, "step": item.step, **item.attrs}
                body = Region((), tuple(self.block(item.body)), (), (item.symbol,))
                return [Op("for", (), (), attrs, (body,), span=item.span)]
            case Branch():
                regions = tuple(
                    Region((), tuple(self.block(b))) for b in (item.then, item.otherwise)
                )
                attrs = {"condition": item.condition}
                return [Op("if", (), (), attrs, regions, span=item.span)]
            case Step():
                return [self.step(item)]

    def step(self, step: Step) -> Op:
        """One instruction."""
        attrs = {**step.attrs, "queue": step.queue}
        if step.kind == "compute":
            operands = [self.buffers[b] for b in (*step.reads, *step.writes)]
            assert step.region is not None
            return Op("compute", tuple(operands), (), attrs, (step.region,), span=step.span)
        assert step.tensor is not None
        tile = step.writes[0] if step.kind == "dma_load" else step.reads[0]
        operands = [step.tensor, self.buffers[tile], *(self.buffers[b] for b in step.lists)]
        return infer(step.kind, operands, attrs, span=step.span)


def _identifier(name: str) -> str:
    plain = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return plain if plain and not plain[0].isdigit() else f"b_{plain}"
