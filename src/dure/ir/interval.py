"""Closed ranges of integers and the arithmetic that proofs of bounds need."""

from __future__ import annotations

from dataclasses import dataclass


def _corner(left: tuple[int | None, int], right: tuple[int | None, int]) -> tuple[int, int]:
    """The product of two ends, each a number or (None, sign of infinity); 0 times infinity is 0."""
    (x, x_end), (y, y_end) = left, right
    if x is not None and y is not None:
        return x * y, 0
    x_sign = x_end if x is None else (x > 0) - (x < 0)
    y_sign = y_end if y is None else (y > 0) - (y < 0)
    return 0, x_sign * y_sign


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed range of integers, open-ended where an end is None."""

    low: int | None
    high: int | None

    def plus(self, other: Interval) -> Interval:
        """The range of ``x + y``."""
        low = None if self.low is None or other.low is None else self.low + other.low
        high = None if self.high is None or other.high is None else self.high + other.high
        return Interval(low, high)

    def times(self, other: Interval) -> Interval:
        """The range of ``x * y``."""
        corners = [
            _corner(x, y)
            for x in ((self.low, -1), (self.high, 1))
            for y in ((other.low, -1), (other.high, 1))
        ]
        finite = [value for value, sign in corners if sign == 0]
        low = None if any(sign < 0 for _, sign in corners) else min(finite, default=None)
        high = None if any(sign > 0 for _, sign in corners) else max(finite, default=None)
        return Interval(low, high)
