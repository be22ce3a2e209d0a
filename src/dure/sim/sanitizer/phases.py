"""Programs of several phases: each is proved alone, and that no two of them meet.

A phase begins when those before it are complete on all cores, so that what they did is ordered
before all that it does.  That leaves queues that run ahead: beside the last ``lag`` phases they may
only load what no phase stores, into bytes that none of those phases touches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from dure.ir.core import Function, Op, Region, Value
from dure.ir.expr import Symbol, as_expr, symbols
from dure.ir.machine.compute import ops_of
from dure.ir.machine.phase import executed, phases_of
from dure.machine.chip import Chip
from dure.sim.sanitizer.alike import key_of
from dure.sim.sanitizer.checks import malformed, outside
from dure.sim.sanitizer.findings import Finding, Verdict
from dure.sim.storage import place_tile

Prove: TypeAlias = Callable[[Function], Verdict]
#: Memory, first byte and the one behind the last (of each partition).
_Bytes: TypeAlias = tuple[str, int, int]


def phased(function: Function) -> bool:
    """Whether a program consists of phases."""
    return any(True for _ in phases_of(function.body))


def prove_phases(function: Function, chip: Chip, prove: Prove, limit: int) -> Verdict:
    """The verdict on a program of phases; ``prove`` proves one of them."""
    found = list(_structure(function))
    if not found:
        found = list(_Order(function, chip).findings())
    iterations = states = 0
    if not found:
        proved: set[Hashable] = set()
        for phase in _alone(function):
            key = key_of(phase)
            if key in proved:
                found += (*malformed(phase, chip), *outside(phase, chip))
                continue
            verdict = prove(phase)
            if verdict.ok:
                proved.add(key)
            found += verdict.findings
            iterations += verdict.iterations
            states += verdict.states
            if len(found) >= limit:
                break
    return Verdict(not found, tuple(found[:limit]), iterations, states)


def _alone(function: Function) -> Iterator[Function]:
    """Each phase as a program of its own: what is around it is views and loops over phases, whose
    symbols are any numbers of their range.
    """
    seen: set[int] = set()

    def enter(region: Region, views: tuple[Op, ...], around: tuple[Symbol, ...]) -> Iterator[Op]:
        for op in region.ops:
            if op.name == "view":
                views = (*views, op)
            elif op.name == "for":
                yield from enter(op.regions[0], views, (*around, *op.regions[0].symbols))
            elif op.name == "phase" and id(op.regions[0]) not in seen:
                seen.add(id(op.regions[0]))
                contexts[op] = views, around
                yield op

    contexts: dict[Op, tuple[tuple[Op, ...], tuple[Symbol, ...]]] = {}
    for phase in enter(function.body, (), ()):
        views, around = contexts[phase]
        body = Region((), (*views, *phase.regions[0].ops))
        yield replace(function, body=body, symbols=(*function.symbols, *around))


def _structure(function: Function) -> Iterator[Finding]:
    """What keeps phases from being the same on all cores."""
    cores = {*function.program_ids}

    def enter(region: Region) -> Iterator[Finding]:
        for op in region.ops:
            if op.name == "for":
                ends = (as_expr(op.attr("start")), as_expr(op.attr("stop")))
                if any(symbols(e) for e in ends):
                    yield _bad("a loop over phases whose trips aren't a number", op)
                yield from enter(op.regions[0])
            elif op.name == "view":
                bounds = (as_expr(op.attr("start")), as_expr(op.attr("stop")))
                if cores & {s for e in bounds for s in symbols(e)}:
                    yield _bad("a view outside phases that differs from core to core", op)
            elif op.name != "phase":
                yield _bad(f"'{op.name}' outside the phases of a program that has phases", op)

    yield from enter(function.body)
    for phase in phases_of(function.body):
        if any(op.name == "phase" for op in ops_of(phase.regions[0])):
            yield _bad("a phase inside a phase", phase)


def _bad(message: str, op: Op) -> Finding:
    return Finding("not-proved", message, (), op)


@dataclass(frozen=True)
class _Phase:
    """What a phase touches: bytes of all its buffers, those that queues ahead load, and how many
    semaphores it has.
    """

    op: Op
    touched: tuple[tuple[Value, _Bytes], ...]
    ahead: tuple[tuple[Op, _Bytes], ...]
    semaphores: int


class _Order:
    """What may run beside what."""

    def __init__(self, function: Function, chip: Chip) -> None:
        self.function = function
        self.chip = chip
        self.views = {
            op.result: op.operands[0]
            for op in ops_of(function.body)
            if op.name in ("view", "reshaped")
        }
        self.stored = {
            self.root(op.operands[0]) for op in ops_of(function.body) if op.name == "dma_store"
        }
        self.phases = {op: self.phase(op) for op in phases_of(function.body)}

    def root(self, tensor: Value) -> Value:
        """The argument that a tensor is a view of."""
        while tensor in self.views:
            tensor = self.views[tensor]
        return tensor

    def bytes_of(self, buffer: Op) -> _Bytes:
        """The bytes of all slots of a buffer."""
        memory = self.chip.memories[str(buffer.attr("memory"))]
        partitions = None if memory.partitions is None else round(memory.partitions.base)
        first, last = int(buffer.attr("offset")), int(buffer.attr("stages")) - 1
        stop = first + last * int(buffer.attr("pitch"))
        size = place_tile(buffer.result.tile, partitions).size
        return str(buffer.attr("memory")), first, stop + size

    def phase(self, op: Op) -> _Phase:
        """What a phase touches."""
        inside = list(ops_of(op.regions[0]))
        buffers = {o.result: self.bytes_of(o) for o in inside if o.name == "buffer"}
        ahead = [o for o in inside if o.attrs.get("queue") in op.attr("ahead")]
        loads = [(o, buffers[o.operands[1]]) for o in ahead if o.name == "dma_load"]
        count = sum(o.name == "semaphore" for o in inside)
        return _Phase(op, tuple(buffers.items()), tuple(loads), count)

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong with queues that run ahead."""
        for phase in self.phases.values():
            if phase.op.attr("lag"):
                yield from self.loads(phase.op)
        reported = set[tuple[Op, Op]]()
        for phase, window in self.windows():
            for other in window:
                if (phase.op, other.op) not in reported:
                    reported.add((phase.op, other.op))
                    yield from self.beside(phase, other)
            most = round(self.chip.sync.semaphores.base)
            count = phase.semaphores + sum(w.semaphores for w in window)
            if count > most and (phase.op, phase.op) not in reported:
                reported.add((phase.op, phase.op))
                yield _bad(f"{count} semaphores in use at once; a core has {most}", phase.op)

    def loads(self, op: Op) -> Iterator[Finding]:
        """Queues ahead only load, and nothing that the program stores; nor do numbers that the
        program stores decide what they do.
        """
        for inner in ops_of(op.regions[0]):
            if inner.name == "index_load" and self.root(inner.operands[0]) in self.stored:
                name = self.root(inner.operands[0]).name
                yield _bad(f"'{name}', which the program stores, is read ahead of its phase", inner)
            if inner.attrs.get("queue") not in op.attr("ahead"):
                continue
            lists = inner.operands[2:]
            if inner.name in ("compute", "dma_store") or lists:
                yield _bad(f"'{inner.name}' on a queue that runs ahead of its phase", inner)
            elif inner.name == "dma_load" and self.root(inner.operands[0]) in self.stored:
                name = self.root(inner.operands[0]).name
                yield Finding(
                    "race",
                    f"a load of '{name}' runs ahead of its phase, and the program stores to it",
                    (),
                    inner,
                    "a load of what is stored begins with its phase, on another queue",
                )

    def windows(self) -> Iterator[tuple[_Phase, list[_Phase]]]:
        """Each phase that may begin early, with those that it may run beside."""
        most = max((int(p.op.attr("lag")) for p in self.phases.values()), default=0)
        recent: deque[_Phase] = deque(maxlen=max(1, most))
        for op in executed(self.function.body, most + 2):
            phase, lag = self.phases[op], int(op.attr("lag"))
            if lag and phase.ahead:
                yield phase, list(recent)[-lag:]
            recent.append(phase)

    def beside(self, phase: _Phase, other: _Phase) -> Iterator[Finding]:
        """What a phase that begins early must leave alone."""
        if phase.op is other.op:
            yield _bad("a phase that may run beside its own last turn", phase.op)
            return
        for load, (memory, first, stop) in phase.ahead:
            for buffer, (where, low, high) in other.touched:
                if memory == where and first < high and low < stop:
                    yield Finding(
                        "overlap",
                        f"'{load.operands[1].name}' of phase '{phase.op.attr('name')}' is loaded "
                        f"ahead, into bytes of '{buffer.name}' of phase '{other.op.attr('name')}'",
                        (),
                        load,
                        "other bytes, or a smaller lag",
                    )
