"""Measurements of operators: files of comma-separated values, one row a measurement.

Lines that begin with ``#`` say where the numbers are from.  A header names the columns:

- ``op`` and ``dims``: as in :mod:`dure.library.operators`;
- ``device_ns`` or ``cycles``: the time on the device, in nanoseconds or cycles of the chip's clock;
- optional: ``dtype`` (bf16 where it isn't given); ``kernel``, the library's kernel with the
  algorithm that ran; ``relation``, ``=`` or ``<=`` where the time is known to be at most that;
  ``near``, operands that lay in the shared memory which caches the far one, by the kernel's names;
  ``set``, numbers of the chip that were others, as ``PATH=VALUE`` with ``;`` between.

An operator that the library doesn't have isn't modelled, and is listed so.  Beside a chip's machine
file lie its public measurements, ``measured.csv``, and ``published.csv``, results that no operator
stands for.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dure.errors import UsageError
from dure.library.operators import forms, parse_dims
from dure.library.operators_common import DTYPES
from dure.machine.chip import Chip
from dure.targets import TARGETS, chip_folder

COLUMNS = ("op", "dims", "device_ns", "cycles", "dtype", "kernel", "relation", "near", "set")
RELATIONS = ("=", "<=")
#: The most rows of a file.
_MOST = 100_000


@dataclass(frozen=True)
class Measurement:
    """A measured operator; ``where`` is its line."""

    op: str
    dims: str
    dtype: str
    ns: float
    kernel: str
    at_most: bool
    near: tuple[str, ...]
    settings: Mapping[str, str]
    where: str


@dataclass(frozen=True)
class Published:
    """A published result that isn't modelled, and why."""

    work: str
    result: str
    reason: str
    source: str


@dataclass(frozen=True)
class Measured:
    """What a file holds."""

    rows: tuple[Measurement, ...]
    unknown: tuple[Published, ...]
    source: str


def packaged(chip: Chip) -> Measured:
    """The public measurements of a chip of the package; none for any other chip."""
    folder = chip_folder(chip.name)
    if folder is None:
        return Measured((), (), "")
    rows, unknown, source = (), (), ""
    file = folder / "measured.csv"
    if file.is_file():
        found = read_measured(file, chip)
        rows, unknown, source = found.rows, found.unknown, found.source
    return Measured(rows, (*unknown, *_published(folder / "published.csv")), source)


def other_devices() -> tuple[Published, ...]:
    """Published results of devices that are no targets."""
    return tuple(_published(TARGETS / "published.csv"))


def _published(file: Path) -> list[Published]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return [
            Published(row["work"], row["result"], row["reason"], row["source"])
            for row in csv.DictReader(stream)
        ]


def read_measured(path: Path, chip: Chip) -> Measured:
    """The measurements in a file; cycles are of the chip's clock.

    Raises :class:`UsageError` that names the line for whatever isn't as above.
    """
    lines = _lines(path)
    comments = [line.lstrip("# ").rstrip() for line in lines if line.startswith("#")]
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    if not numbered:
        raise UsageError(
            "the file holds no measurements",
            where=str(path),
            rule="a header names the columns, and each row after it is a measurement",
            fix="op,dims,device_ns on the first line, gemm,128x4096x4096,32328 on the next",
        )
    names = _header(numbered[0][1], f"{path}:{numbered[0][0]}")
    if len(numbered) == 1:
        raise UsageError(
            "the file holds a header and no measurements",
            where=str(path),
            fix="add a row, as gemm,128x4096x4096,32328",
        )
    if len(numbered) > _MOST:
        raise UsageError(f"more than {_MOST} rows", where=str(path), fix="split the file")
    rows: list[Measurement] = []
    unknown: list[Published] = []
    known = forms("as-measured")
    for number, line in numbered[1:]:
        where = f"{path}:{number}"
        entry = _entry(line, names, where)
        ns = _time(entry, chip, where)
        if entry["op"] not in known:
            unknown.append(
                Published(
                    f"{entry['op']} {entry['dims']}",
                    f"{ns:.0f} ns",
                    "no operator of the library has this name",
                    where,
                )
            )
            continue
        rows.append(_measurement(entry, ns, where))
    return Measured(tuple(rows), tuple(unknown), " ".join(comments))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it isn't text in UTF-8"
        raise UsageError(
            f"the measurements can't be read: {what}",
            where=str(path),
            fix="give a file of comma-separated values",
        ) from error


