"""A result file of whole models' steps on every chip as a Markdown table and as a bar chart."""

from __future__ import annotations

from typing import Any

from report import markdown
from report.bars import chart as drawn
from report.chips import panel

COLUMNS = (
    *("chip", "step", "of what", "part", "devices", "ms", "compile, s", "simulate, s", "GB"),
    "times ONNXim",
)
"""What :func:`row` has."""


def row(target: str, step: str, made: dict[str, Any]) -> list[str]:
    """A step on a chip, or why it has no time."""
    if "error" in made:
        return [target, step, str(made["error"])[:120], *[""] * (len(COLUMNS) - 3)]
    return [
        *(target, step, made["fraction_of"], f"{made['fraction']:.3f}", str(made["chips"])),
        *(f"{made['ns'] / 1e6:,.3f}", f"{made['config_to_time_s']:.1f}"),
        *(f"{made['simulate_s']:.2f}", f"{made['memory_bytes'] / 1e9:.2f}"),
        f"{made['onnxim']['times_faster']:,.0f}" if "onnxim" in made else "",
    ]


def table(document: dict[str, Any]) -> str:
    """The host, then a row a chip and step."""
    rows = (
        row(target, step, made)
        for target, steps in document["chips"].items()
        for step, made in steps.items()
    )
    return f"{markdown.place(document)}.\n\n{markdown.table(COLUMNS, rows, words=3)}"


def chart(document: dict[str, Any]) -> str:
    """A panel a step: its part of what is attainable or published, by chip, as SVG."""
    chips = document["chips"]
    steps = dict.fromkeys(step for found in chips.values() for step in found)
    panels = [
        panel(step, {name: found.get(step, {}).get("fraction") for name, found in chips.items()})
        for step in steps
    ]
    return drawn("What whole models' steps attain on every chip, simulated", {"chip": panels})
