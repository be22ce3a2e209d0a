"""Dots of bfloat16 operands by a machine's tile registers (AMX).

Both operands are copied to where tiles are read in order (:mod:`dure.targets.cpu.paneldots` says
when and how), as memory holds them: 32 k of two blocks of sixteen rows after one another, and of
two blocks of sixteen columns, whose pairs of k lie side by side.  Accumulators go from their buffer
to tiles and back, two by two of them at a time.

An instruction adds the products of the even and of the odd k of 32, then both sums to the
accumulator, and takes subnormal numbers for zero.  So an output element is added up in an order
that K alone decides, as long as every dot of a machine with tiles goes this way, however few rows
and columns it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import gcd

from dure.ir import dtypes
from dure.ir.dtypes import ElementType
from dure.runtime.host import HostFeatures
from dure.targets.cpu.copies import Stored, pair_pitch_of
from dure.targets.cpu.dots import FAR_AHEAD, KRange
from dure.targets.cpu.instructions import Operation, has
from dure.targets.cpu.memory import fetch
from dure.targets.cpu.paneldots import Blocking, PanelDot, most_columns
from dure.targets.cpu.tiledots import (
    LANES,
    LINE,
    ROWS,
    configuration,
    end_sizes,
    keep_sizes,
    on_tiles,
    tile,
    whole_sizes,
)
from dure.targets.cpu.values import Buffer, Tile
from dure.targets.cpu.writer import Reg, integer, lanes_of, vector_type

#: Steps of K in a tile, those that lie side by side in the right one, and bytes of a tile.
_STEPS, _PAIR, _TILE = 32, 2, ROWS * LINE
#: Tiles of accumulators beside and below one another, and the first tile of each operand.
_ACROSS, _BELOW, _LEFT, _RIGHT = 2, 2, 4, 6
#: Bytes of an accumulator, and of what it is made from.
_SIZE, _OPERAND = 4, 2
#: The most bytes between rows that tiles take where they lie: further ones share a cache's sets.
_NEAR = 1024


def takes_products(host: HostFeatures, left: ElementType, right: ElementType) -> bool:
    """Whether the host multiplies such operands by its tile registers, to float32."""
    bfloat16 = left == right == dtypes.bfloat16
    return bfloat16 and has(host, Operation.TILES_OF_BFLOAT16)


def _pitch(right: Tile) -> Reg | None:
    """Bytes from a row of a tile to the next, where tiles of a right operand lie in memory."""
    axis = right.type.rank - 1
    return pair_pitch_of(right, axis - 1, axis, _STEPS, LANES)


class TileProduct(PanelDot):
    """``c += a @ b``, where :func:`takes_products`."""

    together = _PAIR
    #: Tiles wait for caches, not for their products, and a page is looked up for each row.
    whole_rows = True

    def _operand(self, tile: Tile) -> Tile:
        return Stored(tile)

    def _blocking(self) -> Blocking:
        """The copied rows are those of a block of tiles: they take two thirds of the nearest cache,
        and stay there while panels pass by that are loaded as what isn't kept.
        """
        wide, host = _ACROSS * LANES, self.e.host
        width = wide if self.static[1] % wide == 0 else gcd(self.static[1], LANES)
        depth = max(1, host.l1d_bytes * 2 // 3 // (_OPERAND * wide * _STEPS)) * _STEPS
        columns = most_columns(host, _OPERAND * depth, width)
        return Blocking((), _BELOW * ROWS, depth, width, columns)

    def run(self, k: KRange, fresh: bool) -> None:
        whole = self.static[0] >= ROWS
        #: Whether the kernel's whole tiles do.
        self.keeps = whole and self.cuts.width >= LANES
        if self.keeps:
            keep_sizes(self.e)
        elif whole:
            self._configure(integer(ROWS))
        super().run(k, fresh)
        if not self.keeps:
            end_sizes(self.e)

    def _allocate(self, rows: int, panels: int) -> None:
        #: Tiles of a row of blocks, and of a panel's columns.
        self.deep = -(-self.depth // _STEPS)
        self.across = -(-self.cuts.width // LANES)
        self.placed = self._in_place()
        if self.placed is None:
            self.left = self.e.allocate(-(-rows // (_BELOW * ROWS)) * self.deep * _BELOW * _TILE)
        assert isinstance(self.b, Stored)
        #: Bytes between the rows of a right tile in memory, if it is read there.
        self.lying = _pitch(self.b.source) if self._takes_all_steps() else None
        if self.lying is not None:
            return
        # Panels that are copied from whole registers may be more than there are.
        self.right = self.e.allocate((panels + LANES // self.lanes - 1) * self._panel)

    def _in_place(self) -> Buffer | None:
        """The left operand, if tiles take its rows where they lie in the arena."""
        assert isinstance(self.a, Stored)
        a = self.a.source
        if not isinstance(a, Buffer) or not self._takes_all_steps():
            return None
        *_, row, element = a.strides()
        return a if element == 1 and 2 * row <= _NEAR else None

    def _takes_all_steps(self) -> bool:
        """Whether K is whole tiles."""
        start, length = self.k.start.literal, self.w.sub(self.k.stop, self.k.start).literal
        return start is not None and length is not None and not (start % _STEPS or length % _STEPS)

    @property
    def _panel(self) -> int:
        """Bytes from one panel to the next, and no power of two, lest all begin in one set of a
        cache.
        """
        return self.across * self.deep * _TILE + LINE

    # -- copies -----------------------------------------------------------------------------------

    def _left_at(self, row: Reg, k: Reg) -> Reg:
        w = self.w
        if self.placed is not None:
            at = w.mul(row, integer(self.placed.strides()[-2]))
            return w.offset(self.left, w.mul(w.add(at, k), integer(2)))
        block = w.mul(w.floordiv(row, integer(_BELOW * ROWS)), integer(self.deep * _BELOW * _TILE))
        inside = w.add(block, w.mul(w.mod(row, _BELOW * ROWS), integer(LINE)))
        inside = w.add(inside, w.mul(w.floordiv(k, integer(_STEPS)), integer(_BELOW * _TILE)))
        return w.offset(self.left, w.add(inside, w.mul(w.mod(k, _STEPS), integer(2))))

    def _right_at(self, panel: Reg, k: Reg, lane: Reg) -> Reg:
        w = self.w
        if self.lying is not None:
            column = w.add(w.mul(panel, integer(self.cuts.width)), lane)
            place = self.b.loaded_from([*self.batch, w.add(self.first, k), column])
            assert place is not None
            return place
        at = w.mul(panel, integer(self._panel))
        across = w.mul(w.floordiv(lane, integer(LANES)), integer(_TILE))
        inside = w.mul(w.floordiv(k, integer(_STEPS)), integer(self.across * _TILE))
        pair = w.mul(w.floordiv(w.mod(k, _STEPS), integer(_PAIR)), integer(LINE))
        return w.offset(self.right, w.add(w.add(at, across), w.add(inside, pair)))

    def _ragged(self, depth: Reg, clear: Callable[[Reg], None]) -> None:
        """Clear a last tile that isn't whole, from its first k on: what lies behind K counts."""
        w = self.w
        rest = w.mod(depth, _STEPS)
        at = w.sub(depth, rest)
        if rest.literal is None:
            w.when(w.compare("icmp ne", rest, integer(0)), lambda: clear(at), lambda: None)
        elif rest.literal:
            clear(at)

    def _copy_rows(self, row: Reg, count: Reg, first: Reg, depth: Reg) -> None:
        nothing = Reg(vector_type("i32", LANES), "zeroinitializer")

        def clear(k: Reg) -> None:
            def line(i: Reg, _: list[Reg]) -> list[Reg]:
                self.w.store(nothing, self._left_at(i, k), LINE)
                return []

            self.w.loop(integer(0), count, 1, line)

        self._ragged(depth, clear)
        super()._copy_rows(row, count, first, depth)

    def _copy_columns(self, first: Reg, depth: Reg) -> None:
        if self.lying is None:
            super()._copy_columns(first, depth)

    def _copy_along(self, first: Reg, depth: Reg) -> None:
        nothing = Reg(vector_type("i32", LANES), "zeroinitializer")

        def clear(k: Reg) -> None:
            def panel(number: Reg, _: list[Reg]) -> list[Reg]:
                for lane in range(0, self.cuts.width, LANES):
                    at = self._right_at(number, k, integer(lane))
                    for pair in range(_STEPS // _PAIR):
                        self.w.store(nothing, self.w.offset(at, integer(pair * LINE)), LINE)
                return []

            self.w.loop(integer(0), self.panels, 1, panel)

        self._ragged(depth, clear)
        super()._copy_along(first, depth)

    def _put_row(self, i: Reg, k: Reg, vector: Reg) -> None:
        self.w.store(vector, self._left_at(i, k), 2)

    def _joined(self, vectors: Sequence[Reg]) -> Reg:
        """Pairs of k, the even one in the low half."""
        w, lanes = self.w, self.lanes
        pairs = vector_type("i32", lanes)
        if len(vectors) < _PAIR:
            return w.cast("zext", vectors[0], pairs)
        even, odd = vectors
        if lanes == 1:
            low, high = w.cast("zext", even, pairs), w.cast("zext", odd, pairs)
            return w.binary("or", low, w.binary("shl", high, w.constant("i32", 16, lanes)))
        order = [lane + lanes * place for lane in range(lanes) for place in range(_PAIR)]
        return w.cast("bitcast", w.merge(even, odd, order), pairs)

    def _put(self, panel: Reg, k: Reg, lane: Reg, vector: Reg) -> None:
        """A vector of a whole register holds several panels where these are narrower."""
        w, width = self.w, self.lanes
        for part in range(lanes_of(vector.type) // width):
            lanes = range(part * width, part * width + width)
            own = w.shuffle(vector, lanes) if width < lanes_of(vector.type) else vector
            w.store(own, self._right_at(w.add(panel, integer(part)), k, lane), _SIZE)

    # -- products ---------------------------------------------------------------------------------

    def _multiply(self, row: Reg, count: Reg, first: Reg, depth: Reg) -> None:
        """All panels, one after another, times the copied rows; the last ones are fewer."""
        w = self.w
        self.deep_now = w.floordiv(w.add(depth, integer(_STEPS - 1)), integer(_STEPS))
        self.first = first
        rest = w.mod(count, ROWS)
        whole = w.sub(count, rest)
        pairs = w.sub(whole, w.mod(whole, _BELOW * ROWS))

        def blocks(*spans: tuple[Reg, Reg, int]) -> None:
            def panel(number: Reg, _: list[Reg]) -> list[Reg]:
                for start, stop, below in spans:

                    def block(i: Reg, _: list[Reg], below: int = below) -> list[Reg]:
                        self._tiles(row, i, number, below)
                        return []

                    w.loop(start, stop, below * ROWS, block)
                return []

            w.loop(integer(0), self.panels, 1, panel)
            self._end((row, self.column), (spans[0][0], spans[-1][1]), self._stop)

        def last() -> None:
            self._configure(rest)
            blocks((whole, count, 1))
            if self.keeps:
                whole_sizes(self.e)
            elif self.static[0] > ROWS:
                self._configure(integer(ROWS))

        if self.static[0] >= ROWS:
            spans = ((integer(0), pairs, _BELOW), (pairs, whole, 1))
            blocks(*(spans if self.static[0] > ROWS else spans[1:]))
        w.when(w.compare("icmp slt", integer(0), rest), last, lambda: None)

    def _configure(self, rows: Reg) -> None:
        """Tell the machine the sizes of tiles, for so many rows."""
        w, wide, most = self.w, _SIZE * min(self.cuts.width, LANES), rows.literal or ROWS
        sums, left, right = [(most, wide)] * 4, [(most, LINE)] * 2, [(_STEPS // _PAIR, wide)] * 2
        at = configuration(self.e, [*sums, *left, *right])
        if rows.literal is None:
            height = w.cast("trunc", rows, "i8")
            for number in range(_RIGHT):
                w.store(height, w.offset(at, integer(48 + number)))
        on_tiles(self.e, Operation.TILE_SIZES, at)

    def _tiles(self, row: Reg, i: Reg, panel: Reg, below: int) -> None:
        """``below`` blocks of rows times a panel."""
        w = self.w
        grid = list(product(range(below), range(self.across)))
        buffer = [self._accumulator(row, i, panel, r, c) for r, c in grid]
        numbers = [tile(r * _ACROSS + c) for r, c in grid]
        left_pitch = integer(LINE if self.placed is None else 2 * self.placed.strides()[-2])

        def zeros() -> None:
            for number in numbers:
                on_tiles(self.e, Operation.TILE_ZERO, number)

        def every(operation: Operation, places: Sequence[tuple[Reg, Reg]]) -> None:
            for number, place in zip(numbers, places, strict=True):
                on_tiles(self.e, operation, number, *place)

        once = self.lying is not None and self.static[0] <= ROWS

        def step(number: Reg, _: list[Reg]) -> list[Reg]:
            k = w.mul(number, integer(_STEPS))
            for c in range(self.across):
                at = self._right_at(panel, k, integer(c * LANES))
                pitch = integer(LINE) if self.lying is None else self.lying
                for line in range(ROWS if once else 0):
                    fetch(w, w.offset(at, w.mul(pitch, integer(line))), FAR_AHEAD, 1, cache=2)
                on_tiles(self.e, Operation.TILE_LOAD_ONCE, tile(_RIGHT + c), at, pitch)
            for r in range(below):
                at = self._left_at(w.add(i, integer(r * ROWS)), k)
                on_tiles(self.e, Operation.TILE_LOAD, tile(_LEFT + r), at, left_pitch)
            for accumulator, (r, c) in zip(numbers, grid, strict=True):
                operands = accumulator, tile(_LEFT + r), tile(_RIGHT + c)
                on_tiles(self.e, Operation.TILES_OF_BFLOAT16, *operands)
            return []

        w.when(self.begins, zeros, lambda: every(Operation.TILE_LOAD_ONCE, buffer))
        w.loop(integer(0), self.deep_now, 1, step)
        w.when(
            self.ends,
            lambda: every(Operation.TILE_STORE, [self._sums(i, panel, r, c) for r, c in grid]),
            lambda: every(Operation.TILE_STORE, buffer),
        )

    def _accumulator(
        self, row: Reg, i: Reg, panel: Reg, below: int, across: int
    ) -> tuple[Reg, Reg]:
        """Where a tile of accumulators lies in their buffer, and bytes from a row to the next."""
        w = self.w
        at = w.add(w.add(row, i), integer(below * ROWS))
        column = self._column(panel, across * LANES)
        pitch = integer(_SIZE * self.c.strides()[-2])
        return self.c.at(self.e, [*self.batch, at, column]), pitch

    def _sums(self, i: Reg, panel: Reg, below: int, across: int) -> tuple[Reg, Reg]:
        """Where a tile of accumulators lies behind its last step, and bytes from a row on."""
        w = self.w
        lane = w.add(w.mul(panel, integer(self.cuts.width)), integer(across * LANES))
        at = self.sums.at(self.e, [w.add(i, integer(below * ROWS)), lane])
        return at, integer(_SIZE * self.sums.pitch)
