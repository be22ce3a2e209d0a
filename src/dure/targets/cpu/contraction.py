"""Which micro-kernel a dot becomes, and loops over K that become one dot.

``for k: acc = dot(load(a, (i, k)), load(b, (j, k)).T, acc)`` walks K in tiles for the scratchpad's
sake. A CPU has caches instead: such a loop becomes one dot over the whole of K, whose accumulators
stay in registers.  The order of additions is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, TypeAlias

from dure.ir import dtypes
from dure.ir.core import Op, Region, Value
from dure.ir.dtypes import BlockFormat, DType
from dure.ir.expr import Expr, as_expr, minimum, symbols
from dure.ir.layout import AnyLayout, Layout, PlaneLayouts
from dure.ir.types import TensorType
from dure.targets.cpu.bfpdots import copy_rounded
from dure.targets.cpu.blockdots import ActivationRows, Panels, unpack
from dure.targets.cpu.copies import lies_along
from dure.targets.cpu.dots import KRange, block_dot, plain_dot, zero
from dure.targets.cpu.elementwise import OpFunction
from dure.targets.cpu.endings import Ending, ending_of
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.packing import packed_layout
from dure.targets.cpu.paneldots import PanelDot, takes_panels
from dure.targets.cpu.rowproducts import RowProduct, are_few, row_dot, takes_rows
from dure.targets.cpu.tileproducts import TileProduct, takes_products
from dure.targets.cpu.turneddots import takes_squares, turned_dot
from dure.targets.cpu.values import (
    BlockTile,
    Buffer,
    DecodedTile,
    Emitter,
    Full,
    Loaded,
    LoadedBlocks,
    Mapped,
    Reindexed,
    Tile,
    TransposedBlocks,
)
from dure.targets.cpu.writer import Reg, integer

if TYPE_CHECKING:
    from dure.targets.cpu.body import BodyEmitter, TensorRef

#: (what code is written with, left, right, accumulators, rows and columns, K, batch, fresh)
MicroKernel: TypeAlias = Callable[
    [Emitter, Tile, Tile, Buffer, "tuple[Extent, Extent]", KRange, Sequence[Reg], bool], None
]
#: Those that read operands where they lie.
_IN_PLACE: tuple[MicroKernel, ...] = (plain_dot, row_dot, turned_dot)


def dot(body: BodyEmitter, op: Op) -> None:
    """One dot, over the K of its tiles."""
    a, b = body.tiles[op.operands[0]], body.tiles[op.operands[1]]
    target, fresh = _accumulator(body, op)
    extents = body.extents(op.result)
    length = op.operands[0].tile.shape[-1]
    k = KRange(integer(0), integer(length))
    if _is_block_dot(a, b):
        assert isinstance(a, BlockTile) and isinstance(b, BlockTile)
        rows = a if ActivationRows.fits(a) else None
        in_pairs = a.format is dtypes.bfp9_block32
        panels = _panels(body, b, op.operands[1].tile.shape[1], in_pairs)
        if rows is not None and len(extents) == 2:
            if panels is None:
                copied = copy_rounded if in_pairs else unpack
                panels = copied(body.e, b, extents[1], length)
            block_dot(
                body.e, ActivationRows(rows), panels, target, (extents[0], extents[1]), k, fresh
            )
            body.tiles[op.result] = target
            body.owned.add(op.result)
            return
    left, right = _plain(body, op.operands[0], a), _plain(body, op.operands[1], b)
    rows_columns = (extents[-2], extents[-1])
    multiply = _micro_kernel(body, left, right, rows_columns)
    left, right = _placed(body, op, multiply, left, right)
    if len(extents) == 2:
        multiply(body.e, left, right, target, rows_columns, k, (), fresh)
    else:

        def each(index: Reg, _: list[Reg]) -> list[Reg]:
            multiply(body.e, left, right, target, rows_columns, k, (index,), fresh)
            return []

        body.w.loop(integer(0), body.w.index(extents[0].bound), 1, each)
    body.tiles[op.result] = target
    body.owned.add(op.result)


@dataclass(frozen=True)
class Sums:
    """What the dots of a nest of loops add to, and what becomes of it."""

    target: Buffer
    ending: Ending


def nested(
    body: BodyEmitter, op: Op, sums: Sums, first: Sequence[Reg], last: Sequence[Reg]
) -> None:
    """The dot of a nest: the sums begin where all of ``first`` hold, and end where all of ``last``
    do.
    """
    w, ending, target = body.w, sums.ending, sums.target
    left, right = (_plain(body, o, body.tiles[o]) for o in op.operands[:2])
    extents = body.extents(op.result)
    rows_columns = (extents[0], extents[1])
    k = KRange(integer(0), integer(op.operands[0].tile.shape[-1]))
    begins, ends = (reduce(w.both, edges) for edges in (first, last))
    multiply = _micro_kernel(body, left, right, rows_columns)
    kind = _ENDING.get(multiply)
    if kind is not None:
        ending.begins, ending.ends = begins, ends
        kind(body.e, left, right, target, rows_columns, (), ending).run(k, fresh=True)
        return
    left, right = _placed(body, op, multiply, left, right)
    zeros = Full(target.type, zero(target.stored, 1))
    w.when(begins, lambda: body.copy(zeros, target, extents), lambda: None)
    multiply(body.e, left, right, target, rows_columns, k, (), False)
    w.when(ends, lambda: ending.write_all(target, *rows_columns), lambda: None)


def _placed(
    body: BodyEmitter, op: Op, multiply: MicroKernel, left: Tile, right: Tile
) -> tuple[Tile, Tile]:
    """The operands where the micro-kernel reads them."""
    if multiply in _IN_PLACE:
        left = (_widened if multiply is row_dot else _left)(body, op.operands[0], left)
        once = multiply is row_dot and _reads_as_it_is(right, body.e.lanes)
        if multiply is not turned_dot and not once:
            right = _right(body, op.operands[1], right)
    return left, right


def _micro_kernel(
    body: BodyEmitter, left: Tile, right: Tile, extents: tuple[Extent, Extent]
) -> MicroKernel:
    """What suits the operands and their extents."""
    rows, columns, lanes = extents[0], extents[1].static, body.e.lanes
    turned = not lies_along(right, right.type.rank - 1, lanes)
    if takes_products(body.e.host, left.dtype, right.dtype):
        if not are_few(rows) or (turned and not takes_rows(right)):
            return _tile_products
        return _row_products if takes_rows(right) else row_dot
    if takes_squares(right, rows, lanes):
        return turned_dot
    panels = takes_panels(lanes, rows.static, columns, turned)
    return _panel_dots if panels else plain_dot


def _copying(kind: type[PanelDot | RowProduct]) -> MicroKernel:
    """A micro-kernel that copies its operands as it needs them."""

    def dot(
        e: Emitter,
        a: Tile,
        b: Tile,
        c: Buffer,
        extents: tuple[Extent, Extent],
        k: KRange,
        batch: Sequence[Reg],
        fresh: bool,
    ) -> None:
        kind(e, a, b, c, extents, batch).run(k, fresh)

    return dot


_panel_dots, _tile_products, _row_products = map(_copying, (PanelDot, TileProduct, RowProduct))
#: Those that write what becomes of their accumulators, too.
_ENDING: dict[MicroKernel, type[PanelDot]] = {_panel_dots: PanelDot, _tile_products: TileProduct}


def _is_block_dot(a: object, b: object) -> bool:
    if not isinstance(a, BlockTile) or not isinstance(b, BlockTile):
        return False
    return a.format in dtypes.ACTIVATION_FORMATS


def _plain(body: BodyEmitter, value: Value, tile: object) -> Tile:
    if isinstance(tile, BlockTile):
        from dure.ir.types import TileType

        return body.buffered(value, DecodedTile(TileType(tile.type.shape, dtypes.float32), tile))
    assert isinstance(tile, Tile)
    return tile


def _accumulator(body: BodyEmitter, op: Op) -> tuple[Buffer, bool]:
    """The buffer that the dot adds to, and whether it starts from zero."""
    value = op.operands[2]
    tile = body.tile(value)
    kind = op.result.tile
    assert isinstance(kind.dtype, DType)
    if is_zero(tile):
        return body.e.buffer(kind.shape, kind.dtype), True
    if isinstance(tile, Buffer) and body.dies(value):
        return tile, False
    extents = body.extents(value)
    target = _reusable(body, tile, kind.shape) or body.e.buffer(kind.shape, kind.dtype)
    body.copy(tile, target, extents)
    return target, False


def is_zero(tile: Tile) -> bool:
    """Whether a tile is zero everywhere."""
    return isinstance(tile, Full) and tile.value.name in (
        "0",
        "0.0",
        "zeroinitializer",
        "0x0000000000000000",
    )


def _reusable(body: BodyEmitter, tile: Tile, shape: Sequence[int]) -> Buffer | None:
    """A carried buffer that this tile alone reads, element by element: updated in place."""
    if not isinstance(tile, Mapped):
        return None
    for operand in tile.operands:
        if not isinstance(operand, Buffer) or operand.type.shape != tuple(shape):
            continue
        for value, known in body.tiles.items():
            if known is operand and value in body.owned and body.uses.get(value, 0) == 1:
                return operand if operand.stored is tile.dtype else None
    return None


def _left(body: BodyEmitter, value: Value, tile: Tile) -> Tile:
    """The left operand, read a scalar at a time, over and over."""
    if isinstance(tile, Buffer | Full):
        return tile
    if isinstance(tile, Loaded) and all(
        tile.place.inside(axis, 1) for axis in range(tile.type.rank)
    ):
        return tile
    return body.buffered(value, tile)


def _widened(body: BodyEmitter, value: Value, tile: Tile) -> Buffer:
    """The left operand as it is multiplied: a few rows that every column reads again."""
    target = body.e.buffer(tile.type.shape, dtypes.float32)
    body.copy(tile, target, body.extents(value))
    return target


def _reads_as_it_is(right: Tile, lanes: int) -> bool:
    """Whether a few rows, which read each element of it once, may compute a right operand as they
    do: subnormal numbers are zero there, so that floats may be chosen and no more.
    """

    def chosen(tile: Tile) -> bool:
        match tile:
            case Mapped():
                by = tile.function
                choice = isinstance(by, OpFunction) and by.name == "where"
                floats = any(operand.dtype.is_float for operand in tile.operands)
                return (choice or not floats) and all(map(chosen, tile.operands))
            case Reindexed():
                return chosen(tile.source)
            case _:
                return True

    return lies_along(right, right.type.rank - 1, lanes) and chosen(right)


def _right(body: BodyEmitter, value: Value, tile: Tile) -> Tile:
    """The right operand, read a vector along N at a time."""
    if isinstance(tile, Buffer | Full) or streams(body, tile, tile.type.rank - 1):
        return tile
    return body.buffered(value, tile)


def streams(body: BodyEmitter, tile: Tile, axis: int) -> bool:
    """Whether vectors along ``axis`` of a tile are plain loads."""
    if isinstance(tile, Reindexed):
        return axis in tile.sources and streams(body, tile.source, tile.sources.index(axis))
    return isinstance(tile, Loaded) and lies_along(tile, axis, body.e.lanes)


def _panels(body: BodyEmitter, tile: BlockTile, columns: int, pairs: bool) -> Panels | None:
    """The packed panels (in ``pairs`` or not) that a (K, N) weight tile is a piece of, if it is."""
    if not isinstance(tile, TransposedBlocks) or tile.order != (1, 0):
        return None
    source = tile.source
    if not isinstance(source, LoadedBlocks) or source.source is None or source.op is None:
        return None
    ref, op, lanes = source.source, source.op, body.e.lanes
    if len(op.operands) > 1 or columns % lanes or ref.type.rank != 2:
        return None
    whole = ref.type.with_layout(None)
    if not all(_is_static(extent) for extent in whole.shape):
        return None
    if ref.layout != packed_layout(whole, lanes, pairs) or not isinstance(ref.layout, PlaneLayouts):
        return None
    starts = [
        as_expr(op.attr("index")[a]) * op.attr("step")[a] + op.attr("offset")[a] + ref.starts[a]
        for a in range(2)
    ]
    if starts[0] % lanes is not as_expr(0):
        return None
    row, element = (body.w.index(start) for start in starts)
    return Panels(source.format, ref.base, ref.layout, row, element)


def _is_static(extent: Expr) -> bool:
    return not symbols(extent)


# -- loops over K
# -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walk:
    """An operand of a dot that is one load, walked along K by the loop."""

    load: Op
    k_axis: int
    transposed: bool
    size: Expr


def loop(body: BodyEmitter, op: Op) -> bool:
    """Write the loop as dots over the whole of K if it only walks K; say whether it did."""
    region = op.regions[0]
    dots = _dots_of(region)
    if dots is None or op.attr("step") != 1 or as_expr(op.attr("start")) is not as_expr(0):
        return False
    walks: list[tuple[_Walk, _Walk]] = []
    for found in dots:
        left, right = (
            _walk_of(body, region, found.operands[0]),
            _walk_of(body, region, found.operands[1]),
        )
        if left is None or right is None or not _fits(body, left, right, found):
            return False
        walks.append((left, right))
    for place, (left, right) in enumerate(walks):
        _whole_dot(body, op, place, left, right)
    return True


def _dots_of(region: Region) -> list[Op] | None:
    """The dots that accumulate a loop's carried values, in order, if that is all it does."""
    if any(o.name not in ("load", "transpose", "dot") for o in region.ops):
        return None
    by_result = {o.result: o for o in region.ops}
    found: list[Op] = []
    for argument, value in zip(region.args, region.yields, strict=True):
        op = by_result.get(value)
        if op is None or op.name != "dot" or op.operands[2] is not argument:
            return None
        found.append(op)
    used = [o for op in region.ops for o in op.operands]
    if any(used.count(a) != 1 for a in region.args) or not found:
        return None
    return found if len(found) == sum(o.name == "dot" for o in region.ops) else None


