"""How many slots each buffer has: enough to hand it over, no more than its memory holds."""

from __future__ import annotations

from dure.compiler.chip.allocate import limit_of, storage_bytes
from dure.compiler.chip.tree import Buffer, Tree, steps
from dure.ir.expr import Symbol, as_expr
from dure.machine.chip import Chip

#: Slots of what goes to other devices: its way over a link is long, however small it is.
_AWAY = 8


def choose_stages(
    tree: Tree,
    chip: Chip,
    stages: int,
    budget: int | None = None,
    ahead: int = 0,
    device: Symbol | None = None,
) -> None:
    """``stages`` slots for what is loaded in a block that repeats (``ahead`` for what is loaded
    ahead, where that is more) or stored by an index list there, each of whose entries takes its
    time; more for what goes to another ``device``; two where queues hand over what they compute,
    else one.

    Where a memory is too small for that, what is computed gives up its second slot first, then the
    largest of the rings.
    """
    queues: dict[Buffer, set[str]] = {}
    loaded: set[Buffer] = set()
    slow: set[Buffer] = set()
    away: set[Buffer] = set()
    for step in steps(tree.body):
        if step.kind == "dma_load":
            loaded.update(b.root for b in step.writes)
        if step.kind == "dma_store" and step.lists:
            slow.add(step.reads[0].root)
        if step.kind == "dma_store" and device is not None and step.attrs["index"][0] is not device:
            away.add(step.reads[0].root)
        for buffer in (*step.reads, *step.writes):
            queues.setdefault(buffer.root, set()).add(step.queue)
    roots = [b for b in tree.buffers if b.alias_of is None]
    for buffer in roots:
        shared = len(queues.get(buffer, ())) > 1
        wanted = stages if buffer in loaded or buffer in slow else 2
        if buffer in away:
            wanted = max(stages, _AWAY)
        if buffer.ahead:
            wanted = max(stages, ahead)
        buffer.stages = wanted if shared and buffer.block.repeated else 1
        if buffer.slots is not None:
            buffer.stages = buffer.slots
    for name, memory in chip.memories.items():
        own = {b: storage_bytes(b.type, memory) for b in roots if b.memory == name}
        excess = sum(size * b.stages for b, size in own.items()) - limit_of(name, chip, budget)
        while excess > 0:
            rings = [b for b in own if b.stages > 1 and b.slots is None]
            if not rings:
                break
            largest = max(rings, key=lambda b: (b not in loaded, own[b] * b.stages))
            largest.stages -= 1
            excess -= own[largest]
    for buffer in tree.buffers:
        buffer.stages = buffer.root.stages
    for loop, buffer in tree.over_slots:
        loop.stop = as_expr(buffer.stages)
