"""What a program takes at least, without replaying it: the bound that prunes the choice of tiles.

Every queue must do its own work and every shared memory must deliver its bytes; a ring of slots
comes round no faster than its tiles arrive and are used; before the first instruction its tiles
must arrive, and after the last its result must leave.  The busiest core counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from dure.compiler.chip.counts import Counts, direct, number, usual
from dure.compiler.chip.ring import Ring
from dure.compiler.chip.tree import Block, Branch, Buffer, Loop, Step, Structure, Tree, steps
from dure.ir.core import Function, Op
from dure.ir.devices import devices_of
from dure.ir.dtypes import Array
from dure.ir.expr import as_expr, bounds, symbols
from dure.machine.chip import Chip, Dma
from dure.machine.group import Group, group_of
from dure.sim.cost import Costs, duration
from dure.sim.footprint import Footprint, Reach, footprint

#: Transfers that a ring keeps in flight, as a rule.
_FLYING = 4


@dataclass
class Bound:
    """Picoseconds of each queue and shared resource, of the way in and out, of what is still
    computed when the last tile has arrived, and of the stalls in which nothing moves.
    """

    queues: dict[str, float] = field(default_factory=dict[str, float])
    resources: dict[str, float] = field(default_factory=dict[str, float])
    chains: dict[str, float] = field(default_factory=dict[str, float])
    fill: float = 0.0
    drain: float = 0.0
    stalls: float = 0.0
    moving: frozenset[str] = frozenset()
    instructions: float = 0.0

    @property
    def ps(self) -> float:
        """The time that a schedule of this program takes at least, as far as is known."""
        computing = [ps for name, ps in self.queues.items() if name not in self.moving]
        moving = [ps for name, ps in self.queues.items() if name in self.moving]
        arrived = max((*moving, *self.resources.values()), default=0.0)
        arrived += self.stalls + self.drain
        return max([*computing, *self.chains.values(), arrived]) + self.fill

    @property
    def work(self) -> float:
        """The picoseconds that all queues of a core are busy."""
        return sum(self.queues.values())

    def queue(self, name: str, ps: float) -> None:
        """More work of a queue."""
        self.queues[name] = self.queues.get(name, 0.0) + ps

    def chain(self, name: str, ps: float) -> None:
        """More time from a queue's first instruction of a turn to its last."""
        self.chains[name] = self.chains.get(name, 0.0) + ps

    def resource(self, name: str, ps: float) -> None:
        """More use of a resource."""
        self.resources[name] = self.resources.get(name, 0.0) + ps


class Links:
    """A group's links as a program loads them that sends as much to every device."""

    def __init__(self, group: Group) -> None:
        load: dict[str, Fraction] = {}
        for relation in range(group.count):
            for (way, _), part in group.route(0, relation).items():
                load[way] = load.get(way, Fraction()) + part
        self.latency = group.farthest * duration(group.chip, group.link.latency)
        self.seconds_a_byte = float(max(load.values()) / group.count) / group.capacity
        #: Of a transfer by itself.
        self.alone = 1 / group.capacity


def estimate(
    tree: Tree,
    function: Function,
    chip: Chip,
    costs: Costs,
    indices: Mapping[str, Array] | None = None,
) -> Bound:
    """The bound of a lowered program with its slots and shares; ``function`` is the tile program of
    one core, and ``indices`` are values of index arguments that trips depend on.
    """
    work = _Estimate(chip, costs, Counts.of(function, indices), devices_of(function))
    work.block(tree.body, 1, work.counts.start())
    work.contend()
    work.fill(tree.body)
    work.drain(tree.body)
    return work.bound


