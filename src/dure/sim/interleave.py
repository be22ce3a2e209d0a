"""Queues of several cores, interleaved at random, with semaphores obeyed exactly.

An instruction's effect is an iterator: each ``next`` is one step that nothing interrupts, and
between two steps anything else may happen.  A compute queue has one instruction under way.  A DMA
queue issues in order and has up to ``outstanding`` transfers under way, which step in any order and
complete in the order of their issue.  Which step comes next is drawn from a seed, by weights that
are drawn anew now and then, so that a queue may fall far behind the others or run far ahead.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

from dure.errors import IRError
from dure.ir.core import Function, Op, Value, walk
from dure.ir.machine.phase import phases_of
from dure.ir.printer import print_op
from dure.sim.expand import STRUCTURE, Instruction, declared

#: ``(core, instruction, position in the core's text) -> steps``.
Effect: TypeAlias = Callable[[int, Instruction, int], Iterator[None]]

#: Steps between two draws of the weights: a power of two with one of these exponents.
_EPOCHS = range(3, 10)
#: The slowest queue of an epoch steps this much less often than the fastest, at most.
_SPREAD = 1000.0


class Program:
    """One core's instructions, handed out by queue as each comes to need its next."""

    def __init__(self, instructions: Iterator[Instruction], queues: Sequence[str]) -> None:
        self._rest = enumerate(instructions)
        self._waiting: dict[str, deque[tuple[int, Instruction]]] = {q: deque() for q in queues}

    def peek(self, queue: str) -> tuple[int, Instruction] | None:
        """The queue's next instruction with its position in the text; None at the end."""
        mine = self._waiting[queue]
        while not mine:
            found = next(self._rest, None)
            if found is None:
                return None
            queue = found[1].queue
            for name in [queue] if queue else self._waiting:
                self._waiting[name].append(found)
        return mine[0]

    def pop(self, queue: str) -> None:
        """Take what :meth:`peek` gave."""
        self._waiting[queue].popleft()


class _Actor(Protocol):
    """What the scheduler steps.  ``step`` is False if it can't go on until it is woken."""

    awake: bool
    weight: float

    def step(self) -> bool: ...


class _Core:
    """A core's counters, and who waits for them."""

    def __init__(self, number: int, program: Program, semaphores: Sequence[Op]) -> None:
        self.number = number
        self.program = program
        self.semaphores = {op.result: op for op in semaphores}
        self.counters: dict[Value, int] = {op.result: op.attr("initial") for op in semaphores}
        self.waiters: dict[Value, list[_Actor]] = {}


class _Queue:
    """What both kinds of queue do with semaphores and phases."""

    def __init__(self, name: str, core: _Core, run: Interleaving) -> None:
        self.name = name
        self.core = core
        self.run = run
        self.awake = True
        self.weight = 1.0
        self.begun = 0
        self.ended = 0

    def _begin(self, op: Op, actor: _Actor) -> bool:
        """Begin a phase, if enough of those before it are complete."""
        ahead: tuple[str, ...] = op.attr("ahead")
        lag = op.attr("lag") if self.name in ahead else 0
        if self.begun - lag > self.run.complete:
            self.run.waiting.append(actor)
            return False
        self.begun += 1
        return True

    def _wait(self, op: Op, actor: _Actor) -> bool:
        semaphore, count = op.operands[0], int(op.attr("count"))
        if self.core.counters[semaphore] < count:
            self.core.waiters.setdefault(semaphore, []).append(actor)
            return False
        self.core.counters[semaphore] -= count
        return True

    def _signal(self, op: Op) -> None:
        semaphore = op.operands[0]
        self.core.counters[semaphore] += int(op.attr("count"))
        most = self.core.semaphores[semaphore].attr("maximum")
        if self.core.counters[semaphore] > most:
            raise IRError(
                f"semaphore '{_label(semaphore)}' counts to {self.core.counters[semaphore]} on "
                f"core {self.core.number}",
                where=_where(op),
                rule=f"its maximum is {most}",
                fix="wait for it before the next signal",
            )
        for waiter in self.core.waiters.pop(semaphore, ()):
            self.run.wake(waiter)


