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
from dure.models.tables.rows import ModelRow, predict

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
    """The results that say something about a chip: of known configurations, with a tolerance.  The
    first take the least time to predict.
    """
    known = [row for row in rows if row.known and row.within is not None]
    return tuple(sorted(known, key=lambda row: (row.phase != "decode", row.devices)))


def allowed(
    chip: Chip,
    end: End,
    rows: Sequence[ModelRow],
    jobs: int = 1,
    tried: Callable[[float], None] = lambda _: None,
) -> Allowed:
    """How far the guesses of a chip may go to an end, by results on it, ``jobs`` steps predicted at
    once; ``tried`` is told each part that is tried.

    A result that the file's own numbers can't predict at all says nothing.
    """
    known = telling(rows)
    reached, hinders = STEPS, ""
    if at_end(chip, end) == chip:
        return Allowed(rows=len(known))
    for row in known:
        further = _Way(row, end, jobs, tried).furthest(reached)
        if further < reached:
            reached, hinders = further, row.work
    return Allowed(reached / STEPS, hinders, len(known))


@dataclass(frozen=True)
class _Way:
    """A result, predicted along the way to an end."""

    row: ModelRow
    end: End
    jobs: int
    tried: Callable[[float], None]

    def furthest(self, most: int) -> int:
        """The last of at most so many steps at which the result may still have been measured: a
        step further is a chip that is further off.
        """
        low, high, step = 0, most + 1, most
        while high - low > 1:
            if self.fits(step):
                low = step
            else:
                high = step
            step = (low + high) // 2
        return low

    def fits(self, step: int) -> bool:
        """Whether a chip so far on the way may be the one that was measured."""
        assert self.row.within is not None
        off = self.off(step)
        if off is not None and off <= self.row.within:
            return True
        usual = self.off(0)
        # What the file can't predict says nothing; what only this chip can't run is another chip.
        return usual is None or (off is not None and off <= usual)

    def off(self, step: int) -> float | None:
        """How far the prediction is off to the side of the end; None where there is none."""
        self.tried(step / STEPS)
        moved = replace(self.row, chip=at_end(self.row.chip, self.end, step / STEPS))
        ((_, found),) = predict([moved], self.jobs)
        return None if found.error is None else (1 if self.end == "low" else -1) * found.error
