"""The library's kernels as operators: each by its own name, with sizes that mean what its
parameters say.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from dure.errors import UsageError
from dure.ir.dtypes import FORMATS, float32, int32
from dure.ir.stored import STORED_FORMATS
from dure.library import elementwise
from dure.library.activation import silu
from dure.library.attention import paged_attention
from dure.library.attention_dense import attention_scores, dense_attention
from dure.library.call import indices, tensor
from dure.library.conv import conv2d
from dure.library.embedding import embedding, gather_rows
from dure.library.ffn import gated_ffn, gated_linear_kn
from dure.library.matmul import batched_matmul, gated_linear, matmul
from dure.library.matmul_nests import matmul_blocked, matmul_hoisted, matmul_tiled
from dure.library.matmul_packed import (
    e2m1_value,
    e8m0_scale,
    int4_value,
    matmul_packed,
    plain_scale,
)
from dure.library.moe import grouped_matmul, moe_route
from dure.library.norm import layer_norm, rms_norm, softmax, softmax_rows
from dure.library.operators_common import (
    DTYPES,
    FLOATS,
    NUMBERS,
    Plan,
    Shape,
    accumulation,
    bytes_of,
    call,
    integer,
    power_of_two,
    single,
    tile,
)
from dure.library.operators_measured import (
    MOST_INDICES,
    Row,
    attention,
    attention_measured,
    gemm,
    packed_weight,
    sequences,
)
from dure.library.reduction import reduce_last, reduce_middle
from dure.library.rope import kv_write, rope, rope_kv_write
from dure.library.sampling import argmax, top_k
from dure.library.scan import cumulative_sum
from dure.library.transpose import transpose

#: Tiles of a pinned loop nest that are unrolled, at most.
_MOST_UNROLLED = 256


def matmul_plan(shape: Shape, dtype: str) -> Plan:
    """``MxKxN``; the weight is (N, K)."""
    m, k, n = shape
    kind = DTYPES[dtype]
    types = [tensor(kind, m, k), tensor(kind, n, k), tensor(kind, m, n)]
    tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(k)}
    return single(call(matmul, types, tiles, accumulation(dtype)), 2 * m * k * n)


def blocks_plan(format: str, shape: Shape, dtype: str) -> Plan:
    """``MxKxN`` of a block-quantized weight (N, K)."""
    m, k, n = shape
    blocks, kind = FORMATS[format], DTYPES[dtype]
    if k % blocks.block:
        raise UsageError(
            f"rows of {k} in {format}",
            rule=f"{blocks.block} weights make a block of {format}",
            fix=f"K of {-(-k // blocks.block) * blocks.block}",
        )
    types = [tensor(kind, m, k), tensor(blocks, n, k), tensor(kind, m, n)]
    tiles = {"bm": tile(m), "bn": tile(n), "bk": max(blocks.block, tile(k))}
    return single(call(matmul, types, tiles), 2 * m * k * n)


def packed_plan(microscaling: bool, shape: Shape, dtype: str) -> Plan:
    """``MxKxN`` of weights of four bits: int4 with float32 scales, or mxfp4."""
    m, k, n = shape
    kind = DTYPES[dtype]
    codes, scales = packed_weight(k, n)
    if not microscaling:
        scales = tensor(float32, k // 32, n)
    types = [tensor(kind, m, k), codes, scales, tensor(kind, m, n)]
    tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(k // 2)}
    value, scale = (e2m1_value, e8m0_scale) if microscaling else (int4_value, plain_scale)
    return single(
        call(matmul_packed, types, tiles, {"value": value, "scale": scale}), 2 * m * k * n
    )


def batched_plan(shape: Shape, dtype: str) -> Plan:
    """``BxMxKxN``"""
    b, m, k, n = shape
    kind = DTYPES[dtype]
    types = [tensor(kind, b, m, k), tensor(kind, b, k, n), tensor(kind, b, m, n)]
    tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(k)}
    return single(call(batched_matmul, types, tiles, {"transposed": False}), 2 * b * m * k * n)


def nest_plan(kernel: Any, shape: Shape, dtype: str) -> Plan:
    """``MxKxN`` by a pinned loop nest, the left operand transposed."""
    m, k, n = shape
    kind = DTYPES[dtype]
    types = [tensor(kind, k, m), tensor(kind, k, n), tensor(kind, m, n)]
    consts: dict[str, object] = {}
    if kernel is matmul_hoisted:
        consts["depth"] = unrolled(-(-k // 128), "K", 128)
    if kernel is matmul_blocked:
        consts["rows"] = 1
    return single(call(kernel, types, {}, consts), 2 * m * k * n)


def unrolled(count: int, name: str, block: int) -> int:
    """``count``, or a UsageError where so many tiles can't be unrolled."""
    if count > _MOST_UNROLLED:
        raise UsageError(
            f"{name} of {count} tiles",
            rule=f"this loop nest keeps at most {_MOST_UNROLLED} tiles of {block} of {name}",
            fix=f"{name} of at most {_MOST_UNROLLED * block}, or gemm",
        )
    return count


