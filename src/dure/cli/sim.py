"""``dure sim``: how long an operator or a kernel takes on a chip, and what limits it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from dure.cli import options
from dure.cli.artefact import is_artefact, stored
from dure.cli.chip_options import Set
from dure.cli.output import say, show, table
from dure.cli.results import concluded, duration, quantity, show_confidence
from dure.cli.sim_model import (
    HOST,
    KV,
    Activations,
    Batch,
    Chips,
    Chunk,
    Context,
    ExpertParallel,
    NoPrefetch,
    Phase,
    StepOptions,
    TensorParallel,
    Weights,
    model_step,
    sim_step,
    without_host,
)
from dure.cli.subject import (
    Algorithm,
    Arg,
    Const,
    Dims,
    Dtype,
    Strict,
    Subject,
    Targets,
    targets_of,
    work_of,
)
from dure.cli.text import argument
from dure.errors import DureError, UsageError

if TYPE_CHECKING:
    from dure.library.answer import Answer
    from dure.library.build import Built
    from dure.library.work import Work
    from dure.machine.chip import Chip
    from dure.models.chip_step import ChipStep

_HEADS = ("TARGET", "TIME", "CYCLES", "BOUND", "FLOP/s", "B/s", "ROOFLINE", "CONFIDENCE")
_CONVERSIONS = 8


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(
        "sim",
        epilog="Examples: dure sim gemm 4096x4096x4096 --target all; "
        "dure sim llama-3.1-8b --target rngd --batch 8",
    )(sim)


def sim(
    subject: Subject,
    dims: Dims = None,
    target: Targets = "all",
    dtype: Dtype = "bf16",
    algorithm: Algorithm = "dure",
    arg: Arg = None,
    const: Const = None,
    batch: Batch = None,
    context: Context = None,
    phase: Phase = None,
    chunk: Chunk = None,
    weights: Weights = None,
    kv: KV = None,
    activations: Activations = None,
    chips: Chips = None,
    tp: TensorParallel = None,
    ep: ExpertParallel = None,
    no_prefetch: NoPrefetch = False,
    settings: Set = None,
    strict: Strict = False,
    as_json: options.Json = False,
) -> None:
    """Compile an operator, a kernel or a model's step for a chip, prove it, and tell its time.

    The target cpu is the machine that dure runs on, whose rates are measured first.
    """
    from dure.library.work import Work

    types = weights, kv, activations
    step = StepOptions(batch, context, phase, chunk, *types, chips, tp, ep, no_prefetch)
    if is_collective(subject):
        wrong = [given for given in step.given() if not given.startswith("--chips")]
        refuse(subject, {**dict.fromkeys(wrong, wrong), "--arg": arg, "--const": const})
        together = [
            (chip.name, _together(subject, dims, dtype, chip, chips, strict))
            for chip in targets_of(target, settings)
        ]
        if not concluded(together, as_json):
            _show(f"{subject} {dims} {dtype} over {chips or 2} devices", together)
        return
    work = asked(subject, dims, dtype, algorithm, arg, const, step)
    if not isinstance(work, Work):
        sim_step(work, target, settings, step, strict, as_json)
        return
    names, on_host = without_host(target)
    machines = targets_of(names, settings) if names else []
    found = [(chip.name, _answer(work, chip, strict)) for chip in machines]
    if on_host:
        found.append((HOST, _host(work)))
    if not concluded(found, as_json):
        _show(f"{work.name} {work.dims} {work.dtype}", found)


def asked(
    subject: str,
    dims: str | None,
    dtype: str,
    algorithm: str,
    arg: Sequence[str] | None,
    const: Sequence[str] | None,
    step: StepOptions,
) -> Work | ChipStep:
    """The work or the model's step that the arguments of a command name."""
    own = {"dims": dims, "--arg": arg, "--const": const}
    batch = {given: given for given in step.given()}
    if is_artefact(subject):
        return stored(subject, own | batch, dtype)
    if is_model(subject):
        refuse(subject, own)
        return model_step(subject, dtype, step)
    refuse(subject, batch)
    _known(subject, dims)
    return work_of(subject, dims, dtype, algorithm, arg, const)


