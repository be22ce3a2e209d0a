"""Dots of block floating point and weights of four bits by a machine's tile registers (AMX).

Both are bfloat16 numbers: activations lie as tile registers hold them
(:func:`dure.targets.cpu.packing.activation_layout`); weights are rounded
(:mod:`dure.targets.cpu.bfpdots`) once for all rows, two panels at a time.  The sums stay in tile
registers over the whole of K.  An instruction adds the products of one block, which are exact in
float32 in whatever order, to a sum and rounds once: the bits of
:func:`dure.targets.cpu.bfpdots.add_chunks`.
"""

from __future__ import annotations

from itertools import product

from dure.ir.expr import as_expr
from dure.runtime.host import HostFeatures
from dure.targets.cpu.bfpdots import PAIRS, RoundedWeights
from dure.targets.cpu.blockdots import ActivationRows
from dure.targets.cpu.instructions import Operation, has
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.packing import CHUNK
from dure.targets.cpu.tiledots import LANES, LINE, ROWS, keep_sizes, on_tiles, tile
from dure.targets.cpu.values import Buffer, Emitter, LoadedBlocks
from dure.targets.cpu.writer import Reg, integer, vector_type

#: Bytes of a tile; tiles of sums below and beside one another; the first tile of each operand.
_TILE = ROWS * LINE
_BELOW, _ACROSS, _LEFT, _RIGHT = 2, 2, 4, 6
#: Up to so many rows are multiplied where the weights lie: making tiles of these costs as much.
_FEW = 8
#: A chunk is rounded so many chunks before it is multiplied: tiles aren't loaded from stores that
#: are under way.
_AHEAD = 2
#: A number whose last bit is 1, to which an i16 number is added by its bits, and these, with what
#: makes all i16 numbers positive.
_BIAS = 2.0**23 + 2.0**15
_BIAS_BITS = 0x4B008000


def takes_bfp_tiles(host: HostFeatures, a: ActivationRows, rows: Extent, columns: Extent) -> bool:
    """Whether the host multiplies these activations by its tile registers."""
    if not has(host, Operation.TILES_OF_BFLOAT16) or rows.most <= _FEW:
        return False
    if rows.static % ROWS or columns.static % LANES or not isinstance(a.tile, LoadedBlocks):
        return False
    place = a.tile.places["value"]
    outer, inner = place.layout.axes[0][-1], place.layout.axes[1][-1]
    tiled = (outer.extent, inner.extent) == (ROWS, CHUNK)
    return tiled and place.axes[0].start % ROWS is as_expr(0)


