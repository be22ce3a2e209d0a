"""The timing simulator written again, slow and obviously right: every core by itself, every byte
counted by its address, every clock edge at which anything happens looked at anew.

It shares with ``dure.sim`` the laws of the machine file, the expansion of a program into
instructions, and the rounding law as it is written in ``dure.sim.flows``; no code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from dure.ir.core import Function, Op, Region, Value
from dure.ir.dtypes import BlockFormat
from dure.ir.expr import as_expr, evaluate
from dure.ir.layout import Layout, PlaneLayouts
from dure.ir.machine.compute import operation_of
from dure.ir.types import default_layout
from dure.machine.chip import Chip, Dma
from dure.machine.quantity import Quantity
from dure.sim.expand import core_ids, expand


def ps(seconds: Fraction) -> int:
    return math.ceil(round(seconds * 10**12, 3))


def duration(chip: Chip, quantity: Quantity, clock: Quantity | None = None) -> int:
    if quantity.kind == "cycles":
        return ps(Fraction(quantity.base) / Fraction((clock or chip.clock).base))
    return ps(Fraction(quantity.base))


def units(bytes_a_second: float) -> int:
    return max(1, math.floor(Fraction(bytes_a_second) * 2**32 / 10**12))


# --- what an instruction costs -------------------------------------------------------------------


def compute_time(chip: Chip, op: Op) -> int:
    own: dict[str, list[tuple[str, Op]]] = {name: [] for name in op.attr("engines")}
    for kind, tile_op in _works(op.regions[0]):
        able = [(e, _law(chip, e, kind)) for e in op.attr("engines")]
        engine, law = next((e, law) for e, law in able if law)
        own[engine].append((law, tile_op))
    cycles = {name: _passed(chip, name, found, op.regions[0]) for name, found in own.items()}
    issue, work = [], []
    for name, count in cycles.items():
        engine = chip.engines[name]
        work.append(ps(count / Fraction((engine.clock or chip.clock).base)))
        issue.append(duration(chip, engine.issue, engine.clock))
    return max(issue) + max(work)


def _law(chip: Chip, engine: str, kind: str) -> str:
    """The law of an engine for a class of work, or for the class that it is a case of."""
    general = {"scale": "elementwise", "shift": "elementwise", "square": "elementwise"}
    laws = chip.engines[engine].laws
    names = (kind, {**general, "sum": "reduce"}.get(kind, ""))
    return next((name for name in names if name in laws), "")


def _passed(chip: Chip, engine: str, found: Sequence[tuple[str, Op]], region: Region) -> Fraction:
    """Cycles of an engine's ops, in their order: the longest of those that share a pass."""
    stages = chip.engines[engine].passes
    passes: list[list[Fraction]] = []
    stage, stream = len(stages), None
    for law, op in found:
        reduces = law in ("reduce", "sum")
        follows = stream is not None and stream in [_unshaped(v, region) for v in op.operands]
        alone = stream is not None and _readers(stream, region) <= 1
        later = [n for n in range(stage, len(stages)) if law in stages[n]]
        cost = Fraction(_cycles(chip, engine, law, op))
        if follows and (alone or reduces) and later:
            passes[-1].append(cost)
            stage = later[0] + 1
            stream = stream if reduces else op.results[0]
            continue
        passes.append([cost])
        first = [n for n in range(len(stages)) if law in stages[n]]
        stage = first[0] + 1 if first else len(stages)
        stream = op.results[0]
    return sum((max(costs) for costs in passes), Fraction(0))


def _unshaped(value: Value, region: Region) -> Value:
    for op in _flat(region):
        if op.name == "reshape" and value in op.results:
            return _unshaped(op.operands[0], region)
    return value


def _readers(value: Value, region: Region) -> int:
    """Who needs a value, but for reductions; what leaves the instruction counts as two."""
    found = 0
    for op in _flat(region):
        if op.name not in ("reduce", "reshape"):
            found += value in [_unshaped(v, region) for v in op.operands]
    return found + 2 * (value in [_unshaped(v, region) for v in region.yields])


