"""Where a GGUF tensor's bits lie: the layouts of its raw bytes, plane by plane.

Every supported type is strided bit layouts over rows of blocks, the 6-bit scales of the K-quants
included (4 low and 2 high bits apart).  The positions are those of the block structures in
``ggml-common.h`` (ggml-org/ggml).
"""

from __future__ import annotations

from collections.abc import Sequence

from dure.errors import ModelFileError
from dure.frontends.gguf.types import BLOCK, GGMLType
from dure.ir import dtypes
from dure.ir.dtypes import ElementType
from dure.ir.layout import AnyLayout, Digit, Layout, PlaneLayouts, row_major

#: The element type that each tensor type is read as.
ELEMENT_TYPES: dict[GGMLType, ElementType] = {
    GGMLType.F64: dtypes.float64,
    GGMLType.F32: dtypes.float32,
    GGMLType.F16: dtypes.float16,
    GGMLType.BF16: dtypes.bfloat16,
    GGMLType.I8: dtypes.int8,
    GGMLType.I16: dtypes.int16,
    GGMLType.I32: dtypes.int32,
    GGMLType.I64: dtypes.int64,
    GGMLType.Q8_0: dtypes.q8_0,
    GGMLType.Q4_0: dtypes.q4_0,
    GGMLType.Q4_1: dtypes.q4_1,
    GGMLType.Q5_0: dtypes.q5_0,
    GGMLType.Q5_1: dtypes.q5_1,
    GGMLType.Q4_K: dtypes.q4_k,
    GGMLType.Q5_K: dtypes.q5_k,
    GGMLType.Q6_K: dtypes.q6_k,
}

#: The digits of an entry inside a block, major to minor, as (extent, stride in bits).
_Digits = tuple[tuple[int, int], ...]

#: Element k of 32: nibble k // 16 of byte k % 16.
_NIBBLES_32: _Digits = ((2, 4), (16, 8))
#: Element k of 256, in runs of 64: nibble k % 64 // 32 of byte k % 32.
_NIBBLES_256: _Digits = ((4, 256), (2, 4), (32, 8))
#: The twelve bytes of 6-bit scales: entries 0-3 lie in bytes 0-3; of 4-7 the low bits lie in bytes
#: 8-11 and the high bits above entries 0-3.  Minima: one group of bytes, or one nibble, further.
_SCALES_K: dict[str, tuple[int, _Digits]] = {
    "d": (0, ()),
    "dmin": (16, ()),
    "s_low": (32, ((2, 64), (4, 8))),
    "s_high": (32 + 4, ((2, 2), (4, 8))),
    "m_low": (64, ((2, 36), (4, 8))),
    "m_high": (64 + 4, ((2, 2), (4, 8))),
}

#: type -> plane -> (first bit in the block, digits).
_PLANES: dict[GGMLType, dict[str, tuple[int, _Digits]]] = {
    GGMLType.Q8_0: {"d": (0, ()), "code": (16, ((32, 8),))},
    GGMLType.Q4_0: {"d": (0, ()), "low": (16, _NIBBLES_32)},
    GGMLType.Q4_1: {"d": (0, ()), "m": (16, ()), "low": (32, _NIBBLES_32)},
    GGMLType.Q5_0: {"d": (0, ()), "high": (16, ((32, 1),)), "low": (48, _NIBBLES_32)},
    GGMLType.Q5_1: {
        "d": (0, ()),
        "m": (16, ()),
        "high": (32, ((32, 1),)),
        "low": (64, _NIBBLES_32),
    },
    GGMLType.Q4_K: {**_SCALES_K, "low": (128, _NIBBLES_256)},
    GGMLType.Q5_K: {**_SCALES_K, "high": (128, ((8, 1), (32, 8))), "low": (384, _NIBBLES_256)},
    GGMLType.Q6_K: {
        "low": (0, ((2, 512), (2, 4), (64, 8))),
        "high": (1024, ((2, 256), (4, 2), (32, 8))),
        "s": (1536, ((16, 8),)),
        "d": (1664, ()),
    },
}


def element_type(kind: GGMLType) -> ElementType:
    """The element type that tensors of this type are read as.

    Raises :class:`ModelFileError` for a quantization that isn't supported.
    """
    found = ELEMENT_TYPES.get(kind)
    if found is None:
        raise ModelFileError(
            f"tensors of type {kind.name} are not supported",
            rule=f"supported types: {', '.join(k.name for k in ELEMENT_TYPES)}",
            fix="use a file quantized to one of these types",
        )
    return found


def layout_of(kind: GGMLType, shape: Sequence[int]) -> AnyLayout:
    """The layout of a tensor's bytes as they lie in the file.

    ``shape`` is in NumPy's order (the reverse of GGML's): the last axis is contiguous and holds
    whole blocks.  A block-quantized tensor is quantized along its last axis.
    """
    element = element_type(kind)
    if isinstance(element, dtypes.DType):
        return row_major(shape, element.bits)
    block = BLOCK[kind]
    if not shape or shape[-1] % block.elements:
        raise ModelFileError(
            f"a {kind.name} tensor of shape {tuple(shape)}",
            rule=f"rows of {kind.name} hold whole blocks of {block.elements} elements",
            fix="the file is damaged, or another program wrote it wrongly",
        )
    rows: list[tuple[Digit, ...]] = []
    stride = shape[-1] // block.elements * block.nbytes * 8
    for extent in reversed(shape[:-1]):
        rows.insert(0, (Digit(None, stride),))
        stride *= extent
    planes: list[tuple[str, Layout]] = []
    for plane in element.planes:
        first, inner = _PLANES[kind][plane.name]
        digits = (Digit(None, block.nbytes * 8), *(Digit(e, s) for e, s in inner))
        planes.append((plane.name, Layout((*rows, digits), first)))
    return PlaneLayouts(tuple(planes))
