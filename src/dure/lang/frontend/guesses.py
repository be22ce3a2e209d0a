"""What a kernel's grid and the ranges of its index arguments were with other consts.

A search over tile sizes specialises a kernel hundreds of times.  What its loads and stores say of
the grid is then the same but for the steps, which are consts.  So the facts are guessed; whoever
uses a guess compares it with what follows in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from dure.ir.expr import Expr
from dure.lang.frontend.inference import Counted, Facts
from dure.lang.frontend.source import Source

#: Wrong guesses after which no more are made.
_MISSES = 2
#: Arguments' types of a kernel that are remembered.
_MOST = 200


@dataclass
class Guesses:
    """Of a kernel with arguments of certain types."""

    #: By grid axis, the extent, and the consts that were its step so far; or the step itself.
    axes: list[tuple[Expr, frozenset[str], int]] | None = None
    ranges: Mapping[str, Expr] = field(default_factory=dict[str, Expr])
    known: bool = False
    misses: int = 0

    def facts(self, consts: Mapping[str, object]) -> Facts | None:
        """The guess for these consts, if there is one."""
        if not self.known or self.misses >= _MISSES:
            return None
        if self.axes is None:
            return Facts(None, self.ranges)
        counted = [_counted(axis, consts) for axis in self.axes]
        certain = tuple(entry for entry in counted if entry is not None)
        return Facts(certain, self.ranges) if len(certain) == len(counted) else None

    def learn(self, facts: Facts, consts: Mapping[str, object], *, wrong: bool) -> None:
        """What follows with these consts, and whether something else was guessed."""
        self.misses += wrong
        before = self.axes if self.known else None
        self.known, self.ranges = True, facts.ranges
        if facts.counted is None:
            self.axes = None
            return
        self.axes = []
        for number, (extent, step) in enumerate(facts.counted):
            names = frozenset(name for name, value in consts.items() if _is(value, step))
            if before is not None and number < len(before):
                names = names & before[number][1] or names
            self.axes.append((extent, names, step))


def _is(value: object, step: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == step


def _counted(
    axis: tuple[Expr, frozenset[str], int], consts: Mapping[str, object]
) -> Counted | None:
    """An axis with these consts; None where consts that were its step differ now."""
    extent, names, step = axis
    values = {consts.get(name) for name in names} or {step}
    found = values.pop()
    return None if values or not isinstance(found, int) or found < 1 else (extent, found)


_KNOWN: WeakKeyDictionary[Source, dict[tuple[Any, ...], Guesses]] = WeakKeyDictionary()


def guesses_of(source: Source, types: tuple[object, ...]) -> Guesses:
    """What is known of a kernel with such arguments."""
    found = _KNOWN.setdefault(source, {})
    if len(found) >= _MOST and types not in found:
        found.clear()
    return found.setdefault(types, Guesses())
