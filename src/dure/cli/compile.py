"""``dure compile``: a chip's machine programs, and the tile programs they come from, as text."""

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
    Targets,
    error_json,
    targets_of,
    work_of,
)
from dure.errors import DureError

if TYPE_CHECKING:
    from dure.library.work import Work
    from dure.machine.chip import Chip

Folder = Annotated[
    Path,
    typer.Option("-o", "--output", help="The folder to write to.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compile", epilog="Example: dure compile softmax 64x1000 --target rngd -o out")(
        compile_work
    )


def compile_work(
    subject: Subject,
    folder: Folder,
    dims: Dims = None,
    target: Targets = "all",
    dtype: Dtype = "bf16",
    algorithm: Algorithm = "dure",
    arg: Arg = None,
    const: Const = None,
    settings: Set = None,
    strict: Strict = False,
    as_json: options.Json = False,
) -> None:
    """Write a chip's machine programs as text: TARGET/NUMBER-KERNEL.machine.txt and .tile.txt."""
    chips = targets_of(target, settings)
    work = work_of(subject, dims, dtype, algorithm, arg, const)
    entries: list[dict[str, object]] = []
    errors: list[DureError] = []
    for chip in chips:
        try:
            entries += _write(work, chip, folder, strict)
        except DureError as error:
            errors.append(error)
            entries.append({"target": chip.name, **error_json(error)})
            if len(chips) > 1:
                say(f"{chip.name}: {error}")
    if len(errors) == len(chips):
        raise errors[0]
    if as_json:
        print_json({"programs": entries})
        return
    for entry in entries:
        if "file" in entry:
            show(f"{entry['file']}\n")


def _write(work: Work, chip: Chip, folder: Path, strict: bool) -> list[dict[str, object]]:
    from dure.ir.printer import print_function
    from dure.library.answer import check_fits
    from dure.library.build import build, tile_function

    check_fits(work, chip)
    entries: list[dict[str, object]] = []
    for number, call in enumerate(work.calls):
        built = build(call, chip, strict=strict)
        name = f"{number}-{call.kernel.__name__}"
        tile = print_function(tile_function(call, built.consts))
        place = folder / chip.name
        file = _save(place / f"{name}.machine.txt", built.compiled.text)
        entries.append(
            {
                "target": chip.name,
                "kernel": call.kernel.__name__,
                "file": str(file),
                "tile_file": str(_save(place / f"{name}.tile.txt", tile)),
                "program_sha256": built.compiled.sha256,
                "tiles": dict(built.consts),
                "scratchpad": dict(built.compiled.used),
            }
        )
    return entries


def _save(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DureError(
            f"{path} can't be written: {error.strerror}",
            fix="give a folder with -o that can be written to",
        ) from error
    return path