class _Compute(_Queue):
    """An in-order queue with one instruction under way."""

    def __init__(self, name: str, core: _Core, run: Interleaving) -> None:
        super().__init__(name, core, run)
        self.steps: Iterator[None] | None = None

    def step(self) -> bool:
        if self.steps is not None:
            if next(self.steps, self) is self:
                self.steps = None
            return True
        found = self.core.program.peek(self.name)
        if found is None:
            return False
        position, instruction = found
        match instruction.op.name:
            case "wait":
                if not self._wait(instruction.op, self):
                    return False
            case "signal":
                self._signal(instruction.op)
            case "phase":
                if instruction.ends:
                    self.run.end(self)
                elif not self._begin(instruction.op, self):
                    return False
            case _:
                self.steps = self.run.effect(self.core.number, instruction, position)
        self.core.program.pop(self.name)
        return True


class _Dma(_Queue):
    """Issues the transfers of a DMA queue."""

    def __init__(self, name: str, core: _Core, run: Interleaving, outstanding: int) -> None:
        super().__init__(name, core, run)
        self.outstanding = outstanding
        self.mover = _Mover(self)

    def step(self) -> bool:
        found = self.core.program.peek(self.name)
        if found is None:
            return False
        position, instruction = found
        flight = self.mover.flight
        match instruction.op.name:
            case "wait":
                if not self._wait(instruction.op, self):
                    return False
            case "signal":
                if flight:
                    flight.append(instruction.op)
                else:
                    self._signal(instruction.op)
            case "phase":
                if not instruction.ends:
                    if not self._begin(instruction.op, self):
                        return False
                elif flight:
                    flight.append(instruction.op)
                else:
                    self.run.end(self)
            case _:
                if self.mover.transfers >= self.outstanding:
                    return False
                flight.append(self.run.effect(self.core.number, instruction, position))
                self.mover.transfers += 1
                self.run.wake(self.mover)
        self.core.program.pop(self.name)
        return True

    def completed(self, signal: Op) -> None:
        """Everything before a signal, or the end of a phase, is complete."""
        if signal.name == "phase":
            self.run.end(self)
        else:
            self._signal(signal)


class _Mover:
    """Moves the bytes of a DMA queue's transfers, in any order, and completes them in order."""

    def __init__(self, queue: _Dma) -> None:
        self.queue = queue
        self.awake = True
        self.weight = 1.0
        #: Transfers under way (None: its bytes are moved), and signals behind them.
        self.flight: list[Iterator[None] | Op | None] = []
        self.transfers = 0

    def step(self) -> bool:
        if not self.flight:
            return False
        random = self.queue.run.random
        place = random.randrange(len(self.flight)) if len(self.flight) > 1 else 0
        entry = self.flight[place]
        if entry is not None and not isinstance(entry, Op) and next(entry, self) is self:
            self.flight[place] = None
        while self.flight and not isinstance(self.flight[0], Iterator):
            done = self.flight.pop(0)
            if isinstance(done, Op):
                self.queue.completed(done)
            else:
                self.transfers -= 1
                self.queue.run.wake(self.queue)
        return True


