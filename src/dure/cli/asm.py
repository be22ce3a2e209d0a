"""``dure asm``: what this machine's processor executes, beside the author's lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.output import print_json, show
from dure.cli.subject import Arg, Const, Dims, Dtype, Subject, work_of
from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.targets.cpu.listing import Listing

STAGES = ("tile", "llvm", "machine")
Stage = Annotated[str, typer.Option("--stage", help="tile, llvm, machine, or several with commas.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    epilog = "Example: dure asm softmax 64x1000 --stage machine"
    app.command("asm", epilog=epilog)(asm)


def asm(
    subject: Subject,
    dims: Dims = None,
    dtype: Dtype = "f32",
    arg: Arg = None,
    const: Const = None,
    stage: Stage = "tile,llvm,machine",
    as_json: options.Json = False,
) -> None:
    """Show a kernel's tile IR, LLVM IR and machine code for this machine (DURE_CPU_LEVEL: less)."""
    wanted = [name.strip() for name in stage.split(",")]
    if not wanted or any(name not in STAGES for name in wanted):
        raise UsageError(f"--stage {stage}", rule=f"a stage is one of {', '.join(STAGES)}")
    work = work_of(subject, dims, dtype, "dure", arg, const)

    from dure.library.build import tile_function
    from dure.library.validation_cpu import host_tiles
    from dure.runtime.host import host_features
    from dure.targets.cpu.listing import listing

    host = host_features()
    found = [listing(tile_function(call, host_tiles(call)), host) for call in work.calls]
    if as_json:
        print_json({"level": host.level, "kernels": [_json(entry, wanted) for entry in found]})
        return
    for entry in found:
        show(f"{entry.name} at level {host.level}: {entry.instructions} instructions\n")
        for name in wanted:
            show(f"\n== {name}\n\n{_text(entry, name)}\n")


def _text(entry: Listing, stage: str) -> str:
    if stage != "machine":
        return entry.tile if stage == "tile" else entry.llvm
    lines: list[str] = []
    for run in entry.machine:
        span = run.span
        head = "" if span is None else f"{span.file}:{span.line}: {span.text.strip()}"
        lines += [f"; {head}" if head else ";", *run.lines]
    return "\n".join(lines)


def _json(entry: Listing, stages: list[str]) -> dict[str, object]:
    found: dict[str, object] = {"name": entry.name, "instructions": entry.instructions}
    for stage in stages:
        found[stage] = (
            [
                {
                    "file": None if run.span is None else run.span.file,
                    "line": None if run.span is None else run.span.line,
                    "text": None if run.span is None else run.span.text.strip(),
                    "code": list(run.lines),
                }
                for run in entry.machine
            ]
            if stage == "machine"
            else _text(entry, stage)
        )
    return found
