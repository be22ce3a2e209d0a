"""How long a model's step takes on a chip: each launch compiled, proved and timed, and the sum.

A step is one program to its caller: it is launched once, and from one of its kernels to the next
stands a signal to all cores (``sync.latency``), behind which every kernel starts with an empty
pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dure.library.answer import Confidence, bound_of, confidence, roofline_seconds
from dure.library.build import Built, build
from dure.library.call import KernelCall
from dure.machine.chip import Chip
from dure.models.chip_step import ChipStep, StepCall
from dure.sim.cost import duration

#: What a file may call a chip's power, the best first.
_POWERS = ("typical", "chip", "card", "board", "design")


@dataclass(frozen=True)
class StepPart:
    """A launch of the step on the chip; ``ps`` is what each of its turns takes."""

    step: StepCall
    built: Built
    ps: int

    @property
    def total_ps(self) -> int:
        """All of its turns."""
        return self.step.count * self.ps


@dataclass(frozen=True)
class StepAnswer:
    """A step on a chip."""

    step: ChipStep
    chip: Chip
    parts: tuple[StepPart, ...]
    confidence: Confidence

    @property
    def ps(self) -> int:
        """Picoseconds of the step."""
        return duration(self.chip, self.chip.launch) + sum(p.total_ps for p in self.parts)

    @property
    def bound(self) -> str:
        """What bounds most of the time."""
        return bound_of((part.built, part.total_ps) for part in self.parts)

    @property
    def roofline_ps(self) -> float:
        """The least picoseconds that the published peaks allow."""
        step = self.step
        return roofline_seconds(self.chip, step.dtype, step.flops, step.bytes) * 1e12

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
        """Energy of the step at the power that the chip's file gives, typical before designed for;
        None where it gives none.
        """
        found = next((self.chip.power[n] for n in _POWERS if n in self.chip.power), None)
        return None if found is None else found.base * self.ps / 1e12

    def json(self) -> dict[str, object]:
        """Everything as one JSON object."""
        step, built = self.step, [part for part, _ in _programs(self.parts)]
        return {
            "target": self.chip.name,
            "model": step.name,
            "phase": step.batch.phase,
            "batch": step.batch.sequences,
            "context": step.batch.context,
            "dtype": step.dtype,
            "weights": step.weights or step.dtype,
            "kv": step.kv or step.dtype,
            "chips": 1,
            "ns": self.ps / 1000,
            "step_tok_s": self.tokens_a_second,
            "bound": self.bound,
            "flops": step.flops,
            "bytes": step.bytes,
            "fraction_of_roofline": self.fraction_of_roofline,
            **self.confidence.json(),
            "joules": self.joules,
            "compile_s": sum(b.compile_s for b in built),
            "sim_s": sum(b.sim_s for b in built),
            "weight_bytes": step.weight_bytes,
            "kv_bytes": step.kv_bytes,
            "operators": [_operator(part) for part in self.parts],
        }


def _operator(part: StepPart) -> dict[str, object]:
    timing = part.built.timing
    return {
        "name": part.step.part.name,
        "kernel": part.built.call.kernel.__name__,
        "count": part.step.count,
        "ns": part.ps / 1000,
        "total_ns": part.total_ps / 1000,
        "bound": timing.bound,
        "flops": part.step.part.flops,
        "weight_bytes": part.step.part.weight_bytes,
        "kv_bytes": part.step.part.kv_bytes,
        "tiles": dict(part.built.consts),
        "program_sha256": part.built.compiled.sha256,
    }


def step_answer(step: ChipStep, chip: Chip, *, strict: bool = False) -> StepAnswer:
    """What the chip does with the step.

    Raises :class:`~dure.errors.DureError` for a step that doesn't fit or that the chip can't run.
    """
    step.check_fits(chip)
    launch, signal = (duration(chip, law) for law in (chip.launch, chip.sync.latency))
    made: dict[object, Built] = {}
    parts: list[StepPart] = []
    for entry in step.calls:
        for call in entry.part.calls:
            if _key(call) not in made:
                made[_key(call)] = build(call, chip, strict=strict)
        built = min((made[_key(call)] for call in entry.part.calls), key=lambda b: b.timing.ps)
        parts.append(StepPart(entry, built, built.timing.ps - launch + signal))
    total = launch + sum(p.total_ps for p in parts)
    programs, turns = zip(*_programs(parts), strict=True)
    trust = confidence(programs, chip, turns, total)
    return StepAnswer(step, chip, tuple(parts), trust)


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
    return call.kernel, call.types, consts, tuple(call.tiles), lists, call.updates
