"""Sums, maxima and the like across the lanes of vectors, by halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dure.targets.cpu.values import Emitter
from dure.targets.cpu.writer import Reg, lanes_of

Combine = Callable[[Reg, Reg], Reg]


def reduce_lanes(e: Emitter, value: Reg, combine: Combine) -> Reg:
    """All lanes of a vector to one."""
    return reduce_each(e, [value], combine)


def reduce_each(e: Emitter, vectors: Sequence[Reg], combine: Combine) -> Reg:
    """The lanes of each vector to one: a lane for each of them.

    They are a power of two, and no more than a vector has lanes.  Two vectors are halved at once,
    and what is left of both lies side by side.  The tree is that of a vector by itself.
    """
    w, left = e.w, list(vectors)
    width = lanes_of(left[0].type)
    while width > 1:
        parts = lanes_of(left[0].type) // width
        starts = [part * width for part in range(parts)]
        halves = [
            [start + lane for start in starts for lane in range(width)[half]]
            for half in (slice(width // 2), slice(width // 2, None))
        ]
        if len(left) > 1:
            whole = parts * width
            joined = [[*order, *(whole + lane for lane in order)] for order in halves]
            pairs = zip(left[::2], left[1::2], strict=True)
            left = [combine(*(w.merge(*pair, order) for order in joined)) for pair in pairs]
        else:
            left = [combine(*(w.shuffle(left[0], order) for order in halves))]
        width //= 2
    return left[0]
