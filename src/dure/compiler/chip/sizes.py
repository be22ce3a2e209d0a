"""What an open size tiles: which axis of the grid, and how large it may usefully be.

Both are read off a kernel specialised twice, with the size and with its double: the accesses whose
tiles grow are the ones that it tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dure.compiler.chip.partition import grid_extents
from dure.errors import DureError
from dure.ir.core import Function, Op, walk
from dure.ir.expr import as_expr, evaluate
from dure.ir.types import TensorType


@dataclass(frozen=True, slots=True)
class Tiled:
    """``largest`` is the size that covers the longest axis it tiles, None where that isn't known;
    ``axis`` is the one of the grid whose instances become fewer as the size grows.
    """

    largest: int | None = None
    axis: int | None = None


def tiled_by(single: Function, double: Function, size: int) -> Tiled:
    """What ``size`` tiles, given the kernel with it and with twice as much."""
    grids = enumerate(zip(grid_extents(single), grid_extents(double), strict=True))
    axes = [axis for axis, (many, few) in grids if few < many]
    axis = axes[0] if len(axes) == 1 else None
    pairs = list(zip(_accesses(single), _accesses(double), strict=False))
    if any(a.name != b.name for a, b in pairs):
        return Tiled(None, axis)
    useful = [_useful(a, b, size) for a, b in pairs]
    if any(found is None for found in useful):
        return Tiled(None, axis)
    return Tiled(max((found for found in useful if found), default=None), axis)


def _accesses(function: Function) -> Iterator[Op]:
    yield from (op for op in walk(function.body) if op.name in ("load", "store"))


def _useful(single: Op, double: Op, size: int) -> int | None:
    """The size with which an access covers its tensor, 0 where it doesn't depend on it, None where
    that isn't known.
    """
    kind = single.operands[0].type
    assert isinstance(kind, TensorType)
    small, large = (
        (op.results[0] if op.name == "load" else op.operands[1]).tile.shape
        for op in (single, double)
    )
    found, listed = 0, set[int](single.attr("list_axes"))
    for axis, (few, many) in enumerate(zip(small, large, strict=True)):
        # How far an index list goes along an axis isn't said by the axis's extent.
        if few == many or axis in listed:
            continue
        try:
            extent = evaluate(as_expr(kind.shape[axis]), {})
        except DureError:
            return None
        found = max(found, -(-extent * size // few))
    return found
