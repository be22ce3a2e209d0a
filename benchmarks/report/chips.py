"""A result file of single products on every chip as a Markdown table and as a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report import markdown
from report.bars import Bar, Panel
from report.bars import chart as drawn


def columns(streams: Sequence[str]) -> list[str]:
    """What :func:`row` has; ``streams`` are the dims of the products of one row."""
    return ["chip", "products, of the peak", *streams, "compile, s", "simulate, ms"]


def row(name: str, found: dict[str, Any]) -> list[str]:
    """A chip; a stream's part of what is attainable, in brackets with its fixed parts added."""
    peaks = ", ".join(f"{e['dtype']} {e['fraction']:.3f}" for e in found["peak"].values())
    streams = (
        f"{e['attained']:.3f} ({e['attained_with_fixed']:.3f})" for e in found["stream"].values()
    )
    made = found["compile"]
    return [name, peaks, *streams, f"{made['compile_s']:.2f}", f"{1e3 * made['sim_s']:.0f}"]


def table(document: dict[str, Any]) -> str:
    """The host, then a row a chip."""
    rows = [row(name, found) for name, found in document["chips"].items()]
    text = markdown.table(columns(_streams(document)), rows)
    return f"{markdown.place(document)}.\n\n{text}"


def chart(document: dict[str, Any]) -> str:
    """The part of the peak, and of what is attainable in each stream, by chip, as SVG."""
    peaks = {
        name: max(e["fraction"] for e in found["peak"].values())
        for name, found in document["chips"].items()
    }
    panels = [panel("best product, of its peak", peaks)]
    for dims in _streams(document):
        chips = document["chips"].items()
        parts = {name: found["stream"][dims]["attained"] for name, found in chips}
        panels.append(panel(f"{dims}, of attainable", parts))
    return drawn("What programs reach on every chip, simulated", {"chip": panels})


def panel(title: str, parts: dict[str, float | None]) -> Panel:
    """A bar a chip, beside a line at the whole."""
    bars = [Bar(name, p, "-" if p is None else f"{p:.3f}") for name, p in parts.items()]
    return Panel(title, bars, 1.0)


def _streams(document: dict[str, Any]) -> list[str]:
    return list(next(iter(document["chips"].values()))["stream"])
