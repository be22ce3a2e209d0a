"""Tiles while code is written: buffers in the worker's arena, and values computed where they are
used.

Every tile can give a vector of neighbouring elements along one axis.  Loads, constants and
elementwise chains are not stored anywhere: their consumer's loop asks for vectors, so that a chain
of ops becomes one loop.  The generator decides which tiles are worth a buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dure.ir import dtypes
from dure.ir.dtypes import BlockFormat, DType, Plane
from dure.ir.types import TileType
from dure.runtime.host import HostFeatures
from dure.runtime.memory import LINE_BYTES
from dure.targets.cpu.bounds import Access, Bounds
from dure.targets.cpu.memory import EntryReader, Extent, Place, gather
from dure.targets.cpu.numbers import Converter, memory_type, register_type
from dure.targets.cpu.rows import Row
from dure.targets.cpu.scopes import Lines
from dure.targets.cpu.vecmath import VectorMath
from dure.targets.cpu.writer import Reg, Writer, integer, lanes_of, vector_type

if TYPE_CHECKING:
    from dure.ir.core import Op, Span
    from dure.targets.cpu.body import TensorRef

#: Registers that loops over elements work on at a time.
TOGETHER = 4
#: Bytes between buffers of the arena: a cache line, so that no vector crosses one.
_ALIGN = LINE_BYTES
#: Rows so many bytes apart, or a multiple, begin in one or two sets of the nearest cache.
_SET_PERIOD = 2048


class Emitter:
    """What writing a kernel needs: writer, the host's conversions and functions, arena."""

    def __init__(self, writer: Writer, host: HostFeatures, arena: Reg) -> None:
        self.w = writer
        self.host = host
        self.convert = Converter(writer, host)
        self.math = VectorMath(writer, host)
        self.arena = arena
        self.lanes = host.vector_bits // 32
        self.arena_bytes = 0
        self._used = 0
        #: Whether all tile registers are whole in the kernel, and room where they weren't before.
        self.keeps_tiles = False
        self.tile_ends: list[Lines] = []

    def allocate(self, bytes: int) -> Reg:
        """The address of fresh bytes in the arena."""
        start = self._used
        self._used += -(-bytes // _ALIGN) * _ALIGN
        self.arena_bytes = max(self.arena_bytes, self._used)
        return self.w.offset(self.arena, integer(start))

    def mark(self) -> int:
        """Where the arena stands, to be given to :meth:`release`."""
        return self._used

    def release(self, mark: int) -> None:
        """Give back everything that was allocated after ``mark``."""
        self._used = mark

    def buffer(self, shape: Sequence[int], dtype: DType, *, apart: bool = False) -> Buffer:
        """A fresh row-major buffer in the arena.

        ``apart``: neighbouring rows don't begin in one set of a cache, whose ways they would share.
        """
        kind, size = TileType(tuple(shape), dtype), max(8, dtype.bits) // 8
        row = kind.shape[-1] if kind.shape else 1
        pitch = row
        if apart and row * size % _SET_PERIOD == 0:
            pitch += LINE_BYTES // size
        address = self.allocate(max(1, kind.elements // row * pitch) * size)
        return Buffer(kind, address, dtype, pitch)

    def for_each(
        self,
        extents: Sequence[Extent],
        axis: int,
        body: Callable[[list[Reg], int], None],
        accesses: Iterable[Access] = (),
        together: int = 1,
        target: Place | None = None,
    ) -> None:
        """``body(index, lanes)`` for vectors along ``axis`` that cover the used part of a tile.

        Vectors never reach past the static extent; they may reach past the used one.  Masks of the
        ``accesses`` are left to the vectors that may need them.  ``together`` registers are one
        vector where nothing is masked: a processor looks ahead over a few long chains of
        operations, not over as many whole turns.  ``target`` is what whole vectors are stored to.
        """
        w = self.w
        bounds = Bounds(w, accesses, axis, self.lanes)
        counts = [w.index(x.bound) for x in extents]
        whole = bounds.limit(counts) if bounds.open else None

        def nest(depth: int, outer: list[Reg]) -> None:
            if depth == len(extents):
                limit = bounds.limit(counts, outer) if bounds.ragged else whole
                static, used, write = extents[axis].static, counts[axis], inside(outer)
                row = Row(w, self.lanes, static, used, bounds, limit, write, together)
                if target is not None and row.can_align():
                    row.write_aligned(target, target.address(outer))
                else:
                    row.write()
                return
            if depth == axis:
                nest(depth + 1, [*outer, integer(0)])
                return

            def inner(position: Reg, _: list[Reg]) -> list[Reg]:
                nest(depth + 1, [*outer, position])
                return []

            w.loop(integer(0), w.index(extents[depth].bound), 1, inner)

        def inside(outer: list[Reg]) -> Callable[[Reg, int], None]:
            return lambda at, lanes: body([*outer[:axis], at, *outer[axis + 1 :]], lanes)

        nest(0, [])


class Tile(ABC):
    """A tile of plain numbers."""

    def __init__(self, type: TileType) -> None:
        self.type = type

    @property
    def dtype(self) -> DType:
        assert isinstance(self.type.dtype, DType)
        return self.type.dtype

    @abstractmethod
    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        """``lanes`` elements along ``axis`` from ``index``, as registers compute them."""

    def raw(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        """The elements of :meth:`vector` as memory holds them."""
        return e.convert.exact(self.vector(e, index, axis, lanes), self.dtype)

    def loaded_from(self, index: Sequence[Reg]) -> Reg | None:
        """Where an element is loaded from; None for what is computed or lies in the arena."""
        return None

    def accesses(self, axes: Sequence[int | None]) -> Iterator[Access]:
        """What a loop over the tile loads from, where ``axes`` are the loop's that walk its own."""
        return iter(())

    def loads(self, index: Sequence[Reg]) -> Iterator[tuple[Loaded, list[Reg]]]:
        """What the element at ``index`` is computed from, and which of its elements."""
        return iter(())


class Buffer(Tile):
    """A row-major tile in memory that this worker owns.

    ``pitch``: elements from one row along the last axis to the next, where rows lie apart.
    """

    def __init__(
        self, type: TileType, address: Reg, dtype: DType, pitch: int | None = None
    ) -> None:
        super().__init__(type)
        self.address = address
        self.stored = dtype
        self.row = type.shape[-1] if type.shape else 1
        self.pitch = self.row if pitch is None else pitch

    def strides(self) -> list[int]:
        """Elements from one index to the next, per axis."""
        strides, running = list[int](), 1
        for place, extent in enumerate(reversed(self.type.shape)):
            strides.append(running)
            running = running * extent if place else self.pitch
        return strides[::-1]

    def at(self, e: Emitter, index: Sequence[Reg]) -> Reg:
        """The address of an element."""
        w, size = e.w, max(8, self.stored.bits) // 8
        offset = integer(0)
        for position, stride in zip(index, self.strides(), strict=True):
            offset = w.add(offset, w.mul(position, integer(stride * size)))
        return w.offset(self.address, offset)

    def raw(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        element = memory_type(self.stored)
        stride = self.strides()[axis]
        address = self.at(e, index)
        if lanes == 1 or stride == 1:
            return e.w.load(vector_type(element, lanes), address, max(8, self.stored.bits) // 8)
        return gather(e.w, element, self._lane_addresses(e, address, stride, lanes), lanes, None)

    def _lane_addresses(self, e: Emitter, address: Reg, stride: int, lanes: int) -> Reg:
        w, size = e.w, max(8, self.stored.bits) // 8
        steps = w.binary("mul", w.iota("i64", lanes), w.constant("i64", stride * size, lanes))
        return w.emit(f"<{lanes} x ptr>", f"getelementptr i8, {address}, {steps}")

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        return e.convert.widen(self.raw(e, index, axis, lanes), self.stored)

    def put(self, e: Emitter, value: Reg, index: Sequence[Reg], axis: int) -> None:
        """Store a vector of registers along ``axis`` (whose stride is 1, or one lane)."""
        self.keep(e, e.convert.narrow(value, self.stored), index, axis)

    def keep(self, e: Emitter, stored: Reg, index: Sequence[Reg], axis: int) -> None:
        """Store a vector along ``axis`` that is as memory holds it."""
        lanes = lanes_of(stored.type)
        if lanes > 1 and self.strides()[axis] != 1:
            from dure.targets.cpu.memory import scatter

            addresses = self._lane_addresses(e, self.at(e, index), self.strides()[axis], lanes)
            scatter(e.w, stored, addresses, None)
            return
        e.w.store(stored, self.at(e, index), max(8, self.stored.bits) // 8)

    def reshaped(self, shape: Sequence[int]) -> Buffer:
        """The same bytes as a tile of another shape, where they can be one."""
        pitch = None if self.pitch == self.row else self.pitch
        return Buffer(TileType(tuple(shape), self.stored), self.address, self.stored, pitch)

    def reshapes(self, shape: Sequence[int]) -> bool:
        """Whether the same bytes are a tile of another shape: rows that lie apart keep theirs."""
        return self.pitch == self.row or (bool(shape) and shape[-1] == self.row)


class Full(Tile):
    """One value everywhere."""

    def __init__(self, type: TileType, value: Reg) -> None:
        super().__init__(type)
        self.value = value

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        return e.w.splat(self.value, lanes)


class Held(Tile):
    """The elements that a loop is at, in a register."""

    def __init__(self, type: TileType, value: Reg) -> None:
        super().__init__(type)
        self.value = value

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        return self.value


class Iota(Tile):
    """0, 1, 2, ... along the only axis."""

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        w = e.w
        position = w.cast("trunc", index[0], "i32")
        wide = w.binary("add", w.splat(position, lanes), w.iota("i32", lanes))
        return e.convert.convert(wide, dtypes.int32, self.dtype)


class Mapped(Tile):
    """An elementwise function of tiles of the same shape, which comes from ``span``."""

    def __init__(
        self,
        type: TileType,
        operands: Sequence[Tile],
        function: Callable[[Sequence[Reg]], Reg],
        span: Span | None = None,
    ) -> None:
        super().__init__(type)
        self.operands = tuple(operands)
        self.function = function
        self.span = span

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        values = [o.vector(e, index, axis, lanes) for o in self.operands]
        with e.w.at(self.span):
            return self.function(values)

    def accesses(self, axes: Sequence[int | None]) -> Iterator[Access]:
        for operand in self.operands:
            yield from operand.accesses(axes)

    def loads(self, index: Sequence[Reg]) -> Iterator[tuple[Loaded, list[Reg]]]:
        for operand in self.operands:
            yield from operand.loads(index)


#: (emitter, index, axis, lanes) -> the elements
Read = Callable[["Emitter", Sequence[Reg], int, int], Reg]


class Reindexed(Tile):
    """Another tile seen through its axes: broadcast, transposed, or with axes of extent 1 put in.

    ``sources[a]`` is the axis of the result that source axis ``a`` follows, or None (always index
    0).
    """

    def __init__(self, type: TileType, source: Tile, sources: Sequence[int | None]) -> None:
        super().__init__(type)
        self.source = source
        self.sources = tuple(sources)

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        return self._read(self.source.vector, e, index, axis, lanes)

    def raw(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        return self._read(self.source.raw, e, index, axis, lanes)

    def _read(self, read: Read, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        inner = self._inner(index)
        if axis in self.sources:
            return read(e, inner, self.sources.index(axis), lanes)
        return e.w.splat(read(e, inner, len(inner) - 1 if inner else 0, 1), lanes)

    def _inner(self, index: Sequence[Reg]) -> list[Reg]:
        return [integer(0) if s is None else index[s] for s in self.sources]

    def loaded_from(self, index: Sequence[Reg]) -> Reg | None:
        return self.source.loaded_from(self._inner(index))

    def accesses(self, axes: Sequence[int | None]) -> Iterator[Access]:
        return self.source.accesses([None if s is None else axes[s] for s in self.sources])

    def loads(self, index: Sequence[Reg]) -> Iterator[tuple[Loaded, list[Reg]]]:
        return self.source.loads([integer(0) if s is None else index[s] for s in self.sources])


class Loaded(Tile):
    """A load that happens where its elements are used."""

    def __init__(
        self,
        type: TileType,
        place: Place,
        fill: float,
        span: Span | None = None,
        ahead: Callable[[], Place] | None = None,
    ) -> None:
        """``ahead`` says where the next instance's load lies, if it lies elsewhere."""
        super().__init__(type)
        self.place = place
        self.fill = fill
        self.span = span
        self.ahead = ahead

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        with e.w.at(self.span):
            mask = self.place.masks(index, axis, lanes)
            stored = self.place.load(index, axis, lanes, mask)
            value = e.convert.widen(stored, self.dtype)
            if mask is None or self.fill == 0:
                return value
            return e.w.select(mask, value, constant(e, self.dtype, self.fill, lanes))

    def raw(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        if self.fill:
            return super().raw(e, index, axis, lanes)
        with e.w.at(self.span):
            mask = self.place.masks(index, axis, lanes)
            return self.place.load(index, axis, lanes, mask)

    def loaded_from(self, index: Sequence[Reg]) -> Reg | None:
        return self.place.address(index)

    def accesses(self, axes: Sequence[int | None]) -> Iterator[Access]:
        yield Access(self.place, tuple(axes))

    def loads(self, index: Sequence[Reg]) -> Iterator[tuple[Loaded, list[Reg]]]:
        yield self, list(index)


def constant(e: Emitter, dtype: DType, value: float, lanes: int) -> Reg:
    """A number of this type in every lane of a register."""
    element = register_type(dtype)
    if dtype.is_float:
        like = Reg(vector_type(element, lanes), "")
        import numpy as np

        with np.errstate(all="ignore"):
            exact = float(np.asarray(value, np.float64).astype(dtype.numpy).astype(np.float64))
        return e.math.constant(like, exact)
    return e.w.constant(element, int(value), lanes)


class ListEntries(EntryReader):
    """Entries of an index list that lies in a buffer."""

    def __init__(self, e: Emitter, entries: Tile) -> None:
        self.e = e
        self.entries = entries

    def read(self, position: Reg) -> Reg:
        e, lanes = self.e, lanes_of(position.type)
        if lanes == 1:
            found = self.entries.vector(e, [position], 0, 1)
            return e.w.cast("sext", found, "i64")
        assert isinstance(self.entries, Buffer)
        byte = e.w.binary("mul", position, e.w.constant("i64", 4, lanes))
        base = self.entries.address
        addresses = e.w.emit(f"<{lanes} x ptr>", f"getelementptr i8, {base}, {byte}")
        found = gather(e.w, "i32", addresses, lanes, None)
        return e.w.cast("sext", found, f"<{lanes} x i64>")


class BlockTile(ABC):
    """A block-quantized tile: its planes, each read as integers or floats of one entry."""

    def __init__(self, type: TileType) -> None:
        self.type = type

    @property
    def format(self) -> BlockFormat:
        assert isinstance(self.type.dtype, BlockFormat)
        return self.type.dtype

    @property
    def axis(self) -> int:
        return self.type.quantized_axis % self.type.rank

    @abstractmethod
    def entry(self, e: Emitter, plane: Plane, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        """Entries of a plane: ``index`` counts entries along the quantized axis.

        float32 for float planes, int32 for the others.
        """

    def transposed(self, order: Sequence[int]) -> BlockTile:
        """The same tile with its axes permuted."""
        shape = tuple(self.type.shape[a] for a in order)
        kind = TileType(shape, self.type.dtype, list(order).index(self.axis))
        return TransposedBlocks(kind, self, order)

    # -- values -----------------------------------------------------------------------------------

    def _spread(self, e: Emitter, plane: Plane, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        """A plane's entries for ``lanes`` elements along ``axis``."""
        w = e.w
        per = integer(plane.per)
        at = [w.floordiv(p, per) if a == self.axis else p for a, p in enumerate(index)]
        if axis != self.axis or plane.per == 1 or lanes == 1:
            return self.entry(e, plane, at, axis, lanes)
        if plane.per % lanes == 0:
            return w.splat(self.entry(e, plane, at, axis, 1), lanes)
        vector: Reg | None = None
        for place in range(lanes):
            moved = list(index)
            moved[axis] = w.add(index[axis], integer(place))
            one = self._spread(e, plane, moved, axis, 1)
            start = vector.name if vector is not None else "poison"
            type = vector_type(one.type, lanes)
            vector = w.emit(type, f"insertelement {type} {start}, {one}, i64 {place}")
        assert vector is not None
        return vector

    def number(
        self, e: Emitter, planes: Sequence[Plane], index: Sequence[Reg], axis: int, lanes: int
    ) -> Reg:
        """The integer that the planes of one group make up, or the float of a float plane."""
        total = self._spread(e, planes[0], index, axis, lanes)
        for plane in planes[1:]:
            part = self._spread(e, plane, index, axis, lanes)
            shift = e.w.constant("i32", plane.shift, lanes)
            total = e.w.binary("add", total, e.w.binary("shl", part, shift))
        return total

    def product(
        self, e: Emitter, role: str, index: Sequence[Reg], axis: int, lanes: int
    ) -> Reg | None:
        """The product of the scale (or offset) factors in float32, or None if there are none."""
        total: Reg | None = None
        for group in self.format.factors("scale" if role == "scale" else "offset"):
            factor = self.number(e, group, index, axis, lanes)
            if not group[0].dtype.is_float:
                factor = e.w.cast("sitofp", factor, vector_type("float", lanes))
            total = factor if total is None else e.w.binary("fmul", total, factor)
        return total

    def decoded(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        """Values in float32, by the rule of :meth:`dure.ir.dtypes.BlockFormat.decode`."""
        w = e.w
        code = self.number(e, self.format.groups["code"], index, axis, lanes)
        zero = w.constant("i32", self.format.zero, lanes)
        value = w.cast("sitofp", w.binary("sub", code, zero), vector_type("float", lanes))
        scale = self.product(e, "scale", index, axis, lanes)
        assert scale is not None
        value = w.binary("fmul", value, scale)
        offset = self.product(e, "offset", index, axis, lanes)
        if offset is None:
            return value
        return w.binary("fadd" if self.format.offset_sign > 0 else "fsub", value, offset)


class TransposedBlocks(BlockTile):
    """A block-quantized tile seen with its axes permuted."""

    def __init__(self, type: TileType, source: BlockTile, order: Sequence[int]) -> None:
        super().__init__(type)
        self.source = source
        self.order = tuple(order)

    def entry(self, e: Emitter, plane: Plane, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        inner = [integer(0)] * len(self.order)
        for result_axis, source_axis in enumerate(self.order):
            inner[source_axis] = index[result_axis]
        return self.source.entry(e, plane, inner, self.order[axis], lanes)


class LoadedBlocks(BlockTile):
    """A block-quantized tile that stays in memory: one place per plane."""

    def __init__(self, type: TileType, places: dict[str, Place]) -> None:
        super().__init__(type)
        self.places = places
        #: The tensor and the load that this tile comes from, where a dot may read it in place.
        self.source: TensorRef | None = None
        self.op: Op | None = None

    def entry(self, e: Emitter, plane: Plane, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        place = self.places[plane.name]
        mask = place.masks(index, axis, lanes)
        if place.unit == 8 and plane.dtype.bits >= 8:
            stored = place.load(index, axis, lanes, mask)
        else:
            stored = self._bits(e, place, plane, index, axis, lanes, mask)
        if plane.dtype.is_float:
            return e.convert.widen(stored, plane.dtype)
        extend = "sext" if plane.dtype.kind == "int" else "zext"
        return e.w.cast(extend, stored, vector_type("i32", lanes))

    def _bits(
        self,
        e: Emitter,
        place: Place,
        plane: Plane,
        index: Sequence[Reg],
        axis: int,
        lanes: int,
        mask: Reg | None,
    ) -> Reg:
        """Entries whose bits start anywhere in a byte."""
        w = e.w
        bits = place.bit_offsets(index, axis, lanes)
        if place.unit == 8:
            # Every entry starts a byte, and is narrower.
            bits = w.binary("mul", bits, w.constant("i64", 8, lanes))
        byte = w.binary("lshr", bits, w.constant("i64", 3, lanes))
        element = memory_type(plane.dtype)
        if lanes == 1:
            address = w.offset(place.base, byte)
            # An element outside the tensor is read from the arena, which is always there.
            safe = address if mask is None else w.select(mask, address, e.arena)
            found = w.load(element, safe)
        else:
            type = f"<{lanes} x ptr>"
            addresses = w.emit(type, f"getelementptr i8, {place.base}, {byte}")
            found = gather(w, element, addresses, lanes, mask)
        if plane.dtype.bits >= 8:
            return found
        shift = w.binary("and", bits, w.constant("i64", 7, lanes))
        narrow = w.cast("trunc", shift, vector_type("i8", lanes))
        shifted = w.binary("lshr", found, narrow)
        keep = w.constant("i8", (1 << plane.dtype.bits) - 1, lanes)
        return w.binary("and", shifted, keep)


class BlockBuffer(BlockTile):
    """A block-quantized tile in the arena: one buffer per plane."""

    def __init__(self, type: TileType, planes: dict[str, Buffer]) -> None:
        super().__init__(type)
        self.planes = planes

    def entry(self, e: Emitter, plane: Plane, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        stored = self.planes[plane.name].raw(e, index, axis, lanes)
        if plane.dtype.is_float:
            return e.convert.widen(stored, plane.dtype)
        extend = "sext" if plane.dtype.kind == "int" else "zext"
        return e.w.cast(extend, stored, vector_type("i32", lanes))


class DecodedTile(Tile):
    """The float values of a block-quantized tile, computed where they are used."""

    def __init__(self, type: TileType, source: BlockTile) -> None:
        super().__init__(type)
        self.source = source

    def vector(self, e: Emitter, index: Sequence[Reg], axis: int, lanes: int) -> Reg:
        return e.convert.rounded(self.source.decoded(e, index, axis, lanes), self.dtype)


AnyTile = Tile | BlockTile


def lane_axis(shape: Sequence[int]) -> int:
    """The axis along which vectors run: the last one that is longer than 1."""
    for axis in range(len(shape) - 1, -1, -1):
        if shape[axis] > 1:
            return axis
    return max(0, len(shape) - 1)
