"""Weights that are loaded ahead: tiles for kernels that find them there, and how many slots their
rings have.

In a step that moves more than it computes, the far memory should never rest.  While kernels run
that need no weights it fills the rings of those to come; so a kernel is best that is short once its
weights are there, and its ring holds what arrives before the kernel begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from dure.compiler.chip.allocate import storage_bytes
from dure.compiler.chip.partition import grid_extents
from dure.compiler.chip.pipeline import Compiled, Options, compile_for
from dure.errors import DureError
from dure.ir.core import Op, Region
from dure.ir.devices import devices_of
from dure.ir.expr import evaluate
from dure.ir.machine.compute import ops_of
from dure.library.build import Built, index_values, tile_function
from dure.machine.chip import Chip
from dure.sim.timing import simulate

#: The parts of the scratchpad of which a slot of weights may take one.
_PARTS = 32
#: The part of the slots needed that a ring is worth having with.
_MOST = 0.5
#: Tiles of a ring that are in use, beside those on the way and those that wait.
_USED = 2
#: Slots of what is loaded with the kernel.
_STAGES = 3


@dataclass(frozen=True, eq=False)
class Streamed:
    """A launch with its weights loaded ahead: tile sizes, options, its rings, bytes of a slot
    of all of them and of all else, and the picoseconds that it takes once the weights are there.
    """

    built: Built
    consts: Mapping[str, int]
    options: Options
    rings: int
    slot: int
    rest: int
    chain: int

    def handed(self, outstanding: int) -> int:
        """Slots that are in use or on the way, with so many transfers at once."""
        return -(-(outstanding + _USED) // self.rings)

    @property
    def cores(self) -> int:
        """The cores of a device that it runs on."""
        function = self.built.compiled.function
        return prod(evaluate(e, {}) for e in function.grid) // devices_of(function)

    def compiled(self, chip: Chip, slots: int) -> Compiled:
        """The program, with so many slots."""
        tile = tile_function(self.built.call, self.consts)
        options = replace(self.options, slots=slots, budget=None)
        return compile_for(tile, chip, options, index_values(self.built.call, tile))


def streamed(built: Built, chip: Chip, weights: frozenset[str]) -> Streamed:
    """The launch with these arguments loaded ahead, in tiles that are best when they are there:
    those that were chosen for the launch by itself, or larger ones of the same instances.
    """
    options = replace(built.compiled.options, ahead=weights, stages=_STAGES, slots=0)
    best = _tried(built, chip, dict(built.consts), options)
    assert best is not None
    room = int(chip.memories[chip.scratchpad].size.base) // _PARTS
    parts = chip.memories[chip.scratchpad].partitions
    room //= 1 if parts is None else int(parts.base)
    grid = grid_extents(tile_function(built.call, best.consts))
    moved = True
    while moved:
        moved = False
        for name in built.call.open:
            consts = {**best.consts, name: 2 * best.consts[name]}
            found = _tried(built, chip, consts, options, grid)
            if found is not None and found.slot <= room and found.chain < best.chain:
                best, moved = found, True
    return best


def _tried(
    built: Built,
    chip: Chip,
    consts: Mapping[str, int],
    options: Options,
    grid: Sequence[int] = (),
) -> Streamed | None:
    """The launch with these sizes; None where they don't go, or make other instances."""
    try:
        tile = tile_function(built.call, consts)
        if grid and list(grid) != list(grid_extents(tile)):
            return None
        lists = index_values(built.call, tile)
        compiled = compile_for(tile, chip, options, lists)
    except DureError:
        return None
    function = compiled.function
    queues = frozenset(d.ahead for d in chip.dma.values() if d.ahead)
    buffers = {op.result: op for op in ops_of(function.body) if op.name == "buffer"}
    rings = {
        buffers[op.operands[1]]
        for op in ops_of(function.body)
        if op.name == "dma_load" and op.attr("queue") in queues
    }
    memory = chip.memories[chip.scratchpad]
    slot = sum(storage_bytes(op.result.tile, memory) for op in rings)
    ahead = sum(int(op.attr("stages")) * storage_bytes(op.result.tile, memory) for op in rings)
    rest = compiled.used[chip.scratchpad] - ahead
    there = replace(function, body=_without_loads(function.body, queues))
    timing = simulate(there, chip, indices=lists)
    chain = timing.ps - timing.launch
    return Streamed(built, consts, options, len(rings), slot, rest, chain)


