"""``dure kernels``: every kernel of the suite on every target."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options, text
from dure.cli.output import print_json, show, table, write_document
from dure.cli.progress import progress
from dure.errors import KernelError, UsageError

if TYPE_CHECKING:
    from dure.library.matrix import Cell
    from dure.library.suite import Case

Target = Annotated[
    str, typer.Option("--target", help="A name, cpu, names with commas, NAME.toml, or all.")
]
CaseName = Annotated[
    str | None,
    typer.Option("--case", help="Only cases whose name has this in it.", show_default=False),
]
Short = Annotated[
    bool, typer.Option("--short", help="One case a kind and one size a case, for a quick check.")
]
Markdown = Annotated[
    Path | None,
    typer.Option("--markdown", help="Write the matrix to this file.", show_default=False),
]
Check = Annotated[
    Path | None,
    typer.Option(
        "--check",
        help="Fail if this written matrix has other rows or columns, or calls right what fails.",
        show_default=False,
    ),
]

Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Processes.  [default: all cores]", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("kernels", epilog="Example: dure kernels --short --target rngd,cpu")(kernels)


def kernels(
    target: Target = "all",
    case: CaseName = None,
    short: Short = False,
    markdown: Markdown = None,
    check: Check = None,
    jobs: Jobs = None,
    as_json: options.Json = False,
) -> None:
    """Compile, prove, run and time every kernel of the suite on every target."""
    from dure.library import matrix_report as report
    from dure.library.matrix import matrix
    from dure.library.suite import CASES

    wanted = _targets(target)
    names = [name for _, name in wanted]
    written = None if check is None else text.file(check)
    cases = _cases(case, short)
    cells: list[Cell] = []
    jobs = jobs or min(len(cases), os.cpu_count() or 1)
    with progress(len(cases) * len(names)) as advance:
        for done in matrix(cases, [given for given, _ in wanted], short=short, jobs=jobs):
            cells += done
            advance(len(cells), done[-1].case)
    order = {(one.name, name): n for n, (one, name) in enumerate(itertools.product(cases, names))}
    cells.sort(key=lambda cell: order[cell.case, cell.target])
    if markdown is not None:
        write_document(markdown, report.markdown(cases, cells, names))
    if as_json:
        print_json({"cells": [_entry(cell) for cell in cells]})
    else:
        _show(cases, cells, names, each=case is not None)
    if written is not None:
        wrong = report.out_of_date(written, CASES, cells, names)
        if wrong:
            raise KernelError(
                f"{check} is out of date: {wrong[0]}",
                where="\n".join(f"  {line}" for line in wrong[1:]),
                rule="the written matrix has today's rows and columns, and what it calls right is",
                fix=f"mend what fails, then run dure kernels --markdown {check}",
            )
    elif not all(cell.ok for cell in cells):
        wrong_count = sum(not cell.ok for cell in cells)
        raise KernelError(
            f"{wrong_count} of {len(cells)} cells fail",
            rule="each kernel of the suite runs on each target",
            fix="see below the table",
        )


def _targets(target: str) -> list[tuple[str, str]]:
    """The targets that the option names: how each is given, and its own name."""
    from dure import targets
    from dure.library.matrix import CPU, chip_of

    given = [*targets.chip_names(), CPU] if target == "all" else target.split(",")
    found: list[tuple[str, str]] = []
    for name in (part.strip() for part in given):
        chip = chip_of(name)
        found.append((name, CPU if chip is None else chip.name))
    return found


def _cases(pattern: str | None, short: bool) -> Sequence[Case]:
    from dure.library.suite import CASES

    found = [case for case in CASES if pattern is None or pattern in case.name]
    if not found:
        raise UsageError(
            f"no case has '{pattern}' in its name",
            rule="a case of the suite is named by what it computes",
            fix=f"one of {', '.join(dict.fromkeys(case.item for case in CASES))}",
        )
    if short and pattern is None:
        return list({case.item: case for case in reversed(found)}.values())[::-1]
    return found


def _entry(cell: Cell) -> dict[str, object]:
    return {
        "case": cell.case,
        "item": cell.item,
        "target": cell.target,
        "ok": cell.ok,
        "passed": list(cell.passed),
        "ns": None if cell.ps is None else cell.ps / 1000,
        "failed": cell.failed,
        "error": cell.error,
        "note": cell.note,
    }


def _show(
    cases: Sequence[Case], cells: Sequence[Cell], names: Sequence[str], *, each: bool
) -> None:
    from dure.library import matrix_report as report

    rows = report.case_rows(cases, cells, names) if each else report.item_rows(cells, names)
    right = range(1, len(rows[0]))
    table([tuple(cell.upper() for cell in rows[0]), *rows[1:]], right=tuple(right))
    for paragraph in report.failures(cells):
        show(f"\n{paragraph}\n")
