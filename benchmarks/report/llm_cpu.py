"""A result file of LLM engines as a Markdown table and as a bar chart."""

from __future__ import annotations

from typing import Any

from report import markdown
from report.bars import OTHER, OURS, Bar, Panel
from report.bars import chart as drawn

GIGABYTE = 1e9
COLOURS = {
    "dure": OURS,
    "llama.cpp": "#4c6a92",
    "llama.cpp-q4_0": "#7f9dc0",
    "openvino": "#5f8f6a",
    "onnxruntime": "#b98b3e",
}
#: Measure -> goal and floor, as times the best peer's.
GOALS = {
    "decode_1_thread": (1.8, 1.5),
    "decode": (2.0, 1.6),
    "decode_batch_8": (3.5, 2.5),
}
#: The same of decoding after a prompt of so many tokens and more.
LONG, LONG_GOALS = 4096, {"decode": (1.5, 1.2)}
#: The same of a prompt of 512 tokens, by what the host multiplies bytes with.
PREFILL_GOALS = {"amx_int8": (2.5, 1.2), "avx512_vnni": (1.7, 1.2), "avx_vnni": (1.7, 1.2)}


def table(document: dict[str, Any]) -> str:
    """The machine, then for each model medians, ratios to the best peer and the bandwidth."""
    rounds, context = (document["settings"][name] for name in ("rounds", "context"))
    head = (
        f"{markdown.place(document)}; medians of {rounds} interleaved rounds, decoding after "
        f"prompts of {context:,} tokens."
    )
    goals = LONG_GOALS if context >= LONG else _goals(document["machine"]["flags"])
    models = [_model(name, data, goals) for name, data in document["models"].items()]
    return "\n\n".join([head, *models])


def _goals(flags: list[str]) -> dict[str, tuple[float, float]]:
    """The goals of a host with these instructions."""
    prefill = next((goal for flag, goal in PREFILL_GOALS.items() if flag in flags), None)
    return GOALS if prefill is None else {**GOALS, "prefill_512": prefill}


def _model(name: str, data: dict[str, Any], goals: dict[str, tuple[float, float]]) -> str:
    measures = dict(data["measures"])
    if any("first_token" in result.get("medians", {}) for result in data["engines"].values()):
        measures["first_token"] = "start to first token"
    columns, labels = list(measures), list(measures.values())
    rows: list[list[str]] = []
    for result in data["engines"].values():
        if "medians" not in result:
            reason = "not installed" if result["absent"] else "does not run this model"
            rows.append([result["label"], reason, *[""] * (len(columns) - 1)])
            continue
        cells = (_cell(column, result["medians"].get(column)) for column in columns)
        rows.append([result["label"], *cells])
    rows += _ratios(data["engines"], columns)
    if len(data["engines"]) > 1:
        texts = {column: f"{goal:.1f}x [{floor:.1f}x]" for column, (goal, floor) in goals.items()}
        rows.append(["*goal [floor]*", *(texts.get(column, "") for column in columns)])
    parts = [
        f"**{name}** ({data['file_bytes'] / 1e6:.0f} MB), tokens/s",
        markdown.table(["engine", *labels], rows),
        "\n".join(_bandwidth(data)),
        markdown.versions(data["engines"]),
    ]
    return "\n\n".join(part for part in parts if part)


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


def _ratios(engines: dict[str, Any], columns: list[str]) -> list[list[str]]:
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
    return [["*dure against the best peer*", *cells]]


def chart(document: dict[str, Any]) -> str:
    """One row of panels a model, one panel a measure, one bar an engine, as SVG."""
    rows = {
        name: [_panel(data, column) for column in data["measures"]]
        for name, data in document["models"].items()
    }
    return drawn(f"tokens/s, {markdown.host_and_date(document)}", rows)


def _panel(data: dict[str, Any], column: str) -> Panel:
    bars: list[Bar] = []
    for engine, result in data["engines"].items():
        if "medians" in result:
            value = result["medians"].get(column)
            colour = COLOURS.get(engine, OTHER)
            bars.append(Bar(result["label"], value, _cell(column, value), colour))
    return Panel(data["measures"][column], bars)
