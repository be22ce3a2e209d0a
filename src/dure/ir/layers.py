"""How layers become repeats: runs of equal signatures, also with a period."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Layers ``start .. start + period * count``, whose signatures repeat every ``period``
    layers."""

    start: int
    period: int
    count: int


def group(signatures: Sequence[Hashable], longest_period: int = 12) -> list[Run]:
    """Cuts layers into runs so that the fewest layer bodies are compiled, then the fewest runs.

    Dynamic programming over the first layer that is not covered yet; a body of ``period`` layers
    costs ``period``.
    """
    total = len(signatures)
    # cost and choice for covering the layers from `start` on
    best: list[tuple[tuple[int, int], Run | None]] = [((0, 0), None)] * (total + 1)
    for start in range(total - 1, -1, -1):
        choices: list[tuple[tuple[int, int], Run]] = []
        for period in range(1, min(longest_period, total - start) + 1):
            most = _repeats(signatures, start, period)
            for count in range(most, 0, -1) if period == 1 else (most, 1):
                bodies, runs = best[start + period * count][0]
                choices.append(((bodies + period, runs + 1), Run(start, period, count)))
        cost, run = min(choices, key=lambda choice: choice[0])
        best[start] = (cost, run)
    result: list[Run] = []
    position = 0
    while position < total:
        run = best[position][1]
        assert run is not None
        result.append(run)
        position += run.period * run.count
    return result


def _repeats(signatures: Sequence[Hashable], start: int, period: int) -> int:
    first = tuple(signatures[start : start + period])
    count = 1
    while tuple(signatures[start + count * period : start + (count + 1) * period]) == first:
        count += 1
    return count
