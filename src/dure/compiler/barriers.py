"""The fewest barriers: one only where a launch touches what an earlier one, since the last, wrote.

Between two barriers the workers run the launches independently of one another, each its share.  A
turn of a repeat begins with a barrier, so that the turns need no analysis across their border.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dure.compiler.storage import Storage, donated_results, written
from dure.ir.core import Function, Op, Region, Value, infer


@dataclass
class _Pending:
    """What launches since the last barrier read and wrote, by root."""

    read: set[Value] = field(default_factory=set[Value])
    written: set[Value] = field(default_factory=set[Value])

    def conflicts(self, reads: set[Value], writes: set[Value]) -> bool:
        return bool((reads | writes) & self.written or writes & self.read)

    def add(self, reads: set[Value], writes: set[Value]) -> None:
        self.read |= reads
        self.written |= writes

    def clear(self) -> None:
        self.read.clear()
        self.written.clear()


def schedule_barriers(function: Function) -> Function:
    """``function`` with ``barrier`` ops where its launches need them."""
    storage = Storage(function)
    body = _schedule(function.body, storage, _Pending())
    return function.with_body(body)


def touches(op: Op, storage: Storage) -> tuple[set[Value], set[Value]]:
    """The roots that a launch or copy reads, and those that it writes."""
    reads = {storage.root(o) for o in op.operands}
    writes = {storage.root(r) for r in (*written(op), *donated_results(op))}
    return reads, writes


def _schedule(region: Region, storage: Storage, pending: _Pending) -> Region:
    ops: list[Op] = []
    for op in region.ops:
        if op.name in ("launch", "copy"):
            reads, writes = touches(op, storage)
            if pending.conflicts(reads, writes):
                ops.append(infer("barrier", []))
                pending.clear()
            pending.add(reads, writes)
            ops.append(op)
        elif op.name == "repeat":
            pending.clear()
            inner = _schedule(op.regions[0], storage, pending)
            inner = replace(inner, ops=(infer("barrier", []), *inner.ops))
            ops.append(replace(op, regions=(inner,)))
        else:
            ops.append(op)
    return replace(region, ops=tuple(ops))


def count_barriers(function: Function) -> int:
    """The barriers that one step meets, turns of repeats counted."""
    return sum(times for op, times in executed(function.body) if op.name == "barrier")


def count_launches(function: Function) -> int:
    """The launches of one step, turns of repeats counted."""
    return sum(times for op, times in executed(function.body) if op.name == "launch")


def executed(region: Region, times: int = 1) -> Iterator[tuple[Op, int]]:
    """Every op and how often a step runs it."""
    for op in region.ops:
        yield op, times
        count = op.attr("count") if op.name == "repeat" else 1
        for inner in op.regions:
            yield from executed(inner, times * count)
