"""The layouts in which the CPU's dot reads a weight of shape (N, K), and quantized activations.

A weight is cut into panels of ``lanes`` rows, one row a vector lane, so that a dot needs no
horizontal sum. Inside a panel the blocks along K follow one another, and each block holds its
scales, then its offsets, then its codes, so that a worker reads one contiguous stream:

* plain floats: for each k, ``lanes`` neighbouring rows;
* block formats: codes in groups of four k per lane (what one byte-wise dot-product instruction
eats); a
  plane of b bits puts 8 / b such groups into the bits of one byte, group after group;
* the same for products of 16 bits (``pairs``), codes of four bits: two k per lane, half of it for
  each, whose four nibbles belong to four pairs that follow one another.

No bit is added or lost but for rows that pad N to whole panels.
"""

from __future__ import annotations

from dure.errors import TargetError
from dure.ir.dtypes import DERIVED_ROLES, BlockFormat, DType, Plane
from dure.ir.layout import Digit, Layout, PlaneLayouts
from dure.ir.types import TensorType, static_extent

#: Elements of K in one group of a lane: a byte-wise dot product multiplies four at a time.
GROUP = 4
#: Elements of K that share one scale of the activations, and the unit in which a dot walks along K.
CHUNK = 32
#: Rows of a tile register.
TILE_ROWS = 16
#: Bits of a lane's half, and of a line of the cache, on which rows of activations start.
_HALF, _LINE_BITS = 16, 512


def packed_layout(weight: TensorType, lanes: int, pairs: bool = False) -> Layout | PlaneLayouts:
    """The packed layout of a (N, K) weight for vectors of ``lanes`` 32-bit lanes.

    ``pairs``: for what :func:`dure.ir.dtypes.takes_bfp`, as it meets block floating point.

    Raises :class:`TargetError` unless both extents are numbers and K is a whole number of blocks.
    """
    length = static_extent(weight.shape[-1])
    if weight.rank != 2 or length is None or static_extent(weight.shape[0]) is None:
        raise TargetError(
            f"cannot pack {weight}",
            rule="a packed weight is a matrix whose extents are known when it is compiled",
            fix="use the default layout",
        )
    if isinstance(weight.dtype, BlockFormat):
        return _pack_blocks(weight.dtype, length, lanes, pairs)
    return _pack_plain(weight.dtype, length, lanes)


def packed_bytes(weight: TensorType, lanes: int) -> int:
    """Bytes of the packed weight, padding rows included."""
    rows, length = static_extent(weight.shape[0]), static_extent(weight.shape[1])
    assert rows is not None and length is not None
    panels = -(-rows // lanes)
    return int(panels * lanes * length * weight.dtype.bits) // 8


def _pack_plain(dtype: DType, length: int, lanes: int) -> Layout:
    bits = dtype.bits
    rows = (Digit(None, length * lanes * bits), Digit(lanes, bits))
    return Layout((rows, (Digit(None, lanes * bits),)))


def _pack_blocks(format: BlockFormat, length: int, lanes: int, pairs: bool) -> PlaneLayouts:
    block_bits = int(format.bits * format.block) * lanes
    panel_bits = block_bits * (length // format.block)
    ordered = sorted(
        (p for p in format.planes if p.role not in DERIVED_ROLES),
        key=lambda plane: ("scale", "offset", "code").index(plane.role),
    )
    layouts: dict[str, Layout] = {}
    offset = 0
    for plane in ordered:
        entries = format.block // plane.per
        if plane.role == "code":
            digits = _pair_digits if pairs else _code_digits
            columns = digits(plane, format.block, block_bits, lanes)
            lane_bits = GROUP * 8
        else:
            columns = _scale_digits(plane, entries, block_bits, lanes)
            lane_bits = max(8, plane.dtype.bits)
        rows = (Digit(None, panel_bits), Digit(lanes, lane_bits))
        layouts[plane.name] = Layout((rows, columns), offset)
        offset += entries * plane.dtype.bits * lanes
    assert offset == block_bits, f"{format}: planes take {offset} of {block_bits} bits"
    return PlaneLayouts(
        tuple((p.name, layouts[p.name]) for p in format.planes if p.name in layouts)
    )


def _code_digits(plane: Plane, block: int, block_bits: int, lanes: int) -> tuple[Digit, ...]:
    bits = plane.dtype.bits
    per_byte = 8 // bits
    vector = lanes * GROUP * 8
    return (
        Digit(None, block_bits),
        Digit(block // CHUNK, bits * vector),
        Digit(CHUNK // GROUP // per_byte, vector),
        Digit(per_byte, bits),
        Digit(GROUP, 8),
    )


def _pair_digits(plane: Plane, block: int, block_bits: int, lanes: int) -> tuple[Digit, ...]:
    bits, vector = plane.dtype.bits, lanes * 32
    together = _HALF // bits
    return (
        Digit(None, block_bits),
        Digit(block // CHUNK, bits * lanes * CHUNK),
        Digit(CHUNK // (2 * together), vector),
        Digit(together, bits),
        Digit(2, _HALF),
    )


def _scale_digits(plane: Plane, entries: int, block_bits: int, lanes: int) -> tuple[Digit, ...]:
    bits = plane.dtype.bits
    if bits >= 8:
        return (Digit(None, block_bits), Digit(entries, lanes * bits))
    per_byte = 8 // bits
    return (
        Digit(None, block_bits),
        Digit(entries // per_byte, lanes * 8),
        Digit(per_byte, bits),
    )


def activation_layout(value: TensorType) -> PlaneLayouts:
    """Quantized activations row by row, each row its codes, then its scales, then its sums.

    The values of sixteen rows of a matrix (bfloat16 numbers, of block floating point) lie in front
    of these rows, 32 k after 32 k, each as one tile register holds them.
    """
    assert isinstance(value.dtype, BlockFormat)
    length = static_extent(value.shape[-1])
    assert length is not None, f"{value} is quantized along a symbolic axis"
    tiled = [p for p in value.dtype.planes if p.role == "value" and value.rank == 2]
    order = ("value", "code", "scale", "offset", "sum")
    starts: dict[str, int] = {}
    end = 0
    for plane in sorted(value.dtype.planes, key=lambda p: order.index(p.role)):
        if plane not in tiled:
            starts[plane.name] = end
            end += length // plane.per * plane.dtype.bits
    row = -(-end // _LINE_BITS) * _LINE_BITS
    tile = TILE_ROWS * _LINE_BITS
    front = length // CHUNK * tile if tiled else 0
    block = Digit(None, front + TILE_ROWS * row), Digit(TILE_ROWS, row)
    outer = [block] if tiled else _outer(value, row)
    layouts = {
        p.name: Layout((*outer, (Digit(None, p.dtype.bits),)), front + starts[p.name])
        for p in value.dtype.planes
        if p not in tiled
    }
    for plane in tiled:
        rows = block[0], Digit(TILE_ROWS, _LINE_BITS)
        columns = Digit(None, tile), Digit(CHUNK, plane.dtype.bits)
        layouts[plane.name] = Layout((rows, columns))
    return PlaneLayouts(tuple((p.name, layouts[p.name]) for p in value.dtype.planes))


def _outer(value: TensorType, row: int) -> list[tuple[Digit, ...]]:
    """Digits of all axes but the last, of rows of so many bits."""
    outer: list[tuple[Digit, ...]] = []
    for extent in reversed(value.shape[:-1]):
        outer.insert(0, (Digit(None, row),))
        row *= static_extent(extent) or 1
    return outer
