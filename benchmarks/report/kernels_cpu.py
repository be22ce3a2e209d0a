"""A result file of kernels as a Markdown table: a line for each goal of each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from report import markdown
from report.bars import BAD, FAIR, GOOD, Bar, Panel
from report.bars import chart as drawn

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (0.0, "ns"))
_COLUMNS = ("kernel", "threads", "dure", "", "beside", "takes", "reached", "goal [floor]", "")
_COLOURS = {"goal": GOOD, "floor": FAIR, "below": BAD}


def table(document: dict[str, Any]) -> str:
    """The machine, the engines, the bandwidth, then what dure reaches beside each goal."""
    engines = {name: e for name, e in document["engines"].items() if name != "bandwidth"}
    head = f"{markdown.place(document)}; medians of {document['rounds']} interleaved rounds."
    if document["settings"]["smallest"]:
        return f"{markdown.versions(engines)}\n\n{_agreement(document, list(engines))}"
    rates = document["bandwidth"]["medians"].items()
    read = ", ".join(f"{rate / 1e9:.1f} ({threads} threads)" for threads, rate in rates)
    rows = (line for row in document["rows"] for line in _lines(row, document))
    return "\n\n".join(
        [
            head,
            markdown.versions(engines),
            f"Read bandwidth in GB/s: {read}.",
            _counts(document),
            markdown.table(_COLUMNS, rows),
        ]
    )


def chart(document: dict[str, Any]) -> str | None:
    """A panel a number of threads: the part of each goal that is reached, as SVG.

    None for the smallest sizes, which make no claim on time.
    """
    if document["settings"]["smallest"]:
        return None
    compared = list(_compared(document))
    labels = list(dict.fromkeys(_label(row, goal) for row, goal, _ in compared))
    threads = list(dict.fromkeys(row["threads"] for row, _, _ in compared))
    panels: list[Panel] = []
    for count in threads:
        bars = {label: Bar(label, None, "") for label in labels}
        for row, goal, found in compared:
            if row["threads"] == count:
                part = goal["goal"] / found if _at_most(goal) else found / goal["goal"]
                label, colour = _label(row, goal), _COLOURS[verdict(goal, found)]
                # More than three times the goal is drawn as three, so that the others are seen.
                bars[label] = Bar(label, min(part, 3.0), f"{part:.2f}", colour)
        panels.append(Panel(f"{count} threads", list(bars.values()), 1.0))
    title = f"times the goal, {markdown.host_and_date(document)}"
    return drawn(title, {"kernel, beside": panels})


def _label(row: dict[str, Any], goal: dict[str, Any]) -> str:
    return f"{row['name']}, {goal['against']}"


def _compared(
    document: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    """Every row with each of its goals that can be judged, and what is reached."""
    for row in document["rows"]:
        for goal in row["case"]["goals"] if "dure" in row["medians"] else ():
            found = reached(row, goal, document["bandwidth"]["medians"])
            if found is not None:
                yield row, goal, found


def _counts(document: dict[str, Any]) -> str:
    found = Counter(verdict(goal, value) for _, goal, value in _compared(document))
    return (
        f"Of {found.total()} comparisons {found['goal']} reach the goal, {found['floor']} more "
        f"keep the floor, and {found['below']} are below it."
    )


def _agreement(document: dict[str, Any], names: list[str]) -> str:
    """The smallest sizes: how far each engine is from NumPy's reference, and no claim on time."""
    columns = ["largest difference, as a part of the largest magnitude", "threads", *names]
    rows = (
        [row["name"], str(row["threads"]), *(_differs(row, name) for name in names)]
        for row in document["rows"]
    )
    return markdown.table(columns, rows)


def _differs(row: dict[str, Any], engine: str) -> str:
    if engine in row["errors"]:
        return _first_line(row["errors"][engine])
    if engine in row["differences"]:
        return f"{row['differences'][engine]:.1e}"
    return "ran" if engine in row["samples"] else ""


def _first_line(error: str) -> str:
    """An error as it fits a table; the file has the whole."""
    return error.split("\n", 1)[0]


def _lines(row: dict[str, Any], document: dict[str, Any]) -> list[list[str]]:
    """The row once for each of its goals."""
    ours, start = row["medians"].get("dure"), [row["name"], str(row["threads"])]
    if ours is None:
        reason = _first_line(row["errors"].get("dure", "not timed"))
        return [[*start, reason, *[""] * 6]]
    start += [_time(ours), _rate(row, ours)]
    goals = row["case"]["goals"]
    if not goals:
        return [[*start, *[""] * 5]]
    return [[*start, *_beside(row, goal, document)] for goal in goals]


def _beside(row: dict[str, Any], goal: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """The rest of a line: whom dure is held against, what it reached, and what it should."""
    against = goal["against"]
    found = reached(row, goal, document["bandwidth"]["medians"])
    wanted = _number(against, goal["goal"])
    if goal["floor"] is not None:
        wanted += f" [{_number(against, goal['floor'])}]"
    if found is None:
        absent = "versions" not in document["engines"].get(against, {})
        reason = "absent" if absent else _first_line(row["errors"].get(against, "not timed"))
        return [against, reason, "", wanted, ""]
    theirs = row["medians"].get(against)
    takes = "" if theirs is None else _time(theirs)
    return [against, takes, _number(against, found), wanted, verdict(goal, found)]


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
    sign = -1 if _at_most(goal) else 1
    if sign * found >= sign * goal["goal"]:
        return "goal"
    floor = goal["floor"]
    return "floor" if floor is not None and sign * found >= sign * floor else "below"


def _at_most(goal: dict[str, Any]) -> bool:
    """Whether less is better."""
    return goal["against"] == "seconds"


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
