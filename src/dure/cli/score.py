"""``dure score``: how close the chips of one side come to those of the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dure.cli import options
from dure.cli.output import print_json, say, show, table
from dure.cli.progress import progress
from dure.errors import UsageError

if TYPE_CHECKING:
    from dure.models.tables.rows import Attained
    from dure.models.tables.score import Ends as Reached
    from dure.models.tables.score import Guesses, Outcome, Score, Scored

Target = Annotated[
    str | None,
    typer.Option("--target", help="Only these chips, with commas between.", show_default=False),
]
Short = Annotated[
    bool, typer.Option("--short", help="One step a chip and no ends of guesses, as a quick look.")
]
Ends = Annotated[
    str,
    typer.Option(
        help="How far guesses go to their ends: as far as what was measured on the chip allows "
        "(measured), all the way (whole), or not at all (none)."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Processes.  [default: all cores]", show_default=False),
]

_ENDS = ("measured", "whole", "none")
#: Hindrances that are shown to people.
_MOST = 12


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: dure score --json")(score)


def score(
    target: Target = None,
    short: Short = False,
    ends: Ends = "measured",
    jobs: Jobs = None,
    as_json: options.Json = False,
) -> None:
    """Compile the score's steps for every chip: which part of its published roofline each attains.

    What was compiled before is taken from the cache.
    """
    from dure.models.tables import score as scores
    from dure.models.tables.rows import attained

    if ends not in _ENDS:
        raise UsageError(
            f"--ends {ends[:40]}",
            rule=f"guesses go to their ends as one of {', '.join(_ENDS)} says",
            fix=f"--ends {_ENDS[0]}",
        )
    rules, jobs = scores.rules(short), jobs or os.cpu_count() or 1
    asked = _asked(scores.questions(rules), target)
    guesses: Sequence[Guesses] = scores.GUESSES[:1] if short or ends == "none" else scores.GUESSES
    reached: Reached = {}
    if ends == "measured" and len(guesses) > 1:
        reached = scores.measured_ends(asked, jobs, say)
    total = sum(len(guesses) if entry.counted else 1 for entry in asked)
    found: list[tuple[int, Guesses, Outcome]] = []
    with progress(total) as advance:
        for one in scores.ask(asked, guesses, jobs, reached):
            found.append(one)
            advance(len(found), asked[one[0]].name)
    made = scores.score(asked, found, rules, short or target is not None, reached)
    beside = attained({entry.cell.chip.name: entry.cell.chip for entry in asked})
    if as_json:
        print_json({**made.json(), "vendors": [one.json() for one in beside]})
    else:
        _show(made, beside)


def _asked(found: list[Scored], target: str | None) -> list[Scored]:
    if target is None:
        return found
    known = dict.fromkeys(entry.entry.target for entry in found)
    names = [name.strip() for name in target.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(
                f"the score has no chip '{name[:40]}'",
                rule=f"it is of {', '.join(known)}",
                fix="leave out --target, or name some of these",
            )
    return [entry for entry in found if entry.entry.target in names]


# --- for people ----------------------------------------------------------------------------------


def _show(made: Score, beside: Sequence[Attained]) -> None:
    show("Fraction of the published roofline that the compiled step attains\n\n")
    steps = list(dict.fromkeys(_step(cell) for cell in made.cells))
    head = ("TARGET", "SIDE", "MODEL", "WEIGHTS", *(step.upper() for step in steps))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for cell in made.cells:
        side = cell.entry.side or "-"
        key = (cell.entry.target, side if cell.counted else f"({side})", cell.cell.model)
        stored = cell.cell.weights or cell.cell.dtype
        rows.setdefault((*key, stored), {})[_step(cell)] = _cell(cell, made.rules.least)
    lines = [(*key, *(mine.get(step, "") for step in steps)) for key, mine in rows.items()]
    table([head, *lines], right=range(4, 4 + len(steps)))
    show("\n*: too little of its own attainable ceiling; (side): shown, and not counted\n\n")
    _sums(made)
    if beside:
        show("\nWhat vendors' own stacks attain, where that is published\n\n")
        table(
            [("TARGET", "WORK", "MEASURED", "ROOFLINE"), *(_attained(one) for one in beside)],
            right=(2, 3),
        )


def _step(cell: Scored) -> str:
    return f"{cell.cell.batch.phase} {cell.cell.batch.sequences}"


def _cell(cell: Scored, least: float) -> str:
    found, fraction, part = cell.found.get("file"), cell.fraction("file"), cell.of_attainable
    if found is None:
        return ""
    if fraction is None or part is None:
        return "-"
    return f"{fraction:.3f}{'*' if part < least else ''}"


def _sums(made: Score) -> None:
    head = ("", "BY FILE", "GUESSES LOW", "GUESSES HIGH", "OF WHAT HAS A TIME")
    lines: list[tuple[str, ...]] = [head]
    for name, side in dict.fromkeys((c.entry.target, c.entry.side) for c in made.cells):
        if side:
            known = made.so_far(name)
            lines.append((name, *_shown([*(made.chip(name, g) for g in _guesses()), known])))
    sides = made.rules.sides
    lines += [(side, *_shown([made.side(side, g) for g in _guesses()]), "") for side in sides]
    lines.append(("quotient", *_shown([made.quotient(g) for g in _guesses()]), ""))
    table(lines, right=(1, 2, 3, 4))
    for (name, end), one in made.ends.items():
        if one.hinders:
            show(f"\n{name}: guesses {one.part:.0%} of the way to {end}; more contradicts what was")
            show(f" measured: {one.hinders}")
    show("\n")
    if made.counts:
        show("\nIt counts: every cell and every chip is above its floor.\n")
        return
    found = made.hinders
    show(f"\nIt doesn't count yet, for {len(found)} reasons:\n")
    for line in found[:_MOST]:
        show(f"  {line}\n")
    if len(found) > _MOST:
        show(f"  and {len(found) - _MOST} more (--json has all)\n")


def _guesses() -> tuple[Guesses, ...]:
    return ("file", "low", "high")


def _shown(numbers: Sequence[float | None]) -> list[str]:
    return ["-" if number is None else f"{number:.3f}" for number in numbers]


def _attained(one: Attained) -> tuple[str, ...]:
    return one.target, one.work, one.measured, f"{one.fraction:.3f}"
