"""The closed vocabularies of the GGUF format: value types of metadata, element types of tensors.

Numbers and block sizes are those of the GGUF specification (``docs/gguf.md`` in ggml-org/ggml) and
of ``ggml.h``.  :data:`BLOCK` says how many elements one block holds and how many bytes it takes; a
type that has no entry there is known by name only, so that an error can say what a file contains.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class ValueType(IntEnum):
    """The type tag in front of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class GGMLType(IntEnum):
    """The element type of a tensor, by its number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


class Block(NamedTuple):
    """One block of a tensor's rows: ``elements`` consecutive values in ``nbytes`` bytes."""

    elements: int
    nbytes: int


BLOCK: dict[GGMLType, Block] = {
    GGMLType.F32: Block(1, 4),
    GGMLType.F16: Block(1, 2),
    GGMLType.BF16: Block(1, 2),
    GGMLType.F64: Block(1, 8),
    GGMLType.I8: Block(1, 1),
    GGMLType.I16: Block(1, 2),
    GGMLType.I32: Block(1, 4),
    GGMLType.I64: Block(1, 8),
    GGMLType.Q4_0: Block(32, 18),
    GGMLType.Q4_1: Block(32, 20),
    GGMLType.Q5_0: Block(32, 22),
    GGMLType.Q5_1: Block(32, 24),
    GGMLType.Q8_0: Block(32, 34),
    GGMLType.Q4_K: Block(256, 144),
    GGMLType.Q5_K: Block(256, 176),
    GGMLType.Q6_K: Block(256, 210),
}
"""Elements and bytes of one block, for every tensor type that is read."""
