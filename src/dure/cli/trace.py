"""``dure trace``: what every engine and DMA does at every time, for the Perfetto viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dure.cli import options
from dure.cli.chip_options import Set, Target
from dure.cli.output import print_json, show
from dure.cli.subject import (
    Algorithm,
    Arg,
    Const,
    Dims,
    Dtype,
    Strict,
    Subject,
    targets_of,
    work_of,
)
from dure.errors import UsageError

Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="The file to write: .json or .json.gz.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    epilog = "Example: dure trace gemm 4096x4096x4096 --target rngd -o trace.json.gz"
    app.command("trace", epilog=epilog)(trace)


def trace(
    subject: Subject,
    target: Target,
    output: Output,
    dims: Dims = None,
    dtype: Dtype = "bf16",
    algorithm: Algorithm = "dure",
    arg: Arg = None,
    const: Const = None,
    settings: Set = None,
    strict: Strict = False,
    as_json: options.Json = False,
) -> None:
    """Write an execution as a trace: open it in https://ui.perfetto.dev."""
    from dure.prof.output import check_path
    from dure.prof.trace import SUFFIXES, write_trace

    check_path(output, SUFFIXES)
    if target == "all":
        raise UsageError(
            "--target all",
            rule="a trace is of one chip",
            fix="name one from `dure targets`; `dure report` shows several",
        )
    (chip,) = targets_of(target, settings)
    work = work_of(subject, dims, dtype, algorithm, arg, const)

    from dure.library.answer import answer
    from dure.library.profile import profile

    made = profile(answer(work, chip, strict=strict))
    write_trace(made, output)
    if as_json:
        print_json(
            {
                "target": chip.name,
                "ns": made.total / 1000,
                "instructions": len(made.instructions),
                "file": str(output),
            }
        )
    else:
        show(f"{output}: {len(made.instructions):,} instructions; open it in ui.perfetto.dev\n")
