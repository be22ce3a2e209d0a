"""Dot products, reductions, scans and quantization: ops that sum or pick along an axis.

The order of accumulation is part of each op.  A float dot adds its K products one after another in
float32 (fused or not); an int8 dot is exact in int32; a dot of int8 blocks with a block-quantized
operand is exact inside a scale's block, and adds the blocks' scaled sums in order in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir import dtypes
from dure.ir.blocks import Blocks, quantize, rounded
from dure.ir.core import Cost, Op, OpDef, Region, declare
from dure.ir.dtypes import Array, BlockFormat, DType
from dure.ir.rules import axis_of, broken, plain, tile
from dure.ir.types import TileType, Type


def accumulator_of(a: TileType, b: TileType) -> DType:
    """The accumulator's type that a dot of these operands has."""
    if a.block is None and b.block is None and a.dtype.is_integer and b.dtype.is_integer:
        return dtypes.int32
    return dtypes.float32


def _dot_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    a, b = (
        tile(operands[0], "the left operand of dot"),
        tile(operands[1], "the right operand of dot"),
    )
    accumulator = plain(operands[2], "the accumulator of dot")
    fits = (
        2 <= a.rank == b.rank == accumulator.rank <= 3
        and a.shape[:-2] == b.shape[:-2] == accumulator.shape[:-2]
        and a.shape[-1] == b.shape[-2]
        and accumulator.shape[-2:] == (a.shape[-2], b.shape[-1])
    )
    if not fits:
        raise broken(
            f"dot of {a.shape} and {b.shape} into {accumulator.shape}",
            "dot takes (..., m, k) and (..., k, n) and adds to (..., m, n)",
            "transpose an operand with .T, or change a tile size",
        )
    for operand, axis, side in ((a, a.rank - 1, "left"), (b, b.rank - 2, "right")):
        if operand.block is not None and operand.quantized_axis % operand.rank != axis:
            raise broken(
                f"the {side} operand of dot is quantized along axis {operand.quantized_axis}",
                "a block-quantized operand of dot is quantized along K",
                "transpose it, or dequantize it with .to(dl.float32)",
            )
    if a.block is dtypes.bfp9_block32 and (b.block is None or not dtypes.takes_bfp(b.block)):
        raise broken(
            f"dot of {a.dtype} and {b.dtype}",
            "block floating point meets weights of four bits with a scale for 32 or more",
            "quantize to dl.int8_block32",
        )
    wanted = accumulator_of(a, b)
    if accumulator.dtype != wanted:
        raise broken(
            f"dot of {a.dtype} and {b.dtype} into an accumulator of {accumulator.dtype}",
            f"such a dot accumulates in {wanted}",
            f"start from dl.zeros(shape, dl.{wanted})",
        )
    if wanted is dtypes.float32:
        for operand in (a, b):
            if not operand.dtype.is_float:
                raise broken(
                    f"dot of {a.dtype} and {b.dtype}",
                    "both operands are floats (or block-quantized), or both are integers",
                    "convert one of them with .to(dtype)",
                )
    return [accumulator]


def _dot(attrs: Mapping[str, Any], a: Array | Blocks, b: Array | Blocks, c: Array) -> Array:
    if isinstance(a, Blocks) and isinstance(b, Blocks) and a.format in dtypes.ACTIVATION_FORMATS:
        return _dot_blocks(a, b, c)
    left = a.decode() if isinstance(a, Blocks) else a
    right = b.decode() if isinstance(b, Blocks) else b
    if c.dtype == np.int32:
        return c + np.matmul(left.astype(np.int32), right.astype(np.int32))
    return (c + np.matmul(left.astype(np.float64), right.astype(np.float64))).astype(np.float32)


