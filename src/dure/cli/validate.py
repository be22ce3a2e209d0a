"""``dure validate``: public measurements of operators beside what is predicted for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.chip_options import Set, overrides_of
from dure.cli.output import print_json, say, show, table
from dure.errors import DureError, UsageError

if TYPE_CHECKING:
    from dure.library.validation import Measured, Result
    from dure.machine.chip import Chip

Target = Annotated[
    str,
    typer.Option("--target", help="A name from `dure targets`, a machine file NAME.toml, or all."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Measurements in a file: op, dims, and device_ns or cycles, separated by commas.",
        show_default=False,
    ),
]
Algorithm = Annotated[
    str,
    typer.Option(
        "--algorithm", help="as-measured: what ran, where it is known; dure: dure's own program."
    ),
]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", help="Write the page to a file.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure validate --target tpu-v6e")(validate)


def validate(
    target: Target = "all",
    data: Data = None,
    algorithm: Algorithm = "as-measured",
    as_json: options.Json = False,
    page: Markdown = None,
    settings: Set = None,
) -> None:
    """Predict operators that were measured on real chips, and show how far off that is."""
    if target == "cpu":
        _host(as_json, [data, page, settings])
        return
    from dure.library.operators import ALGORITHMS
    from dure.library.validation import markdown, results_json

    if algorithm not in ALGORITHMS:
        raise UsageError(
            f"no algorithm is called '{algorithm}'",
            rule=f"an algorithm is one of {', '.join(ALGORITHMS)}",
            fix="--algorithm as-measured",
        )
    results = [
        _validated(c, m, algorithm) for c, m in _chosen(target, data, overrides_of(settings))
    ]
    if page is not None:
        _write(page, markdown(results))
    if as_json:
        print_json(results_json(results))
    elif page is None:
        for result in results:
            _show(result)


def _host(as_json: bool, others: list[object]) -> None:
    """Kernels on the host, predicted from microbenchmarks and measured."""
    from dure.library.validation_cpu import summary, validate_cpu

    if any(others):
        raise UsageError(
            "the host is measured, so there is nothing to read, to set or to write",
            rule="--data, --set and --markdown go with other targets",
            fix="dure validate --target cpu [--json]",
        )
    rows = validate_cpu(None if as_json else say)
    sums = summary(rows)
    if as_json:
        fields = ("op", "dims", "dtype", "measured_ns", "predicted_ns", "error")
        entries = [{name: getattr(row, name) for name in fields} for row in rows]
        print_json({"target": "cpu", "rows": entries, "summary": sums})
        return
    lines: list[tuple[str, ...]] = [("OP", "DIMS", "DTYPE", "MEASURED", "PREDICTED", "ERROR")]
    for row in rows:
        times = (f"{row.measured_ns / 1000:.1f} us", f"{row.predicted_ns / 1000:.1f} us")
        lines.append((row.op, row.dims, row.dtype, *times, f"{row.error:+.1%}"))
    table(lines, right=(3, 4, 5))
    numbers = ", ".join(f"{name} {value:.1%}" for name, value in sums.items())
    show(f"\nAbsolute error of {len(rows)} kernels: {numbers}\n")


def _chosen(
    target: str, data: Path | None, overrides: dict[str, str]
) -> list[tuple[Chip, Measured]]:
    """The chips and their measurements."""
    from dure import targets
    from dure.library.validation import packaged, read_measured

    if target == "all":
        if data is not None or overrides:
            raise UsageError(
                "measurements and numbers are those of one chip",
                rule="--data and --set go with --target",
                fix="name the chip with --target",
            )
        pairs = [(c, packaged(c)) for c in targets.chips()]
        return [(c, m) for c, m in pairs if m.rows or m.unknown]
    chip = targets.chip(target, overrides)
    measured = packaged(chip) if data is None else read_measured(data, chip)
    if not measured.rows and not measured.unknown:
        raise UsageError(
            f"no measurement of {chip.name} is known",
            rule="public measurements come with the package; others are read from a file",
            fix="--data FILE.csv",
        )
    return [(chip, measured)]


def _validated(chip: Chip, measured: Measured, algorithm: str) -> Result:
    from dure.library.validation import validate as predicted

    with _counted(chip.name, len(measured.rows)) as done:
        return predicted(chip, measured, algorithm, done)


@contextmanager
def _counted(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal."""
    if not sys.stderr.isatty() or not total:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, completed=count)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DureError(
            f"the page can't be written: {error.strerror}",
            where=str(path),
            fix="give the path of a file in a folder that is there",
        ) from error
    say(f"{path} is written")


def _show(result: Result) -> None:
    show(f"{result.chip.name}\n")
    if result.rows:
        head = (
            "OP",
            "DIMS",
            "DTYPE",
            "MEASURED",
            "PREDICTED",
            "ERROR",
            "OWN",
            "ERROR",
            "ALGORITHM",
        )
        rows: list[tuple[str, ...]] = [head]
        for row in result.rows:
            m = row.measurement
            relation = "<= " if m.at_most else ""
            rows.append(
                (
                    *(m.op, m.dims, m.dtype, f"{relation}{m.ns / 1000:.2f} us"),
                    *(f"{row.chosen.ns / 1000:.2f} us", f"{row.error:+.1%}"),
                    *(f"{row.own.ns / 1000:.2f} us", f"{row.own_error:+.1%}", row.chosen.algorithm),
                )
            )
        table(rows, right=(3, 4, 5, 6, 7))
        show("\n")
        sums: list[tuple[str, ...]] = [("ABSOLUTE ERROR", "ROWS", "MEDIAN", "MEAN", "P90")]
        for op, entry in result.summaries().items():
            numbers = (entry.median, entry.mean, entry.p90)
            sums.append((op, str(entry.count), *(f"{n:.1%}" for n in numbers)))
        table(sums, right=(1, 2, 3, 4))
        show("\n")
    for unknown in result.unknown:
        show(f"not modelled: {unknown.work}: {unknown.result} ({unknown.reason})\n")
    if result.unknown:
        show("\n")
