"""How many slots each buffer has: enough to hand it over, no more than its memory holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from dure.compiler.chip.allocate import limit_of, storage_bytes
from dure.compiler.chip.tree import Buffer, Step, Tree, steps
from dure.ir.expr import Symbol, as_expr
from dure.ir.types import static_extent
from dure.machine.chip import Chip

#: Slots of what goes to other devices: its way over a link is long, however small it is.
_AWAY = 8
#: The part of its bandwidth that a transfer in short runs reaches by itself, at most.
_SHORT = 0.5


def choose_stages(
    tree: Tree,
    chip: Chip,
    stages: int,
    budget: int | None = None,
    ahead: int = 0,
    device: Symbol | None = None,
) -> None:
    """``stages`` slots for what is loaded in a block that repeats (``ahead`` for what is loaded
    ahead, where that is more) or stored there by transfers that take their time; more for what goes
    to another ``device``; two where queues hand over what they compute, else one.

    Where the scratchpad is too small for that, what is computed gives up its second slot first,
    then the largest of the rings; where accumulators are, what turns least often (:func:`_first`).
    """
    queues: dict[Buffer, set[str]] = {}
    loaded: set[Buffer] = set()
    slow: set[Buffer] = set()
    listed: set[Buffer] = set()
    away: set[Buffer] = set()
    for step in steps(tree.body):
        if step.kind == "dma_load":
            loaded.update(b.root for b in step.writes)
        if step.kind == "dma_store" and _slow(step, chip):
            slow.add(step.reads[0].root)
        if chip.passes:
            listed.update(b.root for b in step.lists)
        if step.kind == "dma_store" and device is not None and step.attrs["index"][0] is not device:
            away.add(step.reads[0].root)
        for buffer in (*step.reads, *step.writes):
            queues.setdefault(buffer.root, set()).add(step.queue)
    roots = [b for b in tree.buffers if b.alias_of is None]
    for buffer in roots:
        # A DMA queue runs ahead of its own transfers, which read their lists; only where engines do
        # much in little time does that matter, and elsewhere it makes for longer proofs.
        shared = len(queues.get(buffer, ())) > 1 or buffer in listed
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
            if name == chip.scratchpad:
                shorter = max(rings, key=lambda b: (b not in loaded, own[b] * b.stages))
            else:
                shorter = _first(rings, own, excess)
            shorter.stages -= 1
            excess -= own[shorter]
    for buffer in tree.buffers:
        buffer.stages = buffer.root.stages
    for loop, buffer in tree.over_slots:
        loop.stop = as_expr(buffer.stages)


def _slow(step: Step, chip: Chip) -> bool:
    """Whether a store takes long by itself: each entry of an index list takes its time, and in
    short runs several transfers side by side are faster than one.
    """
    if step.lists:
        return True
    dma = next((d for d in chip.dma.values() if d.queue == step.queue), None)
    if dma is None or dma.efficiency is None or step.tensor is None:
        return False
    tile, extent = step.reads[0].type, static_extent(step.tensor.tensor.shape[-1])
    if extent is None or tile.shape[-1] >= extent:
        return False
    runs, run = prod(tile.shape[:-1]), tile.shape[-1] * tile.dtype.bits / 8
    values = {name: number.base for name, number in dma.numbers.items()}
    return dma.efficiency({**values, "run": run, "runs": runs, "bytes": runs * run}) < _SHORT


def _first(rings: Sequence[Buffer], sizes: Mapping[Buffer, int], excess: int) -> Buffer:
    """Which ring gets shorter first: of those that turn in the fewest loops the smallest that is
    enough, or the largest.
    """
    least = min(map(_depth, rings))
    outer = [b for b in rings if _depth(b) == least]
    enough = [b for b in outer if sizes[b] >= excess]
    if enough:
        return min(enough, key=lambda b: sizes[b])
    return max(outer, key=lambda b: sizes[b] * b.stages)


def _depth(buffer: Buffer) -> int:
    """Loops around the block where a buffer turns."""
    depth, block = 0, buffer.block
    while block is not None:
        depth, block = depth + block.loop, block.parent
    return depth
