"""Every interleaving of a machine program's queues, by brute force: what the sanitizer is held to.

A state is how far each queue has issued and completed.  From each state every queue may take its
next step: issue an instruction (a wait needs its counter), or complete one.  A DMA queue issues in
order and completes in order, with any number of transfers in flight; a compute queue completes one
instruction before it issues the next; signals fire as soon as they may.  Bytes are touched from
issue to completion, so two conflicting instructions in flight together are a race.

Labels: race, deadlock, uninitialised, overlap (a read of bytes last written as another buffer or
slot), leak, overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dure.ir.core import Function, Op, Value, walk
from dure.ir.dtypes import Array, BlockFormat
from dure.ir.interpret_memory import positions
from dure.machine.chip import Chip
from dure.sim.expand import Instruction, core_ids, expand
from dure.sim.storage import place_tile


class TooLarge(Exception):
    """More states than the explorer may visit."""


@dataclass(frozen=True, slots=True)
class Item:
    """An instruction: bytes as bits of integers, reads by (buffer, slot) and writes likewise."""

    kind: str
    semaphore: int = -1
    count: int = 0
    reads: tuple[tuple[int, int], ...] = ()
    writes: tuple[tuple[int, int], ...] = ()
    read: int = 0
    write: int = 0
    home: tuple[Value, frozenset[Any], bool] | None = None
    instance: tuple[int, ...] = ()


@dataclass
class Explorer:
    """The program of one core, and what was found in it."""

    function: Function
    chip: Chip
    core: Mapping[str, int]
    indices: Mapping[str, Array] | None = None
    limit: int = 30000
    labels: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.buffers = {o.result: o for o in self.function.body.ops if o.name == "buffer"}
        semaphores = [o for o in self.function.body.ops if o.name == "semaphore"]
        self.number = {o.result: n for n, o in enumerate(semaphores)}
        self.initial = tuple(o.attr("initial") for o in semaphores)
        self.maximum = tuple(o.attr("maximum") for o in semaphores)
        self.touched: dict[Any, Array] = {}
        self.names: list[str] = []
        self.queues: list[list[Item]] = []
        instructions = list(expand(self.function, self.core, self.indices))
        raw = [self._touch(i) for i in instructions]
        masks = self._masks()
        for instruction, (reads, writes) in zip(instructions, raw, strict=True):
            self._queue(instruction, reads, writes, masks)
        self.dma = [any(i.kind == "dma" for i in q) for q in self.queues]
        known = {d.queue for d in self.chip.dma.values()}
        self.dma = [n in known for n in self.names]

    # --- instructions ----------------------------------------------------------------------------

    def _queue(
        self, instruction: Instruction, reads: list[Any], writes: list[Any], masks: dict[Any, int]
    ) -> None:
        op = instruction.op
        if instruction.queue not in self.names:
            self.names.append(instruction.queue)
            self.queues.append([])
        queue = self.queues[self.names.index(instruction.queue)]
        if op.name in ("wait", "signal"):
            queue.append(Item(op.name, self.number[op.operands[0]], op.attr("count")))
            return
        own = tuple((k[0], masks[k]) for k in reads), tuple((k[0], masks[k]) for k in writes)
        kind = "compute" if op.name == "compute" else "dma"
        read, write = 0, 0
        for _, mask in own[0]:
            read |= mask
        for _, mask in own[1]:
            if write & mask:
                self.labels.add("race")
            write |= mask
        if kind == "dma" and read & write:
            self.labels.add("race")
        home = self._home(instruction) if kind == "dma" else None
        queue.append(Item(kind, -1, 0, *own, read, write, home))

    def _touch(self, instruction: Instruction) -> tuple[list[Any], list[Any]]:
        """Keys of the byte sets that an instruction reads and writes."""
        op = instruction.op
        if op.name in ("wait", "signal"):
            return [], []
        keys: list[Any] = []
        for place, (value, slot) in enumerate(zip(op.operands, instruction.slots, strict=True)):
            if value not in self.buffers:
                continue
            cut: Any = None
            if op.name != "compute" and place == 1:
                cut = self._existing(instruction)
            owner = self._owner(value)
            identity = (list(self.buffers).index(owner), slot)
            key = (identity, value, None if cut is None else tuple(map(tuple, cut)))
            if key not in self.touched:
                self.touched[key] = self._bytes(value, slot, cut)
            keys.append(key)
        if op.name == "compute":
            return keys[: op.attr("reads")], keys[op.attr("reads") :]
        if op.name == "dma_load":
            return keys[1:], keys[:1]
        return keys, []

    def _owner(self, value: Value) -> Value:
        """The buffer whose bytes one that nobody writes gives another shape."""
        written = {
            v
            for o in walk(self.function.body)
            if o.name in ("compute", "dma_load")
            for v in (o.operands[1:2] if o.name == "dma_load" else o.operands[o.attr("reads") :])
        }
        if value in written:
            return value
        keys = ("memory", "offset", "pitch", "stages", "dtype")
        same = [
            v
            for v, op in self.buffers.items()
            if v in written
            and v.tile.elements == value.tile.elements
            and all(op.attr(k) == self.buffers[value].attr(k) for k in keys)
        ]
        same.sort(key=lambda v: v.name != value.name)
        return same[0] if same else value

    def _existing(self, instruction: Instruction) -> Any:
        """Positions of a tile's elements that exist, axis by axis; None for a filling load."""
        op = instruction.op
        if op.name == "dma_load" and op.attr("filling"):
            return None
        shape = op.operands[1].tile.shape
        axes = positions(op, shape, instruction.symbols, ())
        extents = [e.value for e in op.operands[0].tensor.shape]  # type: ignore[union-attr]
        found = [
            tuple(np.flatnonzero((p >= 0) & (p < n)).tolist())
            for p, n in zip(axes, extents, strict=True)
        ]
        return [()] * len(shape) if not all(found) else found

    def _bytes(self, value: Value, slot: int, cut: Any) -> Array:
        """The bytes of all memories that writing a tile touches: found by writing ones."""
        op = self.buffers[value]
        memory = self.chip.memories[op.attr("memory")]
        partitions = None if memory.partitions is None else round(memory.partitions.base)
        place = place_tile(value.tile, partitions)
        size = max(
            b.attr("offset")
            + b.attr("pitch") * (b.attr("stages") - 1)
            + place_tile(b.result.tile, partitions).size
            for b in self.buffers.values()
            if b.attr("memory") == op.attr("memory")
        )
        ram = np.zeros((partitions or 1, size), np.uint8)
        address = op.attr("offset") + slot * op.attr("pitch")
        raws = [np.ones_like(r) * np.asarray(-1).astype(r.dtype) for r in place.read(ram, address)]
        if cut is not None:
            assert not isinstance(value.tile.dtype, BlockFormat)
            kept = np.zeros_like(raws[0])
            kept[np.ix_(*cut)] = raws[0][np.ix_(*cut)]
            raws = [kept]
        place.write(ram, address, raws)
        return (np.flatnonzero(ram), str(op.attr("memory")))  # type: ignore[return-value]

    def _masks(self) -> dict[Any, int]:
        """Byte sets as bits: bytes that are in the same sets are one bit."""
        member: dict[Any, list[int]] = {}
        for n, (where, memory) in enumerate(self.touched.values()):
            for at in where.tolist():
                member.setdefault((memory, at), []).append(n)
        bit: dict[tuple[int, ...], int] = {}
        found = [0] * len(self.touched)
        for sets in member.values():
            key = tuple(sets)
            if key not in bit:
                bit[key] = 1 << len(bit)
                for n in key:
                    found[n] |= bit[key]
        return dict(zip(self.touched, found, strict=True))

    def _home(self, instruction: Instruction) -> tuple[Value, frozenset[Any], bool]:
        op = instruction.op
        axes = positions(op, op.operands[1].tile.shape, instruction.symbols, ())
        extents = [e.value for e in op.operands[0].tensor.shape]  # type: ignore[union-attr]
        inside = [p[(p >= 0) & (p < n)].tolist() for p, n in zip(axes, extents, strict=True)]
        mesh = np.array(np.meshgrid(*inside, indexing="ij")).reshape(len(inside), -1).T
        return op.operands[0], frozenset(map(tuple, mesh.tolist())), op.name == "dma_store"

    # --- interleavings ---------------------------------------------------------------------------

    def run(self) -> set[str]:
        """The labels."""
        start = self._settle(tuple((0, 0) for _ in self.queues), self.initial)
        memory: dict[Any, tuple[int, dict[int, int]]] = {start: (0, {})}
        pending = [start]
        while pending:
            state = pending.pop()
            written, source = memory[state]
            moved = False
            for after, finished in self._moves(state, written, source):
                moved = True
                if after in memory:
                    continue
                if len(memory) > self.limit:
                    raise TooLarge
                held = (written, source)
                if finished is not None and finished.write:
                    rest = {k: m & ~finished.write for k, m in source.items()}
                    for key, mask in finished.writes:
                        rest[key] = rest.get(key, 0) | mask
                    held = (written | finished.write, rest)
                memory[after] = held
                pending.append(after)
            if not moved:
                self._end(state)
        return self.labels

    def _moves(self, state: Any, written: int, source: dict[Any, int]) -> Any:
        places, counters = state
        for q, (issued, completed) in enumerate(places):
            items = self.queues[q]
            if completed < issued and items[completed].kind in ("dma", "compute"):
                yield self._step(places, counters, q, issued, completed + 1), items[completed]
            if issued == len(items) or (not self.dma[q] and completed < issued):
                continue
            item = items[issued]
            if item.kind == "wait":
                if counters[item.semaphore] >= item.count:
                    left = list(counters)
                    left[item.semaphore] -= item.count
                    at = completed + 1 if completed == issued else completed
                    yield self._step(places, tuple(left), q, issued + 1, at), None
            else:
                self._start(item, places, written, source)
                yield self._step(places, counters, q, issued + 1, completed), None

    def _step(self, places: Any, counters: Any, q: int, issued: int, completed: int) -> Any:
        moved = (*places[:q], (issued, completed), *places[q + 1 :])
        return self._settle(moved, counters)

    def _settle(self, places: Any, counters: Any) -> Any:
        """Fire the signals that may, and pass what takes no time."""
        found, left = list(places), list(counters)
        for q, (issued, completed) in enumerate(places):
            items = self.queues[q]
            while True:
                if issued < len(items) and items[issued].kind == "signal":
                    if not (self.dma[q] or completed == issued):
                        break
                    issued += 1
                while completed < issued and items[completed].kind in ("wait", "signal"):
                    item = items[completed]
                    if item.kind == "signal":
                        left[item.semaphore] += item.count
                        if left[item.semaphore] > self.maximum[item.semaphore]:
                            self.labels.add("overflow")
                    completed += 1
                if not (
                    issued < len(items)
                    and items[issued].kind == "signal"
                    and (self.dma[q] or completed == issued)
                ):
                    break
            found[q] = (issued, completed)
        return tuple(found), tuple(left)

    def _start(self, item: Item, places: Any, written: int, source: dict[Any, int]) -> None:
        """An instruction starts: what is in flight, and what it reads."""
        for q, (issued, completed) in enumerate(places):
            for other in self.queues[q][completed:issued]:
                if other.kind not in ("dma", "compute"):
                    continue
                touches = other.read | other.write
                if item.write & touches or item.read & other.write:
                    self.labels.add("race")
                elif item.home is not None and other.home is not None:
                    self._meet(item, other)
        for key, mask in item.reads:
            if mask & ~written:
                self.labels.add("uninitialised")
            if mask & written & ~source.get(key, 0):
                self.labels.add("overlap")

    def _meet(self, item: Item, other: Item) -> None:
        assert item.home is not None and other.home is not None
        (a, elements, store), (b, others, stored) = item.home, other.home
        if a is b and (store or stored) and elements & others:
            self.labels.add("race")

    def _end(self, state: Any) -> None:
        places, counters = state
        if any(i < len(self.queues[q]) or c < i for q, (i, c) in enumerate(places)):
            self.labels.add("deadlock")
        elif counters != self.initial:
            self.labels.add("leak")


def explore(
    function: Function,
    chip: Chip,
    indices: Mapping[str, Array] | None = None,
    limit: int = 30000,
) -> set[str]:
    """The labels of a program on all its cores.  Raises :class:`TooLarge`."""
    labels: set[str] = set()
    for core in core_ids(function):
        labels |= Explorer(function, chip, core, indices, limit).run()
    return labels


__all__ = ["Explorer", "Op", "TooLarge", "explore"]
