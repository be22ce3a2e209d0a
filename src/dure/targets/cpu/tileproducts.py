"""Dots of bfloat16 operands by a machine's tile registers (AMX).

Both operands are copied to where tiles are read in order (:mod:`dure.targets.cpu.paneldots` says
when and how): the left one's sixteen rows of 32 k after one another, the right one's pairs of k
side by side.  Accumulators go from their buffer to tiles and back, two by two of them at a time.

An instruction adds the products of the even and of the odd k of 32, then both sums to the
accumulator, and takes subnormal numbers for zero.  So an output element is added up in an order
that K alone decides, as long as every dot of a machine with tiles goes this way, however few rows
and columns it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import gcd

from dure.ir import dtypes
from dure.ir.dtypes import ElementType
from dure.runtime.host import HostFeatures
from dure.targets.cpu.instructions import Operation, has
from dure.targets.cpu.memory import fetch
from dure.targets.cpu.paneldots import Blocking, PanelDot
from dure.targets.cpu.tiledots import LANES, LINE, ROWS, configuration, on_tiles, tile
from dure.targets.cpu.writer import Reg, integer, lanes_of, vector_type

#: Steps of K in a tile, those that lie side by side in the right one, and bytes of a tile.
_STEPS, _PAIR, _TILE = 32, 2, ROWS * LINE
#: Tiles of accumulators beside and below one another, and the first tile of each operand.
_ACROSS, _LEFT, _RIGHT = 2, 4, 6
_SIZE = 4
#: Tiles of the left operand that are asked for ahead of their use.
_AHEAD = 4


def takes_products(host: HostFeatures, left: ElementType, right: ElementType) -> bool:
    """Whether the host multiplies such operands by its tile registers, to float32."""
    bfloat16 = left == right == dtypes.bfloat16
    return bfloat16 and has(host, Operation.TILES_OF_BFLOAT16)


class TileProduct(PanelDot):
    """``c += a @ b``, where :func:`takes_products`."""

    together = _PAIR

    def _blocking(self) -> Blocking:
        """A panel takes two thirds of the nearest cache, the copied rows a sixteenth of the second:
        accumulators and panels are there too.
        """
        host, columns = self.e.host, self.static[1]
        wide = _ACROSS * LANES
        width = wide if columns % wide == 0 else gcd(columns, LANES)
        depth = max(1, 2 * host.l1d_bytes // 3 // (2 * wide * _STEPS)) * _STEPS
        rows = max(_ACROSS, host.l2_bytes // 16 // (2 * depth * ROWS)) * ROWS
        return Blocking((), rows, depth, width)

    def _allocate(self, rows: int, panels: int) -> None:
        #: Tiles of a row of blocks, and of a panel's columns.
        self.deep = -(-self.depth // _STEPS)
        self.left = self.e.allocate(-(-rows // ROWS) * self.deep * _TILE)
        # Panels that are copied from whole registers may be more than there are.
        self.right = self.e.allocate((panels + LANES // self.lanes - 1) * self._panel)

    @property
    def _panel(self) -> int:
        """Bytes from one panel to the next, and no power of two, lest all begin in one set of a
        cache.
        """
        return -(-self.cuts.width // LANES) * self.deep * _TILE + LINE

    def _clear(self) -> None:
        """Only where there is no cut at all: the first one doesn't read accumulators."""
        none = self.w.compare("icmp sle", self.k.stop, self.k.start)
        self.w.when(none, super()._clear, lambda: None)

    # -- copies -----------------------------------------------------------------------------------

    def _left_at(self, row: Reg, k: Reg) -> Reg:
        w = self.w
        block = w.mul(w.floordiv(row, integer(ROWS)), integer(self.deep * _TILE))
        inside = w.add(block, w.mul(w.mod(row, ROWS), integer(LINE)))
        inside = w.add(inside, w.mul(w.floordiv(k, integer(_STEPS)), integer(_TILE)))
        return w.offset(self.left, w.add(inside, w.mul(w.mod(k, _STEPS), integer(2))))

    def _right_at(self, panel: Reg, k: Reg, lane: Reg) -> Reg:
        w = self.w
        at = w.mul(panel, integer(self._panel))
        across = w.mul(w.floordiv(lane, integer(LANES)), integer(self.deep * _TILE))
        inside = w.mul(w.floordiv(k, integer(_STEPS)), integer(_TILE))
        pair = w.mul(w.floordiv(w.mod(k, _STEPS), integer(_PAIR)), integer(LINE))
        return w.offset(self.right, w.add(w.add(at, across), w.add(inside, pair)))

    def _last_tile(self, depth: Reg) -> Reg:
        """The first k of the last tile, which is cleared: what lies behind K would count."""
        last = self.w.sub(depth, integer(1))
        return self.w.sub(last, self.w.mod(last, _STEPS))

    def _copy_rows(self, row: Reg, count: Reg, first: Reg, depth: Reg) -> None:
        nothing = Reg(vector_type("i32", LANES), "zeroinitializer")

        def clear(i: Reg, _: list[Reg]) -> list[Reg]:
            self.w.store(nothing, self._left_at(i, self._last_tile(depth)), LINE)
            return []

        self.w.loop(integer(0), count, 1, clear)
        super()._copy_rows(row, count, first, depth)

    def _copy_columns(self, first: Reg, depth: Reg) -> None:
        nothing = Reg(vector_type("i32", LANES), "zeroinitializer")

        def clear(panel: Reg, _: list[Reg]) -> list[Reg]:
            for lane in range(0, self.cuts.width, LANES):
                at = self._right_at(panel, self._last_tile(depth), integer(lane))
                for pair in range(_STEPS // _PAIR):
                    self.w.store(nothing, self.w.offset(at, integer(pair * LINE)), LINE)
            return []

        self.count = depth
        self.w.loop(integer(0), self.panels, 1, clear)
        super()._copy_columns(first, depth)

    def _put_row(self, i: Reg, k: Reg, vector: Reg) -> None:
        w = self.w
        lanes = lanes_of(vector.type)
        bits = w.cast("bitcast", vector, vector_type("i32", lanes))
        high = w.binary("lshr", bits, w.constant("i32", 16, lanes))
        w.store(w.cast("trunc", high, vector_type("i16", lanes)), self._left_at(i, k), 2)

    def _put(self, panel: Reg, k: Reg, lane: Reg, vectors: Sequence[Reg]) -> None:
        """Vectors of whole registers hold several panels where these are narrower."""
        width = self.lanes
        for part in range(lanes_of(vectors[0].type) // width):
            lanes = range(part * width, part * width + width)
            own = [self.w.shuffle(v, lanes) if len(lanes) < LANES else v for v in vectors]
            self._put_pair(self.w.add(panel, integer(part)), k, lane, own)

    def _put_pair(self, panel: Reg, k: Reg, lane: Reg, vectors: Sequence[Reg]) -> None:
        w, lanes = self.w, self.lanes
        words: list[Reg] = []
        for number, vector in enumerate(vectors):
            bits = w.cast("bitcast", vector, vector_type("i32", lanes))
            # What is turned behind K is anything.
            inside = w.compare("icmp slt", w.add(k, integer(number)), self.count)
            words.append(w.select(inside, bits, w.constant("i32", 0, lanes)))
        pair = w.binary("lshr", words[0], w.constant("i32", 16, lanes))
        for high in words[1:]:
            pair = w.binary("or", pair, w.binary("and", high, w.constant("i32", -65536, lanes)))
        w.store(pair, self._right_at(panel, k, lane), _SIZE)

    # -- products ---------------------------------------------------------------------------------

    def _multiply(self, row: Reg, count: Reg, first: Reg, depth: Reg) -> None:
        """All panels, one after another, times the copied rows; the last ones are fewer."""
        w = self.w
        self.deep_now = w.floordiv(w.add(depth, integer(_STEPS - 1)), integer(_STEPS))
        self.begins = w.compare("icmp eq", first, self.k.start)
        rest = w.mod(count, ROWS)
        whole = w.sub(count, rest)
        pairs = w.sub(whole, w.mod(whole, _ACROSS * ROWS))

        def blocks(rows: Reg, spans: Sequence[tuple[Reg, Reg, int]]) -> None:
            self._configure(rows)

            def panel(number: Reg, _: list[Reg]) -> list[Reg]:
                for start, stop, below in spans:

                    def block(i: Reg, _: list[Reg], below: int = below) -> list[Reg]:
                        self._tiles(row, i, number, below)
                        return []

                    w.loop(start, stop, below * ROWS, block)
                return []

            w.loop(integer(0), self.panels, 1, panel)
            on_tiles(self.e, Operation.TILE_RELEASE)

        if self.static[0] >= ROWS:
            spans = ((integer(0), pairs, _ACROSS), (pairs, whole, 1))
            blocks(integer(ROWS), spans if self.static[0] > ROWS else spans[1:])
        some = w.compare("icmp slt", integer(0), rest)
        w.when(some, lambda: blocks(rest, ((whole, count, 1),)), lambda: None)

    def _configure(self, rows: Reg) -> None:
        """Tell the machine the sizes of tiles, for so many rows."""
        w, wide = self.w, _SIZE * min(self.cuts.width, LANES)
        sums, left, right = [(ROWS, wide)] * 4, [(ROWS, LINE)] * 2, [(_STEPS // _PAIR, wide)] * 2
        at = configuration(self.e, [*sums, *left, *right])
        height = w.cast("trunc", rows, "i8")
        for number in range(_RIGHT):
            w.store(height, w.offset(at, integer(48 + number)))
        on_tiles(self.e, Operation.TILE_SIZES, at)

    def _tiles(self, row: Reg, i: Reg, panel: Reg, below: int) -> None:
        """``below`` blocks of rows times a panel."""
        w = self.w
        across = max(1, self.cuts.width // LANES)
        grid = list(product(range(below), range(across)))
        buffer = [self._accumulator(row, i, panel, r, c) for r, c in grid]
        numbers = [tile(r * _ACROSS + c) for r, c in grid]

        def zeros() -> None:
            for number in numbers:
                on_tiles(self.e, Operation.TILE_ZERO, number)

        def every(operation: Operation) -> None:
            for number, place in zip(numbers, buffer, strict=True):
                on_tiles(self.e, operation, number, *place)

        def step(number: Reg, _: list[Reg]) -> list[Reg]:
            k = w.mul(number, integer(_STEPS))
            for c in range(across):
                at = self._right_at(panel, k, integer(c * LANES))
                on_tiles(self.e, Operation.TILE_LOAD, tile(_RIGHT + c), at, integer(LINE))
            for r in range(below):
                at = self._left_at(w.add(i, integer(r * ROWS)), k)
                fetch(w, at, _AHEAD * _TILE, _TILE)
                on_tiles(self.e, Operation.TILE_LOAD, tile(_LEFT + r), at, integer(LINE))
            for accumulator, (r, c) in zip(numbers, grid, strict=True):
                operands = accumulator, tile(_LEFT + r), tile(_RIGHT + c)
                on_tiles(self.e, Operation.TILES_OF_BFLOAT16, *operands)
            return []

        def read() -> None:
            every(Operation.TILE_LOAD)

        if self.whole or not self.fresh:
            (zeros if self.fresh else read)()
        else:
            w.when(self.begins, zeros, read)
        w.loop(integer(0), self.deep_now, 1, step)
        every(Operation.TILE_STORE)

    def _accumulator(
        self, row: Reg, i: Reg, panel: Reg, below: int, across: int
    ) -> tuple[Reg, Reg]:
        """Where a tile of accumulators lies in their buffer, and bytes from a row to the next."""
        w = self.w
        at = w.add(w.add(row, i), integer(below * ROWS))
        column = w.add(w.mul(panel, integer(self.cuts.width)), integer(across * LANES))
        pitch = integer(_SIZE * self.c.strides()[-2])
        return self.c.at(self.e, [*self.batch, at, column]), pitch