def _walk_of(body: BodyEmitter, region: Region, value: Value) -> _Walk | None:
    """How an operand of a dot walks K with the loop's variable."""
    by_result = {o.result: o for o in region.ops}
    transposed = False
    op = by_result.get(value)
    while op is not None and op.name == "transpose" and tuple(op.attr("order")) == (1, 0):
        transposed = not transposed
        op = by_result.get(op.operands[0])
    if op is None or op.name != "load" or len(op.operands) != 1 or op.attr("fill") != 0:
        return None
    variable = region.symbols[0]
    index = [as_expr(i) for i in op.attr("index")]
    moving = [a for a, i in enumerate(index) if variable in symbols(i)]
    if len(moving) != 1 or index[moving[0]] is not variable or op.result.tile.rank != 2:
        return None
    axis = moving[0]
    shape = op.result.tile.shape
    whole = op.attr("step")[axis] == shape[axis] and op.attr("stride")[axis] == 1
    if not whole or as_expr(op.attr("offset")[axis]) is not as_expr(0):
        return None
    others = [*op.attr("offset"), *index]
    if any(variable in symbols(as_expr(o)) for a, o in enumerate(others) if a != 2 + axis):
        return None
    source = body.tensors[op.operands[0]]
    if source.starts[axis] is not as_expr(0):
        return None
    return _Walk(op, axis, transposed, source.type.shape[axis])


