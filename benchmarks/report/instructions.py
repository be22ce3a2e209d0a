"""The budget of instructions as a Markdown table."""

from __future__ import annotations

from typing import Any

from report import markdown


def table(document: dict[str, Any]) -> str:
    """What the budget was counted with, then a row a case."""
    rows = ([name, f"{count:,}"] for name, count in document["counts"].items())
    head = f"Code for {document['level']}, by LLVM {document['llvm']}."
    return f"{head}\n\n{markdown.table(['a turn of', 'instructions'], rows)}"
