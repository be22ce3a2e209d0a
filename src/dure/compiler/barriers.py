"""The fewest barriers: one only where a launch touches what an earlier one, since the last, wrote,
and each says why it stands there.

Between two barriers the workers run the launches independently of one another, each its share.  A
turn of a repeat begins with a barrier, so that the turns need no analysis across their border.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace

from dure.compiler.storage import Storage, donated_results, written
from dure.ir.core import Function, Op, Region, Value, infer


@dataclass
class _Pending:
    """What launches since the last barrier read and wrote, by root: what did so last."""

    read: dict[Value, str] = field(default_factory=dict[Value, str])
    written: dict[Value, str] = field(default_factory=dict[Value, str])

    def conflict(self, what: str, reads: Set[Value], writes: Set[Value]) -> str:
        """Why ``what`` has to wait for the others, or nothing."""
        for root, by in self.written.items():
            if root in reads:
                return f"{what} reads what {by} writes"
        for root, by in self.written.items():
            if root in writes:
                return f"{what} writes where {by} writes"
        for root, by in self.read.items():
            if root in writes:
                return f"{what} writes what {by} reads"
        return ""

    def add(self, what: str, reads: Set[Value], writes: Set[Value]) -> None:
        self.read.update(dict.fromkeys(reads, what))
        self.written.update(dict.fromkeys(writes, what))

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
            what = str(op.attr("source")) if op.name == "launch" else op.name
            why = pending.conflict(what, reads, writes)
            if why:
                ops.append(infer("barrier", [], {"because": why}))
                pending.clear()
            pending.add(what, reads, writes)
            ops.append(op)
        elif op.name == "repeat":
            pending.clear()
            inner = _schedule(op.regions[0], storage, pending)
            first = infer("barrier", [], {"because": "a turn of a repeat begins"})
            inner = replace(inner, ops=(first, *inner.ops))
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
