"""A step of the engine, watched: what each worker did when, operator by operator.

The engine is loaded with ``recorded=True``; its steps stamp when each worker ended each launch and
each wait.  Beside that stand the bytes and operations that the operators' declarations need at the
step's sizes, and what this machine reads and multiplies in the same run, in bursts between steps.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.compiler.lower import numbered
from dure.compiler.pipeline import prepare
from dure.errors import UsageError
from dure.ir.core import Cost, Function, Op, Value
from dure.ir.sizes import at_sizes
from dure.ir.tensor.program import repeat_tables
from dure.models.decoder import step_program
from dure.runtime.bandwidth import BandwidthProbe
from dure.runtime.host import host_features
from dure.runtime.pool import shared_pool
from dure.serve.engine import Engine
from dure.serve.kv import Sequence
from dure.serve.products import ProductProbe
from dure.serve.stamped import Times, nanoseconds
from dure.serve.work import BatchEntry
from dure.targets.cpu.context import BARRIER, Event
from dure.targets.cpu.target import CpuTarget

Phase: TypeAlias = Literal["decode", "prefill"]

_READ_BYTES = 1 << 28
#: Steps between two bursts of reading and of multiplying.
_BETWEEN = 8


@dataclass(frozen=True)
class OperatorUse:
    """An operator of a step: ``count`` launches (of one op, over the layers) that take ``ns`` each,
    in the mean of the workers, and the slowest worker ``slowest_ns``.

    ``bytes`` and ``flops`` are what its declaration needs each time.
    """

    name: str
    number: int
    count: int
    ns: float
    slowest_ns: float
    bytes: int
    flops: int

    @property
    def total_ns(self) -> float:
        """Of all launches."""
        return self.count * self.ns


@dataclass(frozen=True)
class BarrierUse:
    """A barrier: why it stands there, how often a step meets it, and how long each worker waits."""

    because: str
    count: int
    ns: tuple[float, ...]


@dataclass(frozen=True)
class StepUse:
    """Steps of one kind, watched; medians.

    ``ns`` of a step as the caller sees it, and ``plain_ns`` of one that doesn't record, where both
    engines were given.  ``read`` are bytes a second that the same workers read from memory,
    ``peaks`` operations a second that they multiply, by type.  ``ends`` are the nanoseconds of the
    median step at which (worker, event) ended, after an entry for the step's begin; ``events`` are
    (an operator's name, or nothing for a barrier; why that stands there; the operator's number).
    """

    model: str
    phase: Phase
    batch: int
    context: int
    workers: int
    steps: int
    tokens: int
    ns: float
    plain_ns: float | None
    operators: tuple[OperatorUse, ...]
    barriers: tuple[BarrierUse, ...]
    read: float
    peaks: dict[str, float]
    weight_bytes: int
    kv_bytes: float
    events: tuple[tuple[str, str, int], ...]
    ends: Times

    @property
    def bytes_a_second(self) -> float:
        """Of weights and of keys and values."""
        return (self.weight_bytes + self.kv_bytes) / self.ns * 1e9

    @property
    def waiting(self) -> tuple[float, ...]:
        """The part of a step that each worker spends at barriers."""
        whole = self.ends[:, -1] - self.ends[:, 0]
        waits = [place for place, (name, _, _) in enumerate(self.events) if not name]
        spent = np.diff(self.ends, axis=1)[:, waits].sum(axis=1)
        return tuple(float(part) for part in spent / whole)


def profile_steps(
    engine: Engine,
    model: str,
    *,
    phase: Phase = "decode",
    batch: int = 1,
    context: int = 256,
    steps: int = 40,
    plain: Engine | None = None,
) -> StepUse:
    """Watch ``steps`` steps of an engine that records.

    Decode: ``batch`` sequences that hold ``context`` tokens each get one more a step.  Prefill: one
    step takes ``context`` tokens of one sequence after another.  ``plain`` is an engine of the same
    model that doesn't record; its steps take turns with the others.  Raises :class:`UsageError` for
    steps that the engine can't make.
    """
    _check(engine, phase, batch, context, steps)
    program = engine.program
    executed = _executed(program.events)
    pool = shared_pool(engine.threads)
    reading, multiplying = BandwidthProbe(_READ_BYTES, pool), ProductProbe(engine.threads)
    stamps: list[npt.NDArray[np.int64]] = []
    own: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    reads: list[float] = []
    with ExitStack() as stack:
        mine = stack.enter_context(_Steps(engine, phase, batch, context))
        mine.run()
        theirs = None
        if plain is not None:
            theirs = stack.enter_context(_Steps(plain, phase, batch, context))
            theirs.run()
        for number in range(steps):
            if number % _BETWEEN == 0:
                reads.append(reading.burst())
                multiplying.burst()
            own.append(mine.run())
            stamps.append(program.stamps()[:, : len(executed) + 1])
            if theirs is not None:
                others.append(theirs.run())
    ends = nanoseconds(np.array(stamps), own)
    labels, costs = _labels(program.step), _costs(engine, batch, context)
    walls = [end - begin for begin, end in own]
    middle = int(np.argsort(walls)[len(walls) // 2])
    return StepUse(
        model=model,
        phase=phase,
        batch=batch,
        context=context,
        workers=engine.threads,
        steps=steps,
        tokens=batch if phase == "decode" else context,
        ns=statistics.median(walls),
        plain_ns=statistics.median(e - b for b, e in others) if others else None,
        operators=tuple(_operators(executed, ends, labels, costs)),
        barriers=tuple(_barriers(executed, ends)),
        read=statistics.median(reads) * 1e9,
        peaks=multiplying.peaks(),
        weight_bytes=engine.weight_bytes_per_token,
        kv_bytes=batch * engine.kv_bytes(context),
        events=tuple(
            ("" if e.what == BARRIER else labels.get(e.number, e.what), e.because, e.number)
            for e in executed
        ),
        ends=ends[middle],
    )


def _check(engine: Engine, phase: Phase, batch: int, context: int, steps: int) -> None:
    if min(batch, context, steps) < 1 or (phase == "prefill" and batch != 1):
        raise UsageError(
            f"{steps} steps of {phase}, {batch} sequences, {context} tokens",
            rule="each is at least 1; a prefill step is of one sequence",
        )
    limits, more = engine.limits, steps + 1 if phase == "decode" else 0
    if phase == "prefill" and context > limits.tokens:
        raise UsageError(
            f"a prefill step of {context} tokens",
            rule=f"a step takes at most {limits.tokens} tokens",
            fix="watch fewer tokens: a longer prompt is made of such steps",
        )
    engine.check_room(batch, context + more)


class _Steps:
    """Equal steps of an engine, one after another."""

    def __init__(self, engine: Engine, phase: Phase, batch: int, context: int) -> None:
        self._engine, self._phase = engine, phase
        self._random = np.random.default_rng(0)
        self._prompts = self._random.integers(0, engine.vocabulary, (batch, context))
        self._sequences: list[Sequence] = []
        self._tokens = [0] * batch

    def __enter__(self) -> _Steps:
        if self._phase == "decode":
            for prompt in self._prompts:
                self._sequences.append(self._engine.sequence())
                logits = self._engine.prefill(self._sequences[-1], prompt.astype(np.int32))
                self._tokens[len(self._sequences) - 1] = int(logits.argmax())
        return self

    def __exit__(self, *_: object) -> None:
        for sequence in self._sequences:
            self._engine.release(sequence)

    def run(self) -> tuple[int, int]:
        """One step: nanoseconds at its begin and at its end."""
        if self._phase == "prefill":
            self._sequences[:] = [self._engine.sequence()]
            tokens = self._prompts[0].astype(np.int32)
            entries = [BatchEntry(self._sequences[0], tokens, (len(tokens) - 1,))]
        else:
            entries = [
                BatchEntry(sequence, np.array([token], np.int32), (0,))
                for sequence, token in zip(self._sequences, self._tokens, strict=True)
            ]
        begin = time.perf_counter_ns()
        logits = self._engine.step(entries)
        end = time.perf_counter_ns()
        if self._phase == "prefill":
            self._engine.release(self._sequences.pop())
        else:
            self._tokens = logits.argmax(axis=-1).tolist()
        return begin, end


def _executed(events: SequenceOf[Event]) -> list[Event]:
    """The events as a step executes them."""
    found: dict[int, Event] = {}
    for event in events:
        turns = (range(0, count * each, each) for count, each in event.turns)
        for shifts in itertools.product(*turns):
            found[event.place + sum(shifts)] = event
    return [found[place] for place in sorted(found)]


def _operators(
    executed: SequenceOf[Event], ends: Times, labels: dict[int, str], costs: dict[int, Cost]
) -> list[OperatorUse]:
    """The operators in the order of the program."""
    spent = np.median(np.diff(ends, axis=2), axis=0)
    places: dict[int, list[int]] = {}
    turns: dict[int, set[int]] = {}
    for place, event in enumerate(executed):
        if event.what != BARRIER:
            places.setdefault(event.number, []).append(place)
            turns.setdefault(event.number, set()).add(event.place)
    found: list[OperatorUse] = []
    for number, mine in places.items():
        # An op of several launches is one operator.
        count = len(mine) // len(turns[number])
        cost = costs.get(number, Cost())
        found.append(
            OperatorUse(
                labels.get(number, executed[mine[0]].what),
                number,
                count,
                float(spent[:, mine].mean(axis=0).sum()) / count,
                float(spent[:, mine].max(axis=0).sum()) / count,
                cost.bytes,
                cost.flops,
            )
        )
    return found


def _barriers(executed: SequenceOf[Event], ends: Times) -> list[BarrierUse]:
    spent = np.median(np.diff(ends, axis=2), axis=0)
    places: dict[int, list[int]] = {}
    because: dict[int, str] = {}
    for place, event in enumerate(executed):
        if event.what == BARRIER:
            places.setdefault(event.place, []).append(place)
            because[event.place] = event.because
    return [
        BarrierUse(because[first], len(mine), tuple(spent[:, mine].mean(axis=1).tolist()))
        for first, mine in places.items()
    ]


def _costs(engine: Engine, batch: int, context: int) -> dict[int, Cost]:
    """What each op of a step needs: of the same program for a cache that the batch fills."""
    model, limits = engine.model, engine.limits
    pages = -(-context // limits.page_size)
    filled = replace(limits, sequences=batch, pages=pages, pool_pages=batch * pages)
    program = step_program(model.config, model.types, filled, engine.kv_dtype)
    laid_out = prepare(program, CpuTarget(host_features())).laid_out.step
    found: dict[int, Cost] = {}
    for number, op in enumerate(numbered(laid_out)):
        fixed = at_sizes(op, engine.program.sizes)
        found[number] = fixed.definition.cost(fixed)
    return found


def _labels(step: Function) -> dict[int, str]:
    """A name for each op: what it does, and the weights that it does it with."""
    names = {param.value: str(name) for param, name in zip(step.params, _names(step), strict=True)}
    weights = {
        param.value
        for param, role in zip(step.params, _roles(step), strict=True)
        if str(role) == "weight"
    }
    for op in step.body.ops:
        if op.name == "repeat":
            arguments = op.regions[0].args[int(op.attr("carried")) :]
            for argument, row in zip(arguments, repeat_tables(op), strict=True):
                if row[0] in weights:
                    weights.add(argument)
                    names[argument] = names[row[0]].rpartition(".")[2]
    return {number: _label(op, names, weights) for number, op in enumerate(numbered(step))}


def _label(op: Op, names: dict[Value, str], weights: set[Value]) -> str:
    used = [names[operand] for operand in op.operands if operand in weights]
    shared = [name for name in used if not name.startswith("rope_")]
    return f"{op.name} {'+'.join(shared)}".strip()


def _names(step: Function) -> tuple[object, ...]:
    found = step.attrs["names"]
    assert isinstance(found, tuple)
    return found


def _roles(step: Function) -> tuple[object, ...]:
    found = step.attrs["roles"]
    assert isinstance(found, tuple)
    return found
