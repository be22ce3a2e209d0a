"""``dure report``: one page that shows what a chip does with a kernel or a model's step, and where
the time goes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.chip_options import Set
from dure.cli.output import print_json, say, show
from dure.cli.results import duration
from dure.cli.sim import asked
from dure.cli.sim_model import (
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
)
from dure.cli.subject import (
    Algorithm,
    Arg,
    Const,
    Dims,
    Dtype,
    Strict,
    Subject,
    targets_of,
)
from dure.errors import DureError, UsageError

if TYPE_CHECKING:
    from dure.library.work import Work
    from dure.machine.chip import Chip
    from dure.models.chip_step import ChipStep
    from dure.prof.records import Profile

Targets = Annotated[
    str,
    typer.Option(
        "--target",
        help="Names from `dure targets` or machine files NAME.toml, with commas between; or all.",
    ),
]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", help="The file to write: .html.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    epilog = (
        "Examples: dure report gemm 4096x4096x4096 --target rngd,tpu-v6e -o report.html; "
        "dure report llama-3.1-8b --target rngd,atom-max -o report.html"
    )
    app.command("report", epilog=epilog)(report)


def report(
    subject: Subject,
    target: Targets,
    output: Output,
    dims: Dims = None,
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
    """Write a page with timeline, roofline, scratchpad and bottlenecks; it needs no network."""
    from dure.prof.output import check_path
    from dure.prof.page import SUFFIXES, write_page

    check_path(output, SUFFIXES)
    names = list(dict.fromkeys(name.strip() for name in target.split(",")))
    if len(names) > 1 and settings:
        raise UsageError(
            "--set with several targets",
            rule="a number is that of one chip",
            fix="name one chip with --target",
        )
    machines = [chip for name in names for chip in targets_of(name, settings)]
    types = weights, kv, activations
    step = StepOptions(batch, context, phase, chunk, *types, chips, tp, ep, no_prefetch)
    look = _looker(asked(subject, dims, dtype, algorithm, arg, const, step), step, strict)
    profiles: list[Profile] = []
    errors: list[DureError] = []
    failed: list[tuple[str, str]] = []
    for chip in machines:
        try:
            profiles.append(look(chip))
        except DureError as error:
            errors.append(error)
            failed.append((chip.name, str(error)))
    if not profiles:
        raise errors[0]
    size = write_page(profiles, output, failed)
    if as_json:
        print_json(
            {
                "file": str(output),
                "bytes": size,
                "targets": [{"target": p.target, "ns": _total(p) / 1000} for p in profiles],
                "errors": [{"target": name, "error": text} for name, text in failed],
            }
        )
        return
    for name, text in failed:
        say(f"{name}: {text}")
    shown = ", ".join(f"{p.target} {duration(_total(p))}" for p in profiles)
    show(f"{output}: {shown}; {size / 1000:,.0f} kB, open it in a browser\n")


def _total(made: Profile) -> int:
    """The time of all that ran."""
    return made.whole or made.total


def _looker(what: Work | ChipStep, options: StepOptions, strict: bool) -> Callable[[Chip], Profile]:
    """What looks at an operator, a kernel or a model's step on a chip."""
    from dure.library.answer import answer
    from dure.library.profile import profile
    from dure.library.work import Work
    from dure.models.chip_devices import answer_on
    from dure.models.step_profile import step_profile

    if isinstance(what, Work):
        return lambda chip: profile(answer(what, chip, strict=strict))
    devices, prefetch = options.devices(), not options.no_prefetch
    return lambda chip: step_profile(
        answer_on(what, chip, devices, strict=strict, prefetch=prefetch)
    )
