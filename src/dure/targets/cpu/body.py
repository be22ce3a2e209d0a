"""The body of a kernel instance: each op to a tile that is computed where it is used, or to a loop.

A value gets a buffer where that is cheaper than computing it again: results of dots, reductions and
scans, what loops carry, what several loops use.  Everything else is written into its consumer's
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.core import Function, Op, Region, Value
from dure.ir.dtypes import BlockFormat, DType
from dure.ir.expr import Expr, as_expr, maximum, minimum
from dure.ir.layout import AnyLayout, Layout, PlaneLayouts
from dure.ir.types import TensorType, default_layout
from dure.targets.cpu import carries, contraction, elementwise, nests, reductions
from dure.targets.cpu.bounds import Access
from dure.targets.cpu.copies import lies_along
from dure.targets.cpu.demand import Demands, unit_axes
from dure.targets.cpu.distant import Distant
from dure.targets.cpu.memory import Axis, Extent, Place, in_scope
from dure.targets.cpu.quantizing import quantize
from dure.targets.cpu.values import (
    TOGETHER,
    AnyTile,
    BlockBuffer,
    BlockTile,
    Buffer,
    DecodedTile,
    Emitter,
    Full,
    Iota,
    ListEntries,
    Loaded,
    LoadedBlocks,
    Mapped,
    Reindexed,
    Tile,
    constant,
    lane_axis,
)
from dure.targets.cpu.writer import Reg

#: A chain of at most this many operations is computed again rather than stored for a second use.
_CHEAP = 3


@dataclass(frozen=True)
class TensorRef:
    """A tensor or a view of one: where it starts in the buffer, per axis."""

    base: Reg
    layout: AnyLayout
    type: TensorType
    starts: tuple[Expr, ...]


class BodyEmitter:
    """Writes one instance of a kernel."""

    def __init__(self, emitter: Emitter, function: Function) -> None:
        self.e = emitter
        self.w = emitter.w
        self.function = function
        self.demands = Demands(function)
        self.distant = Distant(emitter, function)
        self.tiles: dict[Value, AnyTile] = {}
        self.tensors: dict[Value, TensorRef] = {}
        self.owned: set[Value] = set()
        self.uses: dict[Value, int] = {}
        self.inner_uses: set[Value] = set()
        self.stored: set[Value] = set()
        #: The least and the largest element of tiles of index arguments.
        self.known: dict[Value, tuple[Expr, Expr]] = {}
        #: Ops that were written with one in front of them.
        self.written: set[Op] = set()
        #: The region that is being written.
        self.now = function.body
        self._inlining = False
        self._count(function.body)

    @contextmanager
    def inlining(self) -> Generator[None]:
        """What is written inside stores no value for its other uses."""
        self._inlining = True
        yield
        self._inlining = False

    def bind(self, value: Value, base: Reg) -> None:
        """Give a tensor parameter its data pointer."""
        kind = value.tensor
        self.tensors[value] = TensorRef(base, default_layout(kind), kind, (as_expr(0),) * kind.rank)

    def _count(self, body: Region) -> None:
        defined: dict[Value, Region] = {}
        roots: dict[Value, Value] = {}

        def visit(region: Region) -> None:
            defined.update(dict.fromkeys(region.args, region))
            for op in region.ops:
                # An op that takes a tile twice computes it once.
                for operand in dict.fromkeys(op.operands):
                    self.uses[operand] = self.uses.get(operand, 0) + 1
                    if defined.get(operand, region) is not region:
                        self.inner_uses.add(operand)
                for inner in op.regions:
                    visit(inner)
                defined.update(dict.fromkeys(op.results, region))
                if op.name == "view":
                    roots[op.result] = roots.get(op.operands[0], op.operands[0])
                if op.name == "store":
                    self.stored.add(roots.get(op.operands[0], op.operands[0]))
            for value in region.yields:
                self.uses[value] = self.uses.get(value, 0) + 1
                if defined.get(value, region) is not region:
                    self.inner_uses.add(value)

        visit(body)
        self.roots = roots

    # -- extents ----------------------------------------------------------------------------------

    def extents(self, value: Value) -> list[Extent]:
        """The static and used extents of a tile, with bounds that can be computed here."""
        found: list[Extent] = []
        for extent, used in zip(value.tile.shape, self.demands.of(value), strict=True):
            usable = used is not None and in_scope(used, self.w)
            found.append(Extent(extent, used if usable else None))
        return found

    # -- dispatch ---------------------------------------------------------------------------------

    def region(self, region: Region) -> None:
        """Write every op of a region."""
        outside, self.now = self.now, region
        for op in region.ops:
            if op in self.written:
                self.written.remove(op)
            else:
                self.op(op)
        self.now = outside

    def op(self, op: Op) -> None:
        """Write one op, or note how its result is computed."""
        if not self.demands.alive(op):
            return
        handler: Callable[[Op], None] | None = getattr(self, f"_op_{op.name}", None)
        with self.w.at(op.span):
            if handler is not None:
                handler(op)
            elif op.definition.elementwise:
                operands = [self.tile(o) for o in op.operands]
                function = elementwise.function_of(self.e, op)
                self.define(op.result, Mapped(op.result.tile, operands, function, op.span))
            else:
                self.refuse(op, f"the CPU target cannot compile '{op.name}'")

    def refuse(self, op: Op, what: str, fix: str = "") -> NoReturn:
        """Raise the error for an op that cannot be compiled."""
        where = op.span.render() if op.span is not None else f"in {self.function.name}"
        raise KernelError(what, where=where, rule="every op of a kernel compiles", fix=fix)

    def tile(self, value: Value) -> Tile:
        """The plain tile of a value."""
        found = self.tiles[value]
        assert isinstance(found, Tile), f"{value.type} is block-quantized"
        return found

    def define(self, value: Value, tile: AnyTile) -> None:
        """Note a value's tile; store it now where its uses make that cheaper."""
        if isinstance(tile, Mapped | Reindexed) and not self._inlining:
            inner = value in self.inner_uses
            again = self.uses.get(value, 0) > 1 or inner
            if again and elementwise.cost_of(tile) > (1 if inner else _CHEAP):
                tile = self.buffered(value, tile)
        self.tiles[value] = tile

    def buffered(self, value: Value, tile: Tile) -> Buffer:
        """A buffer that holds the used part of a tile, owned by ``value``."""
        if isinstance(tile, Buffer):
            return tile
        target = self.e.buffer(tile.type.shape, tile.dtype)
        self.copy(tile, target, self.extents(value))
        self.owned.add(value)
        return target

    def dies(self, value: Value) -> bool:
        """Whether a value's buffer is nobody else's, and its one use, which is now, the last."""
        once = self.uses.get(value, 0) == 1 and value not in self.inner_uses
        return once and value in self.owned

    def copy(self, source: Tile, target: Buffer, extents: Sequence[Extent]) -> None:
        """Compute the used part of a tile into a buffer."""
        axis = lane_axis(source.type.shape)
        # Rounding a number again that has been rounded takes ten instructions.
        exact = source.dtype is target.stored is dtypes.bfloat16

        def body(index: list[Reg], lanes: int) -> None:
            self.distant.ask(source, index, lanes)
            if exact:
                target.keep(self.e, source.raw(self.e, index, axis, lanes), index, axis)
            else:
                target.put(self.e, source.vector(self.e, index, axis, lanes), index, axis)

        if not extents:
            body([], 1)
            return
        several = TOGETHER if lies_along(source, axis, TOGETHER * self.e.lanes) else 1
        self.e.for_each(extents, axis, body, source.accesses(range(len(extents))), several)

    # -- constants and shapes ---------------------------------------------------------------------

    def _op_full(self, op: Op) -> None:
        kind, value = op.result.tile, op.attr("value")
        dtype = kind.dtype
        assert isinstance(dtype, DType)
        if isinstance(value, Expr):
            number = self.w.cast("trunc", self.w.index(value), "i32")
            scalar = self.e.convert.convert(number, dtypes.int32, dtype)
        else:
            scalar = constant(self.e, dtype, value, 1)
        self.define(op.result, Full(kind, scalar))

    def _op_iota(self, op: Op) -> None:
        self.define(op.result, Iota(op.result.tile))

    def _op_broadcast(self, op: Op) -> None:
        source = self.tile(op.operands[0])
        kind = op.result.tile
        grows = kind.shape != source.type.shape
        costs = isinstance(source, Mapped) and elementwise.cost_of(source) > 1
        if grows and costs and not self._inlining:
            source = self.buffered(op.operands[0], source)
            self.tiles[op.operands[0]] = source
        axes = [
            None if have == 1 and want != 1 else axis
            for axis, (have, want) in enumerate(zip(source.type.shape, kind.shape, strict=True))
        ]
        self.define(op.result, Reindexed(kind, source, axes))

    def _op_reshape(self, op: Op) -> None:
        source, kind = self.tile(op.operands[0]), op.result.tile
        kept = unit_axes(source.type.shape, kind.shape)
        if isinstance(source, Buffer) and not source.reshapes(kind.shape):
            apart, source = source, self.e.buffer(source.type.shape, source.stored)
            self.copy(apart, source, self.extents(op.operands[0]))
        if isinstance(source, Buffer):
            self.tiles[op.result] = source.reshaped(kind.shape)
        elif kept is not None:
            self.define(op.result, Reindexed(kind, source, kept))
        else:
            self.tiles[op.result] = self.buffered(op.operands[0], source).reshaped(kind.shape)
        if op.operands[0] in self.known:
            self.known[op.result] = self.known[op.operands[0]]

    def _op_transpose(self, op: Op) -> None:
        source, order = self.tiles[op.operands[0]], op.attr("order")
        if isinstance(source, BlockTile):
            self.tiles[op.result] = source.transposed(order)
            return
        axes: list[int | None] = [None] * len(order)
        for result_axis, source_axis in enumerate(order):
            axes[source_axis] = result_axis
        self.define(op.result, Reindexed(op.result.tile, source, axes))

    # -- memory -----------------------------------------------------------------------------------

    def _op_view(self, op: Op) -> None:
        source, axis = self.tensors[op.operands[0]], op.attr("axis")
        starts = list(source.starts)
        starts[axis] = starts[axis] + op.attr("start")
        self.tensors[op.result] = replace(source, type=op.result.tensor, starts=tuple(starts))

    def _op_index_load(self, op: Op) -> None:
        source = self.tensors[op.operands[0]]
        assert isinstance(source.layout, Layout) and isinstance(source.type.dtype, DType)
        bits = source.layout.address(
            [s + i for s, i in zip(source.starts, op.attr("index"), strict=True)]
        )
        address = self.w.offset(source.base, self.w.index(bits // 8))
        loaded = self.w.load("i32", address, 4)
        self.w.symbols[op.symbols[0]] = self.w.cast("sext", loaded, "i64")

    def axes_of(self, op: Op, source: TensorRef, lists: Sequence[Value], per: int) -> list[Axis]:
        """The axes of a load or store, the quantized one counted in entries of ``per`` elements."""
        found: list[Axis] = []
        quantized = source.type.quantized_axis % source.type.rank if source.type.block else -1
        for axis in range(source.type.rank):
            divide = per if axis == quantized else 1
            size = (source.starts[axis] + source.type.shape[axis]) // divide
            step, stride = op.attr("step")[axis], op.attr("stride")[axis]
            if axis in op.attr("list_axes"):
                entries = lists[list(op.attr("list_axes")).index(axis)]
                start = (source.starts[axis] + op.attr("offset")[axis]) // divide
                reader = ListEntries(self.e, self.tile(entries))
                # What lies behind the used part of a list may be anything.
                whole = all(extent.used is None for extent in self.extents(entries))
                known = self.known.get(entries) if whole else None
                found.append(Axis(start, 1, size, step // divide, reader, known))
                continue
            start = as_expr(op.attr("index")[axis]) * step + op.attr("offset")[axis]
            found.append(Axis((source.starts[axis] + start) // divide, stride, size))
        return found

    def place(
        self,
        op: Op,
        source: TensorRef,
        layout: Layout,
        dtype: DType,
        extents: Sequence[Extent],
        lists: Sequence[Value],
        per: int = 1,
        trusted: frozenset[int] = frozenset(),
    ) -> Place:
        """Where a load or store (or one plane of it) lies."""
        axes = self.axes_of(op, source, lists, per)
        return Place(self.w, source.base, layout, axes, extents, dtype, trusted)

    def _lists(self, values: Sequence[Value]) -> None:
        """Index lists are read at any position: they get buffers."""
        for value in values:
            tile = self.tile(value)
            if not isinstance(tile, Buffer):
                self.tiles[value] = self.buffered(value, tile)

    def _op_load(self, op: Op) -> None:
        source, kind = self.tensors[op.operands[0]], op.result.tile
        lists = op.operands[1:]
        self._lists(lists)
        extents = self.extents(op.result)
        if isinstance(kind.dtype, BlockFormat):
            self.tiles[op.result] = self.load_blocks(op, source, extents)
            return
        assert isinstance(source.layout, Layout)
        if source.type.index is not None:
            low, high = source.type.index
            fill = int(op.attr("fill"))
            self.known[op.result] = minimum(low, fill), maximum(high, fill)
        place = partial(self.place, op, source, source.layout, kind.dtype, extents, lists)
        fill, ahead = float(op.attr("fill")), self.distant.ahead(op, place)
        tile: Tile = Loaded(kind, place(), fill, op.span, ahead)
        if self.root(op) in self.stored:
            tile = self.buffered(op.result, tile)
        self.tiles[op.result] = tile

    def load_blocks(
        self,
        op: Op,
        source: TensorRef,
        extents: Sequence[Extent],
        trusted: frozenset[int] = frozenset(),
    ) -> LoadedBlocks:
        """The planes of a block-quantized load."""
        kind = op.result.tile
        assert isinstance(source.layout, PlaneLayouts) and isinstance(kind.dtype, BlockFormat)
        axis = kind.quantized_axis % kind.rank
        places: dict[str, Place] = {}
        for plane in kind.dtype.planes:
            if plane.role == "sum" and plane.name not in dict(source.layout.planes):
                continue
            cut = list(extents)
            cut[axis] = Extent(cut[axis].static // plane.per)
            places[plane.name] = self.place(
                op,
                source,
                source.layout[plane.name],
                plane.dtype,
                cut,
                op.operands[1:],
                plane.per,
                trusted,
            )
        found = LoadedBlocks(kind, places)
        found.source, found.op = source, op
        return found

    def root(self, op: Op) -> Value:
        """The whole tensor that a load or store is of."""
        return self.roots.get(op.operands[0], op.operands[0])

    def stored_to(self, op: Op) -> tuple[list[Extent], Place]:
        """The extents that a store of plain numbers writes, and where they lie."""
        target, value = self.tensors[op.operands[0]], op.operands[1]
        assert isinstance(target.layout, Layout) and isinstance(value.tile.dtype, DType)
        extents = self.extents(value)
        edges = [self._edge(op, target, axis, x) for axis, x in enumerate(extents)]
        own = [
            Extent(x.static, x.used if edge is None else edge)
            for x, edge in zip(extents, edges, strict=True)
        ]
        dtype, lists = value.tile.dtype, op.operands[2:]
        return own, self.place(op, target, target.layout, dtype, own, lists)

    def _op_store(self, op: Op) -> None:
        target, value = self.tensors[op.operands[0]], op.operands[1]
        lists = op.operands[2:]
        self._lists(lists)
        tile = self.tiles[value]
        if isinstance(tile, BlockTile):
            self._store_blocks(op, target, tile, self.extents(value))
            return
        own, place = self.stored_to(op)
        axis = lane_axis(tile.type.shape)
        combine = op.attr("combine")

        def body(index: list[Reg], lanes: int) -> None:
            self.distant.ask(tile, index, lanes)
            new = tile.vector(self.e, index, axis, lanes)
            mask = place.masks(index, axis, lanes)
            if combine:
                old = self.e.convert.widen(place.load(index, axis, lanes, mask), tile.dtype)
                new = elementwise.apply(self.e, combine, tile.dtype, [old, new])
            place.store(self.e.convert.exact(new, tile.dtype), index, axis, mask)

        if not own:
            body([], 1)
            return
        axes, width = tuple(range(len(own))), TOGETHER * self.e.lanes
        several = lies_along(tile, axis, width) and place.contiguous(axis, width)
        accesses = [*tile.accesses(axes), Access(place, axes)]
        aligned = place if several and not combine else None
        place.far = self.distant.is_far(self.root(op).tensor) if aligned else None
        self.e.for_each(own, axis, body, accesses, TOGETHER if several else 1, aligned)

    def _edge(self, op: Op, target: TensorRef, axis: int, extent: Extent) -> Expr | None:
        """How much of this axis lies inside the tensor, for a store of neighbouring elements."""
        if axis in op.attr("list_axes") or op.attr("stride")[axis] != 1:
            return None
        start = as_expr(op.attr("index")[axis]) * op.attr("step")[axis] + op.attr("offset")[axis]
        found = maximum(0, minimum(extent.static, target.type.shape[axis] - start))
        return None if found is as_expr(extent.static) else found

    def _store_blocks(
        self, op: Op, target: TensorRef, tile: BlockTile, extents: Sequence[Extent]
    ) -> None:
        if not isinstance(tile, BlockBuffer) or not isinstance(target.layout, PlaneLayouts):
            self.refuse(
                op,
                "a block-quantized tile that was not made by quantize is stored",
                "store the result of dl.quantize",
            )
        axis = tile.axis
        for plane in tile.format.planes:
            cut = [
                Extent(x.static // plane.per)
                if a == axis
                else Extent(x.static, self._edge(op, target, a, x))
                for a, x in enumerate(extents)
            ]
            layout = target.layout[plane.name]
            place = self.place(op, target, layout, plane.dtype, cut, op.operands[2:], plane.per)
            buffer = tile.planes[plane.name]

            def body(
                index: list[Reg], lanes: int, place: Place = place, buffer: Buffer = buffer
            ) -> None:
                value = buffer.raw(self.e, index, axis, lanes)
                place.store(value, index, axis, place.masks(index, axis, lanes))

            self.e.for_each(cut, axis, body)

    # -- sums -------------------------------------------------------------------------------------

    def _op_dot(self, op: Op) -> None:
        contraction.dot(self, op)

    def _op_reduce(self, op: Op) -> None:
        self._reduced(op, reductions.reduce)

    def _op_reduce_with(self, op: Op) -> None:
        self._reduced(op, reductions.reduce_with)

    def _op_cumsum(self, op: Op) -> None:
        self._reduced(op, reductions.cumsum)

    def _reduced(self, op: Op, function: Callable[[BodyEmitter, Op, Tile, Buffer], None]) -> None:
        kind = op.result.tile
        assert isinstance(kind.dtype, DType)
        target = self.e.buffer(kind.shape, kind.dtype)
        function(self, op, self.tile(op.operands[0]), target)
        self.tiles[op.result] = target
        self.owned.add(op.result)

    def _op_quantize(self, op: Op) -> None:
        kind = op.result.tile
        assert isinstance(kind.dtype, BlockFormat)
        source = self.buffered(op.operands[0], self.tile(op.operands[0]))
        planes: dict[str, Buffer] = {}
        for plane in kind.dtype.planes:
            shape = (*kind.shape[:-1], kind.shape[-1] // plane.per)
            planes[plane.name] = self.e.buffer(shape, plane.dtype)
        target = BlockBuffer(kind, planes)
        rows = self.w.index(1)
        for extent in self.extents(op.operands[0])[:-1]:
            used = kind.rank == 2 and extent.used is not None
            rows = self.w.mul(rows, self.w.index(extent.bound if used else extent.static))
        quantize(self.e, source, target, rows)
        self.tiles[op.result] = target

    def _op_dequantize(self, op: Op) -> None:
        source = self.tiles[op.operands[0]]
        assert isinstance(source, BlockTile)
        tile: Tile = DecodedTile(op.result.tile, source)
        if self.uses.get(op.result, 0) > 1 or op.result in self.inner_uses:
            tile = self.buffered(op.result, tile)
        self.tiles[op.result] = tile

    # -- control ----------------------------------------------------------------------------------

    def _op_for(self, op: Op) -> None:
        if any(own.loop(self, op) for own in (contraction, nests, carries)):
            return
        body, w = op.regions[0], self.w
        carried: list[Buffer] = []
        for argument, initial in zip(body.args, op.operands, strict=True):
            kind = argument.tile
            if not isinstance(kind.dtype, DType):
                self.refuse(op, f"a loop carries a block-quantized tile ({kind})", "dequantize it")
            tile = self.tile(initial)
            if isinstance(tile, Buffer) and self.dies(initial):
                target = tile
            else:
                target = self.e.buffer(kind.shape, kind.dtype)
                self.copy(tile, target, self.extents(argument))
            carried.append(target)
            self.tiles[argument] = target
            self.owned.add(argument)

        def turn(variable: Reg, _: list[Reg]) -> list[Reg]:
            w.symbols[body.symbols[0]] = variable
            mark, outside = self.e.mark(), dict(self.tiles)
            self.region(body)
            self._yield(body, carried)
            self.e.release(mark)
            # What was stored for a value of outside lies in a buffer of this turn.
            self.tiles = outside
            return []

        w.loop(w.index(op.attr("start")), w.index(op.attr("stop")), op.attr("step"), turn)
        for result, buffer in zip(op.results, carried, strict=True):
            self.tiles[result] = buffer
            self.owned.add(result)

    def _yield(self, body: Region, carried: Sequence[Buffer]) -> None:
        """Bring what a turn yields into the buffers that the next turn reads."""
        moved: list[tuple[Tile, Buffer, list[Extent]]] = []
        addresses = {c.address.name for c in carried}
        for value, argument, target in zip(body.yields, body.args, carried, strict=True):
            tile = self.tile(value)
            if isinstance(tile, Buffer) and tile.address == target.address:
                continue
            extents = self.extents(argument)
            read = reads_of(tile)
            others = read & (addresses - {target.address.name})
            if others or not pointwise(tile, target.address.name):
                stored = self.e.buffer(tile.type.shape, tile.dtype)
                self.copy(tile, stored, extents)
                tile = stored
            moved.append((tile, target, extents))
        for tile, target, extents in moved:
            self.copy(tile, target, extents)

    def _op_if(self, op: Op) -> None:
        results: list[Buffer] = []
        for result in op.results:
            kind = result.tile
            if not isinstance(kind.dtype, DType):
                self.refuse(op, f"an if gives a block-quantized tile ({kind})", "dequantize it")
            results.append(self.e.buffer(kind.shape, kind.dtype))

        def branch(region: Region) -> Callable[[], None]:
            def write() -> None:
                mark, outside = self.e.mark(), dict(self.tiles)
                self.region(region)
                for value, target in zip(region.yields, results, strict=True):
                    self.copy(self.tile(value), target, self.extents(value))
                self.e.release(mark)
                self.tiles = outside

            return write

        then, otherwise = op.regions
        self.w.when(
            self.w.condition(as_expr(op.attr("condition"))), branch(then), branch(otherwise)
        )
        for result, buffer in zip(op.results, results, strict=True):
            self.tiles[result] = buffer
            self.owned.add(result)


def reads_of(tile: Tile) -> set[str]:
    """The addresses of the buffers that a tile reads when it is computed."""
    match tile:
        case Mapped():
            return {name for operand in tile.operands for name in reads_of(operand)}
        case Reindexed():
            return reads_of(tile.source)
        case Buffer():
            return {tile.address.name}
        case _:
            return set()


def pointwise(tile: Tile, address: str) -> bool:
    """Whether element i of a tile reads no other element of the buffer at ``address``."""
    match tile:
        case Mapped():
            return all(pointwise(o, address) for o in tile.operands)
        case Reindexed():
            return address not in reads_of(tile)
        case _:
            return True
