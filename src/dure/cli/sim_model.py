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
    from dure.models.chip_answer import StepAnswer
    from dure.models.chip_devices import Devices
    from dure.models.chip_step import ChipStep
    from dure.models.host_answer import HostStep

Batch = Annotated[int | None, typer.Option(help="Sequences of a model's step.  [default: 1]")]
Context = Annotated[
    str | None,
    typer.Option(
        help="Positions of each sequence when the step is done; or one number for each, with "
        "commas between.  [default: 1024, prefill 2048]"
    ),
]
Phase = Annotated[
    str | None,
    typer.Option(
        help="decode: one new token a sequence; prefill: all of them; mixed: a decode while one "
        "more sequence is prefilled.  [default: decode]"
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Positions that a prefill makes of each sequence, the last of them; those before are "
        "in the cache.  [default: all]"
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="What a model's weights are stored in: --dtype's type, int8, fp8, int4 or mxfp4.  "
        "[default: --dtype]"
    ),
]
KV = Annotated[
    str | None,
    typer.Option("--kv", help="The same of its KV cache: --dtype's type, fp8 or int8."),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="What activations are quantized to where they meet weights of that type: int8 or fp8."
        "  [default: --dtype]"
    ),
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
NoPrefetch = Annotated[
    bool,
    typer.Option(
        "--no-prefetch", help="Load no weights of a model's step before their kernel begins."
    ),
]

#: The target that is the machine that dure runs on.
HOST = "cpu"
_CONTEXT = {"decode": 1024, "prefill": 2048, "mixed": 1024}
_HEADS = ("TARGET", "CHIPS", "STEP", "TOKENS/s", "BOUND", "ROOFLINE", "ENERGY", "CONFIDENCE")
_PARTS = ("OPERATOR", "TIMES", "EACH", "TOGETHER", "OF STEP", "BOUND", "KERNEL")


@dataclass(frozen=True)
class StepOptions:
    """The options of a model's step, as they were given."""

    batch: int | None
    context: str | None
    phase: str | None
    chunk: int | None = None
    weights: str | None = None
    kv: str | None = None
    activations: str | None = None
    chips: int | None = None
    tp: int | None = None
    ep: int | None = None
    no_prefetch: bool = False

    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        names = ("batch", "context", "phase", "chunk", "weights", "kv", "activations")
        names += ("chips", "tp", "ep")
        pairs = [(name, getattr(self, name)) for name in names]
        found = [f"--{name} {value}" for name, value in pairs if value is not None]
        return [*found, "--no-prefetch"] if self.no_prefetch else found

    def devices(self) -> Devices:
        """On how many devices the step runs."""
        from dure.models.chip_devices import Devices

        return Devices(self.chips, self.tp, self.ep)


def sim_step(
    step: ChipStep,
    target: str,
    settings: Sequence[str] | None,
    options: StepOptions,
    strict: bool,
    as_json: bool,
) -> None:
    """Compile a model's step for chips, prove its programs, and tell its time."""
    from dure.models.chip_devices import answer_on  # which imports the compiler

    devices, prefetch = options.devices(), not options.no_prefetch
    found: list[tuple[str, StepAnswer | HostStep | DureError]] = []
    names, on_host = without_host(target)
    for chip in targets_of(names, settings) if names else ():
        if not as_json:
            say(f"compiling for {chip.name}")
        try:
            result = answer_on(step, chip, devices, strict=strict, prefetch=prefetch)
            found.append((chip.name, result))
        except DureError as error:
            found.append((chip.name, error))
    if on_host:
        found.append((HOST, _on_host(step, options)))
    if not concluded(found, as_json):
        _show(step, found)


def _on_host(step: ChipStep, options: StepOptions) -> HostStep | DureError:
    """What the machine that dure runs on does with the step, measured."""
    from dure.models.host_answer import host_step
    from dure.targets.cpu.microbench import measure

    try:
        if options.devices().count_asked > 1:
            raise UsageError(
                f"--chips {options.devices().count_asked} with the target {HOST}",
                rule=f"{HOST} is the machine that dure runs on, and there is one",
                fix="leave out --chips, or the target",
            )
        say("measuring this machine, which takes a while")
        return host_step(step, measure())
    except DureError as error:
        return error


