"""A model's step on a chip as an execution to look at: each of its launches once, in order.

Layers that are alike are shown once; the operators say how often each runs, and the roofline and
the headline are the whole step's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dure.errors import UsageError
from dure.library.answer import peak, roofline_seconds
from dure.library.profile import MOST, launch_profile
from dure.models.chip_answer import StepAnswer, StepPart
from dure.prof.records import Operator, Profile, Roofline, advanced, joined


def step_profile(answer: StepAnswer) -> Profile:
    """The launches of a step as one execution.

    Raises :class:`UsageError` for more instructions than can be looked at.
    """
    step, chip = answer.step, answer.chip
    count = sum(part.built.timing.instructions for part in answer.parts)
    if count > MOST:
        raise UsageError(
            f"{step.name} {step.batch.phase} on {chip.name} executes {count:,} instructions, "
            "with layers that are alike counted once",
            rule=f"at most {MOST:,} are recorded",
            fix="give a smaller --batch or --context, or ask for its time alone with `dure sim`",
        )
    made = joined([_launched(part, number) for number, part in enumerate(answer.parts)])
    batch = step.batch
    return replace(
        made,
        title=f"{step.name} {step.dtype}: {batch.phase} of {batch.sequences} x {batch.new} tokens "
        f"at {batch.context} positions",
        bound=answer.bound,
        roofline=_roofline(answer),
        facts=_facts(answer),
        notes=(*_notes(answer), *made.notes),
        operators=tuple(_operator(part, answer) for part in answer.parts),
        whole=answer.ps,
    )


def _launched(part: StepPart, number: int) -> Profile:
    """A launch as it runs in the step: but for the first, a signal stands where its launch was."""
    made = launch_profile(part.built)
    programs = tuple(replace(p, name=part.step.part.name) for p in made.programs)
    made = replace(made, programs=programs)
    return made if number == 0 else advanced(made, part.built.timing.ps - part.ps)


def _operator(part: StepPart, answer: StepAnswer) -> Operator:
    call, chip = part.step.part, answer.chip
    needed = call.weight_bytes + call.kv_bytes
    least = roofline_seconds(chip, answer.step.dtype, call.flops, needed) * 1e12
    return Operator(
        name=call.name,
        kernel=part.built.call.kernel.__name__,
        count=part.step.count,
        ps=part.ps,
        bound=part.built.timing.bound,
        flops=call.flops,
        bytes=needed,
        moved=part.built.timing.bytes,
        fraction=least / part.ps if part.ps else 0.0,
    )


def _roofline(answer: StepAnswer) -> Roofline:
    chip, step = answer.chip, answer.step
    home, published = chip.memories[chip.home].bandwidth, chip.peaks.bandwidth.base
    return Roofline(
        peaks={name: flops.base for name, flops in chip.peaks.compute.items()},
        peak=peak(chip, step.dtype),
        memory=chip.home,
        bandwidth=published,
        attainable=published if home is None else chip.bytes_a_second(home),
        flops=step.flops,
        bytes=step.bytes,
        moved=sum(part.step.count * part.built.timing.bytes for part in answer.parts),
        seconds=answer.ps / 1e12,
    )


def _facts(answer: StepAnswer) -> dict[str, str]:
    """The lines under a chip's headline."""
    step, chip, trust = answer.step, answer.chip, answer.confidence
    size = chip.memories[chip.home].size.base
    held = step.weight_bytes + step.kv_bytes
    found = {
        "tokens a second": f"{answer.tokens_a_second:,.4g}",
        "weights": f"{step.weight_bytes / 1e9:.4g} GB",
        "KV cache": f"{step.kv_bytes / 1e9:.3g} GB",
        f"of {chip.home}": f"{held / size:.1%}",
        "confidence": trust.status,
    }
    if trust.guesses:
        found["guesses"] = ", ".join(trust.guesses)
    if trust.overridden:
        found["set by you"] = ", ".join(trust.overridden)
    if answer.joules is not None:
        found["energy"] = f"{answer.joules:.3g} J"
    return found


def _notes(answer: StepAnswer) -> Iterator[str]:
    most = max(part.step.count for part in answer.parts)
    if most > 1:
        yield (
            f"Layers that are alike are shown once (the most of them {most} times in the step): "
            "timeline, queues and critical path are of each launch once, the headline, the "
            "roofline and the operators are of the whole step."
        )
