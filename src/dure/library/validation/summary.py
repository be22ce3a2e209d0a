"""Errors of predictions, summed up, as JSON and as a page.

An error is predicted over measured time, less one.  Of a row that is known to take at most some
time it is 0 where the prediction is below.  Sums are of absolute errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median

from dure.errors import DureError
from dure.library.validation.measurements import Measured, Measurement, Published
from dure.library.validation.prediction import Prediction, predict
from dure.machine.chip import Chip

ALL = "all"


@dataclass(frozen=True)
class Row:
    """A measurement and its predictions: ``chosen`` by the algorithm that was asked for, ``own``
    by dure's program.
    """

    measurement: Measurement
    chosen: Prediction
    own: Prediction

    @property
    def error(self) -> float:
        """By the algorithm that was asked for."""
        return error(self.measurement, self.chosen)

    @property
    def own_error(self) -> float:
        """By dure's own program."""
        return error(self.measurement, self.own)


@dataclass(frozen=True)
class Summary:
    """Absolute errors of some rows: how many, and their median, mean and 90th percentile."""

    count: int
    median: float
    mean: float
    p90: float


@dataclass(frozen=True)
class Result:
    """A chip's measurements with their predictions; ``unknown`` are those without."""

    chip: Chip
    algorithm: str
    rows: tuple[Row, ...]
    unknown: tuple[Published, ...]
    source: str

    def summaries(self, of: Callable[[Row], float] = lambda row: row.error) -> dict[str, Summary]:
        """By operator, and of all rows."""
        ops = dict.fromkeys(row.measurement.op for row in self.rows)
        groups = {op: [r for r in self.rows if r.measurement.op == op] for op in ops}
        found = {op: summary([of(row) for row in rows]) for op, rows in groups.items()}
        if self.rows:
            found[ALL] = summary([of(row) for row in self.rows])
        return found


def error(measurement: Measurement, prediction: Prediction) -> float:
    """Predicted over measured time, less one."""
    found = prediction.ns / measurement.ns - 1
    return max(found, 0.0) if measurement.at_most else found


def summary(errors: Sequence[float]) -> Summary:
    """Of at least one error."""
    sizes = sorted(map(abs, errors))
    high = sizes[ceil(0.9 * len(sizes)) - 1]
    return Summary(len(sizes), median(sizes), sum(sizes) / len(sizes), high)


def validate(
    chip: Chip,
    measured: Measured,
    algorithm: str = "as-measured",
    done: Callable[[int], None] = lambda count: None,
) -> Result:
    """Predict every row; ``done`` is told how many are.

    What the chip can't run isn't modelled, and is listed with the reason.
    """
    rows: list[Row] = []
    unknown = list(measured.unknown)
    for count, measurement in enumerate(measured.rows):
        done(count)
        try:
            own = predict(measurement, chip, "dure")
            chosen = own if algorithm == "dure" else predict(measurement, chip, algorithm)
        except DureError as failure:
            work = f"{measurement.op} {measurement.dims} {measurement.dtype}"
            unknown.append(
                Published(work, f"{measurement.ns:.0f} ns", failure.what, measurement.where)
            )
            continue
        rows.append(Row(measurement, chosen, own))
    done(len(measured.rows))
    return Result(chip, algorithm, tuple(rows), tuple(unknown), measured.source)


# --- JSON ----------------------------------------------------------------------------------------


def results_json(results: Sequence[Result]) -> dict[str, object]:
    """One object: ``rows``, ``summary`` by operator and ``not_modelled``; of several chips, also
    each by itself.
    """
    if len(results) == 1:
        return _result_json(results[0])
    return {
        "rows": [_row_json(result, row) for result in results for row in result.rows],
        "targets": {result.chip.name: _result_json(result) for result in results},
    }


