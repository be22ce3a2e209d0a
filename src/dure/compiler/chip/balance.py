"""Instructions move between queues so that those of a loop have as much to do.

Lowering gives each instruction to the queue that is fastest at it, as if nothing else were there.
In a loop whose turns overlap, the queue with most work decides: so an instruction that another one
can do as a whole goes there, as long as the busier of the two then has less to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dure.compiler.chip.engines import Engines
from dure.compiler.chip.tree import Block, Branch, Loop, Step, Tree, blocks
from dure.errors import IRError
from dure.ir.core import Op
from dure.ir.expr import Compare
from dure.ir.machine.compute import Operation, works

#: What a move must save of the busier queue's work: at least one part of so many.
_LEAST = 32


def balance(tree: Tree, engines: Engines) -> None:
    """Move what can move, in every loop without loops inside: elsewhere turns hardly overlap."""
    if len(engines.queues) < 2:
        return
    balancer = _Balancer(engines)
    for block in blocks(tree.body):
        if block.loop and not any(isinstance(item, Loop) for item in block.items):
            balancer.block(block)


class _Balancer:
    def __init__(self, engines: Engines) -> None:
        self.engines = engines

    def block(self, block: Block) -> None:
        """Move instructions of a loop until no move helps."""
        own = list(_own(block))
        loads = dict.fromkeys(self.engines.queues, 0)
        ways: list[dict[str, tuple[int, Step]]] = []
        for step in own:
            found = dict(self.ways(step))
            loads[step.queue] += found[step.queue][0]
            ways.append(found)
        for _ in own:
            best: tuple[float, int, str] | None = None
            for place, step in enumerate(own):
                for queue, (ps, _) in ways[place].items():
                    busy = loads[step.queue]
                    after = max(busy - ways[place][step.queue][0], loads[queue] + ps)
                    saved = busy - after
                    if queue != step.queue and saved * _LEAST > busy:
                        best = max(best or (0.0, 0, ""), (saved, -place, queue))
            if best is None:
                return
            step, queue = own[-best[1]], best[2]
            loads[step.queue] -= ways[-best[1]][step.queue][0]
            loads[queue] += ways[-best[1]][queue][0]
            step.attrs, step.queue = ways[-best[1]][queue][1].attrs, queue

    def ways(self, step: Step) -> Iterator[tuple[str, tuple[int, Step]]]:
        """The queues that can do an instruction, each with the picoseconds that it takes there."""
        yield step.queue, (self.cost(step), replace(step))
        assert step.region is not None
        done = list(works(step.region))
        if any(operation in ("dot", "transpose") for operation, _ in done):
            return
        reads, writes = {b.memory for b in step.reads}, {b.memory for b in step.writes}
        for queue in self.engines.able([operation for operation, _ in done]):
            near = reads <= self.engines.reads[queue] and writes <= self.engines.writes[queue]
            if queue == step.queue or not near or not self.takes(queue, done):
                continue
            names = self.engines.names(queue, [o for o, _ in done], frozenset(reads | writes))
            moved = replace(step, queue=queue, attrs={**step.attrs, "engines": names})
            try:
                yield queue, (self.cost(moved), moved)
            except IRError:
                continue  # a type that the engine has no rate for

    def takes(self, queue: str, done: Sequence[tuple[Operation, Op]]) -> bool:
        """Whether a queue's engines compute in the types of an instruction, and as many ops."""
        engines = self.engines.chip.engines
        for name in self.engines.queues[queue]:
            chain = engines[name].chain
            if chain is not None and len(done) > chain.base:
                return False
        types = {
            str(value.tile.dtype)
            for operation, op in done
            if operation not in ("convert", "copy")
            for value in (*op.operands, *op.results)
        }
        able = {t for name in self.engines.queues[queue] for t in engines[name].types}
        return types <= able

    def cost(self, step: Step) -> int:
        """Picoseconds of an instruction."""
        assert step.region is not None
        op = Op("compute", (), (), {**step.attrs, "queue": step.queue}, (step.region,))
        return self.engines.costs.compute(op).ps


def _own(block: Block) -> Iterator[Step]:
    """The instructions of nearly every turn of a loop, without those of inner loops: of a branch
    for one turn only what the others do.
    """
    for item in block.items:
        if isinstance(item, Step) and item.kind == "compute":
            yield item
        elif isinstance(item, Branch):
            if not (isinstance(item.condition, Compare) and item.condition.relation == "=="):
                yield from _own(item.then)
            yield from _own(item.otherwise)
        elif isinstance(item, Loop):
            continue