def _split(line: str, where: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], strict=True))]
    except csv.Error as error:
        raise UsageError(
            f"the line isn't comma-separated values: {error}", where=where, fix="mend its quotes"
        ) from error


def _header(line: str, where: str) -> list[str]:
    names = _split(line, where)
    for wanted in ("op", "dims"):
        if wanted not in names:
            raise _missing(wanted, where)
    if "device_ns" not in names and "cycles" not in names:
        raise _missing("device_ns", where)
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UsageError(
            f"two columns are called '{doubled}'", where=where, fix="leave one of them out"
        )
    return names


def _missing(column: str, where: str) -> UsageError:
    other = " or cycles" if column == "device_ns" else ""
    return UsageError(
        f"there is no column '{column}'{other}",
        where=where,
        rule="the first line that isn't a comment names the columns: op, dims, and device_ns or "
        "cycles",
        fix="op,dims,device_ns",
    )


def _entry(line: str, names: Sequence[str], where: str) -> dict[str, str]:
    cells = _split(line, where)
    if len(cells) > len(names):
        raise UsageError(
            f"{len(cells)} values under {len(names)} columns",
            where=where,
            fix="give each value a column; a value with a comma stands in quotes",
        )
    # The last columns may be left out where they are empty.
    return dict(zip(names, [*cells, *[""] * (len(names) - len(cells))], strict=True))


def _time(entry: Mapping[str, str], chip: Chip, where: str) -> float:
    column = "device_ns" if entry.get("device_ns") else "cycles"
    text = entry.get(column, "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e18:
        name = column if column in entry else "device_ns"
        raise UsageError(
            f"{name} is '{text[:40]}'",
            where=where,
            rule="a time is a positive number",
            fix="32328",
        )
    return value if column == "device_ns" else value / chip.clock.base * 1e9


def _measurement(entry: Mapping[str, str], ns: float, where: str) -> Measurement:
    op, dims, dtype = entry["op"], entry["dims"], entry.get("dtype") or "bf16"
    form = forms("as-measured")[op]
    try:
        parse_dims(op, form.dims, dims)
    except UsageError as error:
        raise UsageError(error.what, where=where, rule=error.rule, fix=error.fix) from error
    if dtype not in DTYPES:
        raise UsageError(
            f"no dtype is called '{dtype}'",
            where=where,
            rule=f"a dtype is one of {', '.join(DTYPES)}",
            fix="bf16",
        )
    relation = entry.get("relation") or "="
    if relation not in RELATIONS:
        raise UsageError(
            f"'{relation}' is no relation",
            where=where,
            rule="a time is known exactly (=), or it is known to be at most that (<=)",
            fix="=",
        )
    kernel = entry.get("kernel", "")
    if kernel and kernel not in forms():
        raise UsageError(
            f"no kernel is called '{kernel}'", where=where, fix="leave it out, or name an operator"
        )
    settings = settings_of(entry.get("set", ""), where)
    near = tuple(entry.get("near", "").split())
    return Measurement(op, dims, dtype, ns, kernel, relation == "<=", near, settings, where)


def settings_of(text: str, where: str) -> dict[str, str]:
    """Other numbers of a chip, ``PATH=VALUE`` with ``;`` between, by their paths.

    Raises :class:`UsageError` for one without a value.
    """
    found: dict[str, str] = {}
    for each in filter(None, text.split(";")):
        path, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"'{each}' sets nothing", where=where, fix="cores=1")
        found[path.strip()] = value.strip()
    return found
