"""The score: how much of their published rooflines the chips of one side attain, over the other's.

``score.toml`` says which chips, steps and floors.  A chip's number is the average over its cells, a
side's the average over its chips.  Each cell is asked three times: with the chip as its file says,
and with all of its guesses at the slow and at the fast end (:mod:`dure.machine.ends`), as far as
measurements on the chip allow (:mod:`dure.models.tables.ends`); a fraction is of at most 1, as
guesses may be faster than what is published.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dure import targets
from dure.machine.chip import Chip
from dure.machine.ends import End, at_end
from dure.models.attainable import ceiling
from dure.models.batch import Batch, phase_of
from dure.models.tables.cells import Cell, Outcome, outcomes
from dure.models.tables.ends import Allowed, allowed
from dure.models.tables.rows import packaged

#: How a chip's guesses are taken: as the file says, all at the slow end, all at the fast one.
Guesses: TypeAlias = Literal["file", "low", "high"]
GUESSES: tuple[Guesses, ...] = ("file", "low", "high")
ENDS: tuple[End, ...] = ("low", "high")
#: How far guesses go to their ends, by chip and end.
Ends: TypeAlias = Mapping[tuple[str, End], Allowed]


@dataclass(frozen=True)
class Floor:
    """What a chip must reach with one sequence: ``least`` of its attainable ceiling or of its
    published peak.
    """

    model: str
    phase: str
    of: str
    least: float


@dataclass(frozen=True)
class Entry:
    """A chip on a side (``""``: shown only) with the steps that it counts with."""

    side: str
    target: str
    models: tuple[str, ...]
    dtype: str
    weights: str = ""


@dataclass(frozen=True)
class Rules:
    """``score.toml``."""

    entries: tuple[Entry, ...]
    batches: tuple[int, ...]
    contexts: Mapping[str, int]
    least: float
    floors: tuple[Floor, ...]
    sides: tuple[str, str]


@dataclass(frozen=True)
class Scored:
    """A cell of the score with its outcomes by how guesses are taken.

    ``counted``: whether it is part of its side's number.
    """

    entry: Entry
    cell: Cell
    counted: bool
    found: Mapping[Guesses, Outcome]

    @property
    def name(self) -> str:
        """What is said of it."""
        return f"{self.cell.name} in {self.cell.dtype}"

    def fraction(self, guesses: Guesses) -> float | None:
        """The fraction of the published roofline."""
        found = self.found.get(guesses)
        return None if found is None or found.fraction is None else min(1.0, found.fraction)

    @property
    def of_attainable(self) -> float | None:
        """The part of its own attainable ceiling that it reaches."""
        found, fraction = self.found.get("file"), self.fraction("file")
        return None if found is None or fraction is None else fraction / found.attainable


@dataclass(frozen=True)
class Score:
    """All cells, and what follows from them.  ``short`` cells are some of them only, ``ends`` how
    far guesses were moved.
    """

    rules: Rules
    cells: tuple[Scored, ...]
    short: bool = False
    ends: Ends = field(default_factory=dict[tuple[str, End], Allowed])

    def chip(self, target: str, guesses: Guesses = "file") -> float | None:
        """The average over a chip's counted cells; None while one is missing."""
        mine = [c for c in self.cells if c.entry.target == target and c.counted]
        return _average([c.fraction(guesses) for c in mine])

    def so_far(self, target: str) -> float | None:
        """The average over a chip's counted cells that have a time."""
        mine = [c.fraction("file") for c in self.cells if c.entry.target == target and c.counted]
        return _average([fraction for fraction in mine if fraction is not None])

    def side(self, side: str, guesses: Guesses = "file") -> float | None:
        """The average over a side's chips; None while one is missing."""
        names = dict.fromkeys(c.entry.target for c in self.cells if c.entry.side == side)
        return _average([self.chip(name, guesses) for name in names])

    def quotient(self, guesses: Guesses = "file") -> float | None:
        """The first side's number over the second's; None while one is missing."""
        first, second = (self.side(side, guesses) for side in self.rules.sides)
        return None if first is None or second is None else first / second

    @property
    def hinders(self) -> tuple[str, ...]:
        """Why the score doesn't count: cells without a time, below the least part of their
        attainable ceiling, or below a floor.
        """
        found = ["only some of the cells were computed"] if self.short else []
        for entry in (c for c in self.cells if c.counted and c.entry.side):
            found += _hinders(entry, self.rules)
        return tuple(found)

    @property
    def counts(self) -> bool:
        """Whether every cell and every chip is good enough."""
        return not self.hinders

    def json(self) -> dict[str, object]:
        """Everything as one JSON object."""
        return {
            "quotient": [self.quotient("low"), self.quotient("high")],
            "quotient_by_file": self.quotient(),
            "counts": self.counts,
            "hinders": list(self.hinders),
            "sides": {side: {g: self.side(side, g) for g in GUESSES} for side in self.rules.sides},
            "chips": {
                name: {
                    "side": side,
                    **{g: self.chip(name, g) for g in GUESSES},
                    "so_far": self.so_far(name),
                    "ends": {e: self.ends[name, e].json() for e in ENDS if (name, e) in self.ends},
                }
                for name, side in dict.fromkeys((c.entry.target, c.entry.side) for c in self.cells)
            },
            "cells": [_json(cell) for cell in self.cells],
        }


