"""How GGML stores a block-quantized tensor, as layouts of its planes.

Every plane of every format is a bit-strided layout: where a number's bits lie apart (Q5's fifth
bits, the 6-bit scales of the K formats), its low and high bits are planes of their own.  Source:
the public GGUF specification and the structures ``block_*`` of ggml-common.h with their
``dequantize_row_*``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.dtypes import BlockFormat, ElementType
from dure.ir.layout import AnyLayout, Digit, Layout, PlaneLayouts, row_major
from dure.ir.types import TensorType, static_extent

#: A plane inside one block: the digits of its entries (major to minor) and its first bit.
_Inner = tuple[tuple[tuple[int, int], ...], int]


def _simple(offsets: bool, high: bool) -> dict[str, _Inner]:
    """Q4_0, Q4_1, Q5_0, Q5_1: d, [m], [32 high bits], then 16 bytes of two nibbles."""
    planes: dict[str, _Inner] = {"d": ((), 0)}
    start = 16
    if offsets:
        planes["m"] = ((), start)
        start += 16
    if high:
        planes["high"] = (((32, 1),), start)
        start += 32
    planes["low"] = (((2, 4), (16, 8)), start)
    return planes


def _k_quant(high: bool) -> dict[str, _Inner]:
    """Q4_K, Q5_K: d, dmin, 12 bytes of 6-bit scales and minima, [32 bytes of high bits],
    nibbles."""
    scales = 32
    planes: dict[str, _Inner] = {
        "d": ((), 0),
        "dmin": ((), 16),
        "s_low": (((2, 64), (4, 8)), scales),
        "s_high": (((2, 2), (4, 8)), scales + 4),
        "m_low": (((2, 36), (4, 8)), scales + 32),
        "m_high": (((2, 2), (4, 8)), scales + 36),
    }
    start = scales + 96
    if high:
        planes["high"] = (((4, 2), (2, 1), (32, 8)), start)
        start += 256
    planes["low"] = (((4, 256), (2, 4), (32, 8)), start)
    return planes


def _q6_k() -> dict[str, _Inner]:
    """128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d."""
    return {
        "low": (((2, 512), (2, 4), (2, 256), (32, 8)), 0),
        "high": (((2, 256), (2, 4), (2, 2), (32, 8)), 1024),
        "s": (((16, 8),), 1536),
        "d": ((), 1664),
    }


def _q8_0() -> dict[str, _Inner]:
    return {"d": ((), 0), "code": (((32, 8),), 16)}


_BLOCKS: dict[str, Callable[[], dict[str, _Inner]]] = {
    "q8_0": _q8_0,
    "q4_0": lambda: _simple(False, False),
    "q4_1": lambda: _simple(True, False),
    "q5_0": lambda: _simple(False, True),
    "q5_1": lambda: _simple(True, True),
    "q4_k": lambda: _k_quant(False),
    "q5_k": lambda: _k_quant(True),
    "q6_k": _q6_k,
}


@cache
def _planes(format: BlockFormat, leading: tuple[int, ...], length: int) -> PlaneLayouts:
    block_bits = int(format.bits * format.block)
    row_bits = block_bits * (length // format.block)
    outer: list[tuple[Digit, ...]] = []
    for extent in reversed(leading):
        outer.insert(0, (Digit(None, row_bits),))
        row_bits *= extent
    layouts: list[tuple[str, Layout]] = []
    inner = _BLOCKS[format.name]()
    for plane in format.planes:
        digits, offset = inner[plane.name]
        columns = (Digit(None, block_bits), *(Digit(e, s) for e, s in digits))
        layouts.append((plane.name, Layout((*outer, columns), offset)))
    return PlaneLayouts(tuple(layouts))


def stored_layout(shape: tuple[int, ...], dtype: ElementType) -> AnyLayout:
    """The layout of a GGUF tensor's bytes: ``shape`` row by row, blocks along the last axis.

    Raises :class:`IRError` for a format that no file stores, or rows that are not whole blocks.
    """
    if not isinstance(dtype, BlockFormat):
        return row_major(shape, dtype.bits)
    if dtype.name not in _BLOCKS or not shape or shape[-1] % dtype.block:
        raise IRError(
            f"no file stores {list(shape)} as {dtype}",
            rule=f"a stored tensor is one of {', '.join(_BLOCKS)} in whole blocks of {dtype.block}",
            fix="use another format, or a last extent that is a multiple of the block",
        )
    return _planes(dtype, shape[:-1], shape[-1])


def stored_type(weight: TensorType) -> TensorType:
    """``weight`` with the layout of a file's bytes (plain dtypes: None, which is row-major)."""
    if not isinstance(weight.dtype, BlockFormat):
        return weight
    extents = [static_extent(e) for e in weight.shape]
    shape = tuple(e for e in extents if e is not None)
    if len(shape) != weight.rank:
        raise IRError(
            f"a stored weight of symbolic shape {weight}", rule="a weight's shape is known"
        )
    return weight.with_layout(stored_layout(shape, weight.dtype))


def stored_bytes(shape: tuple[int, ...], dtype: ElementType) -> int:
    """Bytes of a stored tensor."""
    total = 1
    for extent in shape:
        total *= extent
    return int(total * dtype.bits) // 8


#: Formats that a file may store.
STORED_FORMATS: tuple[BlockFormat, ...] = tuple(dtypes.FORMATS[name] for name in _BLOCKS)
