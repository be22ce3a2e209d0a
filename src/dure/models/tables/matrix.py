"""The matrix of models and chips: how many chips a model needs, and how long its steps take there.

A model's cells are a decode step of one sequence and a prefill of one, in 16 bits, on the fewest
devices that hold weights and KV cache.  A written matrix is in date in form if its tables have
today's columns and rows, and no cell that it has a time for has come to fail; times may have
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dure.machine.chip import Chip
from dure.models.batch import Batch, Phase
from dure.models.encoder_config import EncoderConfig
from dure.models.shapes import any_config
from dure.models.tables.cells import Cell, Outcome, outcomes

#: Positions of a sequence when its step is done, at most: a model may know fewer.
CONTEXTS: Mapping[Phase, int] = {"decode": 1024, "prefill": 2048}
DTYPE = "bf16"
#: The model of a short run.
SHORT = "smollm2-135m"

_TITLE = "# Models on every chip"
_INTRO = """\
Written by `dure matrix --markdown docs/models.md`; `dure matrix --short` repeats it in small.

Each model of `dure.models.shapes`, in bfloat16 with one sequence: a decode step at 1,024 positions,
and the prefill of 2,048 tokens (or of as many as the model knows). A cell is the time of the step
that dure compiles and proves, the part of the chip's published roofline that it attains, what
bounds it, and how far the numbers of the machine file that it rests on are to be trusted:
published, derived or guessed. A device is what a machine file describes: an ATOM-Max is a card of
four chips. A model runs on the fewest devices that hold it and over which its heads can be cut."""
_FIRST, _FAILS, _WHY = "model", "**fails**", "Why not"


@dataclass(frozen=True)
class Entry:
    """A model's step on a chip."""

    model: str
    target: str
    phase: Phase
    found: Outcome


def asked(models: Sequence[str], chips: Sequence[Chip], short: bool = False) -> list[Cell]:
    """The cells of models on chips; a short run has no prefills of decoders."""
    found: list[Cell] = []
    for model in models:
        config = any_config(model)
        for phase, context in CONTEXTS.items():
            encoder = isinstance(config, EncoderConfig)
            if (encoder and phase == "decode") or (short and not encoder and phase == "prefill"):
                continue
            batch = Batch(phase, 1, min(context, config.context))
            found += [Cell(model, chip, batch, DTYPE) for chip in chips]
    return found


def entries(cells: Sequence[Cell], jobs: int = 1) -> Iterator[Entry]:
    """The cells with what was found, as they are done."""
    for place, found in outcomes(cells, jobs):
        cell = cells[place]
        yield Entry(cell.model, cell.chip.name, cell.batch.phase, found)


# --- tables --------------------------------------------------------------------------------------


def rows(
    found: Sequence[Entry], models: Sequence[str], names: Sequence[str], phase: Phase
) -> list[tuple[str, ...]]:
    """The table of a phase: a row a model, a column a chip."""
    by_key = {(e.model, e.target): e for e in found if e.phase == phase}
    table: list[tuple[str, ...]] = [(_FIRST, *names)]
    for model in models:
        mine = [by_key.get((model, name)) for name in names]
        if any(entry is not None for entry in mine):
            table.append((model, *(shown(entry) for entry in mine)))
    return table


def devices(
    found: Sequence[Entry], models: Sequence[str], names: Sequence[str]
) -> list[tuple[str, ...]]:
    """The table of the devices that hold a model, the most of its steps."""
    table: list[tuple[str, ...]] = [(_FIRST, *names)]
    for model in models:
        counts: list[str] = []
        for name in names:
            mine = [e.found.devices for e in found if (e.model, e.target) == (model, name)]
            counts.append(str(max(mine)) if mine else "")
        table.append((model, *counts))
    return table


def shown(entry: Entry | None) -> str:
    """A cell's text."""
    if entry is None:
        return ""
    found = entry.found
    if found.ps is None or found.fraction is None:
        return _FAILS
    time = _time(found.ps) + (f" on {found.devices}" if found.devices > 1 else "")
    return ", ".join((time, f"{found.fraction:.1%}", found.bound, found.confidence))


def _time(ps: int) -> str:
    for unit, size in (("s", 10**12), ("ms", 10**9)):
        if ps >= size:
            return f"{ps / size:.3g} {unit}"
    return f"{ps / 10**6:.3g} us"


def failures(found: Sequence[Entry]) -> dict[str, list[str]]:
    """The cells that have no time, by the reason."""
    reasons: dict[str, list[str]] = {}
    for entry in found:
        if entry.found.ps is None:
            where = f"{entry.model} {entry.phase} on {entry.target}"
            reasons.setdefault(entry.found.why, []).append(where)
    return reasons


