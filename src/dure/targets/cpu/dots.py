"""Register-blocked micro-kernels of dot.

A block of rows times vectors of columns stays in registers while K is walked from start to end, so
that each output element is one chain of additions in the order of K: the same bits whatever the
block, the number of rows or of workers.  Vector lanes run along N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dure.ir import dtypes
from dure.ir.dtypes import BlockFormat, DType
from dure.runtime.memory import LINE_BYTES
from dure.targets.cpu.bfpdots import PackedWeights, RoundedWeights, add_chunks
from dure.targets.cpu.bfptiles import BfpTileDot, takes_bfp_tiles
from dure.targets.cpu.blockdots import ActivationRows, Panels, chunk_step
from dure.targets.cpu.bounds import Bounds
from dure.targets.cpu.copies import place_along
from dure.targets.cpu.exactdots import exact_dot
from dure.targets.cpu.memory import Extent, fetch
from dure.targets.cpu.packing import CHUNK
from dure.targets.cpu.tiledots import TileDot, takes_tiles
from dure.targets.cpu.values import Buffer, Emitter, Tile
from dure.targets.cpu.writer import Reg, integer, vector_type

__all__ = ["BlockFormat", "KRange", "block_dot", "plain_dot"]


@dataclass(frozen=True)
class KRange:
    """The part of K that a dot walks, as i64 registers, in elements."""

    start: Reg
    stop: Reg


#: How far ahead of their use, in bytes, operands that are read once are asked for: more than a
#: core receives while one of its loads waits for memory.  Its own prefetchers begin anew with each
#: page of 4 KB, and find strides late.
AHEAD = 4096
#: The same for weights that are rounded as they are read, which takes longer.
BFP_AHEAD = 3072
#: The same for operands that aren't packed, of which a few rows take more bytes in less time.
FAR_AHEAD = 8192

#: (first row, rows in the block, first column, lanes per vector, vectors) -> nothing
Block = Callable[[Reg, int, Reg, int, int], None]
#: (step of K, sums) -> the sums with its products
Step = Callable[[Reg, list[Reg]], list[Reg]]
#: (step, sums) -> the sums with all products
Walk = Callable[[Step, list[Reg]], list[Reg]]


def row_blocks(e: Emitter, rows: int) -> list[int]:
    """Heights of the register blocks, the tallest first: bounded by the host's vector registers."""
    tallest = min(rows, 8 if e.host.vector_registers >= 32 else 4)
    return [tallest, *(height for height in (2, 1) if height < tallest)]


def vectors_beside(e: Emitter, height: int, sums: int = 1) -> int:
    """Vectors of columns in a block of so many rows: as many chains of additions, each of so many
    ``sums``, as the registers hold beside an element of each row and two vectors of the right
    operand.
    """
    room = (e.host.vector_registers - height - 2) // (height * sums)
    return min(8, 1 << (max(1, room).bit_length() - 1))


def cover(
    e: Emitter, m: Extent, n: Extent, vectors: int, block: Block, first: Reg | None = None
) -> None:
    """Cover the used part of an (m, n) tile with register blocks, columns outermost, from the row
    ``first`` on.
    """
    w, lanes = e.w, e.lanes

    def rows(column: Reg, wide: int, count: int) -> None:
        used = w.index(m.bound)
        start = first or integer(0)
        for height in row_blocks(e, m.most):
            whole = w.sub(used, w.mod(w.sub(used, start), height))

            def inner(row: Reg, _: list[Reg], height: int = height) -> list[Reg]:
                block(row, height, column, wide, count)
                return []

            w.loop(start, whole, height, inner)
            start = whole

    start, rest = 0, n.static
    used = w.index(n.bound)
    # Narrow tiles take fewer vectors at once, but not single ones, whose sums wait for each other.
    for place in range(vectors.bit_length() - 1, -1, -1):
        count = 1 << place
        width = count * lanes
        main = rest - rest % width
        if not main:
            continue
        stop = w.minimum(used, integer(start + main))

        def columns(column: Reg, _: list[Reg], count: int = count) -> list[Reg]:
            rows(column, lanes, count)
            return []

        w.loop(integer(start), stop, width, columns)
        start, rest = start + main, rest - main
    while rest:
        piece = 1 << (rest.bit_length() - 1)
        rows(integer(start), piece, 1)
        start, rest = start + piece, rest - piece


