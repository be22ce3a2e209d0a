"""``dure sim MODEL``: how long a step of a language model takes on a chip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli.output import say, show, table
from dure.cli.results import concluded, duration, show_confidence
from dure.cli.subject import targets_of
from dure.cli.text import argument
from dure.errors import DureError, UsageError

if TYPE_CHECKING:
    from dure.models.batch import Batch as Sequences
    from dure.models.chip_answer import StepAnswer
    from dure.models.config import ModelConfig
    from dure.models.encoder_config import EncoderConfig

Batch = Annotated[int | None, typer.Option(help="Sequences of a model's step.  [default: 1]")]
Context = Annotated[
    int | None,
    typer.Option(
        help="Positions of each sequence when the step is done.  [default: 1024, prefill 2048]"
    ),
]
Phase = Annotated[
    str | None,
    typer.Option(help="decode: one new token a sequence; prefill: all of them.  [default: decode]"),
]

Chips = Annotated[
    int | None,
    typer.Option(
        help="Devices that make a model's step together, as the machine file counts them.  "
        "[default: the fewest that hold it]"
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option("--tp", help="Devices over which tensors are cut; all of --chips."),
]
ExpertParallel = Annotated[
    int | None,
    typer.Option(
        "--ep", help="Parts in which experts are dealt out.  [default: whatever is faster]"
    ),
]

_CONTEXT = {"decode": 1024, "prefill": 2048}
_HEADS = ("TARGET", "CHIPS", "STEP", "TOKENS/s", "BOUND", "ROOFLINE", "ENERGY", "CONFIDENCE")
_PARTS = ("OPERATOR", "TIMES", "EACH", "TOGETHER", "OF STEP", "BOUND", "KERNEL")


@dataclass(frozen=True)
class StepOptions:
    """The options of a model's step, as they were given."""

    batch: int | None
    context: int | None
    phase: str | None
    chips: int | None = None
    tp: int | None = None
    ep: int | None = None

    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        pairs = (
            ("batch", self.batch),
            ("context", self.context),
            ("phase", self.phase),
            ("chips", self.chips),
            ("tp", self.tp),
            ("ep", self.ep),
        )
        return [f"--{name} {value}" for name, value in pairs if value is not None]


def sim_model(
    subject: str,
    target: str,
    settings: Sequence[str] | None,
    dtype: str,
    options: StepOptions,
    strict: bool,
    as_json: bool,
) -> None:
    """Compile a model's step for chips, prove its programs, and tell its time."""
    from dure.models.chip_devices import Devices, answer_on  # which imports the compiler
    from dure.models.shapes import any_config

    config = any_config(subject)
    batch = _batch(config, dtype, options)
    devices = Devices(options.chips, options.tp, options.ep)
    found: list[tuple[str, StepAnswer | DureError]] = []
    for chip in targets_of(target, settings):
        if not as_json:
            say(f"compiling for {chip.name}")
        try:
            result = answer_on(config, batch, dtype, subject, chip, devices, strict=strict)
            found.append((chip.name, result))
        except DureError as error:
            found.append((chip.name, error))
    if not concluded(found, as_json):
        _show(subject, found)


def _batch(config: ModelConfig | EncoderConfig, dtype: str, options: StepOptions) -> Sequences:
    from dure.library.operators_common import FLOATS
    from dure.models.batch import Batch

    if dtype not in FLOATS:
        raise UsageError(
            f"a step in {argument(dtype, '--dtype')}",
            rule=f"weights, KV cache and values of a step are of one type: {', '.join(FLOATS)}",
            fix="--dtype bf16",
        )
    phase = options.phase or "decode"
    if phase not in ("decode", "prefill"):
        raise UsageError(
            f"the phase {argument(phase, '--phase')}",
            rule="a step decodes a token of each sequence, or prefills all of them",
            fix="--phase decode, or --phase prefill",
        )
    context = options.context
    if context is None:
        context = min(_CONTEXT[phase], config.context)
    sequences = 1 if options.batch is None else options.batch
    made = Batch(phase, sequences, context)
    made.check(config)
    return made


# --- for people ----------------------------------------------------------------------------------


def _show(subject: str, found: Sequence[tuple[str, StepAnswer | DureError]]) -> None:
    step = next(result.step for _, result in found if not isinstance(result, DureError))
    batch = step.batch
    show(
        f"{subject} {step.dtype}: {batch.phase} of {batch.sequences} x {batch.new} tokens at "
        f"{batch.context} positions; weights {step.weight_bytes / 1e9:.4g} GB, "
        f"KV cache {step.kv_bytes / 1e9:.3g} GB\n\n"
    )
    table([_HEADS, *(_row(name, result) for name, result in found)], right=(1, 2, 3, 5, 6))
    for name, result in found:
        if isinstance(result, DureError):
            show(f"\n{name}: {result}\n")
        elif len(found) == 1:
            _details(result)


def _row(name: str, result: StepAnswer | DureError) -> tuple[str, ...]:
    if isinstance(result, DureError):
        return (name, "-", "-", "-", "doesn't run: see below", "", "", "")
    joules = result.joules
    step = result.step
    dealt = f", experts in {step.shards.experts}" if step.shards.experts > 1 else ""
    return (
        name,
        f"{step.chips}{dealt}",
        duration(result.ps),
        f"{result.tokens_a_second:.4g}",
        result.bound,
        f"{result.fraction_of_roofline:.1%}",
        "-" if joules is None else f"{joules:.3g} J",
        result.confidence.status,
    )


def _details(result: StepAnswer) -> None:
    show("\n")
    rows = [
        (
            part.name,
            str(part.step.count),
            duration(part.ps),
            duration(part.total_ps),
            f"{part.total_ps / result.ps:.1%}",
            part.built.timing.bound,
            part.built.call.kernel.__name__,
        )
        for part in result.parts
    ]
    table([_PARTS, *rows], right=(1, 2, 3, 4))
    show_confidence(result.confidence)
