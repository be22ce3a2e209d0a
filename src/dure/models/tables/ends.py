"""How far a chip's guesses may all go towards an end before that contradicts what was measured.

A guess alone may be as wrong as its range says.  All guesses at their slow ends at once are a chip
that may take twice the time that was measured on it: no such chip exists.  So they go together,
each by the same part of its way on a logarithmic scale (:func:`dure.machine.ends.at_end`), and as
far as every published result of a whole model on the chip, whose configuration is known
(:mod:`dure.models.tables.rows`), still comes out within its tolerance; or, where the machine file
itself is further off than that, no further off.  Where nothing was measured they go all the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dure.machine.chip import Chip
from dure.machine.ends import End, at_end
from dure.models.tables.rows import ModelRow, Predicted, predict

#: A way is gone in so many steps.
STEPS = 8


@dataclass(frozen=True)
class Allowed:
    """The part of their way to an end that guesses may go; ``hinders`` is the result that the next
    step would contradict, and ``rows`` how many there are.
    """

    part: float = 1.0
    hinders: str = ""
    rows: int = 0

    def json(self) -> dict[str, object]:
        """As one JSON object."""
        return {"part": self.part, "hinders": self.hinders, "measured": self.rows}


def telling(rows: Sequence[ModelRow]) -> tuple[ModelRow, ...]:
    """The results that say something about a chip: of known configurations, with a tolerance."""
    return tuple(row for row in rows if row.known and row.within is not None)


def allowed(
    chip: Chip,
    end: End,
    rows: Sequence[ModelRow],
    jobs: int = 1,
    tried: Callable[[float], None] = lambda _: None,
) -> Allowed:
    """How far the guesses of a chip may go to an end, by results on it, ``jobs`` predicted at once;
    ``tried`` is told each part that is tried.

    A result that the file's own numbers can't predict at all says nothing.
    """
    known = telling(rows)
    if not known or at_end(chip, end) == chip:
        return Allowed(rows=len(known))

    def at(part: float) -> list[Predicted]:
        tried(part)
        moved = [replace(row, chip=at_end(row.chip, end, part)) for row in known]
        return [one for _, one in sorted(predict(moved, jobs), key=lambda entry: entry[0])]

    usual = at(0.0)
    low, high, hinders = 0, STEPS + 1, ""
    step = STEPS
    while high - low > 1:
        off = _contradicted(at(step / STEPS), usual, end)
        if off is None:
            low = step
        else:
            high, hinders = step, off.row.work
        step = (low + high) // 2
    return Allowed(low / STEPS, hinders, len(known))


def _contradicted(
    found: Sequence[Predicted], usual: Sequence[Predicted], end: End
) -> Predicted | None:
    """The first result that is further off to the side of an end than it may be."""
    for one, before in zip(found, usual, strict=True):
        if before.error is None or one.row.within is None:
            continue
        # A chip that can't run it at all contradicts it, too.
        side = 1 if end == "low" else -1
        off = float("inf") if one.error is None else side * one.error
        if off > max(one.row.within, side * before.error):
            return one
    return None
