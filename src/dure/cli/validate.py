"""``dure validate``: public measurements of operators and whole models beside what is predicted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.chip_options import Set, overrides_of
from dure.cli.output import print_json, say, show, table, write_document
from dure.cli.progress import progress
from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.library.validation import Measured, Published, Result
    from dure.machine.chip import Chip
    from dure.models.tables.rows import Predicted

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
Rows = Annotated[
    str, typer.Option("--rows", help="Measurements of operators, of whole models, or all.")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        help="Processes for whole models.  [default: all cores]",
        show_default=False,
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
    rows: Rows = "all",
    jobs: Jobs = None,
) -> None:
    """Predict operators and models that were measured on real chips; show how far off that is."""
    if target == "cpu":
        _host(as_json, [data, page, settings])
        return
    if rows not in ("all", "operators", "models"):
        raise UsageError(
            f"--rows {rows[:40]}",
            rule="rows are those of operators, of whole models, or all",
            fix="--rows all",
        )
    from dure.library.operators import ALGORITHMS
    from dure.library.validation import markdown, other_devices, results_json
    from dure.models.tables import rows as model_rows

    if algorithm not in ALGORITHMS:
        raise UsageError(
            f"no algorithm is called '{algorithm}'",
            rule=f"an algorithm is one of {', '.join(ALGORITHMS)}",
            fix="--algorithm as-measured",
        )
    chosen = _chosen(target, data, overrides_of(settings))
    results = [_validated(c, m, algorithm) for c, m in chosen if rows != "models"]
    results = [result for result in results if result.rows or result.unknown]
    models = _models([c for c, _ in chosen if rows != "operators" and data is None], jobs)
    others = other_devices() if target == "all" and rows != "operators" else ()
    if not results and not models:
        raise _nothing_known(chosen[0][0])
    if page is not None:
        unknown = [(o.work, o.result, o.reason, o.source) for o in others]
        more = model_rows.markdown(models, unknown) if models or unknown else ""
        write_document(page, markdown(results) + more)
    if as_json:
        found = results_json(results) if results else {}
        print_json({**found, **_models_json(models, others)})
    elif page is None:
        for result in results:
            _show(result)
        _show_models(models, others)


def _models(chips: Sequence[Chip], jobs: int | None) -> list[Predicted]:
    """The published results of whole models with what is predicted."""
    from dure.models.tables import rows

    asked = [row for chip in chips for row in rows.packaged(chip)]
    found: dict[int, Predicted] = {}
    with progress(len(asked)) as advance:
        for place, one in rows.predict(asked, jobs or os.cpu_count() or 1):
            found[place] = one
            advance(len(found), one.row.work)
    return [found[place] for place in range(len(asked))]


def _models_json(models: Sequence[Predicted], others: Sequence[Published]) -> dict[str, object]:
    if not models and not others:
        return {}
    return {
        "models": [one.json() for one in models],
        "other_devices": [
            {"work": o.work, "result": o.result, "reason": o.reason, "source": o.source}
            for o in others
        ],
    }


def _show_models(models: Sequence[Predicted], others: Sequence[Published]) -> None:
    from dure.models.tables.rows import HEADS, notes, shown

    if models:
        heads = tuple(head.upper() for head in HEADS)
        table([heads, *map(shown, models)], right=(2, 3, 4, 5))
        show("\n")
        for line in notes(models):
            show(f"{line}\n")
        show("\n")
    for other in others:
        show(f"not modelled: {other.work}: {other.result} ({other.reason})\n")


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
        return [(c, packaged(c)) for c in targets.chips()]
    chip = targets.chip(target, overrides)
    measured = packaged(chip) if data is None else read_measured(data, chip)
    return [(chip, measured)]


def _nothing_known(chip: Chip) -> UsageError:
    return UsageError(
        f"no measurement of {chip.name} is known",
        rule="public measurements come with the package; others are read from a file",
        fix="--data FILE.csv",
    )


def _validated(chip: Chip, measured: Measured, algorithm: str) -> Result:
    from dure.library.validation import validate as predicted

    with progress(len(measured.rows)) as advance:
        return predicted(chip, measured, algorithm, lambda count: advance(count, chip.name))


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
