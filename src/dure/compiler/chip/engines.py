"""Which queue and engines can do what: the questions that lowering asks a machine file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from dure.errors import KernelError, TargetError
from dure.ir.core import Op
from dure.ir.machine.compute import Operation
from dure.machine.chip import Chip, Dot, Engine
from dure.sim.cost import Costs


@dataclass(frozen=True)
class Engines:
    """The engines of a chip, by queue."""

    chip: Chip

    @cached_property
    def queues(self) -> dict[str, tuple[str, ...]]:
        """Each compute queue's engines, in the order of the file."""
        found: dict[str, list[str]] = {}
        for name, engine in self.chip.engines.items():
            found.setdefault(engine.queue, []).append(name)
        return {queue: tuple(names) for queue, names in found.items()}

    @cached_property
    def costs(self) -> Costs:
        """What instructions cost."""
        return Costs(self.chip)

    @cached_property
    def _doers(self) -> dict[tuple[str, Operation], str | None]:
        return {}

    def doer(self, queue: str, operation: Operation) -> str | None:
        """The first engine of a queue with a law for this operation."""
        key = queue, operation
        if key not in self._doers:
            named = ((n, self.chip.engines[n]) for n in self.queues[queue])
            able = (n for n, engine in named if operation == "none" or engine.law(operation))
            self._doers[key] = next(able, None)
        return self._doers[key]

    @cached_property
    def reads(self) -> dict[str, frozenset[str]]:
        """The memories that each queue's engines read."""
        engines = self.chip.engines
        return {
            q: frozenset(m for n in own for m in engines[n].reads) for q, own in self.queues.items()
        }

    @cached_property
    def writes(self) -> dict[str, frozenset[str]]:
        """The memories that each queue's engines write."""
        engines = self.chip.engines
        return {
            q: frozenset(m for n in own for m in engines[n].writes)
            for q, own in self.queues.items()
        }

    def able(self, operations: Iterable[Operation]) -> list[str]:
        """The queues that have all of these operations; copying counts as one that all need."""
        wanted = set(operations)
        return [q for q in self.queues if all(self.doer(q, o) for o in wanted)]

    def names(
        self, queue: str, operations: Iterable[Operation], memories: frozenset[str]
    ) -> tuple[str, ...]:
        """The engines of a queue that these operations occupy, in the order of the file.

        Of two that have an operation, the one that reaches all of ``memories`` does it.
        """
        used: set[str] = set()
        for operation in operations:
            able = [n for n in self.queues[queue] if self.chip.engines[n].law(operation)]
            near = [n for n in able if memories <= self._reach(n)]
            used.update((near or able)[:1])
        return tuple(n for n in self.queues[queue] if n in used) or self.queues[queue][:1]

    def _reach(self, name: str) -> frozenset[str]:
        engine = self.chip.engines[name]
        own = {*engine.reads, *engine.writes}
        return frozenset(own | set(engine.dot.accumulators if engine.dot is not None else ()))

    def dot(self, op: Op) -> tuple[str, Engine, Dot]:
        """The engine that does a dot, its description, and what it takes.

        Raises :class:`KernelError` for operands that no engine multiplies.
        """
        dtype = str(op.operands[0].tile.dtype)
        for name, engine in self.chip.engines.items():
            if engine.dot is not None and dtype in engine.dot.types:
                return name, engine, engine.dot
        raise KernelError(
            f"a dot of {dtype} operands, which no engine of {self.chip.name} multiplies",
            where=op.span.render() if op.span is not None else "",
            rule="operands of a dot have a type that the matrix engine takes",
            fix="legalise the kernel for the chip first",
        )

    @property
    def accumulator(self) -> str:
        """The memory where the first matrix engine accumulates."""
        for engine in self.chip.engines.values():
            if engine.dot is not None:
                return engine.dot.accumulators[0]
        return self.chip.scratchpad

    def dma(self, source: str, target: str) -> list[str]:
        """The DMA engines that move from one memory to another."""
        return [n for n, d in self.chip.dma.items() if (source, target) in d.moves]

    def storable(self) -> frozenset[str]:
        """The memories from which some DMA reaches the home memory."""
        home = self.chip.home
        return frozenset(a for d in self.chip.dma.values() for a, b in d.moves if b == home)

    def missing(self, what: str, op: Op | None) -> TargetError:
        """The error for an operation that the chip can't do at all."""
        return TargetError(
            f"{self.chip.name} has no way to {what}",
            where=op.span.render() if op is not None and op.span is not None else "",
            rule="a chip's engines and DMA reach what a kernel needs",
            fix="declare a law, a memory or a move for it in the machine file",
        )
