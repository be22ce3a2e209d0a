"""A result file of engines beside their reference as a Markdown table."""

from __future__ import annotations

from typing import Any

from report import markdown


def table(document: dict[str, Any]) -> str:
    """The host, then a row a model and engine."""
    columns = (
        *("model", "engine", "tokens, window", "top-1 agreement", "mean KL", "largest KL"),
        *("perplexity", "the reference's"),
    )
    rows = [_row(row) for row in document["rows"]]
    text = markdown.table(columns, rows, words=3)
    return f"{markdown.place(document)}.\n\n{text}"


def _row(row: dict[str, Any]) -> list[str]:
    start = [row["model"], row["engine"]]
    if "error" in row:
        return [*start, "not installed" if row["absent"] else "failed", *[""] * 5]
    return [
        *(*start, f"{row['tokens']:,}, {row['window']}", f"{100 * row['top1_agreement']:.1f} %"),
        *(f"{row['mean_kl']:.4f}", f"{row['max_kl']:.3f}", f"{row['perplexity']:.2f}"),
        f"{row['reference_perplexity']:.2f}",
    ]