def markdown(
    found: Sequence[Entry], models: Sequence[str], names: Sequence[str], before: str = ""
) -> str:
    """The whole matrix as a document.  Cells of other models and chips stay as they are in the one
    ``before``, which has these columns among its own.
    """
    made: dict[str, list[tuple[str, ...]]] = {
        "Chips that hold it": devices(found, models, names),
        "Decode": rows(found, models, names, "decode"),
        "Prefill": rows(found, models, names, "prefill"),
    }
    kept, reasons = read_tables(before), failures(found)
    tables = {h: _merged(table, kept.get(h, [table[0]])) for h, table in made.items()}
    for reason, where in read_failures(before).items():
        others = [cell for cell in where if not _computed(cell, models, names)]
        if others:
            reasons.setdefault(reason, []).extend(others)
    steps = [cell for name in ("Decode", "Prefill") for row in tables[name][1:] for cell in row[1:]]
    known = [cell for cell in steps if cell]
    timed = sum(cell != _FAILS for cell in known)
    parts = [_TITLE, _INTRO, f"{timed} of {len(known)} steps are compiled, proved and timed."]
    for heading, table in tables.items():
        parts += [f"## {heading}", _table(table)]
    if reasons:
        parts += [f"## {_WHY}", *(f"{', '.join(where)}: {r}" for r, where in reasons.items())]
    return "\n\n".join(parts) + "\n"


def _merged(table: Sequence[Sequence[str]], before: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """A table with the cells of one before that it hasn't; the columns are that one's."""
    head = before[0]
    known = {row[0]: dict(zip(head, row, strict=False)) for row in before[1:]}
    for row in table[1:]:
        mine = {name: cell for name, cell in zip(table[0], row, strict=True) if cell}
        known[row[0]] = {**known.get(row[0], {}), **mine}
    return [head, *([row.get(name, "") for name in head] for _, row in sorted(known.items()))]


def _computed(cell: str, models: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a cell, as :func:`failures` names it, is one of these models and chips."""
    model, *_, target = cell.split()
    return model in models and target in names


def _table(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    lines = [_line(head), _line(["---", *("---:" for _ in head[1:])])]
    return "\n".join([*lines, *map(_line, body)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# --- a written matrix ----------------------------------------------------------------------------


def read_tables(text: str) -> dict[str, list[list[str]]]:
    """The tables of a written matrix, each with its head, by the heading above them."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:].strip()
        elif line.startswith("|") and not line.startswith("| ---"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            found.setdefault(heading, []).append(cells)
    return found


def read_failures(text: str) -> dict[str, list[str]]:
    """Why cells of a written matrix have no time, by the reason."""
    _, heading, rest = text.partition(f"## {_WHY}\n")
    lines = [line for line in rest.splitlines() if line.strip()] if heading else []
    pairs = (line.partition(": ") for line in lines)
    return {reason: where.split(", ") for where, _, reason in pairs}


def out_of_date(
    text: str, found: Sequence[Entry], models: Sequence[str], names: Sequence[str]
) -> list[str]:
    """What is wrong with a written matrix; ``models`` and ``names`` are all there are, ``found``
    what was computed now.
    """
    tables = read_tables(text)
    wrong: list[str] = []
    for heading, phase in (("Decode", "decode"), ("Prefill", "prefill")):
        table = tables.get(heading, [[]])
        if table[0] != [_FIRST, *names]:
            shown_names = ", ".join(table[0][1:]) or "none"
            wrong.append(f"{heading}: its columns are {shown_names}, not {', '.join(names)}")
            continue
        written = {row[0]: dict(zip(table[0], row, strict=False)) for row in table[1:]}
        wrong += [
            f"{heading}: its row {name} is no model" for name in written if name not in models
        ]
        for entry in found:
            if entry.phase == phase:
                wrong += _worse(heading, entry, written)
    if not wrong:
        known = {row[0] for heading in ("Decode", "Prefill") for row in tables[heading][1:]}
        wrong += [f"it has no row for {name}" for name in models if name not in known]
    return wrong


def _worse(heading: str, entry: Entry, written: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Says that a step has no time any more."""
    before = written.get(entry.model, {}).get(entry.target, "")
    if entry.found.ps is None and before and shown(entry) != before:
        where = f"{entry.model} on {entry.target}"
        yield f"{heading}: {where} was '{before}' and now: {entry.found.why}"