class Interleaving:
    """Runs cores to their end.

    ``dma`` gives the transfers that may be under way by DMA queue; every other queue computes.
    """

    def __init__(
        self, function: Function, dma: Mapping[str, int], effect: Effect, random: random.Random
    ) -> None:
        self.effect = effect
        self.random = random
        self.dma = dma
        self.semaphores = declared(function, "semaphore")
        self.queues = queues_of(function)
        #: Whether there are phases; how many are complete, who has ended one after those, and who
        #: waits to begin one.
        self.phased = any(True for _ in phases_of(function.body))
        self.complete = 0
        self.ends: list[int] = []
        self.waiting: list[_Actor] = []
        self.count = 0
        self._ready: list[_Actor] = []
        #: The weights of those ready, in the same order.
        self._weights: list[float] = []

    def wake(self, actor: _Actor) -> None:
        """Let an actor try again."""
        if not actor.awake:
            actor.awake = True
            self._ready.append(actor)
            self._weights.append(actor.weight)

    def end(self, queue: _Queue) -> None:
        """A queue has ended a phase; complete are those that all have."""
        place = queue.ended - self.complete
        queue.ended += 1
        if place == len(self.ends):
            self.ends.append(self.count)
        self.ends[place] -= 1
        while self.ends and not self.ends[0]:
            self.ends.pop(0)
            self.complete += 1
            waiting, self.waiting = self.waiting, []
            for actor in waiting:
                self.wake(actor)

    def run(self, programs: Mapping[int, Iterator[Instruction]]) -> None:
        """Run these cores (by number) together.  Raises :class:`IRError` for a deadlock."""
        cores = [
            _Core(number, Program(program, self.queues), self.semaphores)
            for number, program in programs.items()
        ]
        queues: list[_Compute | _Dma] = []
        for core in cores:
            for name in self.queues:
                if name in self.dma:
                    queues.append(_Dma(name, core, self, self.dma[name]))
                else:
                    queues.append(_Compute(name, core, self))
        self.complete, self.count = 0, len(queues)
        movers = [queue.mover for queue in queues if isinstance(queue, _Dma)]
        self._ready = [*queues, *movers]
        self._drain()
        stuck = [(q, found[1].op) for q in queues if (found := q.core.program.peek(q.name))]
        if stuck:
            raise _deadlock(stuck)
        for core in cores:
            _check_counters(core)

    def _drain(self) -> None:
        ready, weights, draw = self._ready, self._weights, self.random
        while ready:
            for actor in ready:
                actor.weight = _SPREAD ** draw.random()
            weights[:] = [actor.weight for actor in ready]
            for _ in range(1 << draw.choice(_EPOCHS)):
                (place,) = draw.choices(range(len(ready)), weights)
                actor = ready[place]
                if actor.step():
                    continue
                actor.awake = False
                # The last one takes its place: order means nothing here.
                ready[place], weights[place] = ready[-1], weights[-1]
                ready.pop()
                weights.pop()
                if not ready:
                    return


def queues_of(function: Function) -> tuple[str, ...]:
    """The queues that a program uses, in the order of its text."""
    found: dict[str, None] = {}
    skipped: set[Op] = set()
    for op in walk(function.body):
        if op in skipped or op.name in STRUCTURE:
            continue
        if op.name == "compute":
            skipped.update(walk(op.regions[0]))
        found[str(op.attrs["queue"])] = None
    return tuple(found)


def _check_counters(core: _Core) -> None:
    for semaphore, op in core.semaphores.items():
        if core.counters[semaphore] != op.attr("initial"):
            raise IRError(
                f"semaphore '{_label(semaphore)}' ends at {core.counters[semaphore]} on core "
                f"{core.number}",
                where=_where(op),
                rule=f"it ends where it starts, at {op.attr('initial')}",
                fix="wait for as much as is signalled",
            )


def _deadlock(stuck: Sequence[tuple[_Queue, Op]]) -> IRError:
    lines: list[str] = []
    for queue, op in stuck:
        have = ""
        if op.name == "wait":
            semaphore = op.operands[0]
            have = (
                f" for {op.attr('count')} of '{_label(semaphore)}', which is at "
                f"{queue.core.counters[semaphore]}"
            )
        place = f" ({op.span})" if op.span is not None else ""
        text = op.name if op.name == "wait" else print_op(op).splitlines()[0].strip()
        lines.append(f"    core {queue.core.number}, queue {queue.name}: {text}{have}{place}")
    return IRError(
        "deadlock: no queue can go on\n" + "\n".join(lines),
        rule="every wait is met by signals that don't depend on it",
        fix="signal the semaphore before the wait in the order of the text, or lower its count",
    )


def _label(semaphore: Value) -> str:
    return semaphore.name or "semaphore"


def _where(op: Op) -> str:
    return op.span.render() if op.span is not None else ""
