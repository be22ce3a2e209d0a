"""What the far memory itself delivers, where several cores read the same bytes at once.

Cores that differ only in coordinates that a load doesn't depend on read the same tiles in the same
order.  Where the memory says that such reads reach it once (a broadcast, a shared cache), each
transfer counts as its part of one.  A shared memory in between that holds all of a program's
tensors makes every further read of the same bytes free of the far memory's bandwidth as well.
"""

from __future__ import annotations

from dataclasses import replace

from dure.ir.core import Function, Op, Region, Value
from dure.ir.expr import Symbol, evaluate, symbols
from dure.ir.rewrite import expressions_in, type_expressions
from dure.machine.chip import Chip


def share_reads(function: Function, chip: Chip) -> Function:
    """The same program with the ``share`` of each load."""
    home = chip.memories[chip.home]
    if not home.shared_reads or not function.program_ids:
        return function
    counts = {
        s: evaluate(extent, {})
        for s, extent in zip(function.program_ids, function.grid, strict=True)
    }
    work = _Sharing(counts, None if home.readers is None else int(home.readers.base))
    return replace(function, body=work.region(function.body, {}))


class _Sharing:
    def __init__(self, counts: dict[Symbol, int], readers: int | None) -> None:
        self.counts = counts
        self.readers = readers
        self.views: dict[Value, frozenset[Symbol]] = {}

    def region(self, region: Region, loops: dict[Symbol, frozenset[Symbol]]) -> Region:
        return replace(region, ops=tuple(self.op(op, loops) for op in region.ops))

    def op(self, op: Op, loops: dict[Symbol, frozenset[Symbol]]) -> Op:
        if op.name == "for":
            counter = op.regions[0].symbols[0]
            own = self.depends(op, loops)
            return replace(op, regions=(self.region(op.regions[0], {**loops, counter: own}),))
        if op.name == "if":
            return replace(op, regions=tuple(self.region(r, loops) for r in op.regions))
        if op.name == "view":
            before = self.views.get(op.operands[0], frozenset())
            self.views[op.result] = self.depends(op, loops) | before
        if op.name == "index_load":
            loops[op.symbols[0]] = self.depends(op, loops)
        if op.name != "dma_load":
            return op
        used = self.depends(op, loops) | self.views.get(op.operands[0], frozenset())
        sharers = 1
        for entry, count in self.counts.items():
            if entry not in used:
                sharers *= count
        if self.readers is not None:
            sharers = min(sharers, self.readers)
        return replace(op, attrs={**op.attrs, "share": (1, sharers)}) if sharers > 1 else op

    def depends(self, op: Op, loops: dict[Symbol, frozenset[Symbol]]) -> frozenset[Symbol]:
        """The core coordinates that an op's expressions depend on."""
        found: set[Symbol] = set()
        for value in op.attrs.values():
            for expr in expressions_in(value):
                found |= symbols(expr)
        for operand in op.operands:
            for expr in type_expressions(operand.type):
                found |= symbols(expr)
        total: set[Symbol] = set()
        for entry in found:
            total |= {entry} if entry in self.counts else loops.get(entry, frozenset())
        return frozenset(total)
