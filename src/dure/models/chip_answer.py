"""How long a model's step takes on a chip, or on several devices that make it together: its kernels
chosen, and the program that they are together proved and timed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice

from dure.compiler.chip.pipeline import Options
from dure.errors import DureError, KernelError, UnprovedError
from dure.ir.core import Function, Value
from dure.ir.machine.phase import phases_of
from dure.ir.verifier import verify
from dure.library.answer import Confidence, bound_of, confidence, roofline_seconds
from dure.library.build import Built, build, check_proved
from dure.library.call import KernelCall
from dure.library.chip_lowering import Launch
from dure.library.chip_tensors import Operand
from dure.machine.chip import Chip
from dure.models.chip_layouts import standing, standing_values
from dure.models.chip_program import Chosen, StepProgram, options_for, step_program, streams
from dure.models.chip_step import ChipStep, StepCall
from dure.models.near import Near, near_values
from dure.sim.cost import duration
from dure.sim.sanitizer import Verdict, sanitize
from dure.sim.timing import Timing, simulate

#: What a file may call a chip's power, the best first.
_POWERS = ("typical", "chip", "card", "board", "design")


@dataclass(frozen=True)
class StepPart:
    """A launch of the step on the chip; ``total_ps`` is what the step takes longer for it: from
    the end of the kernel before to its own, all turns together.  ``alone_ps`` is what a turn takes
    by itself, and ``name`` what it computes.
    """

    step: StepCall
    name: str
    built: Built
    total_ps: int
    alone_ps: int
    #: How often its part of the batch is taken.
    micro_batches: int = 1
    #: The part that it has in the arithmetic of the launches that compute something together.
    share: float = 1.0

    @property
    def flops(self) -> int:
        """Operations of a turn, on a device."""
        return round(self.share * self.step.part.flops)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a turn multiplies, on a device."""
        return round(self.share * self.step.part.weight_bytes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a turn reads or writes, on a device."""
        return round(self.share * self.step.part.kv_bytes)

    @property
    def ps(self) -> int:
        """Picoseconds of a turn, in the mean."""
        return self.total_ps // self.count

    @property
    def count(self) -> int:
        """How often it runs."""
        return self.step.count * self.micro_batches

    @property
    def bound(self) -> str:
        """What bounds it by itself."""
        return self.built.timing.bound

    @property
    def kernel(self) -> str:
        """Its kernel."""
        return self.built.call.kernel.__name__


class StepResult(ABC):
    """What is said of a step's time, wherever it ran."""

    step: ChipStep
    chip: Chip
    confidence: Confidence
    compile_s: float
    sim_s: float
    #: Other ways to parts of the step whose programs aren't proved.
    left_out: tuple[str, ...]
    #: Equal parts in which the batch is taken, one after another.
    micro_batches: int = 1

    @property
    @abstractmethod
    def ps(self) -> int:
        """Picoseconds of the step."""

    @property
    @abstractmethod
    def bound(self) -> str:
        """What bounds most of the time."""

    @abstractmethod
    def operators(self) -> list[dict[str, object]]:
        """Its parts for JSON."""

    @property
    def roofline_ps(self) -> float:
        """The least picoseconds that the published peaks of all devices together allow."""
        step = self.step
        whole = roofline_seconds(self.chip, step.multiplied(self.chip), step.flops, step.bytes)
        return whole / step.chips * 1e12

    @property
    def fraction_of_roofline(self) -> float:
        """That, as a part of the time."""
        return self.roofline_ps / self.ps

    @property
    def tokens_a_second(self) -> float:
        """Tokens that the step takes in, a second."""
        return self.step.batch.tokens / (self.ps / 1e12)

    @property
    def joules(self) -> float | None:
        """Energy of the step at the power that the chip's file gives, typical before designed for,
        of all devices; None where it gives none.
        """
        found = next((self.chip.power[n] for n in _POWERS if n in self.chip.power), None)
        return None if found is None else found.base * self.step.chips * self.ps / 1e12

    def json(self) -> dict[str, object]:
        """Everything as one JSON object."""
        step = self.step
        return {
            "target": self.chip.name,
            "model": step.name,
            "phase": step.batch.phase,
            "batch": step.batch.sequences,
            "context": step.batch.context,
            "tokens": step.batch.tokens,
            "dtype": step.dtype,
            "weights": step.weights or step.dtype,
            "kv": step.kv or step.dtype,
            "activations": step.activations or step.dtype,
            "chips": step.chips,
            "tp": step.chips,
            "ep": step.shards.experts,
            "ns": self.ps / 1000,
            "step_tok_s": self.tokens_a_second,
            "bound": self.bound,
            "flops": step.flops,
            "bytes": step.bytes,
            "fraction_of_roofline": self.fraction_of_roofline,
            **self.confidence.json(),
            "joules": self.joules,
            "compile_s": self.compile_s,
            "sim_s": self.sim_s,
            "weight_bytes": step.weight_bytes,
            "kv_bytes": step.kv_bytes,
            "device_weight_bytes": step.device_bytes[0],
            "device_kv_bytes": step.device_bytes[1],
            "micro_batches": self.micro_batches,
            "left_out": list(self.left_out),
            "operators": self.operators(),
        }


@dataclass(frozen=True)
class StepAnswer(StepResult):
    """A step on a chip.  Of a step that is taken in ``micro_batches`` equal parts, program, verdict
    and timing are one part's.
    """

    step: ChipStep
    chip: Chip
    parts: tuple[StepPart, ...]
    program: StepProgram
    verdict: Verdict
    timing: Timing
    confidence: Confidence
    compile_s: float
    sim_s: float
    #: Other ways to parts of the step whose programs aren't proved.
    left_out: tuple[str, ...] = ()
    micro_batches: int = 1

    @property
    def ps(self) -> int:
        """Picoseconds of the step."""
        return self.timing.ps * self.micro_batches

    @property
    def bound(self) -> str:
        """What bounds most of the time."""
        return bound_of((part.built, part.total_ps) for part in self.parts)

    def operators(self) -> list[dict[str, object]]:
        """Its parts for JSON."""
        return [_operator(part) for part in self.parts]

    def of_all(self, step: ChipStep, count: int) -> StepAnswer:
        """The answer of a step of which this is one of so many equal parts."""
        if count == 1:
            return self
        parts = tuple(
            replace(part, total_ps=part.total_ps * count, micro_batches=count)
            for part in self.parts
        )
        return replace(self, step=step, parts=parts, micro_batches=count)


def _operator(part: StepPart) -> dict[str, object]:
    timing = part.built.timing
    return {
        "name": part.name,
        "kernel": part.built.call.kernel.__name__,
        "count": part.count,
        "ns": part.ps / 1000,
        "total_ns": part.total_ps / 1000,
        "alone_ns": part.alone_ps / 1000,
        "bound": timing.bound,
        "flops": part.flops,
        "weight_bytes": part.weight_bytes,
        "kv_bytes": part.kv_bytes,
        "tiles": dict(part.built.consts),
        "program_sha256": part.built.compiled.sha256,
    }


def step_answer(
    step: ChipStep,
    chip: Chip,
    *,
    strict: bool = False,
    prefetch: bool = True,
    record: bool = False,
    made: dict[object, Built] | None = None,
) -> StepAnswer:
    """What the chip, or the step's devices together, do with the step; without ``prefetch`` no
    weights are loaded ahead.  ``made`` keeps kernels of the chip from one step to another.

    Raises :class:`~dure.errors.DureError` for a step that doesn't fit or that the chip can't run.
    """
    return plan_step(step, chip, strict=strict, prefetch=prefetch, made=made).answer(record)


@dataclass(frozen=True)
class StepPlan:
    """A step whose kernels are chosen: what is left is to make one program of them."""

    step: ChipStep
    chip: Chip
    chosen: tuple[Chosen, ...]
    prefetch: bool
    left_out: tuple[str, ...]
    #: Seconds that choosing took.
    seconds: float

    @property
    def alone_ps(self) -> int:
        """Picoseconds of the launches, one after another and each by itself."""
        launch = duration(self.chip, self.chip.launch)
        return sum((c.built.timing.ps - launch) * c.step.count for c in self.chosen)

    def answer(self, record: bool = False) -> StepAnswer:
        """The whole program, proved and timed.

        Raises :class:`UnprovedError` for one that isn't proved.
        """
        started = time.perf_counter() - self.seconds
        step, chip = self.step, self.chip
        program = step_program(step, chip, self.chosen, prefetch=self.prefetch)
        verify(program.function)
        verdict = sanitize(program.function, chip)
        check_proved(verdict, f"{step.name} for {chip.name}", "model")
        compile_s = time.perf_counter() - started
        started = time.perf_counter()
        timing = simulate(program.function, chip, indices=program.indices, record=record)
        sim_s = time.perf_counter() - started
        parts = tuple(_parts(self.chosen, program.function, timing, chip))
        programs, turns = zip(*_programs(parts), strict=True)
        trust = confidence(programs, chip, turns, timing.ps)
        facts = parts, program, verdict, timing, trust, compile_s, sim_s
        return StepAnswer(step, chip, *facts, self.left_out)


def plan_step(
    step: ChipStep,
    chip: Chip,
    *,
    strict: bool = False,
    prefetch: bool = True,
    made: dict[object, Built] | None = None,
) -> StepPlan:
    """The kernels of a step; arguments and errors are :func:`step_answer`'s."""
    step.check_fits(chip)
    started = time.perf_counter()
    step = step.cut(chip)
    # Where weights bound the step, the values between its launches are small beside them.
    near = Near() if streams(step, chip) else near_values(step, chip)
    options = options_for(step, chip, strict=strict, prefetch=prefetch)
    work = _Launches(
        chip,
        replace(options, reserved=near.reserved),
        {} if made is None else made,
        standing_values(step, chip),
        near,
    )
    chosen = tuple(_needed([launch for entry in step.calls for launch in work.chosen(entry)]))
    left_out = tuple(dict.fromkeys(work.left_out))
    return StepPlan(step, chip, chosen, prefetch, left_out, time.perf_counter() - started)


@dataclass(frozen=True)
class _Launches:
    """Builds the launches of a step, each program once."""

    chip: Chip
    options: Options
    made: dict[object, Built]
    #: Values that lie transposed.
    standing: frozenset[Value]
    near: Near
    #: What wasn't proved.
    left_out: list[str] = field(default_factory=list[str])

    def chosen(self, entry: StepCall) -> list[Chosen]:
        """The launches of an entry, by the fastest of the ways to it that can be built, or else of
        the others.

        Raises the first way's error where none can.
        """
        found: list[list[tuple[Built, tuple[Operand | None, ...]]]] = []
        errors: list[DureError] = []
        ways, others = entry.part.ways(self.chip), entry.part.others(self.chip)
        if self.options.budget is not None:
            # Launches that load no weights give those of the next the time to arrive.
            ways, others = others or ways, ()
        for number, way in enumerate((*ways, *others)):
            if found and number >= len(ways):
                break
            try:
                made = self.built(way)
            except DureError as error:
                errors.append(error)
                if isinstance(error, UnprovedError):
                    self.left_out.append(f"{entry.part.name}: {error.what}")
                continue
            if made is not None:
                found.append(made)
        if errors and not found:
            raise errors[0]
        if not found:
            raise KernelError(
                f"'{entry.part.name}' of a step for {self.chip.name}",
                rule="one kernel for it takes all of its values as they lie between kernels",
                fix="this is a defect of the compiler: please report the model and its sizes",
            )
        launched = duration(self.chip, self.chip.launch)
        best = min(found, key=lambda way: sum(made.timing.ps - launched for made, _ in way))
        stages = [f"{n + 1}/{len(best)}" if len(best) > 1 else "" for n in range(len(best))]
        return [
            Chosen(entry, operands, built, stage)
            for (built, operands), stage in zip(best, stages, strict=True)
        ]

    def built(self, way: Sequence[Launch]) -> list[tuple[Built, tuple[Operand | None, ...]]] | None:
        """The programs of a way's launches; None where one can't have its values as they lie."""
        found: list[tuple[Built, tuple[Operand | None, ...]]] = []
        for call, operands in way:
            names = standing(call, operands, self.standing, self.chip)
            if names is None:
                return None
            arguments = self.near.arguments(call, operands)
            options = replace(self.options, standing=names, near=arguments)
            key = _key(call), options
            if key not in self.made:
                self.made[key] = build(call, self.chip, base=options)
            found.append((self.made[key], operands))
        return found


def _needed(chosen: Sequence[Chosen]) -> list[Chosen]:
    """The launches without those whose results none of the ways that were chosen reads."""
    read = {
        value
        for entry in chosen
        if entry.step.part.spare is None
        for operand in entry.operands
        if operand is not None
        for value in operand.stored.values
    }
    return [e for e in chosen if e.step.part.spare is None or e.step.part.spare in read]


def _parts(
    chosen: Sequence[Chosen], function: Function, timing: Timing, chip: Chip
) -> Iterator[StepPart]:
    """Each launch with its time in the program, whose phases are the launches in their order, some
    of them together.
    """
    launch = duration(chip, chip.launch)
    entries = zip(chosen, _shares(chosen), strict=True)
    for phase in phases_of(function.body):
        # Kernels of one phase run side by side: each has its part of the time.
        run = list(islice(entries, int(phase.attr("kernels"))))
        alone = [entry.built.timing.ps - launch for entry, _ in run]
        left, rest = timing.phases.get(phase, 0), sum(alone)
        for (entry, share), own in zip(run, alone, strict=True):
            took = left * own // max(rest, 1)
            left, rest = left - took, rest - own
            yield StepPart(entry.step, entry.name, entry.built, took, own, share=share)


def _shares(chosen: Sequence[Chosen]) -> Iterator[float]:
    """The part of each launch in the arithmetic of those that compute something together."""
    for _, together in groupby(chosen, key=lambda entry: id(entry.step)):
        work = [entry.built.timing.flops for entry in together]
        whole = sum(work)
        yield from (own / whole if whole else 1 / len(work) for own in work)


def _programs(parts: Sequence[StepPart]) -> list[tuple[Built, int]]:
    """Each program once, with how often it runs."""
    found: dict[int, tuple[Built, int]] = {}
    for part in parts:
        _, turns = found.get(id(part.built), (part.built, 0))
        found[id(part.built)] = part.built, turns + part.step.count
    return list(found.values())


def _key(call: KernelCall) -> object:
    """What makes two launches the same program."""
    consts = frozenset(call.consts.items())
    lists = tuple((place, values.tobytes()) for place, values in sorted(call.indices.items()))
    return call.kernel, call.types, consts, tuple(call.tiles), lists, call.updates, call.devices
