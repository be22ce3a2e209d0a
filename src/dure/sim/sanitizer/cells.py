"""The bytes of the memories, as few cells: bytes that every access treats alike are one cell.

A tile's bytes, or a part of them, are a region: rectangles, partitions by bytes.  All regions that
a program touches cut the memory into cells; bytes in exactly the same regions are one cell.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from dure.sim.storage import PlanePlace, TilePlace

#: memory, first and stop partition, first and stop byte (in each partition)
Rectangle: TypeAlias = tuple[str, int, int, int, int]
#: What an access touches: sorted, so that it is a key.
Region: TypeAlias = tuple[Rectangle, ...]
#: First and stop element along each axis of a tile.
Box: TypeAlias = tuple[tuple[int, int], ...]

#: A cut tile of more runs of elements than this is not followed byte by byte.
RUNS = 256


def whole(place: TilePlace, memory: str, address: int) -> list[Rectangle]:
    """The bytes of a tile."""
    found: list[Rectangle] = []
    for plane in place.planes:
        if plane.rows * plane.columns:
            found += _rows(plane, memory, address, 0, plane.rows)
    return found


def part(
    place: TilePlace, memory: str, address: int, box: Box, inward: bool
) -> list[Rectangle] | None:
    """The bytes of a box of a tile's elements, or None where that isn't followed.

    ``inward`` leaves out bytes that the box has only a part of.
    """
    if any(low >= high for low, high in box):
        return []
    if len(place.planes) != 1:
        return None
    runs = _runs(place.type.shape, box)
    if runs is None:
        return None
    (plane,) = place.planes
    found: list[Rectangle] = []
    for first, stop in runs:
        found += _run(plane, memory, address, first, stop, inward)
    return _beside(found)


def _beside(rectangles: Sequence[Rectangle]) -> list[Rectangle]:
    """The rectangles with those of neighbouring partitions and the same bytes as one."""
    found: list[Rectangle] = []
    for memory, low, high, first, stop in sorted(rectangles, key=lambda r: (r[0], *r[3:], r[1])):
        last = found[-1] if found else None
        if last is not None and (last[0], *last[2:]) == (memory, low, first, stop):
            found[-1] = memory, last[1], high, first, stop
        else:
            found.append((memory, low, high, first, stop))
    return found


def _rows(plane: PlanePlace, memory: str, address: int, first: int, stop: int) -> list[Rectangle]:
    """Rows ``first`` to ``stop``: a part of a layer, whole layers, a part of a layer."""
    at, width, count = address + plane.start, plane.row_bytes, plane.partitions
    low, high = -(-first // count), stop // count
    if low > high:
        layer = at + high * width
        return [(memory, first % count, stop % count, layer, layer + width)]
    found: list[Rectangle] = []
    if first % count:
        layer = at + (low - 1) * width
        found.append((memory, first % count, count, layer, layer + width))
    if low < high:
        found.append((memory, 0, count, at + low * width, at + high * width))
    if stop % count:
        layer = at + high * width
        found.append((memory, 0, stop % count, layer, layer + width))
    return found


def _run(
    plane: PlanePlace, memory: str, address: int, first: int, stop: int, inward: bool
) -> list[Rectangle]:
    """Elements ``first`` to ``stop`` of a plane in row-major order."""
    columns, bits = plane.columns, plane.dtype.bits
    row, column = divmod(first, columns)
    if column == 0 and stop % columns == 0:
        return _rows(plane, memory, address, row, stop // columns)
    end = column + stop - first
    if inward:
        low, high = -(-column * bits // 8), end * bits // 8
    else:
        low, high = column * bits // 8, -(-end * bits // 8)
    layer, partition = divmod(row, plane.partitions)
    at = address + plane.start + layer * plane.row_bytes
    return [(memory, partition, partition + 1, at + low, at + high)] if low < high else []


def _runs(shape: Sequence[int], box: Box) -> list[tuple[int, int]] | None:
    """The box as runs of elements in row-major order; runs end at the end of a row of the last axis
    or cover whole rows.
    """
    length, axis = 1, len(shape)
    while axis and box[axis - 1] == (0, shape[axis - 1]):
        axis -= 1
        length *= shape[axis]
    if not axis:
        return [(0, length)]
    low, high = box[axis - 1]
    starts, extent = [0], 1
    for place in range(axis - 1):
        first, stop = box[place]
        if len(starts) * (stop - first) > RUNS:
            return None
        starts = [s * shape[place] + t for s in starts for t in range(first, stop)]
    extent = shape[axis - 1]
    return [((s * extent + low) * length, (s * extent + high) * length) for s in starts]


class Cells:
    """Numbers the cells that a growing set of regions, rectangles each, cuts the memories into."""

    def __init__(self) -> None:
        self.known: dict[Region, int] = {}
        self.table: list[tuple[int, ...]] | None = None
        #: Cells by the regions that they are in.
        self.merged: dict[tuple[int, ...], int] = {}
        self.count = 0

    def add(self, regions: Iterable[Sequence[Rectangle]]) -> bool:
        """Enter regions; whether any of them is new."""
        before = len(self.known)
        for rectangles in regions:
            if rectangles:
                self.known.setdefault(_region(rectangles), len(self.known))
        return len(self.known) != before

    def build(self) -> None:
        """Cut the memories by all regions that were entered."""
        members: dict[tuple[str, int, int], list[int]] = {}
        owned = [(r, number) for region, number in self.known.items() for r in region]
        for memory in dict.fromkeys(r[0] for r, _ in owned):
            own = [(r, n) for r, n in owned if r[0] == memory]
            partitions = sorted({p for r, _ in own for p in r[1:3]})
            bytes_ = sorted({b for r, _ in own for b in r[3:5]})
            for (_, p0, p1, b0, b1), number in own:
                for p in range(bisect_left(partitions, p0), bisect_left(partitions, p1)):
                    for b in range(bisect_left(bytes_, b0), bisect_left(bytes_, b1)):
                        members.setdefault((memory, p, b), []).append(number)
        merged: dict[tuple[int, ...], int] = {}
        cells: list[list[int]] = [[] for _ in self.known]
        for numbers in members.values():
            key = tuple(dict.fromkeys(numbers))
            if key not in merged:
                merged[key] = len(merged)
                for number in key:
                    cells[number].append(merged[key])
        self.table = [tuple(c) for c in cells]
        self.merged = merged
        self.count = len(merged)

    def of(self, rectangles: Sequence[Rectangle]) -> tuple[int, ...]:
        """The cells of a region that was entered before :meth:`build`."""
        assert self.table is not None
        return self.table[self.known[_region(rectangles)]] if rectangles else ()

    def moved(self, by: int) -> dict[int, int]:
        """The cells that lie just as others do, ``by`` bytes further on, by those others."""
        further: dict[int, int] = {}
        for region, number in self.known.items():
            moved = [(m, p0, p1, b0 + by, b1 + by) for m, p0, p1, b0, b1 in region]
            target = self.known.get(_region(moved))
            if target is not None:
                further[number] = target
        found: dict[int, int] = {}
        for key, cell in self.merged.items():
            if all(n in further for n in key):
                other = self.merged.get(tuple(sorted(further[n] for n in key)))
                if other is not None:
                    found[cell] = other
        return found


def _region(rectangles: Sequence[Rectangle]) -> Region:
    return tuple(sorted(rectangles))