def gated_linear_plan(shape: Shape, dtype: str) -> Plan:
    """``MxKxN``; the weights are (N, K)."""
    m, k, n = shape
    kind = DTYPES[dtype]
    weight = tensor(kind, n, k)
    types = [tensor(kind, m, k), weight, weight, tensor(kind, m, n)]
    tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(k)}
    return single(call(gated_linear, types, tiles, {"activation": silu}), 4 * m * k * n)


def gated_linear_kn_plan(shape: Shape, dtype: str) -> Plan:
    """``MxKxN``; the weight is (K, 2 N)."""
    m, k, n = shape
    kind = DTYPES[dtype]
    types = [tensor(kind, m, k), tensor(kind, k, 2 * n), tensor(kind, m, n)]
    tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(k)}
    consts = {**accumulation(dtype), **({"scale": 1.0 / 64} if integer(dtype) else {})}
    return single(
        call(gated_linear_kn, types, tiles, {**consts, "activation": silu}), 4 * m * k * n
    )


def gated_ffn_plan(shape: Shape, dtype: str) -> Plan:
    """``MxDxF`` in one kernel."""
    m, d, f = shape
    kind = DTYPES[dtype]
    weight = tensor(kind, d, f)
    types = [tensor(kind, m, d), weight, weight, tensor(kind, f, d), tensor(kind, m, d)]
    tiles = {"bm": tile(m), "bn": tile(d), "bk": tile(d), "bf": tile(f)}
    return single(call(gated_ffn, types, tiles, {"activation": silu}), 6 * m * d * f)


def rows_plan(kernel: Any, shape: Shape, dtype: str) -> Plan:
    """``MxD`` of a norm or softmax."""
    m, d = shape
    x = tensor(DTYPES[dtype], m, d)
    weight = tensor(DTYPES[dtype], d)
    tiles = {"bm": tile(m, 8), "bd": tile(d, 256)}
    if kernel is rms_norm:
        return single(call(kernel, [x, weight, None, x], tiles, {"epsilon": 1e-5}), 4 * m * d)
    if kernel is layer_norm:
        return single(
            call(kernel, [x, weight, weight, None, x], tiles, {"epsilon": 1e-5}), 8 * m * d
        )
    if kernel is softmax_rows:
        return single(call(kernel, [x, x], {"bm": 1}, {"bd": power_of_two(d)}), 5 * m * d)
    return single(call(kernel, [x, x], tiles), 5 * m * d)


def cumulative_plan(shape: Shape, dtype: str) -> Plan:
    """``MxN``"""
    m, n = shape
    x = tensor(DTYPES[dtype], m, n)
    return single(call(cumulative_sum, [x, x], {"bm": tile(m, 8), "bn": tile(n, 256)}), m * n)


def transpose_plan(shape: Shape, dtype: str) -> Plan:
    """``MxN``"""
    m, n = shape
    types = [tensor(DTYPES[dtype], m, n), tensor(DTYPES[dtype], n, m)]
    return single(call(transpose, types, {"bm": tile(m), "bn": tile(n)}), 0)


def elementwise_plan(shape: Shape, dtype: str) -> Plan:
    """The sum of two tensors of one to four axes."""
    x = tensor(DTYPES[dtype], *shape)
    whole = (False,) * len(shape)
    tiles = {"bn": tile(shape[-1], 256)}
    if len(shape) > 1:
        tiles["bm"] = tile(shape[-2], 8)
    function = elementwise.apply(elementwise.add, (whole, whole), len(shape))
    launch = call(elementwise.KERNELS[len(shape)], [x, x, x], tiles, {"function": function})
    return single(launch, int(np.prod(np.array(shape, dtype=object))))


def reduce_last_plan(shape: Shape, dtype: str) -> Plan:
    """``MxN`` to M sums."""
    m, n = shape
    types = [tensor(DTYPES[dtype], m, n), tensor(DTYPES[dtype], m)]
    tiles = {"bm": tile(m, 8), "bn": tile(n, 256)}
    return single(call(reduce_last, types, tiles, {"combiner": "sum"}), m * n)