def without_host(target: str) -> tuple[str, bool]:
    """The targets but for the host, and whether it is among them."""
    names = [name.strip() for name in target.split(",")]
    return ",".join(name for name in names if name != HOST), HOST in names


def model_step(subject: str, dtype: str, options: StepOptions) -> ChipStep:
    """The step of a model, by its name or config.json."""
    from dure.library.operators_common import FLOATS
    from dure.models.batch import Batch, phase_of
    from dure.models.chip_step import chip_step
    from dure.models.shapes import any_config

    if dtype not in FLOATS:
        raise UsageError(
            f"a step in {argument(dtype, '--dtype')}",
            rule=f"the values between ops are of one of the types {', '.join(FLOATS)}",
            fix="--dtype bf16",
        )
    phase = phase_of(argument(options.phase or "decode", "--phase"))
    config = any_config(subject)
    default = str(min(_CONTEXT[phase], config.context))
    contexts = _contexts(argument(options.context or default, "--context"))
    several = contexts if len(contexts) > 1 else ()
    sequences = options.batch
    if sequences is None:
        sequences = len(contexts)
    given = {name: getattr(options, name) for name in ("weights", "kv", "activations")}
    types = {n: "" if g is None else argument(g, f"--{n}") for n, g in given.items()}
    batch = Batch(phase, sequences, max(contexts), options.chunk or 0, several)
    return chip_step(config, batch, dtype, subject, **types)


def _contexts(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in given.split(","))
    except ValueError:
        raise UsageError(
            f"--context {given}",
            rule="it is a number of positions, or several with commas between",
            fix="--context 1024",
        ) from None


# --- for people ----------------------------------------------------------------------------------


def _show(step: ChipStep, found: Sequence[tuple[str, StepAnswer | HostStep | DureError]]) -> None:
    batch = step.batch
    show(
        f"{step.name} {step.dtype}: {batch.text}; weights {step.weight_bytes / 1e9:.4g} GB"
        f"{_other(step.weights, step)}{_by(step)}, KV cache {step.kv_bytes / 1e9:.3g} GB"
        f"{_other(step.kv, step)}\n\n"
    )
    table([_HEADS, *(_row(name, result) for name, result in found)], right=(1, 2, 3, 5, 6))
    for name, result in found:
        if isinstance(result, DureError):
            show(f"\n{name}: {result}\n")
        elif len(found) == 1:
            _details(result)


def _other(dtype: str, step: ChipStep) -> str:
    """The type of what has another one than the step's values."""
    return f" in {dtype}" if dtype and dtype != step.dtype else ""


def _by(step: ChipStep) -> str:
    """The type of activations that meet weights, where it isn't that of the step's values."""
    other = step.activations not in ("", step.dtype)
    return f" by activations in {step.activations}" if other else ""


def _row(name: str, result: StepAnswer | HostStep | DureError) -> tuple[str, ...]:
    if isinstance(result, DureError):
        return (name, "-", "-", "-", "doesn't run: see below", "", "", "")
    joules = result.joules
    return (
        name,
        str(result.step.chips),
        duration(result.ps),
        f"{result.tokens_a_second:.4g}",
        result.bound,
        f"{result.fraction_of_roofline:.1%}",
        "-" if joules is None else f"{joules:.3g} J",
        result.confidence.status,
    )


def _details(result: StepAnswer | HostStep) -> None:
    show("\n")
    rows = [
        (
            part.name,
            str(part.count),
            duration(part.ps),
            duration(part.total_ps),
            f"{part.total_ps / result.ps:.1%}",
            part.bound,
            part.kernel,
        )
        for part in result.parts
    ]
    table([_PARTS, *rows], right=(1, 2, 3, 4))
    if result.micro_batches > 1:
        show(f"\nThe batch is taken in {result.micro_batches} equal parts, one after another.\n")
    show_confidence(result.confidence)
    for line in result.left_out:
        show(f"  left out, a defect of the compiler: {line}\n")
