"""``dure sanitize``: whether a machine program is free of races, deadlocks and stray reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dure.cli import options, text
from dure.cli.chip_options import Set
from dure.cli.output import print_json, show
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
from dure.errors import DureError, KernelError, UsageError

if TYPE_CHECKING:
    from dure.ir.core import Function
    from dure.library.work import Work
    from dure.machine.chip import Chip


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("sanitize", epilog="Example: dure sanitize softmax 64x1000 --target all")(sanitize)


def sanitize(
    subject: Subject,
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
    """Prove a machine program over all interleavings: an operator's, a kernel's, or PROGRAM.txt."""
    chips = targets_of(target, settings)
    entries: list[dict[str, object]] = []
    if subject.endswith(".txt"):
        if target == "all":
            raise UsageError(
                f"{subject} without its target",
                rule="a machine program is that of one chip",
                fix="name it with --target",
            )
        program = _read(subject)
        entries.append(_verdict(program, chips[0]))
    else:
        work = work_of(subject, dims, dtype, algorithm, arg, const)
        for chip in chips:
            entries += _programs(work, chip, strict)
    if as_json:
        print_json({"ok": all(e["ok"] for e in entries), "programs": entries})
    else:
        for entry in entries:
            show(f"{entry['target']}: {entry['program']}: {entry['text']}\n")
    if not all(e["ok"] for e in entries):
        raise _failure(entries)


def _read(file: str) -> Function:
    from dure.ir.parser import parse_function
    from dure.ir.verifier import verify

    found = parse_function(text.file(Path(file)), file)
    verify(found)
    if found.level != "machine":
        raise UsageError(
            f"{file} is a {found.level} program",
            rule="the sanitizer proves machine programs",
            fix="give the .machine.txt that `dure compile` writes",
        )
    return found


def _programs(work: Work, chip: Chip, strict: bool) -> list[dict[str, object]]:
    """The verdict on each of the work's programs; one that doesn't compile isn't proved."""
    from dure.library.answer import check_fits
    from dure.library.build import choose_program

    entries: list[dict[str, object]] = []
    try:
        check_fits(work, chip)
        for call in work.calls:
            _, compiled = choose_program(call, chip, strict=strict)
            entries.append(_verdict(compiled.function, chip))
    except DureError as error:
        if not entries and len(work.calls) == 1:
            name = work.calls[0].kernel.__name__
        else:
            name = work.name
        entries.append(
            {
                "target": chip.name,
                "program": name,
                "ok": False,
                "text": f"doesn't compile: {error}",
                **error_json(error),
            }
        )
    return entries


def _verdict(program: Function, chip: Chip) -> dict[str, object]:
    from dure.sim.sanitizer import sanitize as prove

    verdict = prove(program, chip)
    return {
        "target": chip.name,
        "program": program.name,
        "ok": verdict.ok,
        "states": verdict.states,
        "iterations": verdict.iterations,
        "findings": [
            {"kind": f.kind, "message": f.message, "missing": f.missing, "text": f.render()}
            for f in verdict.findings
        ],
        "text": verdict.render(),
    }


def _failure(entries: list[dict[str, object]]) -> DureError:
    wrong = [f"{e['program']} on {e['target']}" for e in entries if not e["ok"]]
    return KernelError(
        f"not proved: {', '.join(wrong)}",
        rule="a program is free of races, deadlocks and reads of what nobody wrote",
        fix="see the findings",
    )
