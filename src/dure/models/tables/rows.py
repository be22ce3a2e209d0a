"""Published results of whole models as steps on chips: what stands for each, and how far off it is.

Beside a chip's machine file lies ``models.csv``.  Lines that begin with ``#`` are comments; a row
is a ``model`` of :mod:`dure.models.shapes` in a ``dtype`` on so many ``devices`` as the machine
file describes one, but for the numbers that ``set`` says (``PATH=VALUE`` with ``;`` between) where
a part of the chip was a device, and what was measured:

- ``decode``: a step of ``batch`` sequences of ``context`` positions, in ``ms``;
- ``prefill``: a step of ``batch`` sequences of ``context`` new positions, in ``ms``;
- ``serve``: requests of ``context`` tokens in and ``output`` tokens out, in ``requests/s`` or
  ``tokens/s`` (those that come out).  A steady batch stands for it: each request is prefilled
  alone, then is one of ``batch`` sequences in as many decode steps as it has tokens out, all at
  the context that it has half way.  Where no batch is given it is the largest power of two, up
  to :data:`MOST`, whose weights and KV cache fit the devices.

A ``dtype`` of ``fp8`` or ``int8`` is W8A8, as vendors publish it: weights and the activations that
meet them are in that type, values between kernels bf16, and a decoder's KV cache fp8 for fp8, bf16
for int8.

``relation`` is ``=``, or ``>=`` where only a bound is known.  ``known`` says whether the
configuration is (``yes`` or ``no``), ``within`` how large an error may be where it is, ``unknown``
what isn't known, and ``source`` where the result is from.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dure.errors import DureError, UsageError
from dure.library.answer import roofline_seconds
from dure.library.validation.measurements import settings_of
from dure.library.weight_types import ACTIVATION_TYPES
from dure.machine.chip import Chip
from dure.models.batch import Batch, phase_of
from dure.models.config import ModelConfig
from dure.models.shapes import any_config
from dure.models.tables.cells import Cell, Outcome, outcomes, step_of
from dure.targets import chip_folder

COLUMNS = (
    *("model", "dtype", "devices", "set", "phase", "batch", "context", "output", "metric"),
    *("value", "relation", "known", "within", "unknown", "source"),
)
METRICS = {"decode": ("ms",), "prefill": ("ms",), "serve": ("requests/s", "tokens/s")}
#: The largest batch that is taken where none is known.
MOST = 256


@dataclass(frozen=True)
class ModelRow:
    """A published result; ``batch`` is 0 where it isn't known, and ``where`` its line."""

    chip: Chip
    model: str
    dtype: str
    devices: int
    #: What is other in the machine file.
    settings: Mapping[str, str]
    phase: str
    batch: int
    context: int
    output: int
    metric: str
    value: float
    at_least: bool
    known: bool
    within: float | None
    unknown: str
    source: str
    where: str

    @property
    def work(self) -> str:
        """What ran."""
        sizes = f"{self.context} in, {self.output} out" if self.output else f"x {self.context}"
        batch = f"{self.batch} " if self.batch else ""
        many = f" on {self.devices} devices" if self.devices > 1 else ""
        return f"{self.model} {self.dtype} {self.phase} {batch}{sizes}{many}"

    @property
    def measured(self) -> str:
        """The result as it is published."""
        return f"{'>= ' if self.at_least else ''}{self.value:,.6g} {self.metric}"

    @property
    def seconds(self) -> float:
        """The measured seconds: of the step, or of a request."""
        if self.metric == "ms":
            return self.value / 1e3
        return (self.output if self.metric == "tokens/s" else 1) / self.value

    def parts(self) -> list[tuple[Cell, float]]:
        """The steps that stand for it, each with how often it runs; a part of a time where it is
        for several requests.
        """
        if self.phase != "serve":
            return [(self._cell(Batch(phase_of(self.phase), self.batch, self.context)), 1.0)]
        batch = self.batch or self._largest()
        half = self.context + self.output // 2
        return [
            (self._cell(Batch("prefill", 1, self.context)), 1.0),
            (self._cell(Batch("decode", batch, half)), self.output / batch),
        ]

    def _cell(self, batch: Batch) -> Cell:
        scheme = ACTIVATION_TYPES.get(self.dtype)
        if scheme is None:
            return Cell(self.model, self.chip, batch, self.dtype, self.devices)
        cached = scheme.code.is_float and isinstance(any_config(self.model), ModelConfig)
        codes = self.dtype, self.dtype, self.dtype if cached else ""
        return Cell(self.model, self.chip, batch, "bf16", self.devices, *codes)

    def _largest(self) -> int:
        """The largest power of two of whole requests that fit."""
        size = self.chip.memories[self.chip.home].size.base * self.devices
        step = step_of(self._cell(Batch("decode", 1, self.context + self.output)))
        batch = 1
        while 2 * batch <= MOST and step.weight_bytes + 2 * batch * step.kv_bytes <= size:
            batch *= 2
        return batch


