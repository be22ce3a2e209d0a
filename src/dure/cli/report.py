"""``dure report``: one page that shows what a chip does with a kernel, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.chip_options import Set
from dure.cli.output import print_json, say, show
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
from dure.errors import DureError, UsageError

if TYPE_CHECKING:
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
    epilog = "Example: dure report gemm 4096x4096x4096 --target rngd,tpu-v6e -o report.html"
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
    chips = [chip for name in names for chip in targets_of(name, settings)]
    work = work_of(subject, dims, dtype, algorithm, arg, const)

    from dure.library.answer import answer
    from dure.library.profile import profile

    profiles: list[Profile] = []
    errors: list[DureError] = []
    failed: list[tuple[str, str]] = []
    for chip in chips:
        try:
            profiles.append(profile(answer(work, chip, strict=strict)))
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
                "targets": [{"target": p.target, "ns": p.total / 1000} for p in profiles],
                "errors": [{"target": name, "error": text} for name, text in failed],
            }
        )
        return
    for name, text in failed:
        say(f"{name}: {text}")
    shown = ", ".join(f"{p.target} {p.total / 1e6:,.4g} us" for p in profiles)
    show(f"{output}: {shown}; {size / 1000:,.0f} kB, open it in a browser\n")
