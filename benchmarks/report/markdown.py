"""What all tables share: lines of Markdown, and a sentence on where something was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def line(cells: Iterable[str]) -> str:
    """A row of a table; a stroke in a cell would end it."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def head(columns: Sequence[str], words: int = 1) -> str:
    """The first two lines of a table; so many columns hold words, the others numbers."""
    return line(columns) + "\n" + "|---" * words + "|---:" * (len(columns) - words) + "|"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A whole table."""
    return "\n".join([head(columns, words), *map(line, rows)])


def place(document: dict[str, Any]) -> str:
    """Host and date of a result file, as the beginning of a sentence."""
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['flags'])}"
    return f"{where}; {document['date'][:10]}" if "date" in document else where


def host_and_date(document: dict[str, Any]) -> str:
    """The same in short, for a picture."""
    return f"{document['machine']['cpu']}, {document['date'][:10]}"


def versions(engines: dict[str, dict[str, Any]]) -> str:
    """Each engine's versions, or why it took no part; alike ones once, by ``label`` or name."""
    found: dict[str, list[str]] = {}
    for name, engine in engines.items():
        found.setdefault(_versions(engine), []).append(engine.get("label", name))
    return "; ".join(f"{' and '.join(names)}: {what}" for what, names in found.items()) + "."


def _versions(engine: dict[str, Any]) -> str:
    if "versions" in engine:
        # llama.cpp's build lists what it was compiled for as "AVX2 = 1 | FMA = 1 |".
        pairs = (f"{name} {_listed(value)}" for name, value in engine["versions"].items())
        return ", ".join(pairs)
    # The whole error may name folders of the host; the file has it.
    return "not installed" if engine["absent"] else "failed"


def _listed(value: str) -> str:
    return " ".join(value.replace("= 1 |", "").split())
