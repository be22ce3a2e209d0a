"""The kernel language: ``import dure.lang as dl``.

Tiles, index scalars and tensors in memory; see ``docs/language.md``.  The same functions record ops when a
kernel is compiled and compute at once under :func:`interpret`.
"""

from __future__ import annotations

from dure.ir.dtypes import (
    bfloat16,
    bool_,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    float64,
    int4,
    int8,
    int8_block32,
    int16,
    int32,
    int64,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
    uint1,
    uint2,
    uint4,
    uint8,
    uint16,
    uint32,
)
from dure.lang.contraction import (
    argmax,
    argmin,
    cumsum,
    dot,
    max,
    min,
    prod,
    quantize,
    reduce,
    sum,
)
from dure.lang.functions import (
    abs,
    ceil,
    cos,
    erf,
    exp,
    exp2,
    floor,
    log,
    log2,
    maximum,
    minimum,
    round,
    rsqrt,
    sigmoid,
    sin,
    sqrt,
    tanh,
    where,
)
from dure.lang.interpreter import interpret
from dure.lang.memory import load, store
from dure.lang.programs import cdiv, num_programs, program_id, range, static_assert, static_range
from dure.lang.shapes import (
    arange,
    broadcast_to,
    expand_dims,
    full,
    ones,
    reshape,
    transpose,
    zeros,
)
from dure.lang.tensor import Index, Tensor, const
from dure.lang.tile import Tile

#: Alternative spelling of ``transpose`` with an order.
permute = transpose