def _average(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None


def _hinders(cell: Scored, rules: Rules) -> Iterator[str]:
    found = cell.found.get("file")
    part, fraction = cell.of_attainable, cell.fraction("file")
    if found is None or part is None or fraction is None:
        yield f"{cell.name}: {'not computed' if found is None else found.why}"
        return
    if part < rules.least:
        asked = f"at least {rules.least:g} is asked"
        yield f"{cell.name}: {part:.3f} of its attainable ceiling, {asked}"
    batch = cell.cell.batch
    for floor in rules.floors:
        if (floor.model, floor.phase, 1) != (cell.cell.model, batch.phase, batch.sequences):
            continue
        reached, of = part, "its attainable ceiling"
        limits = ceiling(cell.cell.chip, cell.cell.dtype)
        if floor.of == "peak" and limits.compute_from == "laws":
            reached, of = fraction, "its published roofline"
        if reached < floor.least:
            yield f"{cell.name}: {reached:.3f} of {of}, the floor is {floor.least:g}"


def _json(scored: Scored) -> dict[str, object]:
    cell, found = scored.cell, scored.found.get("file")
    entry: dict[str, object] = {
        "side": scored.entry.side,
        "target": cell.chip.name,
        "model": cell.model,
        "phase": cell.batch.phase,
        "batch": cell.batch.sequences,
        "context": cell.batch.context,
        "dtype": cell.dtype,
        "weights": cell.weights or cell.dtype,
        "counted": scored.counted,
        "fraction_of_roofline": {g: scored.fraction(g) for g in GUESSES},
        "of_attainable": scored.of_attainable,
    }
    if found is not None:
        entry |= {
            "chips": found.devices,
            "ns": None if found.ps is None else found.ps / 1000,
            "bound": found.bound,
            "attainable": found.attainable,
            "confidence": found.confidence,
            "guesses": list(found.guesses),
            "why": found.why,
        }
    return entry


# --- the cells -----------------------------------------------------------------------------------


def rules(short: bool = False) -> Rules:
    """``score.toml``; ``short`` takes a few of its steps."""
    table = _table()
    few: dict[str, Any] = table["short"] if short else {}
    models = tuple(few.get("models", table["models"]))
    contexts = {
        phase: context
        for phase, context in table["contexts"].items()
        if phase in few.get("phases", table["contexts"])
    }
    instead: dict[str, Any] = table.get("instead", {})
    entries: list[Entry] = []
    for side in table["side"]:
        for name in side["targets"]:
            entries.append(Entry(side["name"], name, models, table["dtype"]))
            if name in instead:
                other = instead[name]
                stored: str = other["weights"]
                models_of = tuple(other["models"])
                entries.append(Entry(side["name"], name, models_of, table["dtype"], stored))
    return Rules(
        tuple(entries),
        tuple(few.get("batches", table["batches"])),
        contexts,
        table["least"],
        tuple(Floor(**floor) for floor in table["floor"]),
        (table["side"][0]["name"], table["side"][1]["name"]),
    )


@cache
def _table() -> dict[str, Any]:
    path = Path(__file__).with_name("score.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def questions(given: Rules, chips: Mapping[str, Chip] | None = None) -> list[Scored]:
    """The cells of the score, yet without outcomes; ``chips`` are others than the package's."""
    found: list[Scored] = []
    instead = {e.target for e in given.entries if _others(e, given)}
    for entry in given.entries:
        chip = (chips or {}).get(entry.target) or targets.chip(entry.target)
        # What counts instead is the last entry of its target.
        counted = entry.target not in instead or not _others(entry, given)
        for model in entry.models:
            for phase, context in given.contexts.items():
                for batch in given.batches:
                    made = Batch(phase_of(phase), batch, context)
                    cell = Cell(model, chip, made, entry.dtype, weights=entry.weights)
                    found.append(Scored(entry, cell, counted and bool(entry.side), {}))
    return found


def _others(entry: Entry, given: Rules) -> bool:
    """Whether another entry of its target counts instead of this one."""
    mine = [other for other in given.entries if other.target == entry.target]
    return len(mine) > 1 and mine[-1] is not entry


def measured_ends(
    asked: Sequence[Scored], jobs: int = 1, tried: Callable[[str], None] = lambda _: None
) -> Ends:
    """How far the guesses of the chips that count may go, by results measured on them; ``tried`` is
    told what is being tried.
    """
    chips = {entry.cell.chip.name: entry.cell.chip for entry in asked if entry.counted}
    found: dict[tuple[str, End], Allowed] = {}
    for name, chip in chips.items():
        rows = packaged(chip)
        for end in ENDS:
            said = f"{name}: guesses {{:.0%}} of the way to their {end} ends"
            found[name, end] = allowed(
                chip, end, rows, jobs, lambda part, said=said: tried(said.format(part))
            )
    return found


def ask(
    asked: Sequence[Scored],
    guesses: Sequence[Guesses] = GUESSES,
    jobs: int = 1,
    ends: Ends | None = None,
) -> Iterator[tuple[int, Guesses, Outcome]]:
    """The places of the cells with an outcome as it is done; what doesn't count is asked once.
    Guesses go as far as ``ends`` say, and else all the way.
    """
    chips: dict[tuple[str, Guesses], Chip] = {}
    todo: list[tuple[int, Guesses]] = []
    cells: list[Cell] = []
    for guess in guesses:
        for place, entry in enumerate(asked):
            if guess != "file" and not entry.counted:
                continue
            cell = entry.cell
            key = cell.chip.name, guess
            if key not in chips:
                chips[key] = cell.chip if guess == "file" else _moved(cell.chip, guess, ends)
            todo.append((place, guess))
            cells.append(replace(cell, chip=chips[key]))
    for number, found in outcomes(cells, jobs):
        yield (*todo[number], found)


def _moved(chip: Chip, end: End, ends: Ends | None) -> Chip:
    return at_end(chip, end, (ends or {}).get((chip.name, end), Allowed()).part)


def score(
    asked: Sequence[Scored],
    found: Iterable[tuple[int, Guesses, Outcome]],
    given: Rules,
    short: bool = False,
    ends: Ends | None = None,
) -> Score:
    """The score of cells and their outcomes."""
    results: list[dict[Guesses, Outcome]] = [{} for _ in asked]
    for place, guess, result in found:
        results[place][guess] = result
    cells = (replace(entry, found=mine) for entry, mine in zip(asked, results, strict=True))
    return Score(given, tuple(cells), short, ends or {})