def _dot_blocks(a: Blocks, b: Blocks, c: Array) -> Array:
    """int8 or int16 blocks (m, k) times quantized (k, n): exact in a block, blocks in order."""
    if a.format is dtypes.bfp9_block32:
        return _dot_rounded(a, b, c)
    block = min(b.format.scale_block, a.format.block)
    length = a.shape[-1]
    codes, weights = a.codes(), b.codes() - b.format.zero
    last = {n: np.moveaxis(p, -2, -1) for n, p in b.planes.items()}
    scale = np.moveaxis(b.format.scale(last, length), -1, -2)
    offset = b.format.offset(last, length)
    total = c.astype(np.float32)
    for start in range(0, length, block):
        part = slice(start, start + block)
        exact = np.matmul(codes[..., part], weights[..., part, :]).astype(np.float32)
        mine = a.planes["d"][..., start // a.format.block, None].astype(np.float32)
        total = total + exact * (mine * scale[..., start, None, :])
        if offset is not None:
            sums = codes[..., part].sum(axis=-1, keepdims=True).astype(np.float32)
            shift = np.moveaxis(offset, -1, -2)[..., start, None, :]
            total = total + (mine * sums) * (shift * b.format.offset_sign)
    return total


def _dot_rounded(a: Blocks, b: Blocks, c: Array) -> Array:
    """Block floating point times weights that are rounded to it: blocks in order, each exact and
    added with one rounding.
    """
    codes, scale = rounded(b)
    total = c.astype(np.float32)
    for number in range(scale.shape[-1]):
        part = slice(number * a.format.block, (number + 1) * a.format.block)
        exact = np.matmul(a.planes["code"][..., part].astype(np.float64), codes[..., part].T)
        power = a.planes["d"][..., number, None].astype(np.float64) * scale[..., number]
        total = (total + exact * power).astype(np.float32)
    return total


def _dot_cost(op: Op) -> Cost:
    a, c = op.operands[0].tile, op.operands[2].tile
    return Cost(flops=2 * c.elements * a.shape[-1])


declare(
    OpDef(
        "dot",
        "tile",
        _dot_typing,
        _dot,
        _dot_cost,
        exact=False,
        error_bound=1.0,
        doc="dot(a, b, c): c + a @ b; a leading axis is a batch",
    )
)

#: name -> (NumPy reduction, kinds, result type or None for the operand's, exact in any order)
_REDUCTIONS: dict[str, tuple[Callable[..., Any], str, DType | None, bool]] = {
    "sum": (np.sum, "float int uint", None, False),
    "max": (np.max, "float int uint", None, True),
    "min": (np.min, "float int uint", None, True),
    "prod": (np.prod, "float int uint", None, False),
    "argmax": (np.argmax, "float int uint", dtypes.int32, True),
    "argmin": (np.argmin, "float int uint", dtypes.int32, True),
}


def _reduced(source: TileType, axis: int, dtype: DType | None) -> TileType:
    shape = tuple(1 if i == axis else extent for i, extent in enumerate(source.shape))
    return TileType(shape, source.dtype if dtype is None else dtype)


def _reduce_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = plain(operands[0], "the operand of reduce")
    combiner: str = attrs["combiner"]
    if combiner not in _REDUCTIONS:
        raise broken(
            f"reduce with combiner '{combiner}'",
            f"a named combiner is one of {', '.join(_REDUCTIONS)}",
            "use dl.reduce with a combine function",
        )
    assert isinstance(source.dtype, DType)
    _, kinds, dtype, _ = _REDUCTIONS[combiner]
    if source.dtype.kind not in kinds.split():
        raise broken(
            f"{combiner} of {source.dtype}", f"{combiner} takes {kinds}", "convert with .to"
        )
    return [_reduced(source, axis_of(attrs["axis"], source.rank, combiner), dtype)]


def _reduce(attrs: Mapping[str, Any], x: Array) -> Array:
    function, _, dtype, exact = _REDUCTIONS[attrs["combiner"]]
    wide = x if exact or x.dtype.kind in "iub" else x.astype(np.float64)
    if wide.dtype.kind == "V" or wide.dtype.itemsize < 4:
        wide = wide.astype(np.int32 if x.dtype.kind in "iub" else np.float32)
    found = function(wide, axis=attrs["axis"], keepdims=True)
    return np.asarray(found).astype(x.dtype if dtype is None else dtype.numpy)


def _reads_all(op: Op) -> Cost:
    return Cost(flops=op.operands[0].tile.elements)


declare(
    OpDef(
        "reduce",
        "tile",
        _reduce_typing,
        _reduce,
        _reads_all,
        exact=False,
        error_bound=1.0,
        doc="reduce(x) {axis, combiner}: the axis keeps extent 1; argmax gives the lowest index",
    )
)


def _reduce_with_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = plain(operands[0], "the operand of reduce_with")
    region = regions[0]
    if len(region.args) != 2 or len(region.yields) != 1:
        raise broken(
            "a combine function of other than two operands and one result", "combine(a, b) -> c"
        )
    return [_reduced(source, axis_of(attrs["axis"], source.rank, "reduce_with"), None)]


declare(
    OpDef(
        "reduce_with",
        "tile",
        _reduce_with_typing,
        None,
        _reads_all,
        exact=False,
        error_bound=1.0,
        doc="reduce_with(x) {axis, identity} (region): an associative combiner of two (1,) tiles",
    )
)


def _cumsum_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = plain(operands[0], "the operand of cumsum")
    axis_of(attrs["axis"], source.rank, "cumsum")
    return [source]


def _cumsum(attrs: Mapping[str, Any], x: Array) -> Array:
    wide = x.astype(np.int64 if x.dtype.kind in "iub" else np.float64)
    return np.cumsum(wide, axis=attrs["axis"]).astype(x.dtype)


declare(
    OpDef(
        "cumsum",
        "tile",
        _cumsum_typing,
        _cumsum,
        _reads_all,
        exact=False,
        error_bound=1.0,
        doc="cumsum(x) {axis}: running sum, the element itself included",
    )
)


def _quantize_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = plain(operands[0], "the operand of quantize")
    format: BlockFormat = dtypes.FORMATS.get(attrs["format"], dtypes.int8_block32)
    if format not in dtypes.ACTIVATION_FORMATS and format is not dtypes.q8_0:
        raise broken(
            f"quantize to '{attrs['format']}'",
            "run-time quantization is to int8_block32, int16_block32, bfp9_block32 or q8_0",
            "quantize weights ahead of time",
        )
    if not source.dtype.is_float or source.shape[-1] % format.block:
        raise broken(
            f"quantize of {source}",
            f"quantize takes floats, a multiple of {format.block} along the last axis",
            f"choose a tile whose last extent is a multiple of {format.block}",
        )
    return [TileType(source.shape, format, source.rank - 1)]


def _quantize(attrs: Mapping[str, Any], x: Array) -> Blocks:
    return quantize(x, dtypes.FORMATS[attrs["format"]])


def _dequantize_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = tile(operands[0], "the operand of dequantize")
    if source.block is None or not attrs["dtype"].is_float:
        raise broken(
            f"dequantize of {source} to {attrs['dtype']}",
            "dequantize gives the values of a block-quantized tile as floats",
            "use a cast for plain numbers",
        )
    return [TileType(source.shape, attrs["dtype"])]


def _dequantize(attrs: Mapping[str, Any], x: Blocks) -> Array:
    dtype: DType = attrs["dtype"]
    return x.decode().astype(dtype.numpy)


declare(
    OpDef(
        "quantize",
        "tile",
        _quantize_typing,
        _quantize,
        lambda op: Cost(flops=4 * op.operands[0].tile.elements),
        exact=False,
        error_bound=1.0,
        doc="quantize(x) {format}: int8 codes and a scale per block of the last axis",
    )
)
declare(
    OpDef(
        "dequantize",
        "tile",
        _dequantize_typing,
        _dequantize,
        _reads_all,
        defaults={"dtype": dtypes.float32},
        doc="dequantize(x) {dtype}: the values of a block-quantized tile",
    )
)