def _fits(body: BodyEmitter, left: _Walk, right: _Walk, op: Op) -> bool:
    """Whether the micro-kernels can read both operands where they lie."""
    k_of_left, k_of_right = (0 if left.transposed else 1), (1 if right.transposed else 0)
    if left.k_axis != k_of_left or right.k_axis != k_of_right:
        return False
    a, b = op.operands[0].tile, op.operands[1].tile
    if (a.block is None) != (b.block is None):
        return False
    right_ref = body.tensors[right.load.operands[0]]
    lanes = body.e.lanes
    if b.block is not None:
        left_ref = body.tensors[left.load.operands[0]]
        whole = right_ref.type.with_layout(None)
        return (
            a.block in dtypes.ACTIVATION_FORMATS
            and not left.transposed
            and right.transposed
            and all(_is_static(extent) for extent in whole.shape)
            and _rows_lie_flat(left_ref.layout, left_ref.type)
            and right_ref.layout == packed_layout(whole, lanes, a.block is dtypes.bfp9_block32)
            and b.shape[1] % lanes == 0
            and right_ref.starts[0] % lanes is as_expr(0)
            and as_expr(right.load.attr("index")[0]) * right.load.attr("step")[0] % lanes
            is as_expr(0)
        )
    if takes_products(body.e.host, a.dtype, b.dtype):
        return True
    n_axis = 0 if right.transposed else 1
    layout = right_ref.layout
    assert isinstance(layout, Layout) and isinstance(b.dtype, DType)
    inner = layout.axes[n_axis][-1]
    side_by_side = as_expr(inner.stride) is as_expr(b.dtype.bits) and (
        inner.extent is None or (inner.extent % lanes == 0 and b.shape[1] % lanes == 0)
    )
    return side_by_side or takes_panels(lanes, a.shape[0], b.shape[1], turned=True)


