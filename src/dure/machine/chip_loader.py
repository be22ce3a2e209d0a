"""From the ``machine.toml`` of a chip (schema 2) to a :class:`~dure.machine.chip.Chip`.

Whatever is wrong with a file, down to an engine whose law divides by zero, is a
:class:`~dure.errors.TargetError` that says where in the file, which rule, and a change that would
work.  This module imports pydantic: import it where a chip is wanted, not before.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from dure.errors import TargetError
from dure.machine.chip import SCHEMA, Chip
from dure.machine.chip_checks import check_chip
from dure.machine.document import parse_document, read_text
from dure.machine.quantity import UNITS, Quantity

_FIXES = {
    "missing": 'add it; a number is { value = ..., unit = "...", status = "...", source = "..." }',
    "extra_forbidden": "leave it out, or check how it is spelt",
}
_PLURALS = {
    "memory": "memories",
    "engine": "engines",
    "fabric": "fabrics",
    "link": "links",
    "peak": "peaks",
    "group": "groups",
}
_WRITTEN = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*")


def load_chip(path: Path) -> Chip:
    """The chip that a file describes."""
    return parse_chip(read_text(path), str(path))


def parse_chip(text: str, where: str) -> Chip:
    """The chip that a text describes; ``where`` names it in errors."""
    data = parse_document(text, where, SCHEMA, "chips of schema")
    return _build(data, where)


def with_overrides(chip: Chip, overrides: Mapping[str, str]) -> Chip:
    """The chip with other numbers, by dotted path: ``{"memories.hbm.bandwidth": "2TB/s"}``.

    ``memory.`` may stand for ``memories.``, and so on.  The new numbers have the status
    ``overridden`` and say in their source what the file said.  Raises
    :class:`~dure.errors.TargetError` for a path that isn't there, a unit that doesn't fit, and
    where the chip is no chip any more.
    """
    for path, text in overrides.items():
        chip = _override(chip, _whole_path(path), text)
    return chip


def with_numbers(chip: Chip, numbers: Mapping[str, Quantity]) -> Chip:
    """The chip with other numbers, whole with unit, status and source, by dotted path.

    Raises :class:`~dure.errors.TargetError` where the chip is no chip any more.
    """
    tables = _tables(chip)
    for path, number in numbers.items():
        tables = _replaced(tables, path, number)
    return _build(tables, chip.name)


def _override(chip: Chip, path: str, text: str) -> Chip:
    known = dict(chip.quantities())
    if path not in known:
        near = difflib.get_close_matches(path, known, n=3, cutoff=0.3) or sorted(known)[:8]
        raise TargetError(
            f"{chip.name} has no number {path}",
            where=f"--set {path}={text}",
            rule="numbers have the names that `dure targets show` prints",
            fix="one of " + ", ".join(near),
        )
    old = known[path]
    value, unit = _written(text, old, f"--set {path}={text}")
    was = f"{old.value:g} {old.unit}" if old.unit != "1" else f"{old.value:g}"
    said = f"set by the user; the file says {was} ({old.status}: {old.source})"
    entry = {"value": value, "unit": unit, "status": "published", "source": said}
    checked = _build(_replaced(_tables(chip), path, entry), f"--set {path}={text}")
    new = dataclasses.replace(dict(checked.quantities())[path], status="overridden")
    return _build(_replaced(_tables(chip), path, new), f"--set {path}={text}")


def _whole_path(path: str) -> str:
    first, _, rest = path.strip().partition(".")
    return f"{_PLURALS.get(first, first)}.{rest}" if rest else first


def _written(text: str, old: Quantity, where: str) -> tuple[float, str]:
    """A number and its unit as a user writes them; a count needs no unit."""
    found = _WRITTEN.fullmatch(text)
    try:
        value = float(found[1]) if found else None
    except ValueError:
        value = None
    unit = (found[2] if found else "") or ("1" if old.unit == "1" else "")
    if value is None or unit not in UNITS:
        raise TargetError(
            f"'{text}' isn't a number with its unit",
            where=where,
            rule="a number is written with its unit, as in 2TB/s",
            fix=f"write it in {old.unit}, as {old.value:g}{old.unit if old.unit != '1' else ''}",
        )
    return value, unit


def _tables(value: object) -> Any:
    """A model as the nested tables that it is validated from; numbers and laws stay objects."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {f.alias or n: _tables(getattr(value, n)) for n, f in fields.items()}
    if isinstance(value, dict):
        return {k: _tables(v) for k, v in cast(dict[str, object], value).items()}
    return value


def _replaced(table: dict[str, Any], path: str, entry: object) -> dict[str, Any]:
    """The tables with another entry at a dotted path."""
    first, _, rest = path.partition(".")
    return {**table, first: _replaced(table[first], rest, entry) if rest else entry}


def _build(data: Mapping[str, object], where: str) -> Chip:
    try:
        chip = Chip.model_validate(data)
    except ValidationError as error:
        raise _translated(error, where) from error
    check_chip(chip, where)
    return chip


def _translated(error: ValidationError, where: str) -> TargetError:
    """The first thing that pydantic found, as dure says it."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    at = f"{where}: {place}" if place else where
    carried = first.get("ctx", {}).get("error")
    cause = carried.__cause__ if isinstance(carried, ValueError) else None
    if isinstance(cause, TargetError):
        return TargetError(cause.what, where=at, rule=cause.rule, fix=cause.fix)
    last = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "the file")
    kind = first["type"]
    what = {
        "missing": f"'{last}' is missing"
        + (" an entry" if isinstance(first["loc"][-1], int) else ""),
        "extra_forbidden": f"the schema has no '{last}' here",
    }.get(kind, f"'{last}' doesn't fit the schema: {first['msg']}")
    return TargetError(
        what,
        where=at,
        rule=f"schema {SCHEMA} of a machine file (docs/machine-file.md)",
        fix=_FIXES.get(kind, "write what the schema asks for"),
    )