class BfpTileDot:
    """``c += a @ b`` over some chunks of K, where :func:`takes_bfp_tiles`.

    Sums of whole tiles are written: what lies behind the used rows and columns is undefined.
    """

    def __init__(
        self, e: Emitter, a: ActivationRows, b: RoundedWeights, c: Buffer, chunks: tuple[Reg, Reg]
    ) -> None:
        self.e, self.w = e, e.w
        self.a, self.b, self.c = a, b, c
        self.start, self.stop = chunks

    def run(self, rows: Extent, columns: Extent, fresh: bool) -> None:
        """Write the sums; ``fresh`` does not read ``c``."""
        w, self.fresh = self.w, fresh
        self.weights = self.e.allocate(self.b.length // CHUNK * _ACROSS * _TILE)
        self.tiles = self._count(rows, ROWS)
        panels = self._count(columns, LANES)
        pairs = w.sub(panels, w.mod(panels, _ACROSS))

        def write() -> None:
            for across, span in ((_ACROSS, (integer(0), pairs)), (1, (pairs, panels))):

                def several(panel: Reg, _: list[Reg], across: int = across) -> list[Reg]:
                    self._panels(panel, across)
                    return []

                w.loop(*span, across, several)

        keep_sizes(self.e)
        w.when(w.compare("icmp slt", integer(0), self.tiles), write, lambda: None)

    def _count(self, extent: Extent, size: int) -> Reg:
        used = self.w.index(extent.bound)
        return self.w.floordiv(self.w.add(used, integer(size - 1)), integer(size))

    def _panels(self, panel: Reg, across: int) -> None:
        """``across`` panels of weights, times all rows: those of the first block as they are
        rounded, lest either unit waits for the other for long.
        """
        w = self.w
        several = w.compare("icmp sge", self.tiles, integer(_BELOW))
        first = w.select(several, integer(_BELOW), integer(1))
        w.when(
            several,
            lambda: self._block(integer(0), panel, _BELOW, across, rounding=True),
            lambda: self._block(integer(0), panel, 1, across, rounding=True),
        )
        pairs = w.sub(self.tiles, w.mod(self.tiles, _BELOW))
        for below, span in ((_BELOW, (first, pairs)), (1, (w.maximum(first, pairs), self.tiles))):

            def block(row: Reg, _: list[Reg], below: int = below) -> list[Reg]:
                self._block(row, panel, below, across)
                return []

            w.loop(*span, below, block)

    def _tile(self, chunk: Reg, number: int) -> Reg:
        """Where a chunk of a panel's weights lies."""
        by = self.w.mul(chunk, integer(_ACROSS * _TILE))
        return self.w.offset(self.weights, self.w.add(by, integer(number * _TILE)))

    # -- weights ----------------------------------------------------------------------------------

    def _round(self, panel: Reg, number: int, place: Reg) -> None:
        """Copy a chunk of a panel as bfloat16 numbers, two k of a column side by side."""
        w, e = self.w, self.e
        words, half = vector_type("i32", LANES), w.constant("i32", 16, LANES)
        lower = w.constant("i32", 0xFFFF, LANES)

        at, to = self.b.chunk(e, panel, place), self._tile(place, number)
        found = self.b.rounding(e, at, place)
        bias = e.math.constant(found.power, -_BIAS)
        if found.start is not None:
            bias = e.math.add(bias, w.cast("sitofp", found.start, bias.type))
        bias = e.math.mul(bias, found.power)

        def float_of(code: Reg) -> Reg:
            """The bits of a number, from those of its code as an i16 number."""
            moved = w.binary("xor", code, w.constant("i32", _BIAS_BITS, LANES))
            number = w.cast("bitcast", moved, bias.type)
            return w.cast("bitcast", e.math.fma(number, found.power, bias), words)

        for pair in range(PAIRS):
            codes = w.cast("bitcast", self.b.pairs(e, at, place, found, pair), words)
            even = float_of(w.binary("and", codes, lower))
            odd = float_of(w.binary("lshr", codes, half))
            both = w.binary("or", w.binary("lshr", even, half), odd)
            w.store(both, w.offset(to, integer(pair * LINE)), LINE)

    # -- products ---------------------------------------------------------------------------------

    def _block(self, row: Reg, panel: Reg, below: int, across: int, rounding: bool = False) -> None:
        """Tiles of sums: ``below`` of rows by ``across`` panels, which are rounded on the way."""
        w, grid = self.w, list(product(range(below), range(across)))
        sums = [tile(r * _ACROSS + c) for r, c in grid]
        places = [self._sums(w.add(row, integer(r)), w.add(panel, integer(c))) for r, c in grid]
        for number, place in zip(sums, places, strict=True):
            if self.fresh:
                on_tiles(self.e, Operation.TILE_ZERO, number)
            else:
                on_tiles(self.e, Operation.TILE_LOAD, number, *place)

        def multiply(chunk: Reg) -> None:
            for c in range(across):
                at = self._tile(chunk, c)
                on_tiles(self.e, Operation.TILE_LOAD, tile(_RIGHT + c), at, integer(LINE))
            for r in range(below):
                at = self._values(w.add(row, integer(r)), chunk)
                on_tiles(self.e, Operation.TILE_LOAD, tile(_LEFT + r), at, integer(LINE))
                for c in range(across):
                    operands = sums[r * across + c], tile(_LEFT + r), tile(_RIGHT + c)
                    on_tiles(self.e, Operation.TILES_OF_BFLOAT16, *operands)

        columns = [w.mul(w.add(panel, integer(c)), integer(LANES)) for c in range(across)]
        panels = [self.b.panel(self.e, column) for column in columns]

        def read(chunk: Reg) -> None:
            for number, address in enumerate(panels):
                self._round(address, number, chunk)

        def ahead(chunk: Reg, _: list[Reg]) -> list[Reg]:
            read(chunk)
            return []

        def step(chunk: Reg, _: list[Reg]) -> list[Reg]:
            multiply(chunk)
            return []

        def both(chunk: Reg, _: list[Reg]) -> list[Reg]:
            read(w.add(chunk, integer(_AHEAD)))
            multiply(chunk)
            return []

        first = self.start
        if rounding:
            begun = w.minimum(w.add(self.start, integer(_AHEAD)), self.stop)
            w.loop(self.start, begun, 1, ahead)
            first = w.maximum(w.sub(self.stop, integer(_AHEAD)), self.start)
            w.loop(self.start, first, 1, both)
        w.loop(first, self.stop, 1, step)
        for number, place in zip(sums, places, strict=True):
            on_tiles(self.e, Operation.TILE_STORE, number, *place)

    def _values(self, row: Reg, chunk: Reg) -> Reg:
        """Where a tile of activations lies."""
        w = self.w
        place = w.mul(row, integer(ROWS)), w.mul(chunk, integer(CHUNK))
        return self.a.address(self.e, "value", *place)

    def _sums(self, row: Reg, panel: Reg) -> tuple[Reg, Reg]:
        """Where a tile of sums lies, and bytes from a row to the next."""
        w = self.w
        at = self.c.at(self.e, [w.mul(row, integer(ROWS)), w.mul(panel, integer(LANES))])
        return at, integer(4 * self.c.strides()[-2])
