"""``dure matrix``: every model that dure knows by name, on every chip."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options, text
from dure.cli.output import print_json, show, table, write_document
from dure.cli.progress import progress
from dure.cli.subject import targets_of
from dure.errors import KernelError, UsageError

if TYPE_CHECKING:
    from dure.models.tables.matrix import Entry

Target = Annotated[
    str, typer.Option("--target", help="A chip, several with commas, NAME.toml, or all.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Only these models: names with commas, or a config.json.",
        show_default=False,
    ),
]
Short = Annotated[
    bool, typer.Option("--short", help="One small model's decode step, for a quick check.")
]
Markdown = Annotated[
    Path | None,
    typer.Option("--markdown", help="Write the matrix to this file.", show_default=False),
]
Check = Annotated[
    Path | None,
    typer.Option(
        "--check",
        help="Fail if this written matrix has other rows or columns, or a time for what fails.",
        show_default=False,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Processes.  [default: all cores]", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("matrix", epilog="Example: dure matrix --model llama-3.1-8b")(matrix)


def matrix(
    target: Target = "all",
    model: Model = None,
    short: Short = False,
    markdown: Markdown = None,
    check: Check = None,
    jobs: Jobs = None,
    as_json: options.Json = False,
) -> None:
    """Compile, prove and time a decode and a prefill step of every model on every chip.

    With --model or --target, a written matrix keeps the cells of other models and chips.
    """
    from dure.models.shapes import names as known
    from dure.models.tables import matrix as tables

    chips = targets_of(target, None)
    names = [chip.name for chip in chips]
    written = None if check is None else text.file(check)
    whole = model is None and target == "all"
    if not whole:
        _before(markdown, names)  # which is refused before anything is compiled
    models = _models(model, [tables.SHORT] if short else list(known()))
    cells = tables.asked(models, chips, short)
    found: list[Entry] = []
    with progress(len(cells)) as advance:
        for entry in tables.entries(cells, jobs or os.cpu_count() or 1):
            found.append(entry)
            advance(len(found), f"{entry.model} {entry.phase} on {entry.target}")
    if markdown is not None:
        # What others have written meanwhile is kept.
        before = "" if whole else _before(markdown, names)
        write_document(markdown, tables.markdown(found, models, names, before))
    if as_json:
        order = {(c.model, c.batch.phase, c.chip.name): n for n, c in enumerate(cells)}
        found.sort(key=lambda e: order[e.model, e.phase, e.target])
        print_json({"cells": [_entry(entry) for entry in found]})
    else:
        _show(found, models, names)
    if written is not None:
        wrong = tables.out_of_date(written, found, known(), names)
        if wrong:
            raise KernelError(
                f"{check} is out of date: {wrong[0]}",
                where="\n".join(f"  {line}" for line in wrong[1:]),
                rule="the written matrix has today's rows and columns, and what has a time there "
                "still has one",
                fix=f"mend what fails, then run dure matrix --markdown {check}",
            )


def _models(given: str | None, usual: list[str]) -> list[str]:
    """The models that the option names, each one that there is."""
    from dure.models.shapes import any_config

    if given is None:
        return usual
    found = [name.strip() for name in text.argument(given, "--model").split(",")]
    for name in found:
        any_config(name)
    return found


def _before(written: Path | None, names: Sequence[str]) -> str:
    """The written matrix that cells are put into, empty where there is none.

    Raises :class:`UsageError` for one without these chips.
    """
    from dure.models.tables import matrix as tables

    if written is None or not written.exists():
        return ""
    found = text.file(written)
    columns = [table[0][1:] for table in tables.read_tables(found).values()]
    if not columns or not all(set(names) <= set(mine) for mine in columns):
        raise UsageError(
            f"{written} is no matrix of {', '.join(names)}",
            rule="cells are put into a matrix that has a column for each of their chips",
            fix="name its chips with --target, or another file",
        )
    return found


def _entry(entry: Entry) -> dict[str, object]:
    found = entry.found
    return {
        "model": entry.model,
        "target": entry.target,
        "phase": entry.phase,
        "chips": found.devices,
        "ns": None if found.ps is None else found.ps / 1000,
        "fraction_of_roofline": found.fraction,
        "bound": found.bound,
        "confidence": found.confidence,
        "guesses": list(found.guesses),
        "weight_bytes": found.weight_bytes,
        "kv_bytes": found.kv_bytes,
        "why": found.why,
    }


def _show(found: Sequence[Entry], models: Sequence[str], names: Sequence[str]) -> None:
    from dure.models.tables import matrix as tables

    for phase in tables.CONTEXTS:
        rows = tables.rows(found, models, names, phase)
        if len(rows) > 1:
            show(f"{phase}\n")
            head, *body = rows
            table([tuple(cell.upper() for cell in head), *body], right=range(1, len(head)))
            show("\n")
    for line in tables.failures(found):
        show(f"{line}\n")