def _result_json(result: Result) -> dict[str, object]:
    return {
        "target": result.chip.name,
        "algorithm": result.algorithm,
        "source": result.source,
        "rows": [_row_json(result, row) for row in result.rows],
        "summary": {op: _summary_json(s) for op, s in result.summaries().items()},
        "own_summary": {
            op: _summary_json(s) for op, s in result.summaries(lambda row: row.own_error).items()
        },
        "not_modelled": [
            {"work": u.work, "result": u.result, "reason": u.reason, "source": u.source}
            for u in result.unknown
        ],
    }


def _row_json(result: Result, row: Row) -> dict[str, object]:
    measurement = row.measurement
    return {
        "target": result.chip.name,
        "op": measurement.op,
        "dims": measurement.dims,
        "dtype": measurement.dtype,
        "relation": "<=" if measurement.at_most else "=",
        "measured_ns": measurement.ns,
        "predicted_ns": row.chosen.ns,
        "error": row.error,
        "algorithm": row.chosen.algorithm,
        "own_ns": row.own.ns,
        "own_error": row.own_error,
        "program_sha256": list(row.chosen.programs),
    }


def _summary_json(entry: Summary) -> Mapping[str, object]:
    return {
        "count": entry.count,
        "median": entry.median,
        "mean": entry.mean,
        "p90": entry.p90,
    }


# --- the page ------------------------------------------------------------------------------------

_HEAD = """# Validation

Every public measurement of an operator that we have, beside what dure predicts. `dure validate
--markdown docs/validation.md` writes this page.

*Predicted* is the time of the algorithm that ran where it was measured, as far as that is known
(the column *algorithm*); *own program* is the time of the program that dure's compiler makes. An
error is predicted over measured time, less one; where a source only says that something takes at
most some time (`<=`), it is 0 below that. Physical parameters of the chip alone are used: there is
no factor for an operator, a shape or a benchmark. What was fitted says so in the machine file, with
the rows (`dure targets show`).

Other measurements, of any chip, are read from a file of comma-separated values:

    dure validate --target tpu-v6e --data mine.csv
    dure validate --target ./mine.toml --data mine.csv --json

    # Lines like this one say where the numbers are from.
    op,dims,device_ns
    gemm,128x4096x4096,32328

`device_ns` may be `cycles` of the chip's clock. Optional columns: `dtype` (bf16 where it isn't
given), `relation` (`=` or `<=`), `kernel` (the library's kernel with the algorithm that ran),
`near` (operands that lay in the shared memory which caches the far one) and `set` (other numbers of
the chip, as `cores=1;clock=2GHz`).
"""


def markdown(results: Sequence[Result]) -> str:
    """The page of all results."""
    parts = [_HEAD]
    for result in results:
        parts.append(f"\n## {result.chip.name}\n")
        if result.source:
            parts.append(f"\n{result.source}\n")
        if result.rows:
            parts += [_table(_rows_table(result)), _table(_summary_table(result))]
        if result.unknown:
            table = [("not modelled", "result", "why", "source")]
            table += [(u.work, u.result, u.reason, u.source) for u in result.unknown]
            parts.append(_table(table))
    return "".join(parts)


def _rows_table(result: Result) -> list[tuple[str, ...]]:
    head = ("op", "dims", "dtype", "measured us", "predicted us", "error", "algorithm")
    table: list[tuple[str, ...]] = [(*head, "own program us", "error")]
    for row in result.rows:
        m = row.measurement
        relation = "<= " if m.at_most else ""
        table.append(
            (
                *(m.op, m.dims, m.dtype, f"{relation}{m.ns / 1000:.2f}"),
                *(f"{row.chosen.ns / 1000:.2f}", f"{row.error:+.1%}", row.chosen.algorithm),
                *(f"{row.own.ns / 1000:.2f}", f"{row.own_error:+.1%}"),
            )
        )
    return table


def _summary_table(result: Result) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        ("absolute error", "rows", "median", "mean", "90th percentile", "own program's median")
    ]
    own = result.summaries(lambda row: row.own_error)
    for op, entry in result.summaries().items():
        numbers = (entry.median, entry.mean, entry.p90, own[op].median)
        table.append((op, str(entry.count), *(f"{n:.1%}" for n in numbers)))
    return table


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n" + "\n".join(lines) + "\n"
