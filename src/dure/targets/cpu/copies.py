"""Copies of tiles in vectors along one axis, whichever axis their elements lie along.

Elements that lie along another axis are read in squares of registers and turned there: gathering
them one by one takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dure.targets.cpu.bounds import Access
from dure.targets.cpu.memory import Place, fetch
from dure.targets.cpu.numbers import register_type
from dure.targets.cpu.values import (
    Buffer,
    Emitter,
    Full,
    Held,
    Iota,
    Loaded,
    Mapped,
    Reindexed,
    Tile,
)
from dure.targets.cpu.writer import Reg, Writer, integer, vector_type

#: Bytes of a row that are asked for ahead, at most: prefetchers follow longer ones.
_FETCHED = 512
#: Bytes of a lane of a register that is copied.
_SIZE = 4
#: (distance from the first, vector) -> nothing
Put = Callable[[Reg, Reg], None]


class Stored(Tile):
    """A tile whose vectors are what memory holds of its elements."""

    def __init__(self, source: Tile) -> None:
        super().__init__(source.type)
        self.source = source

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        return self.source.raw(e, index, axis, lanes)

    def loaded_from(self, index: Sequence[Reg]) -> Reg | None:
        return self.source.loaded_from(index)

    def accesses(self, axes: Sequence[int | None]) -> Iterator[Access]:
        return self.source.accesses(axes)


def lies_along(tile: Tile, axis: int, lanes: int) -> bool:
    """Whether vectors along ``axis`` take no gathering."""
    match tile:
        case Mapped():
            return all(lies_along(o, axis, lanes) for o in tile.operands)
        case Reindexed():
            if axis not in tile.sources:
                return True
            return lies_along(tile.source, tile.sources.index(axis), lanes)
        case Stored():
            return lies_along(tile.source, axis, lanes)
        case Loaded():
            return tile.place.contiguous(axis, lanes) or tile.place.paired(axis, lanes)
        case Buffer():
            return tile.strides()[axis] == 1
        case Full() | Iota() | Held():
            return True
        case _:
            return False


def pitch_of(tile: Tile, along: int, across: int, count: int) -> Reg | None:
    """Bytes from one row of a tile in memory to the next, if each ``count`` elements ``along`` it
    lie side by side, and rows are as far apart everywhere; whether they lie in the tensor is for
    :class:`~dure.targets.cpu.bounds.Bounds` to say.
    """
    match tile:
        case Reindexed():
            if along not in tile.sources or across not in tile.sources:
                return None
            own = tile.sources.index(along), tile.sources.index(across)
            return pitch_of(tile.source, *own, count)
        case Loaded():
            listed = any(axis.entries is not None for axis in tile.place.axes)
            plain = not listed and tile.place.contiguous(along, count)
            return tile.place.pitch(across) if plain else None
        case _:
            return None


def place_along(tile: Tile, axis: int) -> tuple[Place, int] | None:
    """Where a tile of memory is loaded from, and which of the axes there an axis of it is."""
    match tile:
        case Reindexed() if axis in tile.sources:
            return place_along(tile.source, tile.sources.index(axis))
        case Loaded():
            return tile.place, axis
        case _:
            return None


def pair_pitch_of(tile: Tile, along: int, across: int, steps: int, lanes: int) -> Reg | None:
    """Bytes from a pair of neighbours along an axis of a tile in memory to the next: see
    :meth:`~dure.targets.cpu.memory.Place.pair_pitch`.
    """
    match tile:
        case Reindexed():
            if along not in tile.sources or across not in tile.sources:
                return None
            own = tile.sources.index(along), tile.sources.index(across)
            return pair_pitch_of(tile.source, *own, steps, lanes)
        case Loaded():
            return tile.place.pair_pitch(along, across, steps, lanes)
        case _:
            return None


def turned(w: Writer, rows: Sequence[Reg]) -> list[Reg]:
    """The columns of a square of registers; their number is a power of two.

    Quarters are exchanged, then quarters of these, down to single lanes.
    """
    found, count = list(rows), len(rows)
    half = count // 2
    while half:
        low = [i if not i & half else count + i - half for i in range(count)]
        high = [i + half if not i & half else count + i for i in range(count)]
        for row in range(count):
            if row & half:
                continue
            a, b = found[row], found[row + half]
            found[row], found[row + half] = w.merge(a, b, low), w.merge(a, b, high)
        half //= 2
    return found


def read_along(
    e: Emitter, tile: Tile, index: Sequence[Reg], axis: int, count: Reg, put: Put, wide: int = 1
) -> None:
    """Put ``count`` elements along ``axis`` from ``index`` on: whole vectors, then one by one.

    A register holds ``wide`` times as many elements as one of the widest: where they lie side by
    side they are read so first.
    """
    w = e.w
    widths = [e.lanes, 1]
    if wide > 1 and lies_along(tile, axis, wide * e.lanes):
        widths.insert(0, wide * e.lanes)

    def read(lanes: int) -> Callable[[Reg, list[Reg]], list[Reg]]:
        def step(at: Reg, _: list[Reg]) -> list[Reg]:
            place = [*index[:axis], w.add(index[axis], at), *index[axis + 1 :]]
            put(at, tile.vector(e, place, axis, lanes))
            return []

        return step

    start = integer(0)
    for width in widths:
        stop = w.sub(count, w.mod(count, width))
        w.loop(start, stop, width, read(width))
        start = stop


def _fetch_next(e: Emitter, tile: Tile, place: Sequence[Reg], across: int, count: int) -> None:
    """Ask for the row that the next square of registers has in place of this one.

    While a square is turned no load waits for memory.
    """
    ahead = list(place)
    ahead[across] = e.w.add(place[across], integer(e.lanes))
    source = tile.loaded_from(ahead)
    if source is not None:
        fetch(e.w, source, 0, min(count * tile.dtype.bits // 8, _FETCHED))


def read_turned(
    e: Emitter,
    tile: Tile,
    index: Sequence[Reg],
    axes: tuple[int, int],
    counts: tuple[Reg, Reg],
    most: int,
    guard: Callable[[Callable[[], object]], None],
    put: Put,
    together: int = 1,
) -> None:
    """Put a vector along ``axes[0]`` for each step along ``axes[1]``, where elements lie along
    ``axes[1]``.

    ``counts`` are how many elements there are along both; ``most`` steps are the most.  ``guard``
    writes the loop that reads them, once or for several cases.  Vectors are whole and their number
    is rounded up to whole squares: what lies behind ``counts`` is put as anything, and not read.
    So many steps ``together`` fill a lane and are put as one; behind the last one are zeros then.
    """
    w, (across, along) = e.w, axes
    mark = e.mark()
    line, size = _SIZE * e.lanes, _SIZE // together
    pitch = -(-most * size // line) * line
    rows = e.allocate(pitch * e.lanes + line)

    def row(lane: Reg, _: list[Reg]) -> list[Reg]:
        start = w.offset(rows, w.mul(lane, integer(pitch)))
        place = list(index)
        place[across] = w.add(index[across], lane)
        _fetch_next(e, tile, place, across, most)

        def keep(step: Reg, vector: Reg) -> None:
            w.store(vector, w.offset(start, w.mul(step, integer(size))), size)

        read_along(e, tile, place, along, counts[1], keep, together)
        if together > 1:
            # The next row overwrites what is too much.
            w.store(Reg(type, "zeroinitializer"), w.offset(start, w.mul(counts[1], integer(size))))
        return []

    type = vector_type("i32" if together > 1 else register_type(tile.dtype), e.lanes)
    guard(lambda: w.loop(integer(0), w.minimum(counts[0], integer(e.lanes)), 1, row))

    def square(at: Reg, _: list[Reg]) -> list[Reg]:
        start = w.offset(rows, w.mul(at, integer(_SIZE)))
        loaded = [
            w.load(type, w.offset(start, integer(lane * pitch)), _SIZE) for lane in range(e.lanes)
        ]
        for step, vector in enumerate(turned(w, loaded)):
            put(w.mul(w.add(at, integer(step)), integer(together)), vector)
        return []

    lanes = w.floordiv(w.add(counts[1], integer(together - 1)), integer(together))
    w.loop(integer(0), lanes, e.lanes, square)
    e.release(mark)
