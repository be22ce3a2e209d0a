"""What a queue executes: runs of instructions, each a number of times in turn.

Equal turns of a loop are laid out once, so that a stream of many turns takes the memory of one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count
from operator import is_not
from typing import TypeAlias

from dure.sim.items import Item

#: Instructions, and how often they are executed.
Run: TypeAlias = tuple[list[Item], int]

#: Instructions that are compared at first; then twice as many, as long as they are the same.
_FIRST, _LAST = 32, 8192


class Stream:
    """``runs`` are instructions and how often they are executed one after another; equal
    instructions are one object.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = [run for run in runs if run[0] and run[1]]
        #: The position of the first instruction of each run.
        self.starts: list[int] = []
        self._count = 0
        for items, times in self.runs:
            self.starts.append(self._count)
            self._count += len(items) * times

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        for items, times in self.runs:
            for _ in range(times):
                yield from items

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for streams whose runs are the same lists, as often."""
        return tuple([(times, id(items)) for items, times in self.runs])

    def at(self, position: int) -> tuple[list[Item], int]:
        """The items of the run that a position is in, and its place in them; of the end, the last
        run's.
        """
        if not self.runs:
            return [], 0
        if position == self._count:
            items, _ = self.runs[-1]
            return items, len(items)
        number = bisect_right(self.starts, position) - 1
        items, _ = self.runs[number]
        return items, (position - self.starts[number]) % len(items)

    def alike(self, first: int, second: int, most: int) -> int:
        """How many instructions from ``first`` on are the same as those from ``second`` on, which
        comes later; more than ``most`` aren't looked at.
        """
        start, size = second, _FIRST
        stop = min(self._count, second + most)
        while second < stop:
            number = bisect_right(self.starts, second) - 1
            common = self._common(first, second, number, stop)
            if common:
                first, second = first + common, second + common
                continue
            (items, times), begin = self.runs[number], self.starts[number]
            if first >= begin and (second - first) % len(items) == 0:
                # Both are in one run, whole turns apart.
                end = min(stop, begin + times * len(items))
                first, second = first + end - second, end
                continue
            before, place = self.at(first)
            after = (second - begin) % len(items)
            part = min(size, len(before) - place, len(items) - after, stop - second)
            left, right = before[place : place + part], items[after : after + part]
            found = same(left, right)
            if found < part:
                return second - start + found
            first, second, size = first + part, second + part, min(2 * size, _LAST)
        return min(second, stop) - start

    def _common(self, first: int, second: int, number: int, stop: int) -> int:
        """How many instructions from two positions on are those of equal runs, one after another;
        ``number`` is the run of the second, and at ``stop`` it is enough.
        """
        runs, starts = self.runs, self.starts
        other = bisect_right(starts, first) - 1
        if number == other or first - starts[other] != second - starts[number]:
            return 0
        last = number
        while last < len(runs) and starts[last] < stop and _equal(runs[other], runs[last]):
            other, last = other + 1, last + 1
        end = starts[last] if last < len(runs) else self._count
        return end - second if last > number else 0


def _equal(first: Run, second: Run) -> bool:
    return first[0] is second[0] and first[1] == second[1]


def same(first: Sequence[Item], second: Sequence[Item]) -> int:
    """How many of the first entries are the same."""
    if first == second:
        return len(first)
    return next(compress(count(), map(is_not, first, second)), min(len(first), len(second)))
