"""The matrix of kernels and chips as text, and the check that a written one is in date.

A written matrix is in date in form if its tables have today's columns and rows, and no cell that it
calls right has come to fail; times may have changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dure.library.matrix import Cell
from dure.library.suite import ITEMS, Case

Key = tuple[str, str]

_TITLE = "# Kernels on every target"
_INTRO = """\
Written by `dure kernels --markdown docs/kernels.md`; `dure kernels --short` repeats it in small.

A case of the suite (`dure.library.suite`) is right on a chip if, at each of its sizes, odd and tiny
ones among them, it compiles to a machine program, the sanitizer proves the program over all
interleavings, and the program computes on real bytes what float64 NumPy says, within the tolerance
of the operands' type or of the one that the chip converts them to; and if the case's full-size
operator compiles with dure's choice of tiles, is proved, and is timed. Then its cell is that time;
else it names the stage that failed. On the CPU the interpreter and the compiled code both agree
with NumPy, nothing is left to prove, and the time is what the replay with caches as memories
predicts from the measured rates of the machine that wrote this page."""
_FIRST = ("case", "full size")


def seconds(ps: int) -> str:
    """A time with three digits."""
    for unit, size in (("s", 10**12), ("ms", 10**9), ("us", 10**6)):
        if ps >= size:
            return f"{ps / size:.3g} {unit}"
    return f"{ps / 1000:.3g} ns"


def shown(cell: Cell | None) -> str:
    """A cell's text."""
    if cell is None:
        return ""
    if cell.failed:
        return f"**{cell.failed}**"
    if cell.ps is None:
        return "values (pinned)" if cell.note else "values"
    return seconds(cell.ps)


def by_key(cells: Iterable[Cell]) -> dict[Key, Cell]:
    """Cells by case and target."""
    return {(cell.case, cell.target): cell for cell in cells}


def item_rows(cells: Sequence[Cell], targets: Sequence[str]) -> list[tuple[str, ...]]:
    """A table of kinds of kernels: how many of its cases are right on each target."""
    rows = [("kernel", *targets)]
    for item in ITEMS:
        mine = [cell for cell in cells if cell.item == item]
        if mine:
            rows.append((item, *(_share(mine, target) for target in targets)))
    return rows


def _share(cells: Sequence[Cell], target: str) -> str:
    mine = [cell for cell in cells if cell.target == target]
    right = sum(cell.ok for cell in mine)
    return f"{right}/{len(mine)}" if right < len(mine) else f"{right}"


def case_rows(
    cases: Sequence[Case], cells: Sequence[Cell], targets: Sequence[str]
) -> list[tuple[str, ...]]:
    """A table of cases: each target's time, or the stage that failed."""
    found = by_key(cells)
    rows: list[tuple[str, ...]] = [(*_FIRST, *targets)]
    for case in cases:
        row = (shown(found.get((case.name, target))) for target in targets)
        rows.append((case.name, " ".join(case.large), *row))
    return rows


def failures(cells: Iterable[Cell]) -> list[str]:
    """A paragraph for each cell that fails, and for each note."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.failed:
            found.setdefault(f"{cell.failed}: {cell.error}", []).append(_name(cell))
        elif cell.note:
            found.setdefault(cell.note, []).append(_name(cell))
    return [f"{', '.join(names)}\n{error}" for error, names in found.items()]


def _name(cell: Cell) -> str:
    return f"{cell.case} on {cell.target}"


def markdown(cases: Sequence[Case], cells: Sequence[Cell], targets: Sequence[str]) -> str:
    """The whole matrix as a document."""
    parts = [_TITLE, _INTRO]
    right = sum(cell.ok for cell in cells)
    parts.append(f"{right} of {len(cells)} cells are right.")
    parts += ["## By kind", "Cases that are right, of how many where not all are."]
    parts.append(_table(item_rows(cells, targets)))
    parts += ["## Every case", _table(case_rows(cases, cells, targets))]
    wrong = failures(cells)
    if wrong:
        parts.append("## Why")
        parts += [_paragraph(text) for text in wrong]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [_line(head), _line(["---", *("---:" for _ in head[1:])])]
    return "\n".join([*lines, *map(_line, body)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _paragraph(text: str) -> str:
    first, _, rest = text.partition("\n")
    return f"{first}:\n\n```\n{rest}\n```"


# --- a written matrix ----------------------------------------------------------------------------


def read_cases(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The columns and rows of the table of cases in a written matrix."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    tables = [_cells(line) for line in lines]
    start = next((n for n, row in enumerate(tables) if row[:2] == list(_FIRST)), None)
    if start is None:
        return [], {}
    rows = {row[0]: row[1:] for row in tables[start + 2 :]}
    return tables[start], rows


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in line.strip().strip("|").split(" | ")]


def out_of_date(
    text: str, cases: Sequence[Case], cells: Sequence[Cell], targets: Sequence[str]
) -> list[str]:
    """What is wrong with a written matrix; ``cases`` are all there are, ``cells`` those computed
    now.
    """
    columns, rows = read_cases(text)
    if columns != [*_FIRST, *targets]:
        return [f"its columns are {', '.join(columns) or 'none'}, not {', '.join(targets)}"]
    found: list[str] = []
    known = {case.name: " ".join(case.large) for case in cases}
    found += [f"it has no row for {name}" for name in known if name not in rows]
    found += [f"its row {name} is no case" for name in rows if name not in known]
    found += [
        f"its row {name} is of {rows[name][0]}, not {size}"
        for name, size in known.items()
        if name in rows and rows[name][0] != size
    ]
    found += [_worse(cell, rows, columns) for cell in cells if cell.failed]
    return [line for line in found if line]


def _worse(cell: Cell, rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Says that a cell fails which the matrix calls right."""
    row = rows.get(cell.case)
    if row is None or cell.target not in columns:
        return ""
    if row[columns.index(cell.target) - 1].startswith("**"):
        return ""
    return f"{cell.case} on {cell.target} has come to fail: {cell.failed}: {cell.error}"
