"""Loads that run ahead leave room for those that somebody waits for.

A queue that loads ahead has as many transfers in flight as its engine takes.  Where the engine
moves the bytes of one after another, the small loads of the kernel that runs wait for all of them.
A few keep the memory as busy: as many as it delivers in the time that one takes.  The queue waits
for its own transfers with a semaphore that starts with so many credits.
"""

from __future__ import annotations

from math import ceil

from dure.compiler.chip.tree import Block, Item, Semaphore, Step, Sync, Tree, blocks
from dure.machine.chip import Chip, Dma


def throttle(tree: Tree, chip: Chip) -> None:
    """Bound what is in flight in each block that loads ahead again and again."""
    engines = {dma.ahead: dma for dma in chip.dma.values() if dma.ahead and dma.serial}
    for block in blocks(tree.body):
        for queue, dma in engines.items():
            if block.repeated:
                _bound(block, queue, dma, chip)


def _bound(block: Block, queue: str, dma: Dma, chip: Chip) -> None:
    loads = [
        item
        for item in block.items
        if isinstance(item, Step) and item.kind == "dma_load" and item.queue == queue
    ]
    if not loads:
        return
    count = _enough(sum(load.writes[0].type.bytes for load in loads) / len(loads), dma, chip)
    if count >= int(dma.outstanding.base):
        return
    credits = Semaphore(queue, queue, count, "ahead")
    items: list[Item] = []
    for item in block.items:
        if any(item is load for load in loads):
            items += [Sync("wait", queue, credits), item, Sync("signal", queue, credits)]
        else:
            items.append(item)
    block.items = items


def _enough(size: float, dma: Dma, chip: Chip) -> int:
    """How many loads of ``size`` bytes keep a core's part of the home memory busy."""
    own = chip.bytes_a_second(dma.bandwidth)
    home = chip.memories[chip.home].bandwidth
    rate = own if home is None else min(own, chip.bytes_a_second(home) / chip.cores.base)
    stream = own if dma.stream is None else chip.bytes_a_second(dma.stream)
    seconds = chip.seconds(dma.latency) + size / stream
    return ceil(seconds * rate / size)