def _works(region: Region) -> Iterator[tuple[str, Op]]:
    """Every op's class of work, and a copy for each result that nothing computes."""
    ops = list(_flat(region))
    dots = any(op.name == "dot" for op in ops)
    computed: dict[Value, bool] = {}
    makers: dict[Value, Op] = {}
    for op in ops:
        makers.update(dict.fromkeys(op.results, op))
        kind = operation_of(op, makers)
        if kind == "transpose" and dots:
            kind = "none"
        moved_only = operation_of(op) == "none"
        of = any(computed.get(v, False) for v in op.operands)
        for result in op.results:
            computed[result] = of if moved_only else True
        if kind != "none":
            yield kind, op
    for value in region.yields:
        if not computed.get(value, False):
            yield "copy", Op("copy", (value,), (value,))


def _flat(region: Region) -> Iterator[Op]:
    for op in region.ops:
        for inner in op.regions:
            yield from _flat(inner)
        yield op


def _cycles(chip: Chip, name: str, kind: str, op: Op) -> float:
    engine = chip.engines[name]
    about = op.operands[0].tile if kind in ("reduce", "sum", "scan") else op.results[0].tile
    values: dict[str, float] = {n: q.base for n, q in engine.numbers.items()}
    values["elements"] = math.prod(about.shape)
    values["columns"] = about.shape[-1]
    values["rows"] = math.prod(about.shape[:-1])
    axis = op.attrs.get("axis", -1)
    assert isinstance(axis, int)
    values["axis"] = about.shape[axis]
    values["bits"] = max(v.tile.dtype.bits for v in (*op.operands, *op.results))
    rates = [engine.rates.get(str(v.tile.dtype)) for v in op.operands]
    values["rate"] = max((r.base for r in rates if r is not None), default=1.0)
    if kind == "dot":
        a, b = op.operands[0].tile, op.operands[1].tile
        values["m"], values["k"], values["n"] = *a.shape[-2:], b.shape[-1]
        values["batch"] = math.prod(a.shape[:-2])
        values["rate"] = max(engine.rates[str(t.dtype)].base for t in (a, b))
    return engine.laws[kind](values)


@dataclass
class Moved:
    """What a DMA moves: bytes, runs, bytes in whole granules, and entries of its lists."""

    bytes: int
    runs: int
    granules: int
    entries: int