def reduce_middle_plan(shape: Shape, dtype: str) -> Plan:
    """``OxNxI`` to (O, I) sums."""
    o, n, i = shape
    types = [tensor(DTYPES[dtype], o, n, i), tensor(DTYPES[dtype], o, i)]
    return single(call(reduce_middle, types, {"bi": tile(i, 256)}, {"combiner": "sum"}), o * n * i)


def lookup_plan(kernel: Any, shape: Shape, dtype: str) -> Plan:
    """``TxVxD``: T rows of a table."""
    t, v, d = shape
    limit_tokens(t)
    kind = DTYPES[dtype]
    rows = indices(np.random.default_rng(0).integers(0, v, t))
    tiles = {"bd": tile(d, 256)}
    if kernel is gather_rows:
        tiles["bt"] = tile(t, 16)
    low = -1 if kernel is gather_rows else 0
    types = [tensor(kind, v, d), None, tensor(kind, t, d)]
    launch = call(kernel, types, tiles, {}, {1: (rows, low, v - 1)})
    return single(launch, 0, 2 * bytes_of([types[2]]) + 4 * t)


def limit_tokens(count: int) -> None:
    """Refuse more tokens than an example of index values may have."""
    if count > MOST_INDICES:
        raise UsageError(
            f"{count} tokens",
            rule=f"an operator with index arguments has at most {MOST_INDICES} tokens",
            fix="give fewer tokens",
        )


def kv_write_plan(shape: Shape, dtype: str) -> Plan:
    """``TxHxD`` into a pool of twice as many slots."""
    t, h, d = shape
    limit_tokens(t)
    kind = DTYPES[dtype]
    slots = indices(np.random.default_rng(0).permutation(2 * t)[:t])
    types = [tensor(kind, 2 * t, h, d), tensor(kind, t, h, d), None]
    tiles = {"bt": 1, "bh": tile(h, 8), "bd": tile(d, 256)}
    lists = {2: (slots, -1, 2 * t - 1)}
    launch = call(kv_write, types, tiles, {}, lists, unique=(2,), updates=(0,))
    return single(launch, 0, 2 * bytes_of([types[1]]) + 4 * t)