@dataclass(frozen=True)
class Predicted:
    """A row with what is predicted for it: ``seconds`` is None where ``why`` says why not."""

    row: ModelRow
    seconds: float | None
    stands: str
    why: str = ""

    @property
    def error(self) -> float | None:
        """Predicted over measured time, less one; 0 where a bound holds."""
        if self.seconds is None:
            return None
        found = self.seconds / self.row.seconds - 1
        return min(found, 0.0) if self.row.at_least else found

    @property
    def good(self) -> bool | None:
        """Whether the error is no larger than it may be; None where nothing is asked."""
        if self.row.within is None:
            return None
        return self.error is not None and abs(self.error) <= self.row.within

    @property
    def predicted(self) -> str:
        """In the unit of the measurement."""
        if self.seconds is None:
            return "-"
        row = self.row
        if row.metric == "ms":
            return f"{self.seconds * 1e3:,.4g} ms"
        return f"{(row.output if row.metric == 'tokens/s' else 1) / self.seconds:,.4g} {row.metric}"

    def json(self) -> dict[str, object]:
        """As one JSON object."""
        row = self.row
        return {
            "target": row.chip.name,
            "model": row.model,
            "dtype": row.dtype,
            "chips": row.devices,
            "set": dict(row.settings),
            "phase": row.phase,
            "batch": row.batch or None,
            "context": row.context,
            "output": row.output or None,
            "metric": row.metric,
            "relation": ">=" if row.at_least else "=",
            "value": row.value,
            "measured_s": row.seconds,
            "predicted_s": self.seconds,
            "error": self.error,
            "stands_for_it": self.stands,
            "configuration_known": row.known,
            "within": row.within,
            "good": self.good,
            "unknown": row.unknown,
            "why_not": self.why,
            "source": row.source,
        }


@dataclass(frozen=True)
class Attained:
    """The fraction of the published roofline that a vendor's own stack attains."""

    target: str
    work: str
    measured: str
    fraction: float
    stands: str
    source: str

    def json(self) -> dict[str, object]:
        """As one JSON object."""
        return {
            "target": self.target,
            "work": self.work,
            "measured": self.measured,
            "fraction_of_roofline": self.fraction,
            "stands_for_it": self.stands,
            "source": self.source,
        }


def packaged(chip: Chip) -> tuple[ModelRow, ...]:
    """The published whole-model results of a chip of the package; none for any other chip."""
    folder = chip_folder(chip.name)
    file = None if folder is None else folder / "models.csv"
    return read_rows(file, chip) if file is not None and file.is_file() else ()


def predict(rows: Sequence[ModelRow], jobs: int = 1) -> Iterator[tuple[int, Predicted]]:
    """The places of rows with what is predicted, as it is done."""
    parts: list[tuple[int, Cell, float]] = []
    waiting: dict[int, dict[int, Outcome | None]] = {}
    for place, row in enumerate(rows):
        try:
            mine = row.parts()
        except DureError as error:
            yield place, Predicted(row, None, "", error.what)
            continue
        waiting[place] = dict.fromkeys(range(len(parts), len(parts) + len(mine)))
        parts += [(place, cell, times) for cell, times in mine]
    for number, result in outcomes([cell for _, cell, _ in parts], jobs):
        place = parts[number][0]
        waiting[place][number] = result
        found = [(*parts[n][1:], r) for n, r in waiting[place].items() if r is not None]
        if len(found) == len(waiting[place]):
            yield place, _predicted(rows[place], found)


def _predicted(row: ModelRow, parts: Sequence[tuple[Cell, float, Outcome]]) -> Predicted:
    stands = _stands((cell, times) for cell, times, _ in parts)
    why = next((result.why for _, _, result in parts if result.ps is None), "")
    if why:
        return Predicted(row, None, stands, why)
    seconds = sum(times * (result.ps or 0) / 1e12 for _, times, result in parts)
    return Predicted(row, seconds, stands)


def _stands(parts: Iterable[tuple[Cell, float]]) -> str:
    shown = [(f"{times:.4g} x " if times != 1 else "", cell.batch) for cell, times in parts]
    return " + ".join(f"{times}{b.phase} {b.sequences} x {b.context}" for times, b in shown)


def attained(chips: Mapping[str, Chip]) -> list[Attained]:
    """What vendors' stacks attain of the rooflines of these chips: nothing is compiled for it."""
    found: list[Attained] = []
    for chip in chips.values():
        for row in packaged(chip):
            try:
                parts = row.parts()
                least = sum(times * _roofline(cell) for cell, times in parts)
            except DureError:
                continue
            if not row.at_least:
                fraction = least / row.seconds
                stands = _stands(parts)
                found.append(
                    Attained(chip.name, row.work, row.measured, fraction, stands, row.source)
                )
    return found


def _roofline(cell: Cell) -> float:
    step = step_of(cell)
    dtype = step.multiplied(cell.chip)
    return roofline_seconds(cell.chip, dtype, step.flops, step.bytes) / max(1, cell.devices)


# --- for people ----------------------------------------------------------------------------------

HEADS = ("target", "what ran", "measured", "predicted", "error", "may be", "what stands for it")