def moved(
    function: Function,
    op: Op,
    symbols: Mapping[str, int],
    granule: int,
    lists: Sequence[np.ndarray | None],
) -> Moved:
    """By writing down the address of every bit of every element that exists."""
    views = _views(function, symbols)
    root, starts, sizes = views(op.operands[0])
    tile = op.operands[1].tile
    by_axis = dict(zip(op.attr("list_axes"), lists, strict=True))
    # Of each axis: groups of positions; each group (an entry of a list) lies somewhere else.
    groups: list[list[list[int]]] = []
    entries = 1
    for axis, extent in enumerate(tile.shape):
        step = int(op.attr("step")[axis])
        offset = evaluate(as_expr(op.attr("offset")[axis]), symbols)
        if axis not in by_axis:
            stride = int(op.attr("stride")[axis])
            index = evaluate(as_expr(op.attr("index")[axis]), symbols)
            places = [index * step + offset + t * stride for t in range(extent)]
            groups.append([[p + starts[axis] for p in places if 0 <= p < sizes[axis]]])
            continue
        values = by_axis[axis]
        if values is None:
            found = [list(range(step))] * (extent // step)
        else:
            found = [
                [
                    p
                    for p in range(v * step + offset, v * step + offset + step)
                    if 0 <= p < sizes[axis]
                ]
                for v in values[: extent // step].tolist()
                if v >= 0
            ]
            found = [places for places in found if places]
        entries *= len(found)
        groups.append(found)
    total, runs, granules = 0, 0, 0
    for box in itertools.product(*groups):
        pieces = _pieces(root, box)
        total += sum(bits for _, bits in pieces)
        for run in _joined(pieces):
            runs += 1
            granules += math.ceil(run / 8 / granule) * granule
    return Moved(math.ceil(total / 8), runs, granules, entries)


def _joined(pieces: Sequence[tuple[int, int]]) -> list[int]:
    """Lengths in bits of the runs that pieces (address, bits) make, by looking at each."""
    found: list[int] = []
    end = None
    for at, bits in sorted(pieces):
        if at == end:
            found[-1] += bits
        else:
            found.append(bits)
        end = at + bits
    return found


def _pieces(root: Value, box: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The address and the bits of each element of a box."""
    kind = root.tensor
    layout = default_layout(kind)
    if not isinstance(kind.dtype, BlockFormat):
        assert isinstance(layout, Layout)
        return [(at, kind.dtype.bits) for at in _addresses(layout, box)]
    assert isinstance(layout, PlaneLayouts)
    axis = kind.quantized_axis % kind.rank
    found: list[tuple[int, int]] = []
    for plane in kind.dtype.planes:
        cut = [
            sorted({p // plane.per for p in part}) if a == axis else list(part)
            for a, part in enumerate(box)
        ]
        found += [(at, plane.dtype.bits) for at in _addresses(layout[plane.name], cut)]
    return found


def _addresses(layout: Layout, box: Sequence[Sequence[int]]) -> list[int]:
    """Of every element of a box; an address is a sum of one part an axis."""

    def part(axis: int, place: int) -> int:
        index = [place if a == axis else 0 for a in range(len(box))]
        return evaluate(layout.address(index), {}) - evaluate(as_expr(layout.offset), {})

    parts = [np.array([part(a, p) for p in places], np.int64) for a, places in enumerate(box)]
    total = np.array(evaluate(as_expr(layout.offset), {}))
    for axis_part in parts:
        total = np.add.outer(total, axis_part)
    return total.reshape(-1).tolist()


def _views(function: Function, symbols: Mapping[str, int]) -> Any:
    """Value -> (argument, where the view starts, how far it goes)."""
    ops = {op.result: op for op in _flat(function.body) if op.name == "view"}

    def find(value: Value) -> tuple[Value, list[int], list[int]]:
        if value not in ops:
            shape = [evaluate(e, symbols) for e in value.tensor.shape]
            return value, [0] * len(shape), shape
        op = ops[value]
        root, starts, sizes = find(op.operands[0])
        axis = op.attr("axis")
        start, stop = (evaluate(as_expr(op.attr(k)), symbols) for k in ("start", "stop"))
        starts, sizes = list(starts), list(sizes)
        starts[axis], sizes[axis] = starts[axis] + start, stop - start
        return root, starts, sizes

    return find


# --- the machine ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Transfer:
    core: int
    dma: Dma
    name: str
    issued: int
    start: int
    left: int
    limit: int
    weight: int
    flowed: bool = False
    complete: bool = False
    rate: int = 0
    memories: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Signal:
    semaphore: int
    count: int
    after: int


@dataclass(eq=False)
class Queue:
    core: int
    work: list[Any]
    at: int = 0
    free: int = 0
    transfers: list[Transfer] = field(default_factory=list)
    pending: list[Signal] = field(default_factory=list)
    #: Of the instruction that is computed: what is left of it, and the memories that it touches.
    left: int = 0
    memories: set[str] = field(default_factory=set)


class Machine:
    def __init__(
        self, function: Function, chip: Chip, indices: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.function, self.chip, self.now = function, chip, 0
        self.latency = duration(chip, chip.sync.latency)
        tops = [op for op in function.body.ops if op.name == "semaphore"]
        self.numbers = {op.result: n for n, op in enumerate(tops)}
        self.queues: list[Queue] = []
        self.levels: dict[tuple[int, int], int] = {}
        self.arriving: list[tuple[int, int, int, int]] = []
        self.instructions = 0
        self.finished = 0
        for core, ids in enumerate(core_ids(function)):
            for op in tops:
                self.levels[core, self.numbers[op.result]] = op.attr("initial")
            works: dict[str, list[Any]] = {}
            for work in self._prepare(ids, indices or {}):
                works.setdefault(work[0], []).append(work[1:])
            self.queues += [Queue(core, work) for work in works.values()]

    def _prepare(self, ids: Mapping[str, int], indices: Mapping[str, np.ndarray]) -> Iterator[Any]:
        lists: dict[tuple[Value, int], np.ndarray] = {}
        for made in expand(self.function, ids, indices):
            op, queue = made.op, str(made.op.attr("queue"))
            self.instructions += 1
            if op.name == "compute":
                yield queue, "compute", compute_time(self.chip, op), self._memories(op)
            elif op.name in ("wait", "signal"):
                yield queue, op.name, self.numbers[op.operands[0]], op.attr("count")
            else:
                symbols = dict(made.symbols)
                slots = dict(zip(op.operands, made.slots, strict=True))
                values = [lists.get((v, slots[v] or 0)) for v in op.operands[2:]]
                if op.name == "dma_load" and op.operands[0].name in indices and not values:
                    index = indices[op.operands[0].name]
                    first = evaluate(as_expr(op.attr("index")[0]), symbols) * op.attr("step")[0]
                    size = op.operands[1].tile.shape[0]
                    entries = [
                        int(index[first + t]) if first + t < len(index) else int(op.attr("fill"))
                        for t in range(size)
                    ]
                    lists[op.operands[1], slots[op.operands[1]] or 0] = np.array(entries)
                memory = self._memories(op)
                yield queue, "dma", *self._transfer(op, symbols, values), memory

    def _memories(self, op: Op) -> set[str]:
        """The memories of the buffers that an instruction reads and writes."""
        return {
            str(made.attr("memory"))
            for made in self.function.body.ops
            if made.name == "buffer" and made.result in op.operands
        }

    def _transfer(self, op: Op, symbols: Mapping[str, int], lists: Sequence[Any]) -> Any:
        (name, dma), *_ = [(n, d) for n, d in self.chip.dma.items() if d.queue == op.attr("queue")]
        found = moved(
            self.function, op, symbols, int(dma.granule.base) if dma.granule else 1, lists
        )
        delay = duration(self.chip, dma.latency)
        if dma.descriptor is not None:
            delay += (found.entries - 1) * duration(self.chip, dma.descriptor)
        rate = self.chip.bytes_a_second(dma.stream or dma.bandwidth)
        weight = 0
        if found.bytes:
            if dma.efficiency is not None:
                values = {n: q.base for n, q in dma.numbers.items()}
                values["bytes"], values["runs"] = found.bytes, found.runs
                values["run"] = found.bytes / found.runs
                rate = max(0.0, rate * dma.efficiency(values))
            part = Fraction(found.granules * op.attr("share")[0], found.bytes * op.attr("share")[1])
            weight = math.ceil(part * 2**20)
        issue = duration(self.chip, dma.issue)
        return name, dma, issue, delay, found.bytes * 2**32, units(rate), weight

    def run(self) -> int:
        """Picoseconds until everything is done, without the launch."""
        while True:
            while any(self._step(queue) for queue in self.queues) or self._arrive():
                pass
            flowing = [
                t
                for q in self.queues
                for n, t in enumerate(q.transfers)
                if not t.flowed
                and t.start <= self.now
                and not (t.dma.serial and any(not e.flowed for e in q.transfers[:n]))
            ]
            self._share(flowing)
            times = [q.free for q in self.queues] + [a[0] for a in self.arriving]
            times += [t.start for q in self.queues for t in q.transfers if not t.flowed]
            times += [t.issued for q in self.queues for t in q.transfers]
            times = [t for t in times if t > self.now]
            times += [self.now + max(1, math.ceil(Fraction(t.left, t.rate))) for t in flowing]
            speeds = {q: self._speed(q, flowing) for q in self.queues if q.left > 0}
            times += [self.now + math.ceil(Fraction(q.left, s)) for q, s in speeds.items()]
            if not times:
                break
            passed = min(times) - self.now
            self.now += passed
            for t in flowing:
                t.left -= t.rate * passed
                t.flowed = t.left <= 0
            for q, speed in speeds.items():
                q.left -= speed * passed
                if q.left <= 0:
                    self.finished = max(self.finished, self.now)
        if any(q.at < len(q.work) for q in self.queues):
            raise RuntimeError("deadlock")
        return self.finished

    def _speed(self, queue: Queue, flowing: Sequence[Transfer]) -> int:
        """The seventh rule of the rounding law: work done in a picosecond."""
        busy = [t.memories & queue.memories for t in flowing if t.core == queue.core]
        lost = [self.chip.memories[name].contention for names in busy for name in names]
        return 2**20 - max((math.floor(Fraction(c.base) * 2**20) for c in lost if c), default=0)

    def _arrive(self) -> bool:
        here = [a for a in self.arriving if a[0] <= self.now]
        self.arriving = [a for a in self.arriving if a[0] > self.now]
        for _, core, semaphore, count in here:
            self.levels[core, semaphore] += count
        return bool(here)

    def _step(self, queue: Queue) -> bool:
        """Let a queue do what it can now; whether it did anything."""
        changed = False
        for t in queue.transfers:
            if not t.complete:
                if not (t.flowed and t.issued <= self.now):
                    break
                t.complete = changed = True
                self.finished = max(self.finished, self.now)
        for signal in list(queue.pending):
            if all(t.complete for t in queue.transfers[: signal.after]):
                queue.pending.remove(signal)
                arrival = self.now + self.latency
                self.arriving.append((arrival, queue.core, signal.semaphore, signal.count))
                changed = True
        if queue.free > self.now or queue.left > 0 or queue.at == len(queue.work):
            return changed
        kind, *more = queue.work[queue.at]
        if kind == "compute":
            queue.left, queue.memories = more[0] * 2**20, more[1]
        elif kind == "signal":
            queue.pending.append(Signal(*more, len(queue.transfers)))
        elif kind == "wait":
            if self.levels[queue.core, more[0]] < more[1]:
                return changed
            self.levels[queue.core, more[0]] -= more[1]
            self.finished = max(self.finished, self.now)
        else:
            name, dma, issue, delay, amount, limit, weight, memories = more
            if sum(not t.complete for t in queue.transfers) >= dma.outstanding.base:
                return changed
            queue.free = self.now + issue
            start = queue.free + (delay if amount else 0)
            made = Transfer(
                queue.core, dma, name, queue.free, start, amount, limit, weight, not amount
            )
            made.memories = memories
            queue.transfers.append(made)
        queue.at += 1
        return True

    def _share(self, flowing: Sequence[Transfer]) -> None:
        """The fifth rule of the rounding law, transfer by transfer."""
        left: dict[Any, int] = {}
        uses: dict[Transfer, dict[Any, int]] = {}
        for t in flowing:
            uses[t] = {}
            for key, rate, weight in self._way(t):
                left[key] = units(self.chip.bytes_a_second(rate)) * 2**20
                uses[t][key] = weight
        rising = list(flowing)
        while rising:
            loads = {key: sum(uses[t].get(key, 0) for t in rising) for key in left}
            shares = {key: left[key] // load for key, load in loads.items() if load}
            level = max(1, min([*shares.values(), *(t.limit for t in rising)]))
            stopped = [
                t for t in rising if t.limit <= level or any(shares[k] <= level for k in uses[t])
            ]
            for t in stopped:
                t.rate = level
                for key, weight in uses[t].items():
                    left[key] -= weight * level
            rising = [t for t in rising if t not in stopped]

    def _way(self, t: Transfer) -> Iterator[tuple[Any, Quantity, int]]:
        yield ("dma", t.name, t.core), t.dma.bandwidth, 2**20
        for name in t.dma.route:
            place = self.chip.memories.get(name) or self.chip.fabrics[name]
            if place.bandwidth is not None:
                key = (name, t.core if place.scope == "core" else None)
                yield key, place.bandwidth, t.weight if name == self.chip.home else 2**20


def brute_force(
    function: Function, chip: Chip, indices: Mapping[str, np.ndarray] | None = None
) -> int:
    """Picoseconds of a program, the launch included."""
    return Machine(function, chip, indices).run() + duration(chip, chip.launch)


def longest_path(function: Function, chip: Chip) -> int:
    """The same where no transfer ever takes bandwidth from another: the longest path through the
    dependencies, in the (max, +) algebra, one instruction after another in text order.
    """
    machine = Machine(function, chip)
    latency = machine.latency
    total = 0
    for core, ids in enumerate(core_ids(function)):
        free: dict[str, int] = {}
        done: dict[str, list[int]] = {}
        tokens = {n: [0] * level for (c, n), level in machine.levels.items() if c == core}
        for queue, kind, *more in machine._prepare(ids, {}):
            now, completed = free.get(queue, 0), done.setdefault(queue, [])
            if kind == "compute":
                now += more[0]
            elif kind == "wait":
                taken = [tokens[more[0]].pop(0) for _ in range(more[1])]
                now = max(now, *taken)
            elif kind == "signal":
                fired = max([now, *completed[-1:]])
                tokens[more[0]] += [fired + latency] * more[1]
            else:
                _, dma, issue, delay, amount, limit, _, _ = more
                outstanding = int(dma.outstanding.base)
                if len(completed) >= outstanding:
                    now = max(now, completed[-outstanding])
                now += issue
                end = now + delay + -(-amount // limit) if amount else now
                completed.append(max([end, *completed[-1:]]))
                total = max(total, completed[-1])
            free[queue] = now
            total = max(total, now)
    return total + duration(chip, chip.launch)
