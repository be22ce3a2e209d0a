"""What a GGUF tensor's type means: its element type, and the layouts of its raw bytes."""

from __future__ import annotations

from collections.abc import Sequence

from dure.errors import ModelFileError
from dure.frontends.gguf.types import BLOCK, GGMLType
from dure.ir import dtypes
from dure.ir.dtypes import ElementType
from dure.ir.layout import AnyLayout, row_major
from dure.ir.stored import stored_layout

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
    return stored_layout(tuple(shape), element)