def _rows_lie_flat(layout: AnyLayout, kind: TensorType) -> bool:
    """Whether each row of (M, K) blocks has the entries of a plane side by side, but for values,
    which tiles alone read.
    """
    if not isinstance(layout, PlaneLayouts) or not isinstance(kind.dtype, BlockFormat):
        return False
    for plane in kind.dtype.planes:
        if plane.role == "value":
            continue
        along = layout[plane.name].axes[1]
        if len(along) != 1 or as_expr(along[0].stride) is not as_expr(plane.dtype.bits):
            return False
    return True


def _whole_dot(body: BodyEmitter, op: Op, place: int, left: _Walk, right: _Walk) -> None:
    region = op.regions[0]
    argument, initial, result = region.args[place], op.operands[place], op.results[place]
    kind = argument.tile
    assert isinstance(kind.dtype, DType)
    tile = body.tile(initial)
    target = body.e.buffer(kind.shape, kind.dtype, apart=True)
    fresh = is_zero(tile)
    if not fresh:
        body.copy(tile, target, body.extents(argument))
    step = left.load.result.tile.shape[left.k_axis]
    end = minimum(as_expr(op.attr("stop")) * step, left.size, right.size)
    extents = body.extents(argument)
    variable = region.symbols[0]
    body.w.symbols[variable] = integer(0)
    k = KRange(integer(0), body.w.index(end))
    a = _operand(body, left, extents[0], end)
    b = _operand(body, right, extents[1], end)
    if isinstance(a, BlockTile):
        assert isinstance(b, BlockTile)
        panels = _panels(body, b, kind.shape[1], a.format is dtypes.bfp9_block32)
        assert panels is not None
        block_dot(body.e, ActivationRows(a), panels, target, (extents[0], extents[1]), k, fresh)
    else:
        assert isinstance(a, Tile) and isinstance(b, Tile)
        multiply = _micro_kernel(body, a, b, (extents[0], extents[1]))
        kind = _ENDING.get(multiply)
        ending = None if kind is None else ending_of(body, op, (left.load, right.load))
        if kind is not None and ending is not None:
            dot = kind(body.e, a, b, target, (extents[0], extents[1]), (), ending)
            dot.run(k, fresh)
            return
        multiply(body.e, a, b, target, (extents[0], extents[1]), k, (), fresh)
    body.tiles[result] = target
    body.owned.add(result)


