"""How long a model's step takes on a chip, or on several devices that make it together: each launch
compiled, proved and timed, and the sum.

A step is one program to its caller: it is launched once, and from one of its kernels to the next
stands a signal to all cores (``sync.latency``), behind which every kernel starts with an empty
pipeline.  A collective is several launches; of its ways the fastest is taken.  Devices signal one
another behind the data that they send, on the same way (:mod:`dure.library.collectives`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dure.library.answer import Confidence, bound_of, confidence, roofline_seconds
from dure.library.build import Built, build
from dure.library.call import KernelCall
from dure.library.chip_lowering_collectives import CollectiveCall
from dure.library.collectives import Stage
from dure.machine.chip import Chip
from dure.machine.group import group_of
from dure.models.chip_step import ChipStep, StepCall
from dure.sim.cost import duration

#: What a file may call a chip's power, the best first.
_POWERS = ("typical", "chip", "card", "board", "design")


@dataclass(frozen=True)
class StepPart:
    """A launch of the step on the chip; ``ps`` is what each of its turns takes, and ``stage`` which
    of a collective's launches it is.
    """

    step: StepCall
    built: Built
    ps: int
    stage: str = ""

    @property
    def name(self) -> str:
        """What it computes."""
        return f"{self.step.part.name} {self.stage}".rstrip()

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
        """The least picoseconds that the published peaks of all devices together allow."""
        step = self.step
        whole = roofline_seconds(self.chip, step.dtype, step.flops, step.bytes)
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
        step, built = self.step, [part for part, _ in _programs(self.parts)]
        return {
            "target": self.chip.name,
            "model": step.name,
            "phase": step.batch.phase,
            "batch": step.batch.sequences,
            "context": step.batch.context,
            "dtype": step.dtype,
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
            "compile_s": sum(b.compile_s for b in built),
            "sim_s": sum(b.sim_s for b in built),
            "weight_bytes": step.weight_bytes,
            "kv_bytes": step.kv_bytes,
            "device_weight_bytes": step.device_bytes[0],
            "device_kv_bytes": step.device_bytes[1],
            "operators": [_operator(part) for part in self.parts],
        }


def _operator(part: StepPart) -> dict[str, object]:
    timing = part.built.timing
    return {
        "name": part.name,
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


def step_answer(
    step: ChipStep,
    chip: Chip,
    *,
    strict: bool = False,
    made: dict[object, Built] | None = None,
) -> StepAnswer:
    """What the chip, or the step's devices together, do with the step.  ``made`` keeps programs of
    the chip from one step to another.

    Raises :class:`~dure.errors.DureError` for a step that doesn't fit or that the chip can't run.
    """
    step.check_fits(chip)
    work = _Launches(chip, strict, made if made is not None else {})
    parts = [part for entry in step.calls for part in work.parts(entry)]
    total = duration(chip, chip.launch) + sum(p.total_ps for p in parts)
    programs, turns = zip(*_programs(parts), strict=True)
    trust = confidence(programs, chip, turns, total)
    return StepAnswer(step, chip, tuple(parts), trust)


@dataclass(frozen=True)
class _Launches:
    """Builds the launches of a step, each program once."""

    chip: Chip
    strict: bool
    made: dict[object, Built]

    def parts(self, entry: StepCall) -> list[StepPart]:
        """An entry's launches, the fastest of the ways to it."""
        if isinstance(entry.part, CollectiveCall) and entry.part.collective is not None:
            ways = entry.part.collective.ways(group_of(self.chip, entry.part.devices))
        else:
            ways = tuple((Stage(call, ()),) for call in entry.part.calls)
        built = [[self.build(stage.call) for stage in way] for way in ways]
        best = min(built, key=lambda way: sum(map(self.ps, way)))
        stages = [f"{n + 1}/{len(best)}" if len(best) > 1 else "" for n in range(len(best))]
        return [
            StepPart(entry, b, self.ps(b), stage) for b, stage in zip(best, stages, strict=True)
        ]

    def build(self, call: KernelCall) -> Built:
        key = _key(call)
        if key not in self.made:
            self.made[key] = build(call, self.chip, strict=self.strict)
        return self.made[key]

    def ps(self, built: Built) -> int:
        """What a launch takes in a step."""
        launch, signal = (
            duration(self.chip, d) for d in (self.chip.launch, self.chip.sync.latency)
        )
        return built.timing.ps - launch + signal


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
