"""Kernels written in dure's own language: what cuBLAS and cuDNN are.

Importing this package registers the lowering of every tensor op.
"""

from __future__ import annotations

from dure.library import lowering as _registers_lowerings
from dure.library.attention import paged_attention
from dure.library.conv import conv2d
from dure.library.elementwise import (
    elementwise_1d,
    elementwise_2d,
    elementwise_3d,
    elementwise_4d,
)
from dure.library.embedding import embedding, gather_rows
from dure.library.matmul import batched_matmul, gated_linear, matmul, matmul_kn
from dure.library.norm import layer_norm, rms_norm, softmax
from dure.library.reduction import reduce_last, reduce_middle
from dure.library.rope import kv_write, rope, rope_kv_write
from dure.library.sampling import argmax, top_k

__all__ = [
    "argmax",
    "batched_matmul",
    "conv2d",
    "elementwise_1d",
    "elementwise_2d",
    "elementwise_3d",
    "elementwise_4d",
    "embedding",
    "gated_linear",
    "gather_rows",
    "kv_write",
    "layer_norm",
    "matmul",
    "matmul_kn",
    "paged_attention",
    "reduce_last",
    "reduce_middle",
    "rms_norm",
    "rope",
    "rope_kv_write",
    "softmax",
    "top_k",
]
_REGISTERED = _registers_lowerings
