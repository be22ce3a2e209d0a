"""Dots of a few rows of bfloat16, to the bits of tile registers (AMX), without copies.

A copy of the right operand takes longer than a few rows' products.  Where it lies turned, as keys
and weights do, its columns are rows in memory: sixteen of them are a tile as they are, and a row of
the left operand is a tile of one column.  An instruction adds the same products in the same order,
whichever operand comes first.

Where it lies along, vectors add what a tile does in the order of a tile, by fused multiplications:
products of bfloat16 numbers are exact in them.  Subnormal numbers are zero meanwhile, as they are
for tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from dure.targets.cpu.bounds import Bounds
from dure.targets.cpu.copies import Stored, pitch_of, read_along
from dure.targets.cpu.dots import KRange, Step, plain_dot, zero
from dure.targets.cpu.instructions import Operation, intrinsic
from dure.targets.cpu.memory import Extent, fetch
from dure.targets.cpu.tiledots import LINE, ROWS, configuration, end_sizes, on_tiles, tile
from dure.targets.cpu.values import Buffer, Emitter, Tile
from dure.targets.cpu.writer import Reg, integer, lanes_of, vector_type

#: Rows that are few: for each a tile of accumulators beside those of the operands.
_FEW = 4
#: Steps of K in a tile, those that lie side by side in the left one, and bytes of two of these.
_STEPS, _PAIR, _SIZE = 32, 2, 4
#: The tile of the right operand, the first of the left one's, and how many these are.
_RIGHT, _LEFT, _LEFTS = 4, 5, 3
#: Steps of K for which rows are copied at a time.
_DEPTH = 2048
#: What makes subnormal results and operands zeros, and the sums of an element that registers hold
#: while vectors add a tile's steps: of even and of odd ones.  That of all before waits in memory.
_FLUSHED, _SUMS = 0x8040, 2


def are_few(rows: Extent) -> bool:
    """Whether there are no more rows than repay a copy of the right operand."""
    return rows.most <= _FEW


def takes_rows(b: Tile) -> bool:
    """Whether tiles take the columns of ``b`` where they lie."""
    axis = b.type.rank - 1
    return pitch_of(b, axis - 1, axis, _STEPS) is not None


def row_dot(
    e: Emitter,
    a: Tile,
    b: Tile,
    c: Buffer,
    extents: tuple[Extent, Extent],
    k: KRange,
    batch: Sequence[Reg] = (),
    fresh: bool = False,
) -> None:
    """``c += a @ b`` by vectors, of numbers that are loaded as they are."""
    w = e.w

    def pairs(step: Step, totals: list[Reg], first: Reg, count: Reg) -> list[Reg]:
        """The totals with the sums of the even and of the odd of so many steps."""
        half = len(totals)

        def pair(number: Reg, sums: list[Reg]) -> list[Reg]:
            at = w.add(first, number)
            even = step(at, sums[:half])
            return [*even, *step(w.add(at, integer(1)), sums[half:])]

        def last(number: Reg, sums: list[Reg]) -> list[Reg]:
            return [*step(w.add(first, number), sums[:half]), *sums[half:]]

        nothing = [zero(c.stored, lanes_of(total.type)) for total in totals]
        paired = w.sub(count, w.mod(count, _PAIR))
        sums = w.loop(integer(0), paired, _PAIR, pair, [*nothing, *nothing])
        sums = w.loop(paired, count, 1, last, sums)
        both = [e.math.add(*two) for two in zip(sums[:half], sums[half:], strict=True)]
        return [e.math.add(*two) for two in zip(totals, both, strict=True)]

    def walk(step: Step, totals: list[Reg]) -> list[Reg]:
        length = w.sub(k.stop, k.start)
        rest = w.mod(length, _STEPS)
        whole = w.sub(k.stop, rest)

        def block(first: Reg, totals: list[Reg]) -> list[Reg]:
            return pairs(step, totals, first, integer(_STEPS))

        def end(first: Reg, totals: list[Reg]) -> list[Reg]:
            return pairs(step, totals, first, rest)

        return w.loop(whole, k.stop, _STEPS, end, w.loop(k.start, whole, _STEPS, block, totals))

    mark = e.mark()
    before, flushing = e.allocate(4), e.allocate(4)
    w.call("void", intrinsic(e.host, Operation.FLOATS_STORE), before)
    w.store(w.binary("or", w.load("i32", before, 4), Reg("i32", str(_FLUSHED))), flushing, 4)
    w.call("void", intrinsic(e.host, Operation.FLOATS_LOAD), flushing)
    plain_dot(e, a, b, c, extents, k, batch, fresh, walk, _SUMS)
    w.call("void", intrinsic(e.host, Operation.FLOATS_LOAD), before)
    e.release(mark)


class RowProduct:
    """``c += a @ b`` of bfloat16 numbers, where :func:`takes_rows`.

    Columns that don't lie inside of their tensor, or K that is no whole tile, are copied first.
    """

    def __init__(
        self,
        e: Emitter,
        a: Tile,
        b: Tile,
        c: Buffer,
        extents: tuple[Extent, Extent],
        batch: Sequence[Reg] = (),
    ) -> None:
        self.e, self.w = e, e.w
        self.a, self.b, self.c = Stored(a), Stored(b), c
        self.batch, self.axis = list(batch), len(batch) + 1
        self.rows, self.static = range(extents[0].most), extents[1].static
        self.columns = e.w.index(extents[1].bound)
        #: The last row: what nobody uses may lie outside of the tensor.
        self.last = e.w.sub(e.w.index(extents[0].bound), integer(1))
        #: Columns of a tile.
        self.width = gcd(self.static, ROWS)
        pitch = pitch_of(b, self.axis - 1, self.axis, _STEPS)
        assert pitch is not None
        #: Bytes between columns where they lie.
        self.apart = pitch

    def run(self, k: KRange, fresh: bool) -> None:
        """Write the dot over this part of K; ``fresh`` starts from zero and does not read ``c``."""
        w, e = self.w, self.e
        mark = e.mark()
        length = w.sub(k.stop, k.start).literal
        most = _DEPTH if length is None else min(length, _DEPTH)
        self.pitch = 2 * -(-most // _STEPS) * _STEPS
        self.left = e.allocate(len(self.rows) * self.pitch)
        self.copied = e.allocate(self.width * self.pitch)
        self.fresh = fresh and length == most > 0
        if fresh and not self.fresh:
            self._clear()

        def cut(first: Reg, _: list[Reg]) -> list[Reg]:
            depth = w.minimum(integer(most), w.sub(k.stop, first))
            for i in self.rows:
                own = [*self.batch, w.minimum(integer(i), self.last), first]
                self._copy(self.a, own, self.axis, depth, self._row(i))
            self._multiply(first, depth)
            return []

        sums, columns, row = (self.width, _SIZE), (self.width, LINE), (_STEPS // _PAIR, _SIZE)
        sizes = configuration(e, [*[sums] * _FEW, columns, *[row] * _LEFTS])
        on_tiles(e, Operation.TILE_SIZES, sizes)
        w.loop(k.start, k.stop, max(1, most), cut)
        end_sizes(e)
        e.release(mark)

    def _clear(self) -> None:
        """Zeros in all accumulators."""
        w, nothing = self.w, zero(self.c.stored, self.width)

        def tile_of(column: Reg, _: list[Reg]) -> list[Reg]:
            for i in self.rows:
                self.c.put(self.e, nothing, [*self.batch, integer(i), column], self.axis)
            return []

        w.loop(integer(0), self.columns, self.width, tile_of)

    def _row(self, i: int) -> Reg:
        """Where a row of the left operand is copied to."""
        return self.w.offset(self.left, integer(i * self.pitch))

    def _copy(self, tile: Tile, index: Sequence[Reg], axis: int, depth: Reg, to: Reg) -> None:
        """Copy ``depth`` numbers along an axis, and zeros behind them to the end of a tile."""
        w = self.w
        before = w.sub(depth, integer(1))
        last = w.mul(w.sub(before, w.mod(before, _STEPS)), integer(2))
        w.store(Reg(vector_type("i16", _STEPS), "zeroinitializer"), w.offset(to, last), 2)

        def put(k: Reg, vector: Reg) -> None:
            w.store(vector, w.offset(to, w.mul(k, integer(2))), 2)

        read_along(self.e, tile, index, axis, depth, put)

    def _multiply(self, first: Reg, depth: Reg) -> None:
        """All columns times the copied rows, a tile of them at a time: memory is read in order."""
        w, width = self.w, integer(self.width)
        inside = self._inside(first, depth)

        def columns_from(column: Reg, _: list[Reg]) -> list[Reg]:
            lies = w.compare("icmp sle", w.add(column, width), inside)
            w.when(lies, lambda: None, lambda: self._copy_columns(column, first, depth))
            self._columns(column, first, depth, lies)
            return []

        w.loop(integer(0), self.columns, self.width, columns_from)

    def _inside(self, first: Reg, depth: Reg) -> Reg:
        """How many columns lie in the tensor where K is whole tiles."""
        w, columns = self.w, integer(self.static)
        bounds = Bounds(w, self.b.accesses(range(self.axis + 1)), self.axis, self.width)
        limit = columns
        if bounds.open:
            behind = [w.add(at, integer(1)) for at in self.batch]
            limit = bounds.limit([*behind, w.add(first, depth), columns])
        rest = w.mod(depth, _STEPS)
        if rest.literal is not None:
            return integer(0) if rest.literal else limit
        return w.select(w.compare("icmp eq", rest, integer(0)), limit, integer(0))

    def _copy_columns(self, column: Reg, first: Reg, depth: Reg) -> None:
        """Columns from this one on, as many as a tile has."""
        w = self.w

        def one(i: Reg, _: list[Reg]) -> list[Reg]:
            own = w.minimum(w.add(column, i), w.sub(self.columns, integer(1)))
            to = w.offset(self.copied, w.mul(i, integer(self.pitch)))
            self._copy(self.b, [*self.batch, first, own], self.axis - 1, depth, to)
            return []

        w.loop(integer(0), integer(self.width), 1, one)

    def _columns(self, column: Reg, first: Reg, depth: Reg, lies: Reg) -> None:
        """A tile of columns, which ``lies`` where it is or else is copied, times all rows."""
        w, e = self.w, self.e
        sums = [self.c.at(e, [*self.batch, integer(i), column]) for i in self.rows]
        pitch, pair = w.select(lies, self.apart, integer(self.pitch)), integer(2 * _PAIR)

        def step(number: Reg, _: list[Reg]) -> list[Reg]:
            k = w.mul(number, integer(_STEPS))
            place = self.b.loaded_from([*self.batch, w.add(first, k), column])
            assert place is not None
            at = w.select(lies, place, w.offset(self.copied, w.mul(k, integer(2))))
            for i in range(self.width):
                fetch(w, w.offset(at, w.mul(integer(self.width + i), pitch)), 0, 1)
            on_tiles(e, Operation.TILE_LOAD, tile(_RIGHT), at, pitch)
            for i in self.rows:
                left = tile(_LEFT + i % _LEFTS)
                row = w.offset(self._row(i), w.mul(k, integer(2)))
                on_tiles(e, Operation.TILE_LOAD, left, row, pair)
                on_tiles(e, Operation.TILES_OF_BFLOAT16, tile(i), tile(_RIGHT), left)
            return []

        for i, at in enumerate(sums):
            if self.fresh:
                on_tiles(e, Operation.TILE_ZERO, tile(i))
            else:
                on_tiles(e, Operation.TILE_LOAD, tile(i), at, integer(_SIZE))
        deep = w.floordiv(w.add(depth, integer(_STEPS - 1)), integer(_STEPS))
        w.loop(integer(0), deep, 1, step)
        for i, at in enumerate(sums):
            on_tiles(e, Operation.TILE_STORE, tile(i), at, integer(_SIZE))