@dataclass(frozen=True)
class Turn:
    """A launch in the order of execution: ``chain`` picoseconds once its weights are there, and
    ``load`` for those to arrive; ``ring`` is None where it has none.
    """

    chain: int
    load: int = 0
    ring: Streamed | None = None


@dataclass(frozen=True)
class Demand:
    """Slots that each ring needs so that the far memory never waits, and the rings that are in use
    at once.
    """

    slots: dict[Streamed, int]
    beside: dict[Streamed, set[Streamed]]


def demand(turns: Iterable[Turn], tiles: Mapping[Streamed, int], outstanding: int) -> Demand:
    """What the rings of a step need; ``tiles`` are all that a core loads of a ring's weights,
    and ``outstanding`` the transfers that may be under way.

    The far memory brings one ring's weights after another's: what arrives before the first kernel
    that uses them begins has to have a slot, in bytes that no kernel uses that still runs when they
    are on the way.
    """
    now, arrived = 0, 0
    slots = {ring: min(ring.handed(outstanding), tiles[ring]) for ring in tiles}
    beside: dict[Streamed, set[Streamed]] = {ring: set() for ring in tiles}
    ends: list[tuple[int, Streamed]] = []
    for turn in turns:
        ring, begun = turn.ring, now
        now = max(now + turn.chain, arrived + turn.load)
        if ring is None:
            continue
        stock = min(max(begun - arrived, 0) / turn.load, 1)
        count = ceil(stock * tiles[ring]) + ring.handed(outstanding)
        slots[ring] = max(slots[ring], min(count, tiles[ring]))
        for place, (end, other) in enumerate(reversed(ends)):
            if other is not ring and (place == 0 or end > arrived):
                beside[ring].add(other)
                beside[other].add(ring)
        ends.append((now, ring))
        arrived += turn.load
    return Demand(slots, beside)


@dataclass(frozen=True)
class Ring:
    """A ring that has its place: how many slots, and where it begins."""

    streamed: Streamed
    slots: int
    offset: int


def placed(needed: Demand, room: int) -> list[Ring] | None:
    """The rings' slots and places; where there is too little room, the largest give up slots, and
    None where that are more than a few.
    """
    slots = dict(needed.slots)
    while True:
        found: dict[Streamed, Ring] = {}
        for ring in sorted(slots, key=lambda ring: -ring.slot * slots[ring]):
            taken = sorted(
                (other.offset, other.offset + other.slots * other.streamed.slot)
                for other in found.values()
                if other.streamed in needed.beside[ring]
            )
            offset, size = 0, slots[ring] * ring.slot
            for first, stop in taken:
                if first < offset + size:
                    offset = max(offset, stop)
            found[ring] = Ring(ring, slots[ring], offset)
        if all(r.offset + r.slots * r.streamed.slot <= room for r in found.values()):
            return list(found.values())
        largest = max(slots, key=lambda ring: ring.slot * slots[ring])
        slots[largest] -= 1
        if slots[largest] < _MOST * needed.slots[largest]:
            return None


def _without_loads(region: Region, queues: frozenset[str]) -> Region:
    """The region without the loads on these queues: what they load is there."""

    def kept(op: Op) -> bool:
        return op.name != "dma_load" or op.attr("queue") not in queues

    ops = (
        op
        if op.name == "compute" or not op.regions
        else replace(op, regions=tuple(_without_loads(r, queues) for r in op.regions))
        for op in region.ops
        if kept(op)
    )
    return replace(region, ops=tuple(ops))
