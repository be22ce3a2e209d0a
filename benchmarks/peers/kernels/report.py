"""A result file of kernels as a Markdown table: a line for each goal of each row."""

from __future__ import annotations

from typing import Any

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (0.0, "ns"))


def table(document: dict[str, Any]) -> str:
    """The machine, the engines, the bandwidth, then what dure reaches beside each goal."""
    machine = document["machine"]
    head = (
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['flags'])}; "
        f"{document['date'][:10]}; medians of {document['rounds']} interleaved rounds."
    )
    if document["settings"]["smallest"]:
        return "\n\n".join([_engines(document), _agreement(document)])
    rates = document["bandwidth"]["medians"].items()
    read = ", ".join(f"{rate / 1e9:.1f} ({threads} threads)" for threads, rate in rates)
    lines = [
        "| kernel | threads | dure | | beside | takes | reached | goal [floor] | |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for row in document["rows"] for line in _lines(row, document)),
    ]
    bandwidth = f"Read bandwidth in GB/s: {read}."
    return "\n\n".join([head, _engines(document), bandwidth, "\n".join(lines)])


def _agreement(document: dict[str, Any]) -> str:
    """The smallest sizes: how far each engine is from NumPy's reference, and no claim on time."""
    names = [name for name in document["engines"] if name != "bandwidth"]
    lines = [
        "| largest difference, as a part of the largest magnitude | threads | "
        + " | ".join(names)
        + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in document["rows"]:
        cells = [_differs(row, name) for name in names]
        lines.append(f"| {row['name']} | {row['threads']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _differs(row: dict[str, Any], engine: str) -> str:
    if engine in row["errors"]:
        return _first_line(row["errors"][engine])
    if engine in row["differences"]:
        return f"{row['differences'][engine]:.1e}"
    return "ran" if engine in row["samples"] else ""


def _first_line(error: str) -> str:
    """An error as it fits a table; the file has the whole."""
    return error.split("\n", 1)[0].replace("|", "/")


def _engines(document: dict[str, Any]) -> str:
    """Every engine's versions, or why it took no part."""
    found: list[str] = []
    for name, engine in document["engines"].items():
        if "versions" in engine:
            versions = ", ".join(f"{k} {v}" for k, v in engine["versions"].items())
        else:
            versions = "not installed" if engine["absent"] else engine["error"]
        if name != "bandwidth":
            found.append(f"{name}: {versions}")
    return "; ".join(found) + "."


def _lines(row: dict[str, Any], document: dict[str, Any]) -> list[str]:
    ours = row["medians"].get("dure")
    if ours is None:
        reason = _first_line(row["errors"].get("dure", "not timed"))
        return [f"| {row['name']} | {row['threads']} | {reason} | | | | | | |"]
    start = f"| {row['name']} | {row['threads']} | {_time(ours)} | {_rate(row, ours)} |"
    goals = row["case"]["goals"]
    if not goals:
        return [f"{start} | | | | |"]
    return [f"{start} {_beside(row, goal, document)}" for goal in goals]


def _beside(row: dict[str, Any], goal: dict[str, Any], document: dict[str, Any]) -> str:
    """The rest of a line: whom dure is held against, what it reached, and what it should."""
    against = goal["against"]
    found = reached(row, goal, document["bandwidth"]["medians"])
    wanted = _number(against, goal["goal"])
    if goal["floor"] is not None:
        wanted += f" [{_number(against, goal['floor'])}]"
    if found is None:
        absent = "versions" not in document["engines"].get(against, {})
        reason = "absent" if absent else _first_line(row["errors"].get(against, "not timed"))
        return f"{against} | {reason} | | {wanted} | |"
    theirs = row["medians"].get(against)
    takes = "" if theirs is None else _time(theirs)
    number = _number(against, found)
    return f"{against} | {takes} | {number} | {wanted} | {verdict(goal, found)} |"


def reached(row: dict[str, Any], goal: dict[str, Any], bandwidth: dict[Any, float]) -> float | None:
    """The number that the goal is about; None where it isn't known."""
    ours, against = row["medians"]["dure"], goal["against"]
    if against == "seconds":
        return ours
    if against == "bandwidth":
        rates = {int(threads): rate for threads, rate in bandwidth.items()}
        limit = rates.get(row["threads"])
        return None if limit is None else row["bytes"] / ours / limit
    theirs = row["medians"].get(against)
    return None if theirs is None else theirs / ours


def verdict(goal: dict[str, Any], found: float) -> str:
    """Whether the goal is met, or at least the floor kept."""
    sign = -1 if goal["against"] == "seconds" else 1
    if sign * found >= sign * goal["goal"]:
        return "goal"
    floor = goal["floor"]
    return "floor" if floor is not None and sign * found >= sign * floor else "below"


def _number(against: str, value: float) -> str:
    if against == "seconds":
        return _time(value)
    return f"{100 * value:.0f} %" if against == "bandwidth" else f"{value:.2f}x"


def _time(seconds: float) -> str:
    size, unit = next(pair for pair in _UNITS if seconds >= pair[0])
    return f"{seconds / (size or 1e-9):.3g} {unit}"


def _rate(row: dict[str, Any], seconds: float) -> str:
    if row["flops"]:
        return f"{row['flops'] / seconds / 1e9:.1f} GFLOP/s"
    return f"{row['bytes'] / seconds / 1e9:.1f} GB/s" if row["bytes"] > 1024 else ""
