"""One arena for all buffers of a step: a buffer's place is free before its first and after its last
use.

Time is counted in epochs, the stretches between barriers, so that reusing a place never needs a
barrier of its own.  A buffer from outside a repeat that is touched inside lives for all of it.
Sizes are those at the upper bounds of the program's symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dure.compiler.barriers import touches
from dure.compiler.storage import Storage, written
from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.sizes import tensor_bytes

#: Buffers start on pairs of cache lines, which processors fetch together.
ALIGNMENT = 128


@dataclass
class Buffer:
    """A piece of the arena: its bytes, its offset, the first and last epoch in which it lives."""

    bytes: int
    first: int
    last: int
    offset: int = 0

    def overlaps(self, other: Buffer) -> bool:
        """Whether both live in some epoch."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Planned:
    """A program whose ops say where their results lie, and the bytes that the arena needs."""

    function: Function
    arena_bytes: int
    buffers: int


def plan_arena(function: Function) -> Planned:
    """Gives every buffer of ``function`` (with its barriers) an offset in one arena."""
    lives = _Lives(function)
    buffers = list(lives.buffers.values())
    _place(buffers)
    body = _annotate(function.body, lives)
    total = max((b.offset + b.bytes for b in buffers), default=0)
    return Planned(function.with_body(body), total, len(buffers))


class _Lives:
    """The buffers of a program by root, with their lives in epochs."""

    def __init__(self, function: Function) -> None:
        self.storage = Storage(function)
        self.buffers: dict[Value, Buffer] = {}
        self._epoch = 0
        self._visit(function.body)
        for value in function.body.yields:
            buffer = self.buffers.get(self.storage.root(value))
            if buffer is not None:
                buffer.last = self._epoch

    def _visit(self, region: Region) -> None:
        for op in region.ops:
            if op.name == "barrier":
                self._epoch += 1
            elif op.name == "repeat":
                self._repeat(op)
            elif op.name in ("launch", "copy"):
                self._touch(op)

    def _touch(self, op: Op) -> None:
        reads, writes = touches(op, self.storage)
        for value in written(op):
            root = self.storage.root(value)
            size = tensor_bytes(value.tensor)
            found = self.buffers.setdefault(root, Buffer(size, self._epoch, self._epoch))
            found.bytes = max(found.bytes, size)
        for root in reads | writes:
            if root in self.buffers:
                self.buffers[root].last = self._epoch

    def _repeat(self, op: Op) -> None:
        body = op.regions[0]
        before = set(self.buffers)
        first = self._epoch + 1
        self._visit(body)
        roots = {self.storage.root(v) for inner in walk(body) for v in inner.operands}
        roots |= {self.storage.root(v) for v in (*body.yields, *body.args)}
        for root in roots & before:
            self.buffers[root].last = self._epoch
        carried = {self.storage.root(v) for v in body.args[: op.attr("carried")]}
        for root in carried & set(self.buffers):
            # What is carried from turn to turn lives through all of them.
            self.buffers[root].first = min(self.buffers[root].first, first)
            self.buffers[root].last = self._epoch


def _place(buffers: list[Buffer]) -> None:
    """Largest first, each at the lowest offset where nothing else lives at the same time."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, b.first)):
        offset = 0
        for other in sorted((o for o in placed if o.overlaps(buffer)), key=lambda o: o.offset):
            if offset + buffer.bytes <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.bytes))
        buffer.offset = offset
        placed.append(buffer)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _annotate(region: Region, lives: _Lives) -> Region:
    ops: list[Op] = []
    for op in region.ops:
        values: list[Value] = list(written(op))
        if op.name == "repeat":
            values = list(op.regions[0].args[: op.attr("carried")])
        regions = tuple(_annotate(inner, lives) for inner in op.regions)
        if values:
            offsets = tuple(lives.buffers[lives.storage.root(v)].offset for v in values)
            op = replace(op, attrs={**op.attrs, "offsets": offsets}, regions=regions)
        ops.append(op)
    return replace(region, ops=tuple(ops))
