"""Dot products of int8 (or two-byte) activations with block-quantized weights, 32 at a time.

Inside a scale's block the sum is exact in int32 (:mod:`dure.targets.cpu.exactdots`); blocks are
scaled and added in order in float32.
The weight comes as panels of one row a lane (:mod:`dure.targets.cpu.packing`); four consecutive k
of a lane are one 32-bit group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dure.ir import dtypes
from dure.ir.dtypes import BlockFormat, DType, Plane
from dure.ir.expr import Const, as_expr
from dure.ir.layout import Layout, PlaneLayouts
from dure.targets.cpu.exactdots import ExactDot, Products
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.packing import CHUNK, GROUP
from dure.targets.cpu.values import BlockBuffer, BlockTile, Emitter, LoadedBlocks
from dure.targets.cpu.writer import Reg, integer, vector_type


class ActivationRows:
    """The rows of an int8 tile: addresses of its planes, contiguous along K."""

    def __init__(self, tile: BlockTile) -> None:
        assert isinstance(tile, LoadedBlocks | BlockBuffer)
        self.tile = tile
        #: The plane of the high bytes of 16-bit codes, if there is one.
        self.high = next((p.name for p in tile.format.planes if p.shift == 8), None)

    @staticmethod
    def fits(tile: BlockTile) -> bool:
        """Whether groups of four codes of a row lie side by side."""
        if isinstance(tile, BlockBuffer):
            return tile.axis == 1
        if not isinstance(tile, LoadedBlocks) or tile.axis != 1:
            return False
        return all(
            place.contiguous(1, 1) and place.inside(0, 1) and place.inside(1, 1)
            for place in tile.places.values()
        )

    def address(self, e: Emitter, plane: str, row: Reg, entry: Reg) -> Reg:
        """The address of an entry of a plane."""
        if isinstance(self.tile, BlockBuffer):
            return self.tile.planes[plane].at(e, [row, entry])
        return self.tile.places[plane].address([row, entry])

    def row_bytes(self, plane: str) -> int | None:
        """Bytes from a row's entries of a plane to those of the next row, where that is known."""
        if isinstance(self.tile, BlockBuffer):
            buffer = self.tile.planes[plane]
            return buffer.strides()[0] * max(8, buffer.stored.bits) // 8
        assert isinstance(self.tile, LoadedBlocks)
        place = self.tile.places[plane]
        digits, axis = place.layout.axes[0], place.axes[0]
        stride = as_expr(digits[0].stride)
        if len(digits) != 1 or axis.entries is not None or not isinstance(stride, Const):
            return None
        return stride.value * axis.stride // 8

    def spread(self, e: Emitter, plane: str, row: Reg, chunk: Reg, group: int) -> Reg:
        """A row's codes of a group of four k, in every lane."""
        w = e.w
        at = w.add(w.mul(chunk, integer(CHUNK)), integer(group * GROUP))
        return w.splat(w.load("i32", self.address(e, plane, row, at), 4), e.lanes)


