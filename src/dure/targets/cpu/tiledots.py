"""Dots of sixteen rows at a time by a machine's tile registers (AMX): int8 blocks times panels.

A tile register holds sixteen rows of 64 bytes, and one instruction multiplies two of them into
sixteen rows and columns of int32.  Panels (:mod:`dure.targets.cpu.packing`) are unpacked once for
all rows: a chunk's codes as bytes, four k of all lanes after four, which is such an operand, then
its scales and offsets in float32.  What a scale covers is one product; it leaves the tile by way of
memory, where the vectors scale it and add it in order: the sums are exact, so that the bits are
those of :func:`dure.targets.cpu.blockdots.chunk_step`.  Tiles and vectors take turns of many
products, as many as a quarter of the nearest cache holds: each of them waits for itself only.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from dure.ir.dtypes import BlockFormat
from dure.runtime import tile_registers
from dure.runtime.host import HostFeatures
from dure.targets.cpu.blockdots import ActivationRows, Panels, zero_of
from dure.targets.cpu.instructions import Operation, has, intrinsic
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.packing import CHUNK, GROUP, TILE_ROWS
from dure.targets.cpu.scopes import Lines
from dure.targets.cpu.values import Buffer, Emitter
from dure.targets.cpu.writer import Reg, integer, vector_type

#: Rows of a tile register, bytes of each, and int32 lanes of a row.
ROWS, LINE, LANES = TILE_ROWS, 64, 16
#: Registers of tiles, and the name of where it says that all of them are whole.
_TILES, _SIZES = 8, "whole_tiles"
#: Rows that are scaled at once: a compiler that loads the sums of more spills them again.
_AT_ONCE = 4
#: Tile registers: sums of several products, then operands of two.
_SUMS, _OPERANDS = 4, 2
_LEFT, _RIGHT = _SUMS, _SUMS + _OPERANDS


def takes_tiles(
    host: HostFeatures, a: ActivationRows, weights: BlockFormat, rows: int, columns: int
) -> bool:
    """Whether the host multiplies blocks of sixteen rows by its tile registers.

    ``rows`` and ``columns`` are the most that there may be of them.
    """
    if not has(host, Operation.TILES_OF_SIGNED_BYTES) or rows < ROWS or columns % LANES:
        return False
    if any(a.row_bytes(plane.name) is None for plane in a.tile.format.planes):
        return False
    planes, zero = weights.groups["code"], zero_of(weights, signed=True)
    signed = planes[0].dtype.kind == "int"
    least = -128 if signed else 0
    most = 127 if signed else (1 << sum(plane.dtype.bits for plane in planes)) - 1
    return least - zero >= -128 and most - zero <= 127


class TileDot:
    """``c += a @ b`` for as many rows as are whole blocks of sixteen, where :func:`takes_tiles`.

    ``start`` and ``stop`` are the part of K, in elements.
    """

    def __init__(
        self, e: Emitter, a: ActivationRows, b: Panels, c: Buffer, start: Reg, stop: Reg
    ) -> None:
        self.e, self.w = e, e.w
        self.a, self.b, self.c = a, b, c
        self.start, self.stop = (e.w.floordiv(end, integer(CHUNK)) for end in (start, stop))
        #: Scales of the weights in a chunk, and bytes of a row of activations that meet each.
        self.halves = CHUNK // min(CHUNK, b.format.scale_block)
        self.width = CHUNK // self.halves
        self.chunks = b.length // CHUNK
        self.planes = ("code",) if a.high is None else ("code", a.high)
        self.roles = ("scale", "offset") if b.format.factors("offset") else ("scale",)
        #: Bytes of an unpacked chunk: codes, then factors; of a chunk's sums; of a row of shifts.
        self.chunk_bytes = CHUNK * LANES + self.halves * len(self.roles) * LINE
        self.sum_bytes = len(self.planes) * self.halves * ROWS * LINE
        #: Chunks whose products are made before the vectors have their turn.
        most = max(1, e.host.l1d_bytes // 4 // self.sum_bytes)
        self.turn = -(-self.chunks // max(1, -(-self.chunks // most)))
        self.shift_bytes = 4 * self.chunks * self.halves

    def run(self, rows: Extent, columns: Extent, fresh: bool) -> Reg:
        """Write the blocks; gives how many rows they are.  ``fresh`` does not read ``c``."""
        w, e = self.w, self.e
        used = w.index(rows.bound)
        whole = w.sub(used, w.mod(used, ROWS))
        panels = w.floordiv(w.add(w.index(columns.bound), integer(LANES - 1)), integer(LANES))
        self.unpacked = e.allocate(columns.static // LANES * self.chunks * self.chunk_bytes)
        self.sums = e.allocate(self.turn * self.sum_bytes)
        self.shifts = e.allocate(rows.static * self.shift_bytes if len(self.roles) > 1 else 0)

        def write() -> None:
            if len(self.roles) > 1:
                self._shift_rows(whole)
            w.loop(integer(0), panels, 1, self._unpack_panel)
            self._configure()
            self._blocks(whole, panels, fresh)
            end_sizes(self.e)

        some = w.compare("icmp slt", integer(0), whole)
        for least, most in ((integer(0), panels), (self.start, self.stop)):
            some = w.binary("and", some, w.compare("icmp slt", least, most))
        w.when(some, write, lambda: None)
        return w.select(some, whole, integer(0))

    def _configure(self) -> None:
        """Tell the machine the rows of each tile register, and the bytes of a row."""
        sums, left, right = (ROWS, LINE), (ROWS, self.width), (self.width // GROUP, LINE)
        shapes = [sums] * _SUMS + [left] * _OPERANDS + [right] * _OPERANDS
        on_tiles(self.e, Operation.TILE_SIZES, configuration(self.e, shapes))

    # -- operands ---------------------------------------------------------------------------------

    def _unpack_panel(self, number: Reg, _: list[Reg]) -> list[Reg]:
        """Copy a panel's codes, as signed bytes around zero, and its factors."""
        w, e, b = self.w, self.e, self.b
        panel = b.panel(e, w.mul(number, integer(LANES)))
        least = w.constant("i8", zero_of(b.format, signed=True), GROUP * LANES)

        def chunk(place: Reg, _: list[Reg]) -> list[Reg]:
            block = b.block(e, panel, w.floordiv(place, integer(b.chunks)))
            inside = w.mod(place, b.chunks)
            at = self._chunk(number, place)
            for group in range(CHUNK // GROUP):
                codes = b.code(e, block, inside, group, signed=True)
                if zero_of(b.format, signed=True):
                    codes = w.binary("sub", w.cast("bitcast", codes, least.type), least)
                w.store(codes, w.offset(at, integer(group * LINE)), LINE)
            for half in range(self.halves):
                for role in self.roles:
                    factor = b.factor(e, role, block, inside, half)
                    assert factor is not None
                    w.store(factor, self._factor(at, role, half), LINE)
            return []

        return w.loop(self.start, self.stop, 1, chunk)

    def _chunk(self, panel: Reg, place: Reg) -> Reg:
        """Where an unpacked chunk lies."""
        w = self.w
        at = w.offset(self.unpacked, w.mul(panel, integer(self.chunks * self.chunk_bytes)))
        return w.offset(at, w.mul(place, integer(self.chunk_bytes)))

    def _factor(self, chunk: Reg, role: str, half: int) -> Reg:
        number = half * len(self.roles) + self.roles.index(role)
        return self.w.offset(chunk, integer(CHUNK * LANES + number * LINE))

    def _shift_rows(self, rows: Reg) -> None:
        """What meets the weights' offsets: the sum of a row's part of a chunk, times its scale."""
        w = self.w
        whole = w.sub(self.stop, w.mod(w.sub(self.stop, self.start), LANES))

        def row(i: Reg, _: list[Reg]) -> list[Reg]:
            for first, end, lanes in ((self.start, whole, LANES), (whole, self.stop, 1)):

                def places(place: Reg, _: list[Reg], lanes: int = lanes) -> list[Reg]:
                    self._shift_places(i, place, lanes)
                    return []

                w.loop(first, end, lanes, places)
            return []

        w.loop(integer(0), rows, 1, row)

    def _shift_places(self, row: Reg, place: Reg, lanes: int) -> None:
        """The shifts of so many chunks of a row."""
        w, e, count = self.w, self.e, 2 * lanes
        at = self.a.address(e, "sum", row, w.mul(place, integer(2)))
        sums = w.load(vector_type("i32", count), at, 4)
        scales = w.load(vector_type("float", lanes), self.a.address(e, "d", row, place), 4)
        if self.halves == 1:
            even, odd = (w.shuffle(sums, range(first, count, 2)) for first in (0, 1))
            sums = w.binary("add", even, odd)
        elif lanes == 1:
            scales = w.splat(scales, count)
        else:
            scales = w.shuffle(scales, [lane // 2 for lane in range(count)])
        shift = w.binary("fmul", w.cast("sitofp", sums, scales.type), scales)
        if self.b.format.offset_sign < 0:
            shift = w.emit(shift.type, f"fneg {shift}")
        w.store(shift, self._shift(row, place, 0), 4)

    def _shift(self, row: Reg, place: Reg, half: int) -> Reg:
        """Where the shift of a row lies."""
        w = self.w
        entry = w.add(w.mul(place, integer(self.halves)), integer(half))
        at = w.offset(self.shifts, w.mul(row, integer(self.shift_bytes)))
        return w.offset(at, w.mul(entry, integer(4)))

    # -- products ---------------------------------------------------------------------------------

    def _blocks(self, rows: Reg, panels: Reg, fresh: bool) -> None:
        """All blocks: the panels of sixteen rows, then those of the next ones."""
        w = self.w

        def row_block(row: Reg, _: list[Reg]) -> list[Reg]:
            def block(panel: Reg, _: list[Reg]) -> list[Reg]:
                self._block((row, panel), fresh)
                return []

            return w.loop(integer(0), panels, 1, block)

        w.loop(integer(0), rows, ROWS, row_block)

    def _block(self, at: tuple[Reg, Reg], fresh: bool) -> None:
        """Sixteen rows of a panel: ``at`` are the first row and the panel."""
        w, e = self.w, self.e
        row, column = at[0], w.mul(at[1], integer(LANES))
        places = [[w.add(row, integer(i)), column] for i in range(ROWS)]
        nothing = Reg(vector_type("float", LANES), "zeroinitializer")
        initial = [nothing if fresh else self.c.vector(e, p, 1, LANES) for p in places]

        def turn(first: Reg, totals: list[Reg]) -> list[Reg]:
            end = w.minimum(w.add(first, integer(self.turn)), self.stop)
            self._multiply(at, first, end)

            def scale(place: Reg, running: list[Reg]) -> list[Reg]:
                return self._scaled(at, place, self._turn(first, place), running)

            return w.loop(first, end, 1, scale, totals)

        totals = w.loop(self.start, self.stop, self.turn, turn, initial)
        for place, total in zip(places, totals, strict=True):
            self.c.put(e, total, place, 1)

    def _turn(self, first: Reg, place: Reg) -> Reg:
        """Where the sums of a chunk lie in the buffer of a turn that begins with ``first``."""
        return self.w.mul(self.w.sub(place, first), integer(self.sum_bytes))

    def _multiply(self, at: tuple[Reg, Reg], first: Reg, end: Reg) -> None:
        """The products of some chunks, to the buffer of sums; those of several before any of them
        is stored, which waits for its product.
        """
        w, together = self.w, max(1, _SUMS // (len(self.planes) * self.halves))
        whole = w.sub(end, w.mod(w.sub(end, first), together))
        for start, stop, count in ((first, whole, together), (whole, end, 1)):

            def some(place: Reg, _: list[Reg], count: int = count) -> list[Reg]:
                places = [w.add(place, integer(i)) for i in range(count)]
                self._products(at, places, [self._turn(first, one) for one in places])
                return []

            w.loop(start, stop, count, some)

    def _products(self, at: tuple[Reg, Reg], places: Sequence[Reg], sums: Sequence[Reg]) -> None:
        """The products of as many chunks as there are tiles for their sums."""
        w, a, line, (row, panel) = self.w, self.a, integer(LINE), at
        stores: list[tuple[Reg, Reg]] = []
        for chunk, buffer in zip(places, sums, strict=True):
            codes = self._chunk(panel, chunk)
            for half in range(self.halves):
                entry = w.add(w.mul(chunk, integer(CHUNK)), integer(half * self.width))
                weights = w.offset(codes, integer(half * self.width * LANES))
                right = tile(_RIGHT + len(stores) // len(self.planes) % _OPERANDS)
                on_tiles(self.e, Operation.TILE_LOAD, right, weights, line)
                for number, plane in enumerate(self.planes):
                    total = tile(len(stores) % _SUMS)
                    left = tile(_LEFT + len(stores) % _OPERANDS)
                    rows, step = a.address(self.e, plane, row, entry), a.row_bytes(plane) or 0
                    on_tiles(self.e, Operation.TILE_ZERO, total)
                    on_tiles(self.e, Operation.TILE_LOAD, left, rows, integer(step))
                    on_tiles(self.e, Operation.TILES_OF_SIGNED_BYTES, total, left, right)
                    stores.append((total, self._sum(buffer, half, number, 0)))
        for total, place in stores:
            on_tiles(self.e, Operation.TILE_STORE, total, place, line)

    def _sum(self, sums: Reg, half: int, plane: int, row: int) -> Reg:
        """Where a row of a product lies."""
        inside = ((half * len(self.planes) + plane) * ROWS + row) * LINE
        return self.w.offset(self.w.offset(self.sums, sums), integer(inside))

    def _scaled(
        self, at: tuple[Reg, Reg], place: Reg, sums: Reg, totals: Sequence[Reg]
    ) -> list[Reg]:
        """``totals`` of sixteen rows with a chunk's products added."""
        w, e, (row, panel) = self.w, self.e, at
        chunk, running = self._chunk(panel, place), list(totals)
        scales, step = self.a.address(e, "d", row, place), self.a.row_bytes("d") or 0
        kind = vector_type("float", LANES)
        for half in range(self.halves):
            scale, *offset = (w.load(kind, self._factor(chunk, r, half), LINE) for r in self.roles)
            shifts = self._shift(row, place, half)
            for i in range(ROWS):
                if i % _AT_ONCE == 0:
                    w.do('fence syncscope("singlethread") acq_rel')
                one = w.load("float", w.offset(scales, integer(i * step)), 4)
                both = w.binary("fmul", scale, w.splat(one, LANES))
                value = w.cast("sitofp", self._exact(sums, half, i), kind)
                running[i] = e.math.fma(value, both, running[i])
                for factor in offset:
                    one = w.load("float", w.offset(shifts, integer(i * self.shift_bytes)), 4)
                    running[i] = e.math.fma(factor, w.splat(one, LANES), running[i])
        return running

    def _exact(self, sums: Reg, half: int, row: int) -> Reg:
        """The exact sum of a row of the block, for each lane."""
        w, kind = self.w, vector_type("i32", LANES)
        low, *high = (
            w.load(kind, self._sum(sums, half, plane, row), LINE)
            for plane in range(len(self.planes))
        )
        for part in high:
            low = w.binary("add", low, w.binary("shl", part, w.constant("i32", 8, LANES)))
        return low


def configuration(e: Emitter, shapes: Sequence[tuple[int, int]]) -> Reg:
    """Where it says, as the machine reads it, how many rows each tile has and how many bytes a row.

    The rows are the bytes from the 48th on.
    """
    words = struct.unpack("<16i", tile_registers.configuration(shapes))
    text = ", ".join(f"i32 {word}" for word in words)
    at = e.allocate(LINE)
    e.w.store(Reg(vector_type("i32", len(words)), f"<{text}>"), at)
    return at


def keep_sizes(e: Emitter) -> None:
    """Rely on whole tiles, which the kernel then asks for once: a configuration takes as long as
    ten products, and the unit that multiplies falls asleep the sooner.
    """
    e.keeps_tiles = True


def end_sizes(e: Emitter) -> None:
    """Tiles had other sizes until here."""
    e.tile_ends.append(e.w.reserve())


def whole_sizes(e: Emitter) -> None:
    """Make all tiles whole."""
    words = struct.unpack("<16i", tile_registers.configuration([(ROWS, LINE)] * _TILES))
    kind, text = vector_type("i32", len(words)), ", ".join(f"i32 {word}" for word in words)
    constant = f"@{_SIZES} = private unnamed_addr constant {kind} <{text}>, align {LINE}"
    e.w.declarations[_SIZES] = constant
    on_tiles(e, Operation.TILE_SIZES, Reg("ptr", f"@{_SIZES}"))


def finish_sizes(e: Emitter, entry: Lines) -> None:
    """Write what a kernel of tiles does at its ``entry``, where other sizes end, and at its end."""
    for room in [entry] * e.keeps_tiles + e.tile_ends:
        with e.w.into(room):
            if e.keeps_tiles:
                whole_sizes(e)
            else:
                on_tiles(e, Operation.TILE_RELEASE)
    if e.keeps_tiles:
        on_tiles(e, Operation.TILE_RELEASE)


def on_tiles(e: Emitter, operation: Operation, *arguments: Reg) -> None:
    """An instruction of tile registers."""
    e.w.call("void", intrinsic(e.host, operation), *arguments)


def tile(number: int) -> Reg:
    """A tile register, as instructions name it."""
    return Reg("i8", str(number))
