"""Reading a machine file as a document: its text, its TOML, and the schema that it says it has."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from dure.errors import TargetError


def read_text(path: Path) -> str:
    """The file's text.  Raises :class:`~dure.errors.TargetError` where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TargetError(
            f"the machine file can't be read: {error}", where=str(path), fix="check the path"
        ) from error


def parse_document(text: str, where: str, schema: int, what: str) -> dict[str, Any]:
    """The tables of a machine file, whose schema must be the given one.

    ``where`` names the file in errors, ``what`` says what dure reads of that schema.  Raises
    :class:`~dure.errors.TargetError` for a text that isn't TOML or is of another schema.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise TargetError(
            f"the machine file isn't TOML: {error}", where=where, fix="mend the line that it names"
        ) from error
    found: object = data.get("schema")
    if isinstance(found, bool) or found != schema:
        raise TargetError(
            f"the schema of the machine file is {found!r}",
            where=where,
            rule=f"this version of dure reads {what} {schema}",
            fix=f"write schema = {schema}, or take the dure that the file was written for",
        )
    return data
