"""A result file as a Markdown table and as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GIGABYTE = 1e9
COLOURS = {
    "dure": "#c8102e",
    "llama.cpp": "#4c6a92",
    "llama.cpp-q4_0": "#7f9dc0",
    "openvino": "#5f8f6a",
    "onnxruntime": "#b98b3e",
}


def table(document: dict[str, Any]) -> str:
    """The machine, then for each model medians, ratios to the best peer and the bandwidth."""
    machine = document["machine"]
    head = (
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['flags'])}; "
        f"{document['date'][:10]}; medians of {document['settings']['rounds']} interleaved rounds."
    )
    return "\n\n".join([head, *(_model(name, data) for name, data in document["models"].items())])


def _model(name: str, data: dict[str, Any]) -> str:
    columns = [*data["measures"], "first_token"]
    labels = [*data["measures"].values(), "start to first token"]
    lines = [
        f"**{name}** ({data['file_bytes'] / 1e6:.0f} MB), tokens/s",
        "",
        "| engine | " + " | ".join(labels) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for result in data["engines"].values():
        if "medians" not in result:
            reason = "not installed" if result["absent"] else "does not run this model"
            lines.append(f"| {result['label']} | {reason} |" + " |" * (len(columns) - 1))
            continue
        cells = [_cell(column, result["medians"].get(column)) for column in columns]
        lines.append(f"| {result['label']} | " + " | ".join(cells) + " |")
    lines += _ratios(data["engines"], columns)
    lines += ["", *_bandwidth(data)]
    return "\n".join(lines)


def _bandwidth(data: dict[str, Any]) -> list[str]:
    """A sentence on the memory, and one on how near to it each engine's decode comes."""
    names = {"1gb": "1 GB", "model_size": "the model's size"}
    rates = [
        f"{rate / GIGABYTE:.1f} ({names[key.rsplit('_', 2)[0]]}, {key.rsplit('_', 2)[1]} threads)"
        for key, rate in data["bandwidth"]["medians"].items()
    ]
    if not rates:
        return []
    lines = [f"Read bandwidth in GB/s: {', '.join(rates)}."]
    lines.append(f"A token reads {data['bytes_per_token'] / 1e6:.1f} MB; decode's part of 1 GB's:")
    shares = [
        f"{data['engines'][engine]['label']} {100 * values['decode/1gb']:.0f} %"
        for engine, values in data["fraction_of_bandwidth"].items()
        if "decode/1gb" in values
    ]
    return [*lines, "; ".join(shares) + "."]


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if column == "first_token" else f"{value:,.0f}"


def best_peer(engines: dict[str, Any], column: str) -> float | None:
    """The best peer's median: the largest rate, or the shortest time."""
    values = [
        result["medians"][column]
        for engine, result in engines.items()
        if engine != "dure" and column in result.get("medians", {})
    ]
    if not values:
        return None
    return min(values) if column == "first_token" else max(values)


def _ratios(engines: dict[str, Any], columns: list[str]) -> list[str]:
    ours = engines.get("dure", {}).get("medians", {})
    if not ours:
        return []
    cells: list[str] = []
    for column in columns:
        best = best_peer(engines, column)
        if best is None or column not in ours:
            cells.append("-")
        elif column == "first_token":
            cells.append(f"{best / ours[column]:.2f}x")
        else:
            cells.append(f"{ours[column] / best:.2f}x")
    return ["| *dure against the best peer* | " + " | ".join(cells) + " |"]


def chart(document: dict[str, Any], picture: Path) -> None:
    """One row of panels a model, one panel a measure, one bar an engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = document["models"]
    columns = list(next(iter(models.values()))["measures"])
    figure, axes = pyplot.subplots(
        len(models), len(columns), figsize=(3.1 * len(columns), 2.6 * len(models)), squeeze=False
    )
    for row, (name, data) in zip(axes, models.items(), strict=True):
        for panel, column in zip(row, columns, strict=True):
            _panel(panel, data["measures"][column], data["engines"], column)
        row[0].set_ylabel(name, fontsize=9, fontweight="bold")
        for panel in row[1:]:
            panel.set_yticklabels([])
    figure.suptitle(f"tokens/s, {document['machine']['cpu']}, {document['date'][:10]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


def _panel(panel: Any, title: str, engines: dict[str, Any], column: str) -> None:
    shown = {name: result for name, result in engines.items() if "medians" in result}
    medians = [result["medians"].get(column) for result in shown.values()]
    values = [median or 0.0 for median in medians]
    labels = [result["label"] for result in shown.values()]
    colours = [COLOURS.get(name, "#777777") for name in shown]
    bars = panel.barh(range(len(shown)), values, color=colours)
    marks = ["-" if median is None else f"{median:,.0f}" for median in medians]
    panel.bar_label(bars, marks, fontsize=7, padding=2)
    panel.set_yticks(range(len(shown)), labels, fontsize=7)
    panel.set_xticks([])
    panel.set_xlim(0, 1.25 * max([*values, 1.0]))
    panel.invert_yaxis()
    panel.set_title(title, fontsize=8)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