@dataclass
class Panels:
    """A weight tile as panels: where codes, scales and offsets of a chunk lie."""

    format: BlockFormat
    base: Reg
    layouts: PlaneLayouts
    first_row: Reg
    first_element: Reg

    @property
    def chunks(self) -> int:
        """Chunks in one block of the format."""
        return self.format.block // CHUNK

    @property
    def length(self) -> int:
        """The K of a whole row of the weight."""
        rows, columns = self.layouts[self.format.planes[0].name].axes
        whole, one = as_expr(rows[0].stride), as_expr(columns[0].stride)
        return int(str(whole // one)) * self.format.block

    def panel(self, e: Emitter, column: Reg) -> Reg:
        """The address of the panel that holds this column of the tile."""
        row = e.w.add(self.first_row, column)
        panel = e.w.floordiv(row, integer(e.lanes))
        plane = self.format.planes[0].name
        stride = self._bytes(self.layouts[plane], 0, 0)
        return e.w.offset(self.base, e.w.mul(panel, stride))

    @staticmethod
    def _bytes(layout: Layout, axis: int, digit: int) -> Reg:
        stride = as_expr(layout.axes[axis][digit].stride)
        text = str(stride // 8)
        return integer(int(text))

    @property
    def block_bytes(self) -> int:
        """Bytes from a block of a panel to the next."""
        layout = self.layouts[self.format.planes[0].name]
        return int(str(as_expr(layout.axes[1][0].stride) // 8))

    def block(self, e: Emitter, panel: Reg, block: Reg) -> Reg:
        """The address of a block of the panel."""
        w = e.w
        first = w.floordiv(self.first_element, integer(self.format.block))
        return w.offset(panel, w.mul(w.add(first, block), integer(self.block_bytes)))

    # -- planes -----------------------------------------------------------------------------------

    def code(self, e: Emitter, block: Reg, chunk: Reg, group: int, signed: bool) -> Reg:
        """The codes of a group of four k of each lane, as bytes in vectors of i32 lanes.

        Unless ``signed``, a signed plane is moved up by 128, which :func:`zero_of` takes off again.
        """
        w = e.w
        found: Reg | None = None
        for plane in self.format.groups["code"]:
            part = self._code_plane(e, plane, block, chunk, group)
            if plane.dtype.kind == "int" and not signed:
                part = w.binary("xor", part, w.constant("i32", -0x7F7F7F80, e.lanes))
            if found is not None:
                shift = w.constant("i32", plane.shift, e.lanes)
                part = w.binary("or", found, w.binary("shl", part, shift))
            found = part
        assert found is not None
        return found

    def _code_plane(self, e: Emitter, plane: Plane, block: Reg, chunk: Reg, group: int) -> Reg:
        """The bits of a plane.  Groups that share a vector load it again: LLVM sees that."""
        w, bits = e.w, plane.dtype.bits
        vector, position = divmod(group, 8 // bits)
        inside = w.mul(integer(vector), self._bytes(self.layouts[plane.name], 1, 2))
        at = w.offset(self.bytes_at(e, plane, block, chunk), inside)
        value = w.load(vector_type("i32", e.lanes), at)
        if bits == 8:
            return value
        if position:
            value = w.binary("lshr", value, w.constant("i32", position * bits, e.lanes))
        mask = int.from_bytes(bytes([(1 << bits) - 1] * 4), "little")
        return w.binary("and", value, w.constant("i32", mask, e.lanes))

    def bytes_at(self, e: Emitter, plane: Plane, block: Reg, chunk: Reg) -> Reg:
        """Where a plane's bits of a chunk lie."""
        w, layout = e.w, self.layouts[plane.name]
        start = w.offset(block, w.mul(chunk, self._bytes(layout, 1, 1)))
        return w.offset(start, w.index(as_expr(layout.offset) // 8))

    def factor(self, e: Emitter, role: str, block: Reg, chunk: Reg, half: int) -> Reg | None:
        """The scale (or offset) of each lane in float32; ``half`` picks one of two scales."""
        w = e.w
        total: Reg | None = None
        for group in self.format.factors("scale" if role == "scale" else "offset"):
            value = self._entry(e, group[0], block, chunk, half)
            for plane in group[1:]:
                part = self._entry(e, plane, block, chunk, half)
                shift = w.constant("i32", plane.shift, e.lanes)
                value = w.binary("or", value, w.binary("shl", part, shift))
            if not group[0].dtype.is_float:
                value = w.cast("sitofp", value, vector_type("float", e.lanes))
            total = value if total is None else w.binary("fmul", total, value)
        return total

    def _entry(self, e: Emitter, plane: Plane, block: Reg, chunk: Reg, half: int) -> Reg:
        w, dtype, lanes = e.w, plane.dtype, e.lanes
        layout = self.layouts[plane.name]
        base = w.offset(block, w.index(as_expr(layout.offset) // 8))
        entries = self.format.block // plane.per
        entry = integer(0)
        if entries > 1:
            per_chunk = max(1, CHUNK // plane.per)
            entry = w.add(w.mul(chunk, integer(per_chunk)), integer(half if per_chunk > 1 else 0))
        if dtype.bits >= 8:
            at = w.offset(base, w.mul(entry, integer(lanes * dtype.bits // 8)))
            loaded = w.load(vector_type(f"i{dtype.bits}", lanes), at)
            return self._widen(e, loaded, dtype)
        per_byte = 8 // dtype.bits
        at = w.offset(base, w.mul(w.floordiv(entry, integer(per_byte)), integer(lanes)))
        loaded = w.cast("zext", w.load(vector_type("i8", lanes), at), vector_type("i32", lanes))
        shift = w.cast("trunc", w.mul(w.mod(entry, per_byte), integer(dtype.bits)), "i32")
        moved = w.binary("lshr", loaded, w.splat(shift, lanes))
        return w.binary("and", moved, w.constant("i32", (1 << dtype.bits) - 1, lanes))

    @staticmethod
    def _widen(e: Emitter, loaded: Reg, dtype: DType) -> Reg:
        if dtype.is_float:
            if dtype.bits == 32:
                return e.w.cast("bitcast", loaded, vector_type("float", e.lanes))
            return e.convert.widen(loaded, dtype)
        extend = "sext" if dtype.kind == "int" else "zext"
        return e.w.cast(extend, loaded, vector_type("i32", e.lanes))


def zero_of(format: BlockFormat, signed: bool) -> int:
    """What to subtract from the codes as :meth:`Panels.code` gives them."""
    plane = format.groups["code"][0]
    return format.zero + (128 if plane.dtype.kind == "int" and not signed else 0)


def chunk_step(
    e: Emitter,
    a: ActivationRows,
    rows: Sequence[Reg],
    b: Panels,
    panels: Sequence[Reg],
    block: Reg,
    chunk: Reg,
    totals: Sequence[Reg],
    dot: ExactDot,
) -> list[Reg]:
    """Add one chunk of 32 to ``totals`` (row-major over rows and panels)."""
    w, lanes = e.w, e.lanes
    blocks = [b.block(e, panel, block) for panel in panels]
    place = w.add(w.mul(block, integer(b.chunks)), chunk)
    scales_a = [w.load("float", a.address(e, "d", row, place), 4) for row in rows]
    halves = CHUNK // min(CHUNK, b.format.scale_block)
    zero, has_offset = zero_of(b.format, dot.signed), bool(b.format.factors("offset"))

    def codes(panel: int, group: int) -> Reg:
        return b.code(e, blocks[panel], chunk, group, dot.signed)

    running = list(totals)
    for half in range(halves):
        sums = (
            [_code_sum(e, a, row, place, half, halves) for row in rows]
            if zero or has_offset
            else []
        )
        starts: list[Reg] = []
        for i in range(len(rows)):
            start = Reg(vector_type("i32", lanes), "zeroinitializer")
            if zero:
                start = w.splat(w.binary("mul", sums[i], Reg("i32", str(-zero))), lanes)
            starts.extend([start] * len(panels))
        count = CHUNK // GROUP // halves
        groups = range(half * count, (half + 1) * count)
        exact = dot.add(e, starts, Products(codes, rows, place, groups))
        for j, at in enumerate(blocks):
            scale = b.factor(e, "scale", at, chunk, half)
            offset = b.factor(e, "offset", at, chunk, half)
            assert scale is not None
            for i in range(len(rows)):
                slot = i * len(panels) + j
                value = w.cast("sitofp", exact[slot], vector_type("float", lanes))
                both = w.binary("fmul", scale, w.splat(scales_a[i], lanes))
                running[slot] = e.math.fma(value, both, running[slot])
                if offset is not None:
                    total = w.cast("sitofp", sums[i], "float")
                    shift = w.binary("fmul", total, scales_a[i])
                    if b.format.offset_sign < 0:
                        shift = w.emit("float", f"fneg {shift}")
                    running[slot] = e.math.fma(offset, w.splat(shift, lanes), running[slot])
    return running


def _code_sum(e: Emitter, a: ActivationRows, row: Reg, place: Reg, half: int, halves: int) -> Reg:
    """The sum of a row's codes over the chunk, or over one half of it."""
    w = e.w
    first = w.mul(place, integer(2))
    if halves == 2:
        return w.load("i32", a.address(e, "sum", row, w.add(first, integer(half))), 4)
    one = w.load("i32", a.address(e, "sum", row, first), 4)
    return w.binary(
        "add", one, w.load("i32", a.address(e, "sum", row, w.add(first, integer(1))), 4)
    )


def unpack(e: Emitter, tile: BlockTile, columns: Extent, length: int) -> Panels:
    """Copy the used columns of a (K, N) tile of any layout into panels of an all-int8 format in
    the arena; what lies behind them is undefined.
    """
    from dure.ir.types import TensorType, shape_of
    from dure.targets.cpu.packing import packed_bytes, packed_layout

    source = tile.format
    per = min(source.scale_block, CHUNK)
    planes = [Plane("d", "scale", dtypes.float32, per=per)]
    if source.factors("offset"):
        planes.append(Plane("m", "offset", dtypes.float32, per=per))
    planes.append(Plane("code", "code", dtypes.int8))
    format = BlockFormat("unpacked", CHUNK, tuple(planes), 0, source.offset_sign)
    padded = -(-columns.static // e.lanes) * e.lanes
    weight = TensorType(shape_of(padded, length), format, None, 1)
    layouts = packed_layout(weight, e.lanes)
    assert isinstance(layouts, PlaneLayouts)
    base = e.allocate(packed_bytes(weight, e.lanes))
    _fill_panels(e, tile, Panels(format, base, layouts, integer(0), integer(0)), columns, length)
    return Panels(format, base, layouts, integer(0), integer(0))


def _fill_panels(e: Emitter, tile: BlockTile, panels: Panels, columns: Extent, length: int) -> None:
    w, source, format = e.w, tile.format, panels.format

    def put(plane: Plane, value: Reg, row: Reg, entry: Reg) -> None:
        layout = panels.layouts[plane.name]
        total = w.index(as_expr(layout.offset) // 8)
        for position, digits in zip((row, entry), layout.axes, strict=True):
            below = 1
            for place in range(len(digits) - 1, -1, -1):
                digit = digits[place]
                value_here = w.floordiv(position, integer(below))
                if place:
                    assert digit.extent is not None
                    value_here = w.mod(value_here, digit.extent)
                    below *= digit.extent
                total = w.add(total, w.mul(value_here, w.index(as_expr(digit.stride) // 8)))
        w.store(value, w.offset(panels.base, total))

    per = format.scale_block

    def column(n: Reg, _: list[Reg]) -> list[Reg]:
        def scale(entry: Reg, _: list[Reg]) -> list[Reg]:
            index = [w.mul(entry, integer(per)), n]
            for plane in format.planes:
                if plane.role != "code":
                    found = tile.product(e, plane.role, index, 0, 1)
                    assert found is not None
                    put(plane, found, n, entry)
            return []

        w.loop(integer(0), integer(length // per), 1, scale)

        def code(k: Reg, _: list[Reg]) -> list[Reg]:
            number = tile.number(e, source.groups["code"], [k, n], 0, 1)
            value = w.binary("sub", number, Reg("i32", str(source.zero)))
            put(format.plane("code"), w.cast("trunc", value, "i8"), n, k)
            return []

        w.loop(integer(0), integer(length), 1, code)
        return []

    w.loop(integer(0), w.index(columns.bound), 1, column)
