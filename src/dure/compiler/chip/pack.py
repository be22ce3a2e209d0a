"""Independent instructions of one queue on different engines become one instruction.

A queue executes one instruction after another, and the engines of an instruction work at the same
time.  So where a queue's instructions are bundles, a product and other work beside it take as long
as the longer of the two, if they are one instruction.  An instruction moves up to an earlier one of
its block if nothing on the way, nor that one itself, writes what it touches, nothing on the way
reads what it writes, and engines work at the same time then that didn't.  (An instruction reads
everything before it writes, so what the earlier one reads may be overwritten.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dure.compiler.chip.engines import Engines
from dure.compiler.chip.tree import Block, Buffer, Item, Step, Tree, blocks
from dure.ir.core import Op, Region, Value
from dure.ir.machine.compute import Operation, works
from dure.ir.rewrite import clone_region

#: What a merger must save of the shorter instruction: at least one part of so many.
_LEAST = 8


def pack(tree: Tree, engines: Engines) -> None:
    """Merge what can be merged, in every block."""
    if not engines.chip.bundles:
        return
    packer = _Packer(engines)
    for block in blocks(tree.body):
        block.items = packer.items(block)


class _Packer:
    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.queues = engines.chip.bundles

    def items(self, block: Block) -> list[Item]:
        """A block's items; each run of instructions between two others is packed by itself."""
        found: list[Item] = []
        run: list[Step] = []
        for item in block.items:
            if isinstance(item, Step):
                run.append(item)
                continue
            found += [*self.packed(run), item]
            run = []
        return [*found, *self.packed(run)]

    def packed(self, run: Sequence[Step]) -> list[Step]:
        """The instructions of a run, each in the one where it saves most, the earliest of them."""
        found: list[Step] = []
        for step in run:
            places = list(self.places(found, step))
            if not places:
                found.append(step)
                continue
            _, place, both = max(places, key=lambda entry: (entry[0], -entry[1]))
            found[place] = both
        return found

    def places(self, before: Sequence[Step], step: Step) -> Iterator[tuple[int, int, Step]]:
        """Where an instruction can be part of an earlier one: picoseconds that it saves, the place
        and the whole.
        """
        if not self.movable(step):
            return
        first = len(before)
        while first and not _meets(before[first - 1], step, reads=True):
            first -= 1
        if first and not _meets(before[first - 1], step, reads=False):
            first -= 1
        for place in range(first, len(before)):
            other = before[place]
            if other.queue != step.queue or not self.movable(other):
                continue
            both = _merged(other, step)
            saved = self.saved(other, step, both)
            if saved:
                yield saved, place, both

    def movable(self, step: Step) -> bool:
        """Whether an instruction is a bundle, and means the same beside others.

        A transpose is no work in an instruction with a product, which reads its operand through it.
        """
        if step.kind != "compute" or step.queue not in self.queues:
            return False
        assert step.region is not None
        names = {op.name for op in step.region.ops}
        return "dot" in names or "transpose" not in names

    def saved(self, one: Step, other: Step, both: Step) -> int:
        """How much less time the work of two instructions takes in one, besides what it costs to
        issue them; 0 where that is next to nothing, or where an op would change its engine.
        """
        for step in (one, other):
            assert step.region is not None
            if any(self.doer(step, o) != self.doer(both, o) for o, _ in works(step.region)):
                return 0
        alone = self.work(one), self.work(other)
        saved = sum(alone) - self.work(both)
        return saved if saved * _LEAST >= min(alone) else 0

    def doer(self, step: Step, operation: Operation) -> str | None:
        """The engine of an instruction that does an operation."""
        engines = self.engines.chip.engines
        return next((n for n in step.attrs["engines"] if engines[n].law(operation)), None)

    def work(self, step: Step) -> int:
        """Picoseconds that an instruction's slowest engine works."""
        assert step.region is not None
        attrs = {**step.attrs, "queue": step.queue}
        op = Op("compute", (), (), attrs, (step.region,))
        return max(self.engines.costs.compute(op).engines.values())


def _meets(earlier: Step, later: Step, *, reads: bool) -> bool:
    """Whether an instruction touches what an earlier one writes, or (``reads``) writes what that
    reads.
    """
    written = {b.root for b in earlier.writes}
    if not written.isdisjoint(b.root for b in (*later.reads, *later.writes, *later.lists)):
        return True
    read = {b.root for b in (*earlier.reads, *earlier.lists)} if reads else set[Buffer]()
    return not read.isdisjoint(b.root for b in later.writes)


def _merged(one: Step, other: Step) -> Step:
    """Both as one instruction."""
    assert one.region is not None and other.region is not None
    places = {buffer: n for n, buffer in enumerate(one.reads)}
    known: dict[Value, Value] = {}
    more: list[tuple[Buffer, Value]] = []
    for buffer, argument in zip(other.reads, other.region.args, strict=True):
        if buffer in places:
            known[argument] = one.region.args[places[buffer]]
        else:
            more.append((buffer, argument))
    inner = Region((), other.region.ops, other.region.yields)
    inner = clone_region(inner, known) if known else inner
    region = Region(
        (*one.region.args, *(argument for _, argument in more)),
        (*one.region.ops, *inner.ops),
        (*one.region.yields, *inner.yields),
    )
    reads = [*one.reads, *(buffer for buffer, _ in more)]
    engines = tuple(dict.fromkeys((*one.attrs["engines"], *other.attrs["engines"])))
    attrs = {**one.attrs, "engines": engines, "reads": len(reads)}
    span = one.span if "dot" in {op.name for op in one.region.ops} else other.span
    writes = [*one.writes, *other.writes]
    return replace(one, reads=reads, writes=writes, attrs=attrs, region=region, span=span)
