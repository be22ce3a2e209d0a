"""Kernels written in dure's own language: what cuBLAS and cuDNN are.

Importing this package registers the lowering of every tensor op.
"""

from __future__ import annotations

from dure.library import lowering as _registers_lowerings
from dure.library import lowering_moe as _registers_expert_lowerings
from dure.library.attention import paged_attention
from dure.library.attention_columns import attention_columns
from dure.library.attention_dense import attention_scores, dense_attention
from dure.library.attention_grouped import grouped_attention
from dure.library.attention_ragged import ragged_attention
from dure.library.attention_rows import attention_rows
from dure.library.attention_split import join_attention, split_attention
from dure.library.conv import conv2d
from dure.library.elementwise import (
    elementwise_1d,
    elementwise_2d,
    elementwise_3d,
    elementwise_4d,
)
from dure.library.embedding import embedding, gather_rows
from dure.library.ffn import gated_ffn, gated_linear_kn
from dure.library.matmul import batched_matmul, gated_linear, matmul, matmul_kn
from dure.library.matmul_nests import matmul_blocked, matmul_hoisted, matmul_tiled
from dure.library.matmul_packed import gated_linear_packed, matmul_packed
from dure.library.moe import grouped_matmul, moe_route
from dure.library.norm import layer_norm, rms_norm, rms_norm_rows, softmax, softmax_rows
from dure.library.reduction import reduce_last, reduce_middle
from dure.library.rope import kv_write, rope, rope_kv_write
from dure.library.rope_whole import rope_whole, rope_whole_kv_write
from dure.library.sampling import argmax, top_k
from dure.library.scan import cumulative_sum
from dure.library.transpose import transpose

__all__ = [
    "argmax",
    "attention_columns",
    "attention_rows",
    "attention_scores",
    "batched_matmul",
    "conv2d",
    "cumulative_sum",
    "dense_attention",
    "elementwise_1d",
    "elementwise_2d",
    "elementwise_3d",
    "elementwise_4d",
    "embedding",
    "gated_ffn",
    "gated_linear",
    "gated_linear_kn",
    "gated_linear_packed",
    "gather_rows",
    "grouped_attention",
    "grouped_matmul",
    "join_attention",
    "kv_write",
    "layer_norm",
    "matmul",
    "matmul_blocked",
    "matmul_hoisted",
    "matmul_kn",
    "matmul_packed",
    "matmul_tiled",
    "moe_route",
    "paged_attention",
    "ragged_attention",
    "reduce_last",
    "reduce_middle",
    "rms_norm",
    "rms_norm_rows",
    "rope",
    "rope_kv_write",
    "rope_whole",
    "rope_whole_kv_write",
    "softmax",
    "softmax_rows",
    "split_attention",
    "top_k",
    "transpose",
]
_REGISTERED = (_registers_lowerings, _registers_expert_lowerings)