def is_model(subject: str) -> bool:
    """Whether a subject is a model: its name, or a config.json."""
    from dure.models.shapes import names  # which reads no model

    return subject in names() or subject.endswith(".json")


def is_collective(subject: str) -> bool:
    """Whether a subject is what several devices do together."""
    from dure.library.collectives import KINDS

    return subject in KINDS


def _together(
    subject: str, dims: str | None, dtype: str, chip: Chip, chips: int | None, strict: bool
) -> Answer | DureError:
    from dure.library.collective_answer import collective_answer

    try:
        return collective_answer(
            subject, dims or "", dtype, chip, 2 if chips is None else chips, strict=strict
        )
    except DureError as error:
        return error


def _known(subject: str, dims: str | None) -> None:
    """Name the models that come close to a subject that is nothing else."""
    from dure.library.operators import forms
    from dure.library.work import is_kernel
    from dure.models.shapes import names

    near = difflib.get_close_matches(argument(subject, "the subject").lower(), names(), n=3)
    if near and dims is None and subject not in forms() and not is_kernel(subject):
        raise UsageError(
            f"no model is called '{subject[:80]}'",
            rule="a subject is an operator, FILE.py:KERNEL, or a model: its name or a config.json",
            fix=f"one of {', '.join(near)}",
        )


def refuse(subject: str, given: Mapping[str, object]) -> None:
    """Refuse what doesn't go with the subject."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"{argument(subject, 'the subject')} with {name}",
                rule="a model takes --batch, --context, --phase, --chunk, --weights, --kv, --chips,"
                " --tp, --ep and --no-prefetch; an operator its dims; a collective --chips too; a "
                "kernel of a file --arg and --const",
                fix=f"leave out {name}",
            )


def _host(work: Work) -> Answer | DureError:
    from dure.library.answer_host import host_answer
    from dure.targets.cpu.microbench import measure

    say("measuring the rates of this machine, which takes a while")
    try:
        return host_answer(work, measure())
    except DureError as error:
        return error


def _answer(work: Work, chip: Chip, strict: bool) -> Answer | DureError:
    from dure.library.answer import answer

    try:
        return answer(work, chip, strict=strict)
    except DureError as error:
        return error


# --- for people ----------------------------------------------------------------------------------


def _show(title: str, found: Sequence[tuple[str, Answer | DureError]]) -> None:
    show(f"{title}\n\n")
    table([_HEADS, *(_row(name, result) for name, result in found)], right=(1, 2, 4, 5, 6))
    show("\n")
    for name, result in found:
        if isinstance(result, DureError):
            show(f"{name}: {result}\n")
        else:
            _details(result)


def _row(name: str, result: Answer | DureError) -> tuple[str, ...]:
    if isinstance(result, DureError):
        return (name, "-", "-", "doesn't run: see below", "", "", "", "")
    seconds = result.ps / 1e12
    return (
        name,
        duration(result.ps),
        str(result.cycles),
        result.bound,
        quantity(result.flops / seconds),
        quantity(result.work.bytes / seconds),
        f"{result.fraction_of_roofline:.1%}",
        result.confidence.status,
    )


def _details(result: Answer) -> None:
    for part in result.parts:
        name = part.call.kernel.__name__
        time = f", {duration(part.timing.ps)}" if len(result.parts) > 1 else ""
        show(f"{result.chip.name}: {name}{time}: {_how(part)}\n")
        shown = part.compiled.conversions
        for c in shown[:_CONVERSIONS]:
            place = next((line.strip() for line in c.where.splitlines()), "")
            show(
                f"  converts {c.what}: {c.found} -> {c.becomes}{f' at {place}' if place else ''}\n"
            )
        if len(shown) > _CONVERSIONS:
            show(f"  and {len(shown) - _CONVERSIONS} conversions more\n")
    show_confidence(result.confidence)


def _how(part: Built) -> str:
    from dure.library.answer import split_of

    tiles = " ".join(f"{name}={size}" for name, size in part.consts.items()) or "no open tile sizes"
    cores = "x".join(map(str, split_of(part))) or "1"
    return f"{tiles}; cores {cores}; {part.compiled.options.stages} slots a ring"
