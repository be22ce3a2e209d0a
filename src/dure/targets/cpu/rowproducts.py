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
from dure.targets.cpu.copies import pitch_of, read_along
from dure.targets.cpu.dots import KRange, Step, plain_dot, zero
from dure.targets.cpu.instructions import Operation, intrinsic
from dure.targets.cpu.memory import Extent, fetch
from dure.targets.cpu.paneldots import Blocking
from dure.targets.cpu.tiledots import LINE, ROWS, configuration, on_tiles, tile
from dure.targets.cpu.tileproducts import TileProduct
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
#: What makes subnormal results and operands zeros, and the sums of an element that vectors add up:
#: those of even and of odd steps of a tile, and of all before.
_FLUSHED, _SUMS = 0x8040, 3


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


class RowProduct(TileProduct):
    """``c += a @ b`` of bfloat16 numbers, where :func:`takes_rows`.

    Columns that don't lie inside of their tensor, or K that is no whole tile, are copied first.
    """

    def _blocking(self) -> Blocking:
        """A panel is the columns of a tile."""
        return Blocking((), _FEW, _DEPTH, gcd(self.static[1], ROWS))

    def _allocate(self, rows: int, panels: int) -> None:
        """Rows of the left operand, and those that are a tile of the right one."""
        self.pitch = 2 * -(-self.depth // _STEPS) * _STEPS
        self.left = self.e.allocate(rows * self.pitch)
        self.copied = self.e.allocate(self.cuts.width * self.pitch)
        self.high = rows

    def _left_at(self, row: Reg, k: Reg) -> Reg:
        w = self.w
        return w.offset(self.left, w.add(w.mul(row, integer(self.pitch)), w.mul(k, integer(2))))

    def _copy_columns(self, first: Reg, depth: Reg) -> None:
        """Where they don't lie inside, a tile of them is copied when its turn comes."""

    def _multiply(self, row: Reg, count: Reg, first: Reg, depth: Reg) -> None:
        """All columns times the copied rows, a tile of them at a time: memory is read in order."""
        w, width = self.w, self.cuts.width
        self.deep_now = w.floordiv(w.add(depth, integer(_STEPS - 1)), integer(_STEPS))
        self.begins = w.compare("icmp eq", first, self.k.start)
        sums, columns, rows = (width, _SIZE), (width, LINE), (_STEPS // _PAIR, _SIZE)
        sizes = configuration(self.e, [*[sums] * _FEW, columns, *[rows] * _LEFTS])
        on_tiles(self.e, Operation.TILE_SIZES, sizes)
        inside = self._inside(first, depth)

        def columns_from(column: Reg, _: list[Reg]) -> list[Reg]:
            lies = w.compare("icmp sle", w.add(column, integer(width)), inside)
            w.when(lies, lambda: None, lambda: self._copy_tile(column, first, depth))
            self._columns(row, column, first, lies)
            return []

        w.loop(integer(0), w.mul(self.panels, integer(width)), width, columns_from)
        on_tiles(self.e, Operation.TILE_RELEASE)

    def _inside(self, first: Reg, depth: Reg) -> Reg:
        """How many columns lie in the tensor where K is whole tiles."""
        w, columns = self.w, integer(self.static[1])
        bounds = Bounds(w, self.b.accesses(range(self.axis + 1)), self.axis, self.cuts.width)
        limit = columns
        if bounds.open:
            limit = bounds.limit([*self.behind, w.add(first, depth), columns])
        rest = w.mod(depth, _STEPS)
        if rest.literal is not None:
            return integer(0) if rest.literal else limit
        return w.select(w.compare("icmp eq", rest, integer(0)), limit, integer(0))

    def _copy_tile(self, column: Reg, first: Reg, depth: Reg) -> None:
        """Columns from this one on, as many as a tile has."""
        w, nothing = self.w, Reg(vector_type("i16", _STEPS), "zeroinitializer")

        def one(i: Reg, _: list[Reg]) -> list[Reg]:
            # What nobody uses may lie outside of the tensor.
            own = w.minimum(w.add(column, i), w.sub(self.columns, integer(1)))
            index = [*self.batch, first, own]
            start = w.offset(self.copied, w.mul(i, integer(self.pitch)))

            def put(k: Reg, vector: Reg) -> None:
                self._put_narrow(vector, w.offset(start, w.mul(k, integer(2))))

            last = w.mul(self._last_tile(depth), integer(2))
            w.store(nothing, w.offset(start, last), LINE)
            read_along(self.e, self.b, index, self.axis - 1, depth, put)
            return []

        w.loop(integer(0), integer(self.cuts.width), 1, one)

    def _columns(self, row: Reg, column: Reg, first: Reg, lies: Reg) -> None:
        """A tile of columns, which ``lies`` where it is or else is copied, times all rows."""
        w, e = self.w, self.e
        rows = range(self.high)
        sums = [self.c.at(e, [*self.batch, w.add(row, integer(r)), column]) for r in rows]
        apart = pitch_of(self.b, self.axis - 1, self.axis, _STEPS)
        assert apart is not None
        pitch = w.select(lies, apart, integer(self.pitch))

        def step(number: Reg, _: list[Reg]) -> list[Reg]:
            k = w.mul(number, integer(_STEPS))
            place = self.b.loaded_from([*self.batch, w.add(first, k), column])
            assert place is not None
            at = w.select(lies, place, w.offset(self.copied, w.mul(k, integer(2))))
            for i in range(self.cuts.width):
                ahead = w.mul(integer(self.cuts.width + i), pitch)
                fetch(w, w.offset(at, ahead), 0, 1)
            on_tiles(e, Operation.TILE_LOAD, tile(_RIGHT), at, pitch)
            for r in rows:
                left, pair = tile(_LEFT + r % _LEFTS), integer(2 * _PAIR)
                on_tiles(e, Operation.TILE_LOAD, left, self._left_at(integer(r), k), pair)
                on_tiles(e, Operation.TILES_OF_BFLOAT16, tile(r), tile(_RIGHT), left)
            return []

        self._sum_up([tile(r) for r in rows], [(at, integer(_SIZE)) for at in sums], step)
