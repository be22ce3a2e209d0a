"""A chip with all of its guesses at one end: as slow as they allow, or as fast.

Which end of a guess is the slow one follows from what the number is: more of a rate, a size or a
count makes a chip faster, more of a duration or a granule slower; of the numbers in an engine's
laws, the laws say it.  Guesses that together make a published peak stay: the peak fixes their
product, and a chip with all of them at one end would be another chip.  So do a guessed peak, which
nothing runs at, and power.

Guesses may also go only a part of the way from the file's numbers to an end, all by as much on a
logarithmic scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import log2
from typing import Literal, TypeAlias

from dure.machine.chip import Chip, Engine
from dure.machine.chip_loader import with_numbers
from dure.machine.law import VARIABLES, Law
from dure.machine.quantity import Quantity

#: ``low`` is the slow end of every guess, ``high`` the fast one.
End: TypeAlias = Literal["low", "high"]

#: A tile op to ask laws about, and a dot that is large enough to reach an engine's rate.
_SAMPLE: Mapping[str, float] = {
    **dict.fromkeys(VARIABLES, 100.0),
    "m": 3.0,
    "elements": 65536.0,
    "rows": 256.0,
    "columns": 256.0,
    "axis": 256.0,
    "batch": 1.0,
    "bits": 16.0,
    "bytes": 131072.0,
    "run": 1024.0,
    "runs": 128.0,
    "rate": 1.0,
}
_LARGE: Mapping[str, float] = {**_SAMPLE, "m": 8192.0, "n": 8192.0, "k": 8192.0}
#: Numbers of which more is slower, whatever their unit.
_SLOWING = ("granule", "alignment", "reserved", "contention")
#: By how much a number is changed to see whether a peak rests on it, and how far that moves one.
_STEP, _MOVES = 1.1, 0.02


def at_end(chip: Chip, end: End, part: float = 1.0) -> Chip:
    """The chip with its guesses at one end, or this part of the way there (0 is the file, 1 the
    end); their status stays.
    """
    pinned = pinned_guesses(chip)
    moved: dict[str, Quantity] = {}
    for path, number in chip.quantities():
        if number.status != "guessed" or path in pinned:
            continue
        assert number.low is not None and number.high is not None
        slow, fast = number.low, number.high
        if more_is_slower(chip, path, number):
            slow, fast = fast, slow
        reached = _on_the_way(number, slow if end == "low" else fast, part)
        moved[path] = dataclasses.replace(number, value=reached)
    return with_numbers(chip, moved)


def _on_the_way(number: Quantity, end: float, part: float) -> float:
    """A part of the way to an end of a guess; whole numbers stay whole, powers of two are such."""
    value = number.value
    assert value is not None and number.low is not None and number.high is not None
    if part in (0.0, 1.0):
        return end if part else value
    steps = log2(value) + part * log2(end / value)
    kinds = (number.low, value, number.high)
    if not all(float(kind).is_integer() for kind in kinds):
        return 2.0**steps
    powers = all(log2(kind).is_integer() for kind in kinds)
    return 2.0 ** round(steps) if powers else float(round(2.0**steps))


def pinned_guesses(chip: Chip) -> frozenset[str]:
    """The guesses that a published peak rests on together, and those that no time rests on."""
    found: set[str] = set()
    for path, number in chip.quantities():
        if number.status != "guessed":
            continue
        parts = path.split(".")
        rests = parts[0] in ("peaks", "power")
        if parts == ["clock"]:
            rests = any("dot" in e.laws and e.clock is None for e in chip.engines.values())
        elif parts[0] == "engines":
            rests = _moves_peak(chip.engines[parts[1]], parts[2:], number)
        if rests:
            found.add(path)
    return frozenset(found)


def _moves_peak(engine: Engine, place: list[str], number: Quantity) -> bool:
    """Whether the rate of a large dot is proportional to a number of its engine."""
    law = engine.laws.get("dot")
    if law is None:
        return False
    if place == ["clock"]:
        return True
    if place[0] == "rates":
        return "rate" in law.names and engine.dot is not None and place[1] in engine.dot.types
    if place[0] != "numbers" or place[1] not in law.names:
        return False
    # Both ways: a number that only rounds sizes up may happen to move one of them.
    values = _numbers(engine)
    usual = law({**_LARGE, **values})
    more, less = (
        law({**_LARGE, **values, place[1]: number.base * by}) for by in (_STEP, 1 / _STEP)
    )
    return abs(more / usual - 1) > _MOVES and abs(less / usual - 1) > _MOVES


def more_is_slower(chip: Chip, path: str, number: Quantity) -> bool:
    """Whether a chip with more of a number takes longer."""
    parts = path.split(".")
    last = parts[-1]
    if len(parts) == 4 and parts[2] in ("numbers", "rates"):
        return _laws_say(chip.engines[parts[1]], parts[2], last, number)
    if len(parts) == 4 and parts[0] == "dma":
        law = chip.dma[parts[1]].efficiency
        numbers = {n: q.base for n, q in chip.dma[parts[1]].numbers.items()}
        # An efficiency is a part of a rate: less of it is slower.
        return law is not None and _more(law, numbers, last, number) < 0
    return last in _SLOWING or number.kind in ("time", "cycles")


def _laws_say(engine: Engine, table: str, name: str, number: Quantity) -> bool:
    """Whether an engine's ops take longer with more of a number of it."""
    if table == "rates":
        name = "rate"
    laws = [law for law in engine.laws.values() if name in law.names]
    return sum(_more(law, _numbers(engine), name, number) for law in laws) > 0


def _more(law: Law, numbers: Mapping[str, float], name: str, number: Quantity) -> float:
    """By which part a law gives more at a guess's high than at its low."""
    assert number.low is not None and number.high is not None
    scale = number.base / (number.value or 1.0)
    values = {**_SAMPLE, **numbers}
    low, high = (law({**values, name: end * scale}) for end in (number.low, number.high))
    return (high - low) / max(low, high, 1e-30)


def _numbers(engine: Engine) -> dict[str, float]:
    return {name: number.base for name, number in engine.numbers.items()}
