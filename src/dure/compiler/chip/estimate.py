"""What a program takes at least, without replaying it: the bound that prunes the choice of tiles.

Every queue must do its own work and every shared memory must deliver its bytes; before the first
instruction its tiles must arrive, and after the last its result must leave.  The busiest core
counts.  Loops whose trips only the run tells count the middle of their range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dure.compiler.chip.tree import Block, Branch, Loop, Step, Structure, Tree
from dure.errors import DureError
from dure.ir.core import Function, Op, Value
from dure.ir.expr import Expr, Symbol, bounds, evaluate, symbols
from dure.ir.rewrite import expressions_in
from dure.ir.types import TensorType
from dure.machine.chip import Chip, Dma
from dure.sim.cost import Costs, duration
from dure.sim.footprint import Footprint, Reach, footprint


@dataclass
class Bound:
    """Picoseconds of each queue and shared resource, and of the way in and out."""

    queues: dict[str, float] = field(default_factory=dict[str, float])
    resources: dict[str, float] = field(default_factory=dict[str, float])
    fill: float = 0.0

    @property
    def ps(self) -> float:
        """The time that no schedule of this program goes below, as far as is known."""
        busiest = max((*self.queues.values(), *self.resources.values()), default=0.0)
        return busiest + self.fill


def estimate(tree: Tree, function: Function, chip: Chip, costs: Costs) -> Bound:
    """The bound of a lowered program; ``function`` is the tile program of one core."""
    counts = {s: evaluate(e, {}) for s, e in zip(function.program_ids, function.grid, strict=True)}
    work = _Estimate(chip, costs, counts)
    work.block(tree.body, 1.0, {s.name: 0 for s in counts})
    work.fill(tree.body)
    return work.bound


class _Estimate:
    def __init__(self, chip: Chip, costs: Costs, counts: Mapping[Symbol, int]) -> None:
        self.chip = chip
        self.costs = costs
        self.counts = counts
        self.cores = 1
        for count in counts.values():
            self.cores *= count
        self.dma = {d.queue: d for d in chip.dma.values()}
        self.bound = Bound()
        self.roots: dict[Value, Value] = {}
        self.depends: dict[Symbol, frozenset[Symbol]] = {}

    def block(self, block: Block, times: float, known: dict[str, int]) -> None:
        """Add what a block does when it runs ``times`` times."""
        for item in block.items:
            if isinstance(item, Structure) and item.op.name == "view":
                source = item.op.operands[0]
                self.roots[item.op.result] = self.roots.get(source, source)
            elif isinstance(item, Loop):
                trips, start = self._trips(item, known)
                self.depends[item.symbol] = self._cores((item.start, item.stop))
                inner = {**known, item.symbol.name: start + trips // 2 * item.step}
                self._loop(item.body, times * trips, inner)
            elif isinstance(item, Branch):
                taken = _number(item.condition, known)
                self.block(item.then if taken else item.otherwise, times, known)
            elif isinstance(item, Step):
                self.step(item, times)

    def _trips(self, loop: Loop, known: dict[str, int]) -> tuple[int, int]:
        """The trips of a loop on the core that has the most, and where it starts there."""
        entries = [s for s in self.counts if s in symbols(loop.stop)]
        best = (-1, 0)
        for value in range(self.counts[entries[0]]) if len(entries) == 1 else (0,):
            here = {**known, entries[0].name: value} if entries else known
            start, stop = _number(loop.start, here), _number(loop.stop, here)
            best = max(best, (max(0, -(-(stop - start) // loop.step)), start))
        return best

    def _loop(self, body: Block, times: float, known: dict[str, int]) -> None:
        """A loop's body: where a tile that arrives has a single slot, moving and computing take
        turns, so that the queues' times add up.
        """
        if not _takes_turns(body):
            self.block(body, times, known)
            return
        outer, self.bound.queues = self.bound.queues, {}
        self.block(body, times, known)
        own, self.bound.queues = self.bound.queues, outer
        total = sum(own.values())
        for queue in own:
            self.bound.queues[queue] = self.bound.queues.get(queue, 0.0) + total

    def step(self, step: Step, times: float) -> None:
        if step.kind == "compute":
            ps = times * self.compute(step)
            self.bound.queues[step.queue] = self.bound.queues.get(step.queue, 0.0) + ps
            return
        dma, moved = self.dma[step.queue], self.moved(step)
        ps = times * (self.issue(dma) + moved.bytes / self.rate(dma, moved) * 1e12)
        self.bound.queues[step.queue] = self.bound.queues.get(step.queue, 0.0) + ps
        for name in dma.route:
            at_home = name == self.chip.home
            amount = times * (moved.granules if at_home else moved.bytes)
            rate, scope = self._resource(name)
            if rate is None:
                continue
            if scope == "chip":
                amount *= self.cores
            if at_home and step.kind == "dma_load":
                amount /= self._sharers(step)
            self.bound.resources[name] = self.bound.resources.get(name, 0.0) + amount / rate * 1e12

    def compute(self, step: Step) -> float:
        assert step.region is not None
        attrs = {**step.attrs, "queue": step.queue}
        return self.costs.compute(Op("compute", (), (), attrs, (step.region,), span=step.span)).ps

    def issue(self, dma: Dma) -> int:
        return duration(self.chip, dma.issue)

    def moved(self, step: Step) -> Footprint:
        """What a transfer touches, as if none were cut."""
        assert step.tensor is not None
        root = self.roots.get(step.tensor, step.tensor)
        kind = root.type
        assert isinstance(kind, TensorType)
        tile = (step.writes if step.kind == "dma_load" else step.reads)[0].type
        listed = set(step.attrs["list_axes"])
        reach: list[Reach] = []
        for axis, extent in enumerate(tile.shape):
            most = _number(kind.shape[axis], {})
            step_ = int(_number(step.attrs["step"][axis], {})) if axis in listed else 1
            entries = extent // max(1, step_) if axis in listed else 1
            stride = step.attrs["stride"][axis]
            stride = 1 if axis in listed else max(1, _number(stride, {}))
            reach.append(
                Reach(min(extent, most) if axis not in listed else extent, stride, entries)
            )
        dma = self.dma[step.queue]
        granule = int(dma.granule.base) if dma.granule is not None else 1
        return footprint(kind, reach, granule)

    def rate(self, dma: Dma, moved: Footprint) -> float:
        """Bytes a second of a transfer alone."""
        rate = self.chip.bytes_a_second(dma.bandwidth)
        if dma.stream is not None and dma.outstanding.base < 2:
            rate = min(rate, self.chip.bytes_a_second(dma.stream))
        if dma.efficiency is not None and moved.bytes:
            values = {n: q.base for n, q in dma.numbers.items()}
            values |= {"bytes": moved.bytes, "runs": moved.runs, "run": moved.bytes / moved.runs}
            rate *= max(dma.efficiency(values), 1e-6)
        return rate

    def fill(self, body: Block) -> None:
        """The way in (until the first compute) and out (the last store), unloaded."""
        arrived = left = 0.0
        seen = False
        for step in _once(body):
            if step.kind == "compute":
                seen = True
                continue
            dma, moved = self.dma[step.queue], self.moved(step)
            share = self.rate(dma, moved)
            home, _ = self._resource(self.chip.home)
            if home is not None:
                share = min(share, home / self.cores)
            took = duration(self.chip, dma.latency) + moved.bytes / share * 1e12
            if step.kind == "dma_load" and not seen:
                arrived += moved.bytes / share * 1e12
                latency = duration(self.chip, dma.latency)
                arrived = max(arrived, latency)
            elif step.kind == "dma_store":
                left = max(left, took)
        self.bound.fill = arrived + left

    def _resource(self, name: str) -> tuple[float | None, str]:
        memory = self.chip.memories.get(name)
        if memory is not None:
            rate = memory.bandwidth
            return (None if rate is None else self.chip.bytes_a_second(rate)), memory.scope
        fabric = self.chip.fabrics[name]
        return self.chip.bytes_a_second(fabric.bandwidth), fabric.scope

    def _sharers(self, step: Step) -> int:
        if not self.chip.memories[self.chip.home].shared_reads:
            return 1
        used = self._cores([e for v in step.attrs.values() for e in expressions_in(v)])
        sharers = 1
        for entry, count in self.counts.items():
            sharers *= 1 if entry in used else count
        readers = self.chip.memories[self.chip.home].readers
        return sharers if readers is None else min(sharers, int(readers.base))

    def _cores(self, expressions: tuple[Expr, ...] | list[Expr]) -> frozenset[Symbol]:
        found: set[Symbol] = set()
        for expr in expressions:
            for entry in symbols(expr):
                found |= {entry} if entry in self.counts else self.depends.get(entry, frozenset())
        return frozenset(found)


def _takes_turns(body: Block) -> bool:
    """Whether what is loaded in a loop's body waits for its own last use."""
    filled = False
    for item in body.items:
        if not isinstance(item, Step):
            continue
        if item.kind == "compute":
            filled |= not item.reads
            continue
        if item.kind == "dma_load":
            single = item.writes[0].block is body and item.writes[0].stages < 2
            cleared = filled and any(
                isinstance(other, Step) and not other.reads and item.writes[0] in other.writes
                for other in body.items
            )
            if single or cleared:
                return True
    return False


def _once(block: Block) -> list[Step]:
    """The steps of a block, each once."""
    found: list[Step] = []
    for item in block.items:
        if isinstance(item, Step):
            found.append(item)
        elif isinstance(item, Loop):
            found += _once(item.body)
        elif isinstance(item, Branch):
            found += _once(item.then)
    return found


def _number(expr: Expr | int, known: Mapping[str, int]) -> int:
    """An expression with what is known, else the middle of its range."""
    if isinstance(expr, int):
        return expr
    try:
        return evaluate(expr, known)
    except DureError:
        low, high = bounds(expr)
        if low is None or high is None:
            return 1 if low is None else max(low, 1)
        return (low + high + 1) // 2