def _padded(body: BodyEmitter, source: TensorRef, axis: int, extent: Extent) -> bool:
    """Whether whole vectors along ``axis`` of a packed weight lie in its buffer.

    A packed axis is padded to whole panels.  The lanes beyond the tensor hold anything, and a dot
    stores none of them; any other use of a load needs its fill there, and asks for masks.
    """
    layout = source.layout
    if not isinstance(layout, Layout) or extent.used is None:
        return False
    digits = layout.axes[axis]
    return len(digits) > 1 and (digits[-1].extent or 1) % body.e.lanes == 0


def _operand(body: BodyEmitter, walk: _Walk, other: Extent, end: Expr) -> Tile | BlockTile:
    """The operand as one tile over the whole of K."""
    op, axis = walk.load, walk.k_axis
    source = body.tensors[op.operands[0]]
    extents = [other, other]
    extents[axis] = Extent(op.result.tile.shape[axis], end)
    trusted = frozenset({axis, 1 - axis} if _padded(body, source, 1 - axis, other) else {axis})
    kind = op.result.tile
    if kind.block is not None:
        blocks = body.load_blocks(op, source, extents, trusted)
        return blocks.transposed((1, 0)) if walk.transposed else blocks
    assert isinstance(source.layout, Layout) and isinstance(kind.dtype, DType)
    at = body.place(op, source, source.layout, kind.dtype, extents, (), 1, trusted)
    tile = Loaded(kind, at, 0.0)
    if not walk.transposed:
        return tile
    from dure.ir.types import TileType

    return Reindexed(TileType(kind.shape[::-1], kind.dtype), tile, (1, 0))