def shown(one: Predicted) -> tuple[str, ...]:
    """A line under :data:`HEADS`."""
    row = one.row
    error = "-" if one.error is None else f"{one.error:+.1%}"
    within = "-" if row.within is None else f"{row.within:.0%}"
    return row.chip.name, row.work, row.measured, one.predicted, error, within, one.stands


def notes(found: Iterable[Predicted]) -> list[str]:
    """What is unknown about each, and where it is from; equal ones once."""
    return list(dict.fromkeys(map(_note, found)))


def _note(one: Predicted) -> str:
    row = one.row
    why = f"not predicted: {one.why}; " if one.why else ""
    what = f"{row.chip.name}, {row.model} {row.phase}"
    others = ", ".join(f"{path}={value}" for path, value in row.settings.items())
    each = f"a device has {others}; " if others else ""
    return f"{what}: {why}{each}unknown: {row.unknown}. Source: {row.source}."


_HEAD = """
## Whole models

Published results of whole models, and the time of the steps that dure compiles for them. A request
of a throughput is one prefill of its tokens in, alone, and its share of as many decode steps as it
has tokens out: steps of a steady batch in which all sequences have the context that one has half
way. Where the batch isn't known it is the largest power of two, up to 256, whose weights and KV
cache fit. An error is predicted over measured time, less one; where only a bound is known it is 0
beyond it. *May be* is the largest error asked for, where the configuration is known. Each time is
that of the chip alone: nothing is added for the host.
"""


def markdown(found: Sequence[Predicted], others: Iterable[Sequence[str]]) -> str:
    """The part of the validation page about whole models; ``others`` are results that none of the
    targets stands for.
    """
    parts = [_HEAD, table_of([HEADS, *map(shown, found)])]
    parts += [f"\n- {line}" for line in notes(found)]
    more = list(others)
    if more:
        head = ("other devices", "result", "why", "source")
        parts += ["\n\nNot modelled:\n", table_of([head, *more])]
    return "".join(parts).rstrip() + "\n"


def table_of(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n" + "\n".join(lines) + "\n"


# --- the files -----------------------------------------------------------------------------------


def read_rows(path: Path, chip: Chip) -> tuple[ModelRow, ...]:
    """The rows of a file.

    Raises :class:`UsageError`, which names the line, for what isn't as above.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the results can't be read: {error}", where=str(path), fix="give a text file"
        ) from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    names = next(csv.reader([numbered[0][1]])) if numbered else list[str]()
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise UsageError(
            f"there is no column '{missing[0]}'",
            where=str(path),
            rule="the first line that isn't a comment names the columns",
            fix=",".join(COLUMNS),
        )
    return tuple(_row(names, line, f"{path}:{number}", chip) for number, line in numbered[1:])


def _row(names: Sequence[str], line: str, where: str, chip: Chip) -> ModelRow:
    cells = next(csv.reader([line]))
    if len(cells) != len(names):
        raise UsageError(
            f"{len(cells)} values under {len(names)} columns",
            where=where,
            fix="give each column a value; one with a comma stands in quotes",
        )
    entry = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
    phase = _one_of(entry, "phase", METRICS, where)
    output = _whole(entry, "output", where) if phase == "serve" else 0
    batch = 0 if phase == "serve" and not entry["batch"] else _whole(entry, "batch", where)
    settings = settings_of(entry["set"], where)
    return ModelRow(
        chip=_with(chip, settings, where),
        model=entry["model"],
        dtype=entry["dtype"],
        devices=_whole(entry, "devices", where),
        settings=settings,
        phase=phase,
        batch=batch,
        context=_whole(entry, "context", where),
        output=output,
        metric=_one_of(entry, "metric", METRICS[phase], where),
        value=_positive(entry, "value", where),
        at_least=_one_of(entry, "relation", ("=", ">="), where) == ">=",
        known=_one_of(entry, "known", ("yes", "no"), where) == "yes",
        within=_positive(entry, "within", where) if entry["within"] else None,
        unknown=entry["unknown"],
        source=entry["source"],
        where=where,
    )


def _with(chip: Chip, settings: Mapping[str, str], where: str) -> Chip:
    """The chip with other numbers."""
    from dure.machine.chip_loader import with_overrides  # imports pydantic

    try:
        return with_overrides(chip, settings)
    except DureError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise UsageError(error.what, where=place, rule=error.rule, fix=error.fix) from error


def _one_of(entry: Mapping[str, str], name: str, known: Iterable[str], where: str) -> str:
    names = tuple(known)
    if entry[name] not in names:
        raise UsageError(
            f"the {name} is '{entry[name][:40]}'",
            where=where,
            rule=f"it is one of {', '.join(names)}",
            fix=names[0],
        )
    return entry[name]


def _positive(entry: Mapping[str, str], name: str, where: str) -> float:
    try:
        value = float(entry[name])
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15:
        raise UsageError(
            f"the {name} is '{entry[name][:40]}'", where=where, rule="it is positive", fix="1"
        )
    return value


def _whole(entry: Mapping[str, str], name: str, where: str) -> int:
    value = _positive(entry, name, where)
    if value != int(value):
        raise UsageError(
            f"the {name} is {entry[name][:40]}", where=where, rule="it is a whole number", fix="1"
        )
    return int(value)
