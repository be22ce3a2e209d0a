"""A number of a machine file: its value, its unit, where it comes from and how far to trust it.

A number without a source is refused, and so is a unit of the wrong kind: a size in hertz is a slip
of the pen, not a machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from dure.errors import TargetError

STATUSES = ("published", "derived", "guessed", "detected")
"""``published`` by the vendor or in a paper; ``derived`` from published numbers; ``guessed``, with
a low and a high beside the value; ``detected`` on the machine, so that the file holds no value."""

UNITS: Mapping[str, tuple[str, float]] = {
    "1": ("count", 1),
    "bit": ("bits", 1),
    **{
        f"{prefix}B": ("bytes", factor)
        for prefix, factor in (
            *(("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)),
            *(("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)),
        )
    },
    **{f"{p}Hz": ("frequency", f) for p, f in {"": 1, "M": 1e6, "G": 1e9}.items()},
    **{f"{p}B/s": ("bandwidth", f) for p, f in {"M": 1e6, "G": 1e9, "T": 1e12}.items()},
    "B/cycle": ("bytes a cycle", 1),
    "op/cycle": ("operations a cycle", 1),
    "cycle": ("cycles", 1),
    "GFLOP/s": ("operations a second", 1e9),
    "TFLOP/s": ("operations a second", 1e12),
    "kW": ("power", 1e3),
    **{f"{p}s": ("time", f) for p, f in {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1}.items()},
    "W": ("power", 1),
}
"""Unit -> its kind, and how many of the kind's base unit (1, bit, B, Hz, B/s, s, W) it is."""

_KEYS = frozenset({"value", "unit", "status", "source", "low", "high"})


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its unit and its source.

    ``value``, ``low`` and ``high`` are in ``unit``.  ``value`` is None only for a detected number
    that nobody has detected yet; ``low`` and ``high`` are there for guesses alone.
    """

    value: float | None
    unit: str
    status: str
    source: str
    low: float | None = None
    high: float | None = None

    @property
    def kind(self) -> str:
        """What the unit measures: ``count``, ``bits``, ``bytes``, ``frequency``, ..."""
        return UNITS[self.unit][0]

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def base(self) -> float:
        """The value in the kind's base unit (1, bit, B, Hz, B/s, s, W).

        Raises :class:`~dure.errors.TargetError` for a detected number without a value.
        """
        if self.value is None:
            raise TargetError(
                f"a number in {self.unit} that is detected on the machine has no value yet",
                where=self.source,
                rule="a detected number gets its value from the target that knows the machine",
                fix="take the target's describe(), with measure=True where it has to be measured",
            )
        return self.value * UNITS[self.unit][1]

    def with_base(self, value: float, where: str) -> Quantity:
        """This number with a detected value, given in the base unit."""
        if self.status != "detected":
            raise TargetError(
                f"{where} is {self.status}, not detected",
                rule="only a detected number is filled in",
            )
        _check_positive(value, where)
        return dataclasses.replace(self, value=value / UNITS[self.unit][1])


def read_quantity(entry: object, kinds: tuple[str, ...], where: str) -> Quantity:
    """A :class:`Quantity` from a table of a machine file, whose unit is one of ``kinds``.

    Raises :class:`~dure.errors.TargetError` that names ``where`` for whatever breaks a rule above.
    """
    if not isinstance(entry, Mapping):
        raise TargetError(
            "a number stands alone",
            where=where,
            rule="every number says its unit, its status and its source",
            fix='write { value = 1, unit = "GHz", status = "published", source = "..." }',
        )
    table = cast(Mapping[str, object], entry)
    unknown = sorted(table.keys() - _KEYS)
    if unknown:
        raise TargetError(
            f"a number has no field '{unknown[0]}'",
            where=where,
            fix="its fields are " + ", ".join(sorted(_KEYS)),
        )
    unit, status, source = (_text(table, key, where) for key in ("unit", "status", "source"))
    _check_unit(unit, kinds, where)
    if status not in STATUSES:
        raise TargetError(
            f"'{status}' is not a status of a number",
            where=where,
            fix="write one of " + ", ".join(STATUSES),
        )
    value, low, high = (_number(table, key, where) for key in ("value", "low", "high"))
    _check_status(status, (value, low, high), where)
    return Quantity(value, unit, status, source, low, high)


def _check_unit(unit: str, kinds: tuple[str, ...], where: str) -> None:
    fitting = [name for name, (kind, _) in UNITS.items() if kind in kinds]
    if unit not in fitting:
        raise TargetError(
            f"the unit '{unit}' doesn't fit",
            where=where,
            rule=f"this number is one of {' or '.join(kinds)}",
            fix="write one of " + ", ".join(fitting),
        )


def _check_status(status: str, numbers: tuple[float | None, ...], where: str) -> None:
    value, low, high = numbers
    if status == "detected":
        if any(number is not None for number in numbers):
            raise TargetError(
                "a detected number has a value in the file",
                where=where,
                rule="what is detected is found on the machine, when it is asked for",
                fix="leave the value out, or say published, derived or guessed",
            )
        return
    if value is None:
        raise TargetError(
            f"a {status} number has no value", where=where, fix="add `value = ...`, or say detected"
        )
    if status != "guessed":
        if low is not None or high is not None:
            raise TargetError(
                f"a {status} number has a low or a high",
                where=where,
                rule="only a guess carries low and high",
                fix="leave them out, or say guessed",
            )
        return
    if low is None or high is None or not low <= value <= high:
        raise TargetError(
            "a guess doesn't lie between its low and its high",
            where=where,
            rule="a guess carries low and high beside its value: low <= value <= high",
            fix="add both",
        )


def _text(table: Mapping[str, object], key: str, where: str) -> str:
    value = table.get(key)
    if isinstance(value, str) and value.strip():
        return value
    raise TargetError(
        f"a number has no {key}",
        where=where,
        rule="every number says its unit, its status and its source",
        fix=f'add {key} = "..."',
    )


def _number(table: Mapping[str, object], key: str, where: str) -> float | None:
    if key not in table:
        return None
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TargetError(f"the {key} is not a number", where=where, fix="write it without quotes")
    _check_positive(value, where)
    return value


def _check_positive(value: float, where: str) -> None:
    if not (0 < value < math.inf):
        raise TargetError(
            f"{value} is not a number of a machine", where=where, rule="it is positive and finite"
        )
