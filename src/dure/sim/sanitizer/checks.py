"""What a machine program must be before its runs can be proved: queues, engines, memories, ends of
semaphores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from dure.ir.core import Function, Op, Value, walk
from dure.ir.devices import devices_of
from dure.ir.expr import evaluate
from dure.machine.chip import Chip, Memory
from dure.sim.sanitizer.findings import Finding, Place
from dure.sim.storage import place_tile


def malformed(function: Function, chip: Chip) -> Iterator[Finding]:
    """What keeps a program from being one of the chip's."""
    buffers: dict[Value, Op] = {}
    for op in walk(function.body):
        if op.name == "buffer":
            buffers[op.result] = op
            if op.attr("memory") not in chip.memories:
                yield _bad(f"buffer '{op.result.name}' in unknown memory '{op.attr('memory')}'", op)
        elif "queue" in op.attrs:
            yield from _queue(op, chip)
    cores = _cores(function)
    if cores > round(chip.cores.base):
        yield _bad(f"a program for {cores} cores; the chip has {round(chip.cores.base)}")
    yield from _semaphores(function, chip)
    names = cast("tuple[str, ...]", function.attrs.get("near", ()))
    near = {p.value for p in function.params if p.value.name in names}
    for op in walk(function.body):
        if op.name in ("view", "reshaped") and op.operands[0] in near:
            near.update(op.results)
        if op.name in ("dma_load", "dma_store"):
            yield from _transfer(op, chip, buffers, near)
        elif op.name == "compute":
            yield from _compute(op, chip, buffers)


def _cores(function: Function) -> int:
    """The cores of a device that the program is for."""
    cores = 1
    for extent in function.grid:
        cores *= evaluate(extent, {})
    return cores // devices_of(function)


def outside(function: Function, chip: Chip) -> Iterator[Finding]:
    """Buffers that don't lie in their memory, or in one that other cores use too."""
    cores = _cores(function)
    for op in walk(function.body):
        if op.name != "buffer":
            continue
        name, memory = str(op.attr("memory")), chip.memories[str(op.attr("memory"))]
        size = place_tile(op.result.tile, _partitions(memory)).size
        slot = int(op.attr("stages")) - 1
        first = int(op.attr("offset")) + slot * int(op.attr("pitch"))
        room = _room(memory)
        if first + size > room:
            where = Place(op, "", op.result.name, slot, name, first, first + size, True)
            message = (
                f"buffer '{op.result.name}' ends at byte {first + size} of '{name}', which has "
                f"{room}" + (" in each partition" if memory.partitions is not None else "")
            )
            yield Finding("out-of-bounds", message, (where,), op)
        if memory.scope == "chip" and cores > 1:
            where = Place(op, "", op.result.name, 0, name, first, first + size, True)
            message = (
                f"buffer '{op.result.name}' has the same bytes of '{name}' on each of {cores} "
                "cores, which aren't ordered"
            )
            yield Finding("race", message, (where,), op)


def _partitions(memory: Memory) -> int | None:
    return None if memory.partitions is None else round(memory.partitions.base)


def _room(memory: Memory) -> int:
    """Bytes (of each partition) that a program may use."""
    reserved = 0 if memory.reserved is None else round(memory.reserved.base)
    return (round(memory.size.base) - reserved) // (_partitions(memory) or 1)


def _bad(message: str, op: Op | None = None) -> Finding:
    return Finding("not-proved", message, (), op)


def _queue(op: Op, chip: Chip) -> Iterator[Finding]:
    queue = op.attrs["queue"]
    computes = any(e.queue == queue for e in chip.engines.values())
    moves = queue in chip.transfer_queues
    if not computes and not moves:
        yield _bad(f"unknown queue '{queue}'", op)
    elif op.name == "compute" and not computes:
        yield _bad(f"a compute on queue '{queue}', which computes nothing", op)
    elif op.name in ("dma_load", "dma_store") and not moves:
        yield _bad(f"a {op.name} on queue '{queue}', which moves nothing", op)


def _semaphores(function: Function, chip: Chip) -> Iterator[Finding]:
    declared = [op for op in walk(function.body) if op.name == "semaphore"]
    most, highest = round(chip.sync.semaphores.base), round(chip.sync.maximum.base)
    if len(declared) > most:
        yield _bad(f"{len(declared)} semaphores; a core has {most}", declared[most])
    ends: dict[tuple[str, Value], dict[str, Op]] = {}
    for op in walk(function.body):
        if op.name in ("wait", "signal"):
            ends.setdefault((op.name, op.operands[0]), {})[str(op.attrs["queue"])] = op
    for (name, semaphore), queues in ends.items():
        if len(queues) > 1:
            verb = "waits on" if name == "wait" else "signals"
            text = " and ".join(f"'{q}'" for q in queues)
            yield _bad(
                f"semaphore '{semaphore.name}': more than one queue {verb} it ({text})",
                list(queues.values())[-1],
            )
    for op in declared:
        if int(op.attr("maximum")) > highest:
            yield _bad(
                f"semaphore '{op.result.name}' counts to {op.attr('maximum')}; the chip's count to "
                f"{highest}",
                op,
            )


def _transfer(op: Op, chip: Chip, buffers: dict[Value, Op], near: set[Value]) -> Iterator[Finding]:
    memory = str(buffers[op.operands[1]].attr("memory"))
    place = chip.near if op.operands[0] in near else chip.home
    way = (place, memory) if op.name == "dma_load" else (memory, place)
    if not any(way in d.moves for d in chip.dma.values() if op.attrs["queue"] in d.queues):
        text = f"queue '{op.attrs['queue']}' doesn't move from '{way[0]}' to '{way[1]}'"
        yield _bad(text, op)
    for value in op.operands[2:]:
        held = buffers[value].attr("memory")
        if held != chip.lists:
            yield _bad(f"an index list in '{held}'; the chip reads lists from '{chip.lists}'", op)


def _compute(op: Op, chip: Chip, buffers: dict[Value, Op]) -> Iterator[Finding]:
    names: tuple[str, ...] = op.attr("engines")
    engines = [chip.engines.get(name) for name in names]
    for name, engine in zip(names, engines, strict=True):
        if engine is None:
            yield _bad(f"unknown engine '{name}'", op)
        elif engine.queue != op.attrs["queue"]:
            yield _bad(f"engine '{name}' isn't one of queue '{op.attrs['queue']}'", op)
    reads = int(op.attr("reads"))
    for place, value in enumerate(op.operands):
        memory = str(buffers[value].attr("memory"))
        reached = any(
            memory in (e.reads if place < reads else e.writes)
            or (e.dot is not None and memory in e.dot.accumulators)
            for e in engines
            if e is not None
        )
        if not reached:
            verb = "read" if place < reads else "write"
            text = f"no engine of {', '.join(names)} can {verb} '{memory}'"
            yield _bad(f"{text}, where buffer '{value.name}' is", op)
