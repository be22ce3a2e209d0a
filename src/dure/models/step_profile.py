"""A model's step on a chip as an execution to look at: its program, what ran when, and the
operators.

Of a step with many instructions the timeline shows two turns of the most frequent layers, in the
middle of the step; operators, roofline and the curves over the whole step are of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from dure.errors import UsageError
from dure.ir.machine.phase import phases_of
from dure.ir.printer import print_function
from dure.library.answer import peak, roofline_seconds
from dure.library.profile import Turn, recorded
from dure.models.chip_answer import StepAnswer, StepPart
from dure.prof.analysis import occupancy
from dure.prof.condense import EXACT
from dure.prof.records import Counter, Operator, Profile, Program, Roofline, windowed
from dure.sim.timing import simulate

#: The most instructions that are recorded, over classes of equal cores.
MOST = 1_000_000
#: Turns of a layer that are shown of a long step.
_LAYERS = 2


def step_profile(answer: StepAnswer) -> Profile:
    """The program of a step as one execution.

    Raises :class:`UsageError` for more instructions than can be looked at.
    """
    step, chip, program = answer.step, answer.chip, answer.program
    timing = answer.timing
    if timing.instructions > MOST:
        raise UsageError(
            f"{step.name} {step.batch.phase} on {chip.name} executes {timing.instructions:,} "
            "instructions",
            rule=f"at most {MOST:,} are recorded",
            fix="give a smaller --batch or --context, or ask for its time alone with `dure sim`",
        )
    if not timing.spans:
        timing = simulate(program.function, chip, indices=program.indices, record=True)
    text = Program(step.name, print_function(program.function), _program_facts(answer))
    made, turns = recorded(program.function, chip, program.indices, timing, text)
    phases = list(phases_of(program.function.body))
    before = accumulate((int(phase.attr("kernels")) for phase in phases), initial=0)
    numbers = dict(zip(phases, before, strict=False))
    ran = tuple(
        shown for turn in turns for shown in _side_by_side(answer.parts, numbers[turn.phase], turn)
    )
    made = replace(
        made,
        title=_title(answer),
        bound=answer.bound,
        roofline=_roofline(answer),
        facts=_facts(answer),
        operators=tuple(_operator(part, answer) for part in answer.parts),
        turns=ran,
        overview=tuple(_overview(made, chip.home)),
        whole=answer.ps,
    )
    window = _layers(answer, ran) if len(made.instructions) > EXACT else None
    shown = made if window is None else windowed(made, *window)
    return replace(shown, notes=tuple(_notes(shown, answer)))


def _side_by_side(
    parts: Sequence[StepPart], first: int, turn: Turn
) -> Iterator[tuple[int, int, int]]:
    """The operators of a phase, which run side by side, each with its part of a turn's time."""
    run = range(first, first + int(turn.phase.attr("kernels")))
    start, rest = turn.start, sum(parts[n].alone_ps for n in run)
    for number in run:
        own = parts[number].alone_ps
        end = start + (turn.end - start) * own // max(rest, 1)
        yield number, start, end
        start, rest = end, rest - own


def _title(answer: StepAnswer) -> str:
    step, batch = answer.step, answer.step.batch
    return f"{step.name} {step.dtype}: {batch.text}"


def _operator(part: StepPart, answer: StepAnswer) -> Operator:
    needed = part.weight_bytes + part.kv_bytes
    dtype = answer.step.multiplied(answer.chip)
    least = roofline_seconds(answer.chip, dtype, part.flops, needed) * 1e12
    return Operator(
        name=part.name,
        kernel=part.built.call.kernel.__name__,
        count=part.count,
        ps=part.ps,
        alone=part.alone_ps,
        bound=part.built.timing.bound,
        flops=part.flops,
        bytes=needed,
        moved=part.built.timing.bytes,
        fraction=least / part.ps if part.ps else 0.0,
    )


def _layers(answer: StepAnswer, turns: Sequence[tuple[int, int, int]]) -> tuple[int, int] | None:
    """From when to when some turns of the most frequent layers ran, in the middle of them."""
    most = max(part.step.count for part in answer.parts)
    first = next(n for n, part in enumerate(answer.parts) if part.step.count == most)
    starts = [place for place, (operator, _, _) in enumerate(turns) if operator == first]
    if len(starts) <= _LAYERS:
        return None
    begin = starts[(len(starts) - _LAYERS) // 2]
    after = [place for place in starts if place > begin][_LAYERS - 1 :]
    end = turns[after[0] - 1][2] if after else turns[-1][2]
    return turns[begin][1], end


def _overview(made: Profile, home: str) -> Iterator[Counter]:
    """Curves over the whole step: what flows from the far memory, and what scratchpads hold."""
    yield from (c for c in made.counters if c.name == f"memories.{home}")
    for memory in made.memories:
        points = occupancy(b for b in made.buffers if b.memory == memory.name)
        name = f"{memory.name} in use"
        yield Counter(name, "B", memory.capacity, tuple((at, float(v)) for at, v in points))


def _roofline(answer: StepAnswer) -> Roofline:
    """A device's roofline, and its part of the work."""
    chip, step = answer.chip, answer.step
    home, published = chip.memories[chip.home].bandwidth, chip.peaks.bandwidth.base
    return Roofline(
        peaks={name: flops.base for name, flops in chip.peaks.compute.items()},
        peak=peak(chip, step.dtype),
        memory=chip.home,
        bandwidth=published,
        attainable=published if home is None else chip.bytes_a_second(home),
        flops=step.flops // step.chips,
        bytes=step.bytes // step.chips,
        moved=answer.timing.bytes * answer.micro_batches,
        seconds=answer.ps / 1e12,
    )


def _facts(answer: StepAnswer) -> dict[str, str]:
    """The lines under a chip's headline."""
    step, chip, trust = answer.step, answer.chip, answer.confidence
    held = sum(step.device_bytes) / chip.memories[chip.home].size.base
    found = {
        "tokens a second": f"{answer.tokens_a_second:,.4g}",
        "weights": f"{step.weight_bytes / 1e9:.4g} GB",
        "KV cache": f"{step.kv_bytes / 1e9:.3g} GB",
        f"of {chip.home}": f"{held:.1%}",
        "confidence": trust.status,
    }
    if trust.guesses:
        found["guesses"] = ", ".join(trust.guesses)
    if trust.overridden:
        found["set by you"] = ", ".join(trust.overridden)
    if answer.joules is not None:
        found["energy"] = f"{answer.joules:.3g} J"
    return found


def _program_facts(answer: StepAnswer) -> dict[str, str]:
    timing = answer.timing
    return {
        "phases": str(len(answer.parts)),
        "instructions": f"{timing.instructions:,}",
        "events": f"{timing.events:,}",
        "classes of cores": str(len(timing.classes)),
    }


def _notes(shown: Profile, answer: StepAnswer) -> Iterator[str]:
    if answer.step.chips > 1:
        yield (
            f"{answer.step.chips} devices make the step together; operations, bytes and rooflines "
            "are one device's, but for weights and KV cache."
        )
    if answer.micro_batches > 1:
        yield (
            f"The batch is taken in {answer.micro_batches} equal parts, one after another; the "
            "program and its timeline are one part's."
        )
    if shown.window is not None:
        yield (
            f"Timeline, queues, scratchpad and critical path are of {_LAYERS} layers in the middle "
            "of the step; the headline, the roofline and the operators are of all of it."
        )
    if len(shown.classes) > 1:
        yield "Cores that do the same are one class; the scratchpad is that of the first class."