def last_vector(e: Emitter, columns: Extent, width: int) -> Reg | None:
    """Where the last vector begins that holds a used column; None where groups of ``width`` columns
    never reach past it.

    A packed weight is padded to whole vectors, and what lies behind its last one isn't its own.
    """
    if columns.used is None:
        return None
    used = e.w.index(columns.used)
    if used.literal is not None and -(-used.literal // e.lanes) * e.lanes % width == 0:
        return None
    before = e.w.sub(used, integer(1))
    return e.w.maximum(e.w.sub(before, e.w.mod(before, e.lanes)), integer(0))


def plain_dot(
    e: Emitter,
    a: Tile,
    b: Tile,
    c: Buffer,
    extents: tuple[Extent, Extent],
    k: KRange,
    batch: Sequence[Reg] = (),
    fresh: bool = False,
    walk: Walk | None = None,
    sums: int = 1,
) -> None:
    """``c += a @ b`` for floats (in float32) or integers (in int32).

    ``fresh`` starts from zero and does not read ``c``.  ``batch`` are the leading indices.
    Products are added in the order of K, or as a ``walk`` does that keeps ``sums`` of an element.
    """
    w = e.w
    accumulator = c.stored

    def chain(step: Step, initial: list[Reg]) -> list[Reg]:
        return w.loop(k.start, k.stop, 1, step, initial)

    once = _reads_once(e, extents[0])

    def block(row: Reg, height: int, column: Reg, lanes: int, vectors: int) -> None:
        places = [
            [*batch, w.add(row, integer(i)), w.add(column, integer(j * lanes))]
            for i in range(height)
            for j in range(vectors)
        ]
        axis = len(batch) + 1
        columns = [w.add(column, integer(j * lanes)) for j in range(vectors)]
        if vectors > 1 and last is not None:
            columns = [column, *(w.minimum(one, last) for one in columns[1:])]
        nothing = zero(accumulator, lanes)
        initial = [nothing if fresh else c.vector(e, p, axis, lanes) for p in places]

        def step(at: Reg, totals: list[Reg]) -> list[Reg]:
            if once:
                _ask(e, b, batch, at, columns, lanes)
            left = [
                w.splat(
                    operand(e, a, [*batch, w.add(row, integer(i)), at], axis, 1, accumulator),
                    lanes,
                )
                for i in range(height)
            ]
            found = dict[tuple[int, int], Reg]()
            for j, right_column in enumerate(columns):
                right = operand(e, b, [*batch, at, right_column], axis, lanes, accumulator)
                for i in range(height):
                    total = totals[i * vectors + j]
                    found[i, j] = multiply_add(e, left[i], right, total)
            return [found[i, j] for i in range(height) for j in range(vectors)]

        def entries() -> None:
            """Of index lists, which would be read again for every step."""
            for one in columns:
                b.loaded_from([*batch, k.start, one])

        with w.kept(entries):
            totals = (walk or chain)(step, initial)
        for place, total in zip(places, totals, strict=True):
            c.put(e, total, place, axis)

    axis = len(batch) + 1
    vectors = vectors_beside(e, row_blocks(e, extents[0].most)[0], sums)
    bounds = Bounds(w, b.accesses(range(axis + 1)), axis, e.lanes)
    last = None if bounds.open else last_vector(e, extents[1], vectors * e.lanes)
    stop = [*(w.add(at, integer(1)) for at in batch), k.stop, integer(extents[1].static)]
    bounds.either(stop, lambda: cover(e, *extents, vectors, block))


def _ask(
    e: Emitter, b: Tile, batch: Sequence[Reg], at: Reg, columns: Sequence[Reg], lanes: int
) -> None:
    """Ask for the lines of a later step that a block of columns will read, each of them once."""
    w, axis = e.w, len(batch) + 1
    found = place_along(b, axis)
    if found is None:
        return
    place, own = found
    paired = lanes > 1 and place.paired(own, lanes)
    size = lanes * max(8, b.dtype.bits) // 8
    beside = place.contiguous(own, LINE_BYTES * lanes // size)
    for first in columns[:: 2 if paired else max(1, LINE_BYTES // size) if beside else 1]:
        source = b.loaded_from([*batch, at, first])
        if source is None:
            continue
        if paired:
            # Two steps read the same two lines.
            source = w.offset(source, w.mul(w.mod(at, 2), integer(LINE_BYTES)))
        fetch(w, source, FAR_AHEAD, 1, cache=2)


def _reads_once(e: Emitter, rows: Extent) -> bool:
    """Whether the right operand is walked once: all rows are one block of registers."""
    return rows.most <= row_blocks(e, rows.most)[0]


def zero(dtype: DType, lanes: int) -> Reg:
    """What an accumulator starts from."""
    element = "float" if dtype.is_float else "i32"
    if lanes == 1:
        return Reg(element, "0.0" if dtype.is_float else "0")
    return Reg(vector_type(element, lanes), "zeroinitializer")


def operand(
    e: Emitter, tile: Tile, index: Sequence[Reg], axis: int, lanes: int, accumulator: DType
) -> Reg:
    """Elements of an operand, as they are multiplied."""
    value = tile.vector(e, index, axis, lanes)
    target = dtypes.float32 if accumulator.is_float else dtypes.int32
    if tile.dtype.is_float:
        return value if tile.dtype.bits <= 32 else e.convert.convert(value, tile.dtype, target)
    return e.convert.convert(value, tile.dtype, target)


def multiply_add(e: Emitter, a: Reg, b: Reg, c: Reg) -> Reg:
    """``a * b + c`` of an accumulator's type."""
    if "float" in c.type:
        return e.math.fma(a, b, c)
    return e.w.binary("add", e.w.binary("mul", a, b), c)


def block_dot(
    e: Emitter,
    a: ActivationRows,
    b: Panels | RoundedWeights,
    c: Buffer,
    extents: tuple[Extent, Extent],
    k: KRange,
    fresh: bool = False,
) -> None:
    """``c += a @ b`` for quantized blocks times panels of a block-quantized weight."""
    mark = e.mark()
    if a.tile.format is dtypes.bfp9_block32:
        weights = PackedWeights(b) if isinstance(b, Panels) else b
        chunks = e.w.floordiv(k.start, integer(CHUNK)), e.w.floordiv(k.stop, integer(CHUNK))
        _bfp_dot(e, a, weights, c, extents, chunks, fresh)
    else:
        assert isinstance(b, Panels)
        _int_dot(e, a, b, c, extents, k, fresh)
    e.release(mark)


def _int_dot(
    e: Emitter,
    a: ActivationRows,
    b: Panels,
    c: Buffer,
    extents: tuple[Extent, Extent],
    k: KRange,
    fresh: bool,
) -> None:
    """With int8 (or two-byte) activations."""
    w = e.w
    rows = w.index(extents[0].bound), extents[0].static
    chunks = w.floordiv(k.stop, integer(CHUNK)), b.length // CHUNK
    exact = exact_dot(e, a, b.format, rows, chunks)
    once = _reads_once(e, extents[0])
    block_elements = integer(b.chunks * CHUNK)
    span = w.floordiv(k.start, block_elements), w.floordiv(k.stop, block_elements)

    def walk(rows: list[Reg], panel: Reg, initial: list[Reg]) -> list[Reg]:
        def step(first: Reg, totals: list[Reg]) -> list[Reg]:
            if once:
                fetch(w, b.block(e, panel, first), AHEAD, b.block_bytes)

            def inner(chunk: Reg, running: list[Reg]) -> list[Reg]:
                return chunk_step(e, a, rows, b, [panel], first, chunk, running, exact)

            return w.loop(integer(0), integer(b.chunks), 1, inner, totals)

        return w.loop(*span, 1, step, initial)

    done = None
    if takes_tiles(e.host, a, b.format, extents[0].most, extents[1].static):
        done = TileDot(e, a, b, c, k.start, k.stop).run(*extents, fresh)
    _cover_panels(e, b, c, extents, walk, fresh, done)


def _bfp_dot(
    e: Emitter,
    a: ActivationRows,
    b: RoundedWeights,
    c: Buffer,
    extents: tuple[Extent, Extent],
    chunks: tuple[Reg, Reg],
    fresh: bool,
) -> None:
    """With block floating point, the ``chunks`` of a part of K."""
    ahead = BFP_AHEAD if _reads_once(e, extents[0]) else 0

    def walk(rows: list[Reg], panel: Reg, initial: list[Reg]) -> list[Reg]:
        return add_chunks(e, a, rows, b, panel, chunks, initial, ahead)

    if takes_bfp_tiles(e.host, a, *extents):
        BfpTileDot(e, a, b, c, chunks).run(*extents, fresh)
    else:
        _cover_panels(e, b, c, extents, walk, fresh)


def _cover_panels(
    e: Emitter,
    b: Panels | RoundedWeights,
    c: Buffer,
    extents: tuple[Extent, Extent],
    walk: Callable[[list[Reg], Reg, list[Reg]], list[Reg]],
    fresh: bool,
    first: Reg | None = None,
) -> None:
    """Register blocks from the row ``first`` on: ``walk`` adds all of K to the sums of some rows
    and a panel.
    """
    w = e.w

    def block(row: Reg, height: int, column: Reg, lanes: int, _: int) -> None:
        rows = [w.add(row, integer(i)) for i in range(height)]
        nothing = zero(dtypes.float32, lanes)
        places = [[one, column] for one in rows]
        initial = [nothing if fresh else c.vector(e, p, 1, lanes) for p in places]
        totals = walk(rows, b.panel(e, column), initial)
        for place, total in zip(places, totals, strict=True):
            c.put(e, total, place, 1)

    # One panel at a time: a weight streams from memory fastest as one run of addresses.
    cover(e, *extents, 1, block, first)