def rope_plan(interleaved: bool, shape: Shape, dtype: str) -> Plan:
    """``TxHxD``, every element turned."""
    t, h, d = shape
    limit_tokens(t)
    even(d)
    x, table = tensor(DTYPES[dtype], t, h, d), tensor(float32, t, d // 2)
    types = [x, table, table, None, None, x]
    launch = call(
        rope,
        types,
        {"bt": 1, "bh": tile(h, 8)},
        {"half": power_of_two(d // 2), "rest": 0, "interleaved": interleaved},
        {3: (indices(np.arange(t)), 0, t - 1)},
    )
    return single(launch, 3 * t * h * d)


def rope_write_plan(shape: Shape, dtype: str) -> Plan:
    """``TxHxD``: rope, and the write to a pool of twice as many slots."""
    t, h, d = shape
    limit_tokens(t)
    even(d)
    kind, table = DTYPES[dtype], tensor(float32, t, d // 2)
    slots = indices(np.random.default_rng(0).permutation(2 * t)[:t])
    pool, x = tensor(kind, 2 * t, h, d), tensor(kind, t, h, d)
    launch = call(
        rope_kv_write,
        [pool, x, None, table, table, None, None],
        {"bt": 1, "bh": tile(h, 8)},
        {"half": power_of_two(d // 2), "rest": 0, "interleaved": False},
        {2: (slots, -1, 2 * t - 1), 5: (indices(np.arange(t)), 0, t - 1)},
        unique=(2,),
        updates=(0,),
    )
    return single(launch, 3 * t * h * d, 2 * bytes_of([x, table]) + 8 * t)


def even(size: int) -> None:
    """Refuse a head that has no two halves."""
    if size % 2:
        raise UsageError(
            f"rope of heads of {size}",
            rule="rope turns pairs of elements: D is even",
            fix=f"D of {size + 1}",
        )


def argmax_plan(shape: Shape, dtype: str) -> Plan:
    """``MxN``"""
    m, n = shape
    types = [tensor(DTYPES[dtype], m, n), tensor(int32, m)]
    return single(call(argmax, types, {"bm": tile(m, 8), "bn": tile(n, 256)}), m * n)


def top_k_plan(shape: Shape, dtype: str) -> Plan:
    """``MxNxK``: the K largest of each row."""
    m, n, k = shape
    types = [tensor(DTYPES[dtype], m, n), tensor(float32, m, k), tensor(int32, m, k)]
    return single(call(top_k, types, {"bm": tile(m, 8), "bn": tile(n, 256)}), m * n * k)


def route_plan(shape: Shape, dtype: str) -> Plan:
    """``TxExK``: T tokens, the K best of E experts."""
    t, e, k = shape
    if k > e:
        raise UsageError(
            f"{k} of {e} experts",
            rule="a token goes to at most all experts: K is at most E",
            fix=f"K of {e}",
        )
    types = [tensor(DTYPES[dtype], t, e), tensor(float32, t, k), tensor(int32, t, k)]
    consts = {"be": power_of_two(e), "bt": power_of_two(k)}
    return single(call(moe_route, types, {"bm": tile(t, 32)}, consts), (5 + k) * t * e)


def grouped_plan(shape: Shape, dtype: str) -> Plan:
    """``TxExKxN``: T rows over E experts, as chance has it."""
    t, e, k, n = shape
    limit_tokens(max(t, e))
    kind = DTYPES[dtype]
    counts = np.random.default_rng(0).multinomial(t, [1 / e] * e)
    stops = np.cumsum(counts)
    lists = {2: (indices(stops - counts), 0, t), 3: (indices(stops), 0, t)}
    x, y = tensor(kind, t, k), tensor(kind, t, n)
    tiles = {"bm": tile(-(-t // e)), "bn": tile(n), "bk": tile(k)}
    launch = call(grouped_matmul, [x, tensor(kind, e, k, n), None, None, None, y], tiles, {}, lists)
    used = tensor(kind, int(np.count_nonzero(counts)), k, n)
    return single(launch, 2 * t * k * n, bytes_of([x, used, y]) + 8 * e)


def conv_plan(shape: Shape, dtype: str) -> Plan:
    """``NxHxWxCxOxKHxKW``, as large as its input."""
    n, h, w, c, o, kh, kw = shape
    kind = DTYPES[dtype]
    for name, extent in (("KH", kh), ("KW", kw)):
        if extent % 2 == 0:
            raise UsageError(
                f"{name} of {extent}",
                rule="the result is as large as the input: KH and KW are odd",
                fix=f"{name} of {extent + 1}",
            )
    types = [
        tensor(kind, n, h, w, c),
        tensor(kind, o, kh, kw, c),
        tensor(kind, o),
        tensor(kind, n, h, w, o),
    ]
    tiles = {"bw": tile(w, 16), "bo": tile(o), "bc": tile(c)}
    launch = call(conv2d, types, tiles, {"bh": 1, "pad_h": kh // 2, "pad_w": kw // 2})
    return single(launch, 2 * n * h * w * c * o * kh * kw)


def dense_attention_plan(shape: Shape, dtype: str) -> Plan:
    """``HqxHkvxSqxSkvxD``, causal, of one sequence."""
    heads, kv_heads, queries, length, size = shape
    flops = sequences(shape).flops
    kind = DTYPES[dtype]
    q, k = tensor(kind, heads, queries, size), tensor(kind, kv_heads, length, size)
    launch = call(
        dense_attention,
        [q, k, k, q],
        {"bq": tile(queries), "bk": tile(length)},
        {
            "bd": power_of_two(size),
            "group": heads // kv_heads,
            "scale": size**-0.5,
            "apart": False,
        },
    )
    return single(launch, flops)


def paged_attention_plan(shape: Shape, dtype: str) -> Plan:
    """``HqxHkvxSqxSkvxD`` by the attention whose tiles hold one head's queries."""
    s, kind = sequences(shape), DTYPES[dtype]
    bq = tile(s.queries)
    work = indices(
        [
            (n, n * s.queries + first, min(bq, s.queries - first))
            for n in range(s.count)
            for first in range(0, s.queries, bq)
        ]
    )
    positions = indices(np.tile(np.arange(s.length - s.queries, s.length), s.count))
    lists = {
        3: (positions, 0, s.length - 1),
        4: (s.block_table(), 0, s.count * s.pages - 1),
        5: (indices([s.length] * s.count), 0, s.length),
        6: (indices(work[:, 0]), 0, s.count - 1),
        7: (indices(work[:, 1]), 0, s.tokens - 1),
        8: (indices(work[:, 2]), int(work[:, 2].min()), int(work[:, 2].max())),
    }
    pool = tensor(kind, s.slots, s.heads, s.size)
    q = tensor(kind, s.tokens, s.heads * s.group, s.size)
    y = tensor(kind, s.tokens, s.heads * s.group * s.size)
    launch = call(
        paged_attention,
        [q, pool, pool, *[None] * 7, y],
        {"piece": max(s.page, tile(s.length, 256))},
        {
            "bq": bq,
            "group": s.group,
            "bg": power_of_two(s.group),
            "bd": power_of_two(s.size),
            "page": s.page,
            "scale": s.size**-0.5,
        },
        lists,
    )
    return Plan((launch,), s.flops, s.bytes(dtype))


def scores_plan(shape: Shape, dtype: str) -> Plan:
    """``HxSqxSkvxD``"""
    h, queries, length, size = shape
    kind = DTYPES[dtype]
    types = [
        tensor(kind, h, queries, size),
        tensor(kind, h, length, size),
        tensor(kind, h, queries, length),
    ]
    tiles = {"bm": tile(queries), "bn": tile(length)}
    launch = call(attention_scores, types, tiles, {"bd": power_of_two(size), "scale": size**-0.5})
    return single(launch, 2 * h * queries * length * size)


_MATMUL = ("f32", "f16", "bf16", "fp8", "int8", "int4")
_STORED = ("f32", "f16", "bf16")
_HEADS = "HqxHkvxSqxSkvxD"

TABLE: dict[str, Row] = {
    "matmul": ("MxKxN", _MATMUL, matmul_plan),
    "matmul_kn": ("MxKxN", (*_MATMUL, "mxfp4"), gemm),
    "matmul_int4": ("MxKxN", _STORED, partial(packed_plan, False)),
    "matmul_mxfp4": ("MxKxN", _STORED, partial(packed_plan, True)),
    **{
        f"matmul_{f.name}": ("MxKxN", _STORED, partial(blocks_plan, f.name)) for f in STORED_FORMATS
    },
    "matmul_tiled": ("MxKxN", FLOATS, partial(nest_plan, matmul_tiled)),
    "matmul_hoisted": ("MxKxN", FLOATS, partial(nest_plan, matmul_hoisted)),
    "matmul_blocked": ("MxKxN", FLOATS, partial(nest_plan, matmul_blocked)),
    "batched_matmul": ("BxMxKxN", FLOATS, batched_plan),
    "gated_linear": ("MxKxN", FLOATS, gated_linear_plan),
    "gated_linear_kn": ("MxKxN", _MATMUL, gated_linear_kn_plan),
    "gated_ffn": ("MxDxF", FLOATS, gated_ffn_plan),
    "grouped_matmul": ("TxExKxN", FLOATS, grouped_plan),
    "moe_route": ("TxExK", FLOATS, route_plan),
    "rms_norm": ("MxD", FLOATS, partial(rows_plan, rms_norm)),
    "layer_norm": ("MxD", FLOATS, partial(rows_plan, layer_norm)),
    "softmax": ("MxD", FLOATS, partial(rows_plan, softmax)),
    "softmax_rows": ("MxD", FLOATS, partial(rows_plan, softmax_rows)),
    "cumulative_sum": ("MxN", FLOATS, cumulative_plan),
    "transpose": ("MxN", NUMBERS, transpose_plan),
    "elementwise_1d": ("N", FLOATS, elementwise_plan),
    "elementwise_2d": ("MxN", FLOATS, elementwise_plan),
    "elementwise_3d": ("BxMxN", FLOATS, elementwise_plan),
    "elementwise_4d": ("AxBxMxN", FLOATS, elementwise_plan),
    "reduce_last": ("MxN", FLOATS, reduce_last_plan),
    "reduce_middle": ("OxNxI", FLOATS, reduce_middle_plan),
    "embedding": ("TxVxD", FLOATS, partial(lookup_plan, embedding)),
    "gather_rows": ("TxVxD", NUMBERS, partial(lookup_plan, gather_rows)),
    "kv_write": ("TxHxD", FLOATS, kv_write_plan),
    "rope": ("TxHxD", FLOATS, partial(rope_plan, False)),
    "rope_interleaved": ("TxHxD", FLOATS, partial(rope_plan, True)),
    "rope_kv_write": ("TxHxD", FLOATS, rope_write_plan),
    "argmax": ("MxN", FLOATS, argmax_plan),
    "top_k": ("MxNxK", FLOATS, top_k_plan),
    "conv2d": ("NxHxWxCxOxKHxKW", FLOATS, conv_plan),
    "dense_attention": (_HEADS, FLOATS, dense_attention_plan),
    "grouped_attention": (_HEADS, FLOATS, attention),
    "paged_attention": (_HEADS, FLOATS, paged_attention_plan),
    "ragged_attention": (_HEADS, FLOATS, attention_measured),
    "attention_scores": ("HxSqxSkvxD", FLOATS, scores_plan),
}
