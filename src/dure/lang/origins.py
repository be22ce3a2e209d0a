"""Where a tile's elements came from, to catch arguments whose shapes disagree.

Edge tiles are cut for the author, so that a missing row would go unnoticed: ``a @ b`` with one
column of ``a`` too many would read zeros from ``b``.  So a loaded tile remembers, for each axis,
which elements of which argument it holds.  Where two such axes meet (in an elementwise operation,
along a dot's K, in a store) at the same place, the two arguments must have the same extent there.
Giving ``fill=`` says that the author wants elements beyond the end, and forgets the origin.
"""

from __future__ import annotations

from collections.abc import Sequence

from dure.errors import KernelError
from dure.lang import indices
from dure.lang.values import Index, Origin, TileBase, builder


def merged(tiles: Sequence[TileBase]) -> tuple[Origin | None, ...]:
    """The origins of an elementwise result."""
    rank = max((t.rank for t in tiles), default=0)
    return tuple(
        next((t.origins[axis] for t in tiles if t.origins[axis] is not None), None)
        for axis in range(rank)
    )


def check_meeting(tiles: Sequence[TileBase]) -> None:
    """Require equal extents wherever tiles of one shape come from the same place of two tensors."""
    rank = max((t.rank for t in tiles), default=0)
    for axis in range(rank):
        known = [o for t in tiles if (o := t.origins[axis]) is not None]
        for other in known[1:]:
            check_pair(known[0], other)


def _same_place(one: Index, other: Index) -> bool:
    return one is other or (type(one) is int and one == other)


def check_pair(one: Origin | None, other: Origin | None) -> None:
    """Require equal extents if both axes hold the same place."""
    if one is None or other is None or one is other:
        return
    if not all(map(_same_place, one.place, other.place)):
        return
    builder().require(
        indices.compare("==", one.extent, other.extent),
        KernelError(
            f"axis {one.axis} of '{one.tensor}' has {one.extent} elements and axis {other.axis} of "
            f"'{other.tensor}' has {other.extent}",
            rule="tiles that meet at the same index come from axes of the same extent",
            fix="pass arrays whose shapes agree, or say fill= where a shorter one is meant",
        ),
    )
