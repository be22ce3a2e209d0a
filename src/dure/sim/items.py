"""The timed instructions that a program is traced into, and what its DMAs cost.

A DMA's bytes and runs follow from how many of its elements exist along each axis
(:mod:`dure.sim.footprint`), and from nothing else about where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, TypeAlias

from dure.errors import IRError
from dure.ir.core import Op, Value
from dure.ir.types import TensorType
from dure.machine.chip import Chip, Dma
from dure.machine.group import Group
from dure.sim.cost import duration
from dure.sim.flows import UNIT, WEIGHT, units_a_picosecond, weight_of
from dure.sim.footprint import Footprint, Reach, footprint

COMPUTE, WAIT, SIGNAL, MOVE, BEGIN, END = range(6)

#: (COMPUTE, op, ComputeCost), (MOVE, op, Transfer), (WAIT or SIGNAL, op, (semaphore, count)),
#: (BEGIN or END of a phase, op, the last phases before it that the queue needn't wait for)
Item: TypeAlias = tuple[int, Op, Any]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A DMA with its numbers: picoseconds of ``issue`` and ``delay`` (from issue to flow), what
    flows, its own ``limit``, the ``weight`` of its units at the home memory, and the bytes that the
    home memory gives or takes.  ``memory`` is the one at its other end, of whose contention it
    causes the part ``contends``, in 2^-20.  The home memory is that of the device at this
    ``relation`` (:class:`dure.machine.group.Group`).
    """

    dma: str
    issue: int
    delay: int
    bytes: int
    units: int
    limit: int
    weight: int
    home: Fraction
    memory: str
    relation: int = 0
    contends: int = WEIGHT


def engine_of(chip: Chip, buffers: Mapping[Value, Op], op: Op) -> str:
    """The DMA engine of the op's queue that goes its way."""
    memory = str(buffers[op.operands[1]].attr("memory"))
    queue = op.attr("queue")
    for place in (chip.near, chip.home):
        way = (place, memory) if op.name == "dma_load" else (memory, place)
        for name, dma in chip.dma.items():
            if queue in dma.queues and way in dma.moves:
                return name
    way = (chip.home, memory) if op.name == "dma_load" else (memory, chip.home)
    engines = [f"'{d.queue}'" for d in chip.dma.values() if way in d.moves]
    raise refusal(
        op,
        f"a DMA in queue '{queue}' from {way[0]} to {way[1]}",
        f"a DMA of {chip.name} moves bytes between the memories that its engine reaches",
        f"use queue {' or '.join(engines)}" if engines else "go by way of another memory",
    )


def transfer_maker(
    chip: Chip, name: str, op: Op, tensor: TensorType, memory: str, group: Group | None = None
) -> Callable[[Sequence[Reach], int], Transfer]:
    """What makes an op's transfers from their reach and their relation, in a group of devices."""
    dma = chip.dma[name]
    issue, latency = duration(chip, dma.issue), duration(chip, dma.latency)
    descriptor = 0 if dma.descriptor is None else duration(chip, dma.descriptor)
    granule = 1 if dma.granule is None else int(dma.granule.base)
    hop = 0 if group is None else duration(chip, group.link.latency)
    share = Fraction(*op.attr("share"))
    lists: tuple[int, ...] = tuple(op.attr("list_axes"))

    def make(reach: Sequence[Reach], relation: int) -> Transfer:
        found = footprint(tensor, reach, granule)
        if not found.bytes:
            return Transfer(name, issue, 0, 0, 0, 1, 0, Fraction(), memory)
        way = hop * group.hops(relation) if group is not None else 0
        entries = prod(reach[axis].entries for axis in lists)
        delay = latency + descriptor * (entries - 1) + way
        limit = _limit(chip, dma, found)
        home = found.granules * share if chip.home in dma.route else Fraction()
        weight = weight_of(found.granules * share / found.bytes)
        units = found.bytes * UNIT
        numbers = found.bytes, units, limit, weight
        contends = _contends(limit, relation, group)
        return Transfer(name, issue, delay, *numbers, home, memory, relation, contends)

    return make


def _contends(limit: int, relation: int, group: Group | None) -> int:
    """The part of a memory's contention that a transfer causes: it takes the memory's ports for its
    bytes, and one that links slow down takes them as much more seldom.
    """
    if group is None or not relation:
        return WEIGHT
    rate = min(units_a_picosecond(group.capacity / p) for p in group.route(0, relation).values())
    return min(WEIGHT, WEIGHT * rate // limit)


def _limit(chip: Chip, dma: Dma, found: Footprint) -> int:
    stream = chip.bytes_a_second(dma.stream or dma.bandwidth)
    if dma.efficiency is None:
        return units_a_picosecond(stream)
    values = {name: number.base for name, number in dma.numbers.items()}
    run = found.bytes / found.runs
    values |= {"bytes": found.bytes, "run": run, "runs": found.runs}
    return units_a_picosecond(max(0.0, stream * dma.efficiency(values)))


def refusal(op: Op, what: str, rule: str, fix: str) -> IRError:
    """The error of an op that can't be timed."""
    return IRError(what, where=op.span.render() if op.span is not None else "", rule=rule, fix=fix)
