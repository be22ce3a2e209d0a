"""Dots of a few rows whose right operand lies turned, as keys do: without a copy of it.

Squares of registers are read along K, turned, and multiplied at once.  For more rows it repays to
keep what was turned (:mod:`dure.targets.cpu.paneldots`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dure.targets.cpu.bounds import Bounds
from dure.targets.cpu.copies import lies_along, turned
from dure.targets.cpu.dots import KRange, cover, multiply_add, operand, zero
from dure.targets.cpu.memory import Extent, fetch
from dure.targets.cpu.values import Buffer, Emitter, Tile
from dure.targets.cpu.writer import Reg, integer

#: Rows that are few.
FEW = 4


def takes_squares(b: Tile, rows: Extent, lanes: int) -> bool:
    """Whether there are few rows, and the columns of ``b`` lie along K."""
    axis = b.type.rank - 1
    plain = b.dtype.is_float and b.dtype.bits <= 32
    along = lies_along(b, axis - 1, lanes) and not lies_along(b, axis, lanes)
    return plain and rows.most <= FEW and along


def turned_dot(
    e: Emitter,
    a: Tile,
    b: Tile,
    c: Buffer,
    extents: tuple[Extent, Extent],
    k: KRange,
    batch: Sequence[Reg] = (),
    fresh: bool = False,
) -> None:
    """``c += a @ b`` like :func:`~dure.targets.cpu.dots.plain_dot`, where :func:`takes_squares`."""
    w, axis = e.w, len(batch) + 1
    rest = w.mod(w.sub(k.stop, k.start), e.lanes)
    columns = w.index(extents[1].bound)
    last, end = w.sub(columns, integer(1)), integer(extents[1].static - 1)
    cut = columns.literal is None or columns.literal % e.lanes > 0
    accesses = list(b.accesses(range(axis + 1)))
    listed = any(own.entries is not None for access in accesses for own in access.place.axes)

    def block(row: Reg, height: int, column: Reg, lanes: int, _: int) -> None:
        rows = [w.add(row, integer(i)) for i in range(height)]
        places = [[*batch, at, column] for at in rows]
        nothing = zero(c.stored, lanes)
        initial = [nothing if fresh else c.vector(e, p, axis, lanes) for p in places]

        def added(at: Reg, right: Reg, totals: list[Reg]) -> list[Reg]:
            """The totals with a step of K."""
            left = [operand(e, a, [*batch, i, at], axis, 1, c.stored) for i in rows]
            spread = [w.splat(one, lanes) for one in left]
            return [multiply_add(e, x, right, t) for x, t in zip(spread, totals, strict=True)]

        # A square has columns that nobody uses, and that may lie outside of the tensor.
        own = [w.add(column, integer(lane)) for lane in range(lanes)]
        coming = [w.add(one, integer(lanes)) for one in own]
        own = [w.minimum(one, last) for one in own] if cut else own
        coming = [w.minimum(one, end) for one in coming] if listed else coming

        def square(at: Reg, totals: list[Reg]) -> list[Reg]:
            for one in coming:
                ahead = b.loaded_from([*batch, at, one])
                if ahead is not None:
                    fetch(w, ahead, 0, 1)
            read = [operand(e, b, [*batch, at, one], axis - 1, lanes, c.stored) for one in own]
            for step, right in enumerate(turned(w, read)):
                totals = added(w.add(at, integer(step)), right, totals)
            return totals

        def single(at: Reg, totals: list[Reg]) -> list[Reg]:
            read = [operand(e, b, [*batch, at, one], axis - 1, 1, c.stored) for one in own]
            return added(at, w.together(read), totals)

        def entries() -> None:
            """Of index lists, which would be read again for every square."""
            for one in [*own, *coming]:
                b.loaded_from([*batch, k.start, one])

        whole = w.sub(k.stop, rest) if lanes == e.lanes else k.start
        with w.kept(entries):
            totals = w.loop(k.start, whole, lanes, square, initial)
            totals = w.loop(whole, k.stop, 1, single, totals)
        for place, total in zip(places, totals, strict=True):
            c.put(e, total, place, axis)

    bounds = Bounds(w, accesses, axis - 1, e.lanes)
    stop = [*(w.add(at, integer(1)) for at in batch), k.stop, columns]
    bounds.either(stop, lambda: cover(e, *extents, 1, block))