class _Estimate:
    def __init__(self, chip: Chip, costs: Costs, counts: Counts, devices: int = 1) -> None:
        self.chip = chip
        self.links = Links(group_of(chip, devices)) if devices > 1 else None
        self.costs = costs
        self.counts = counts
        self.dma = {queue: d for d in chip.dma.values() for queue in d.queues}
        self.signal = duration(chip, chip.sync.latency)
        self.bound = Bound(moving=frozenset(self.dma))

    def block(self, block: Block, times: float, known: dict[str, int]) -> None:
        """Add what a block does when it runs ``times`` times."""
        for item in block.items:
            if isinstance(item, Structure):
                self.counts.structure(item, known)
            elif isinstance(item, Loop):
                trips, start = self.counts.trips(item, known)
                inner = {**known, item.symbol.name: start + int(trips) // 2 * item.step}
                self.loop(item.body, times * trips, inner)
            elif isinstance(item, Branch):
                side, part = self.counts.share_of(item, known)
                self.block(side, times * part, known)
            elif isinstance(item, Step):
                self.step(item, times)

    def loop(self, body: Block, times: float, known: dict[str, int]) -> None:
        """A loop's body: where a tile that arrives has a single slot, moving and computing take
        turns, so that the queues' times add up.
        """
        self._rings(body, times)
        self._chains(body, times, known)
        self._handoffs(body, times)
        self._reloads(body, times, known)
        if not _takes_turns(body):
            self.block(body, times, known)
            return
        outer, self.bound.queues = self.bound.queues, {}
        self.block(body, times, known)
        own, self.bound.queues = self.bound.queues, outer
        for queue in own:
            self.bound.queue(queue, sum(own.values()))

    def _reloads(self, body: Block, times: float, known: dict[str, int]) -> None:
        """Tiles that stay have a slot each: when their loop begins again, whoever reads the first
        of them waits for its way in, but for the turns in which the others were used up.
        """
        computing = [s for s in direct(body) if s.kind == "compute"]
        turn = sum(map(self.compute, computing))
        for item in body.items:
            if not isinstance(item, Branch) or item.last is None:
                continue
            side, part = self.counts.share_of(item, known)
            for load in direct(side):
                if load.kind != "dma_load":
                    continue
                dma, moved = self.dma[load.queue], self.moved(load)
                slots = load.writes[0].root.stages
                latency = duration(self.chip, dma.issue) + duration(self.chip, dma.latency)
                flow = max(moved.bytes / self.rate(dma, moved) * 1e12, self.at_home(load))
                again = max(0.0, times * part / slots - 1)
                behind = (slots - 1) * turn
                for queue in {s.queue for s in computing}:
                    self.bound.chain(queue, again * max(0.0, latency + flow - behind))
                # What moves stands still meanwhile, and until there is something to store.
                self.bound.stalls += again * max(0.0, latency + turn - behind)

    def _rings(self, body: Block, times: float) -> None:
        """The turns of a loop's rings, in which equal cores wait at the same times."""
        own = list(direct(body))
        turn = sum(self.compute(s) for s in own if s.kind == "compute") + 2 * self.signal
        loads = [s for s in own if s.kind == "dma_load" and s.writes[0].block is body]
        stores = [s for s in own if s.kind == "dma_store" and s.reads[0].root.block is body]
        together = sum(self.at_home(s) for s in (*loads, *stores))
        for group in (loads, stores):
            for queue in {s.queue for s in group}:
                ring = self._ring([s for s in group if s.queue == queue], turn, together)
                # The first tile's way in or out is part of the fill, the last turn of the drain.
                apart = ring.issue + ring.latency + max(ring.flow, ring.alone) + turn
                self.bound.resource(f"ring {queue}", max(0.0, ring.time(times) - apart))

    def _ring(self, transfers: list[Step], turn: float, together: float) -> Ring:
        """The ring of a queue's transfers in a loop's body, all of whose transfers take
        ``together`` of the home memory.
        """
        dma = self.dma[transfers[0].queue]
        moved = [self.moved(s) for s in transfers]
        flow = sum(m.bytes / self.rate(dma, m) for m in moved) * 1e12
        slots = min(
            (s.writes[0] if s.kind == "dma_load" else s.reads[0].root).stages for s in transfers
        )
        return Ring(
            slots=slots,
            turn=turn,
            issue=len(transfers) * duration(self.chip, dma.issue),
            latency=duration(self.chip, dma.latency) + max(map(self.way, transfers)),
            flow=max(flow, together),
            alone=max(m.bytes / self.rate(dma, m, 1) for m in moved) * 1e12,
            serial=dma.serial,
            outstanding=dma.outstanding.base // len(transfers),
        )

    def at_home(self, step: Step) -> float:
        """Picoseconds of the home memory that a transfer takes while every core does the same."""
        home, _ = self._resource(self.chip.home)
        if home is None or self.chip.home not in self.dma[step.queue].route:
            return 0.0
        return self.moved(step).granules * self._part(step) * self.counts.total / home * 1e12

    def _chains(self, body: Block, times: float, known: dict[str, int]) -> None:
        """A queue that waits for another one inside a turn stands still: its turn is as long as the
        way from its first instruction to its last.
        """
        often, seldom = list(direct(body)), list[Step]()
        part = 0.0
        for item in body.items:
            if isinstance(item, Branch):
                side, share = self.counts.share_of(item, known)
                if share < 1:
                    part = max(part, share)
                    seldom += [s for s in side.items if isinstance(s, Step)]
        lengths = self._lengths(often)
        longer = self._lengths([*seldom, *often]) if seldom else lengths
        for queue, length in lengths.items():
            whole = (1 - part) * length + part * longer.get(queue, length)
            self.bound.chain(queue, times * whole)

    def _handoffs(self, body: Block, times: float) -> None:
        """A single slot that queues hand to one another: while one works on it the others wait."""
        touched: dict[Buffer, set[str]] = {}
        for step in steps(body):
            if step.kind == "compute":
                for buffer in (*step.reads, *step.writes):
                    if buffer.root.block is body and buffer.root.stages < 2:
                        touched.setdefault(buffer.root, set()).add(step.queue)
        shared = {b for b, queues in touched.items() if len(queues) > 1}
        for step in direct(body) if shared else ():
            if step.kind != "compute":
                continue
            own = {b.root for b in (*step.reads, *step.writes)} & shared
            others = {q for b in own for q in touched[b]} - {step.queue}
            for queue in others:
                self.bound.queue(queue, times * self.compute(step))

    def _lengths(self, turn: list[Step]) -> dict[str, float]:
        """From a queue's first start to its last end in one turn whose loads have arrived."""
        ready: dict[Buffer, tuple[float, str]] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for step in turn:
            if step.kind != "compute":
                continue
            here = [ready.get(b.root, (0.0, step.queue)) for b in step.reads]
            start = last.get(step.queue, 0.0)
            for at, queue in here:
                start = max(start, at + (self.signal if queue != step.queue else 0))
            first.setdefault(step.queue, start)
            last[step.queue] = start + self.compute(step)
            ready.update((b.root, (last[step.queue], step.queue)) for b in step.writes)
        return {queue: last[queue] - first[queue] for queue in last}

    def step(self, step: Step, times: float) -> None:
        """Add an instruction."""
        self.bound.instructions += times
        if step.kind == "compute":
            self.bound.queue(step.queue, times * self.compute(step))
            return
        dma, moved = self.dma[step.queue], self.moved(step)
        self.bound.queue(step.queue, times * duration(self.chip, dma.issue))
        flow = moved.bytes / self.rate(dma, moved) * 1e12
        self.bound.resource(f"flow {dma.queue}", times * flow)
        for name in dma.route:
            rate, scope = self._resource(name)
            if rate is None:
                continue
            at_home = name == self.chip.home
            amount = times * (moved.granules * self._part(step) if at_home else moved.bytes)
            cores = self.counts.total if scope == "chip" else 1
            self.bound.resource(name, amount * cores / rate * 1e12)
        if self.way(step) and self.links is not None:
            amount = times * moved.bytes * self.counts.total
            # So many are under way together, and those that share a link also arrive together: the
            # next ones' way to the other device is not hidden.
            under_way = duration(self.chip, dma.latency) + self.way(step)
            self.bound.resource(
                "links",
                amount * self.links.seconds_a_byte * 1e12
                + times * under_way / dma.outstanding.base,
            )

    def way(self, step: Step) -> int:
        """Picoseconds of latency that a transfer has beside its DMA engine's: 0 in a device."""
        if self.links is None or step.attrs["index"][0] is self.counts.device:
            return 0
        return self.links.latency

    def _leaves_last(self, step: Step) -> bool:
        """Whether the last of a store's transfers goes to another device."""
        to = as_expr(step.attrs["index"][0])
        last = {s.name: bounds(s)[1] or 0 for s in symbols(to) if s is not self.counts.device}
        own = 0 if self.counts.device is None else number(self.counts.device, {})
        device = {} if self.counts.device is None else {self.counts.device.name: own}
        return number(to, {**last, **device}) != own

    def compute(self, step: Step) -> float:
        """Picoseconds of a compute instruction."""
        assert step.region is not None
        attrs = {**step.attrs, "queue": step.queue}
        return self.costs.compute(Op("compute", (), (), attrs, (step.region,), span=step.span)).ps

    def moved(self, step: Step) -> Footprint:
        """What a transfer touches, as if none were cut."""
        assert step.tensor is not None
        kind = self.counts.root(step.tensor).tensor
        tile = (step.writes if step.kind == "dma_load" else step.reads)[0].type
        listed = set(step.attrs["list_axes"])
        reach: list[Reach] = []
        for axis, extent in enumerate(tile.shape):
            if axis in listed:
                each = max(1, number(step.attrs["step"][axis], {}))
                reach.append(Reach(extent, 1, extent // each))
            else:
                stride = max(1, number(step.attrs["stride"][axis], {}))
                reach.append(Reach(min(extent, number(kind.shape[axis], {})), stride))
        dma = self.dma[step.queue]
        return footprint(kind, reach, int(dma.granule.base) if dma.granule is not None else 1)

    def rate(self, dma: Dma, moved: Footprint, flying: int = _FLYING) -> float:
        """Bytes a second of a queue's transfers, so many at once."""
        whole = self.chip.bytes_a_second(dma.bandwidth)
        one = whole if dma.stream is None else self.chip.bytes_a_second(dma.stream)
        if dma.efficiency is not None and moved.bytes:
            values = {n: q.base for n, q in dma.numbers.items()}
            values |= {"bytes": moved.bytes, "runs": moved.runs, "run": moved.bytes / moved.runs}
            one *= max(dma.efficiency(values), 1e-6)
        return min(whole, one * min(flying, dma.outstanding.base))

    def contend(self) -> None:
        """Engines that lose speed while bytes flow take as much longer as that is of the flow."""
        lost = max(
            (m.contention.base for m in self.chip.memories.values() if m.contention is not None),
            default=0.0,
        )
        flow = self.bound.resources.get(self.chip.home, 0.0)
        if not lost or not flow:
            return
        for queue in self.bound.queues:
            if queue not in self.dma:
                own = self.bound.queues[queue]
                self.bound.queues[queue] = own + lost * min(flow, own / (1 - lost))

    def fill(self, body: Block) -> None:
        """The way in (until the first compute that reads) and out (the last store), unloaded."""
        arrived = left = 0.0
        latency = 0
        seen = False
        for step in _once(body):
            if step.kind == "compute":
                seen |= bool(step.reads)
                continue
            dma, moved = self.dma[step.queue], self.moved(step)
            took = max(moved.bytes / self.rate(dma, moved) * 1e12, self.at_home(step))
            if step.kind == "dma_load" and not seen:
                arrived += took
                latency = max(latency, duration(self.chip, dma.latency))
            elif step.kind == "dma_store":
                if self.links is not None and self._leaves_last(step):
                    took = max(took, moved.bytes * self.links.alone * 1e12)
                left = max(left, duration(self.chip, dma.latency) + self.way(step) + took)
        self.bound.fill = latency + arrived + left

    def drain(self, body: Block) -> None:
        """What is computed when the last tile has arrived: its turn's rest and what follows."""
        path = _once(body)
        loads = [number for number, step in enumerate(path) if step.kind == "dma_load"]
        rest = path[loads[-1] + 1 :] if loads else []
        self.bound.drain = sum(self.compute(step) for step in rest if step.kind == "compute")

    def _resource(self, name: str) -> tuple[float | None, str]:
        memory = self.chip.memories.get(name)
        if memory is not None:
            rate = memory.bandwidth
            return (None if rate is None else self.chip.bytes_a_second(rate)), memory.scope
        fabric = self.chip.fabrics[name]
        return self.chip.bytes_a_second(fabric.bandwidth), fabric.scope

    def _part(self, step: Step) -> float:
        part, whole = step.attrs.get("share", (1, 1))
        return part / whole


def _takes_turns(body: Block) -> bool:
    """Whether what is loaded in a loop's body waits for its own last use."""
    cleared = {b for s in direct(body) if s.kind == "compute" and not s.reads for b in s.writes}
    loads = [s.writes[0] for s in direct(body) if s.kind == "dma_load"]
    return any(b in cleared or (b.block is body and b.stages < 2) for b in loads)


def _once(block: Block) -> list[Step]:
    """The steps of a block, each once."""
    found: list[Step] = []
    for item in block.items:
        if isinstance(item, Step):
            found.append(item)
        elif isinstance(item, Loop):
            found += _once(item.body)
        elif isinstance(item, Branch):
            found += _once(usual(item, {}))
    return found
