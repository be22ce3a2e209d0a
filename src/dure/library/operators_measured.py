"""The operators of public measurements: gemm, both feed-forward networks, both attentions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from dure.errors import UsageError
from dure.ir.dtypes import uint8
from dure.ir.types import TensorType
from dure.library import epilogue
from dure.library.activation import silu
from dure.library.attention_dense import attention_scores, dense_attention
from dure.library.attention_grouped import grouped_attention
from dure.library.attention_ragged import ragged_attention
from dure.library.call import IndexArray, KernelCall, indices, tensor
from dure.library.ffn import gated_linear_kn
from dure.library.matmul import batched_matmul, matmul_kn
from dure.library.matmul_packed import e2m1_value, e8m0_scale, gated_linear_packed, matmul_packed
from dure.library.norm import softmax, softmax_rows
from dure.library.operators_common import (
    ALL,
    DTYPES,
    FLOATS,
    Plan,
    Shape,
    accumulation,
    balanced,
    bytes_of,
    call,
    integer,
    power_of_two,
    result_of,
    tile,
)

#: KV heads of a sequence where the batch is multiplied into the heads.
SEQUENCE_HEADS = 8
#: Slots of a page, and the blocks of keys (in pages) and queries that the measured kernel takes
#: unless it is told otherwise (the defaults of its public source).
PAGE, BLOCK_PAGES, BLOCK_QUERIES = 16, 128, 32
#: Slots of a page of dure's own paged attention, keys of a block, and queries of a work item.
OWN_PAGE, OWN_PIECE, OWN_ROWS = 64, 256, 64
#: The longest row that softmax holds whole.
WHOLE_ROW = 8192
_MXFP4: dict[str, object] = {"value": e2m1_value, "scale": e8m0_scale}
#: The most queries and the most pages of an example of paged attention.
MOST_INDICES = 1 << 20

#: What an operator is: the names of its extents, its dtypes, and what plans its launches.
Row: TypeAlias = tuple[str, tuple[str, ...], Callable[[Shape, str], Plan]]


def matmul_call(
    shape: Shape,
    dtype: str,
    result: str,
    stages: tuple[epilogue.Epilogue, ...] = (),
    extra: Shape | None = None,
) -> KernelCall:
    """(M, K) @ (K, N), with one tensor of shape ``extra`` for the epilogue's stages."""
    m, k, n = shape
    kind, out = DTYPES[dtype], DTYPES[result]
    wide = DTYPES["f32"] if integer(dtype) else kind
    extras = [] if extra is None else [tensor(wide, *extra)]
    tiles = {"bm": tile(m), "bn": tile(n), "bk": tile(k)}
    if dtype == "mxfp4":
        packed = packed_weight(k, n)
        tiles["bk"] = tile(k // 2, 64)
        types = [tensor(kind, m, k), *packed, tensor(out, m, n), *extras]
        chain = epilogue.compose(stages)
        return call(matmul_packed, types, tiles, {**_MXFP4, "epilogue": chain})
    if integer(dtype):
        stages = (epilogue.scaled(1.0 / 64), *stages)
    types = [tensor(kind, m, k), tensor(kind, k, n), tensor(out, m, n), *extras]
    chain = epilogue.compose(stages)
    return call(matmul_kn, types, tiles, {**accumulation(dtype), "epilogue": chain})


def packed_weight(k: int, n: int) -> list[TensorType | None]:
    """The codes and scales of a weight (K, N) of four bits with e8m0 scales."""
    if k % 64:
        raise UsageError(
            f"a weight of {k} rows in mxfp4",
            rule="32 weights share a scale and rows are packed in halves: K is a multiple of 64",
            fix=f"K of {-(-k // 64) * 64}",
        )
    return [tensor(uint8, k // 2, n), tensor(uint8, k // 32, n)]


def gemm(shape: Shape, dtype: str) -> Plan:
    """``MxKxN``"""
    m, k, n = shape
    launch = matmul_call(shape, dtype, result_of(dtype))
    return Plan((launch,), 2 * m * k * n, bytes_of(launch.types))


def gemm_stage(stage: str, shape: Shape, dtype: str) -> Plan:
    """``MxKxN`` with a bias, an activation or a residual after it."""
    m, k, n = shape
    added = {"bias": (n,), "residual": (m, n)}.get(stage)
    last = {"bias": epilogue.bias, "residual": epilogue.residual}.get(stage)
    names = {"gelu": "gelu_erf"}
    chain = epilogue.activated(names.get(stage, stage)) if last is None else last(0)
    launch = matmul_call(shape, dtype, result_of(dtype), (chain,), added)
    return Plan((launch,), 2 * m * k * n, bytes_of(launch.types))


def ffn_gated(shape: Shape, dtype: str) -> Plan:
    """``MxDxF``: the gated half in one kernel, then down."""
    m, d, f = shape
    kind = DTYPES[dtype]
    tiles = {"bm": tile(m), "bn": tile(f), "bk": tile(d)}
    if dtype == "mxfp4":
        tiles["bk"] = tile(d // 2, 64)
        types = [tensor(kind, m, d), *packed_weight(d, 2 * f), tensor(kind, m, f)]
        first = call(gated_linear_packed, types, tiles, {**_MXFP4, "activation": silu})
    else:
        types = [tensor(kind, m, d), tensor(kind, d, 2 * f), tensor(kind, m, f)]
        consts = {**accumulation(dtype), **({"scale": 1.0 / 64} if integer(dtype) else {})}
        first = call(gated_linear_kn, types, tiles, {**consts, "activation": silu})
    second = matmul_call((m, f, d), dtype, result_of(dtype))
    moved = bytes_of(first.types[:-1]) + bytes_of(second.types[1:])
    return Plan((first, second), 6 * m * d * f, moved)


def ffn_gelu(shape: Shape, dtype: str) -> Plan:
    """``MxDxF``: two matmuls with bias, GELU after the first."""
    m, d, f = shape
    activation = epilogue.activated("gelu_erf")
    first = matmul_call((m, d, f), dtype, dtype, (epilogue.bias(0), activation), (f,))
    second = matmul_call((m, f, d), dtype, result_of(dtype), (epilogue.bias(0),), (d,))
    hidden = bytes_of([tensor(DTYPES[dtype], m, f)])
    moved = bytes_of(first.types) + bytes_of(second.types) - 2 * hidden
    return Plan((first, second), 4 * m * d * f, moved)


@dataclass(frozen=True)
class Sequences:
    """What ``HqxHkvxSqxSkvxD`` says about the sequences of a batch, all of one length."""

    count: int
    heads: int
    group: int
    queries: int
    length: int
    size: int
    page: int

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return -(-self.length // self.page)

    @property
    def tokens(self) -> int:
        """Queries of all sequences."""
        return self.count * self.queries

    @property
    def slots(self) -> int:
        """Slots of all pages."""
        return self.count * self.pages * self.page

    @property
    def flops(self) -> int:
        """Both products of every query with the keys that it sees."""
        seen = self.queries * self.length - self.queries * (self.queries - 1) // 2
        return 4 * self.count * self.heads * self.group * seen * self.size

    def bytes(self, dtype: str) -> int:
        """Queries, results, and the keys and values of the sequences."""
        vectors = self.heads * self.count * 2 * (self.group * self.queries + self.length)
        return vectors * self.size * DTYPES[dtype].bits // 8

    def block_table(self) -> IndexArray:
        """Pages in no order."""
        order = np.random.default_rng(0).permutation(self.count * self.pages)
        return indices(order.reshape(self.count, self.pages))


def sequences(shape: Shape, page: int = PAGE) -> Sequences:
    """The sequences of ``HqxHkvxSqxSkvxD`` in pages of ``page`` slots; extents that don't go
    together are a UsageError.
    """
    heads, kv_heads, queries, length, size = shape
    if heads % kv_heads:
        raise UsageError(
            f"{heads} query heads over {kv_heads} KV heads",
            rule="as many query heads share each KV head",
            fix=f"Hq of {-(-heads // kv_heads) * kv_heads}",
        )
    if queries > length:
        raise UsageError(
            f"{queries} queries over {length} positions",
            rule="the queries are the last of the positions: Sq is at most Skv",
            fix=f"Skv of {queries}",
        )
    own = SEQUENCE_HEADS if kv_heads % SEQUENCE_HEADS == 0 else kv_heads
    found = Sequences(kv_heads // own, own, heads // kv_heads, queries, length, size, page)
    if max(found.tokens, found.count * found.pages) > MOST_INDICES:
        raise UsageError(
            f"{found.count} sequences of {queries} queries and {found.pages} pages",
            rule=f"an operator has at most {MOST_INDICES} queries, and as many pages",
            fix="give fewer heads or shorter sequences",
        )
    return found


def attention(shape: Shape, dtype: str) -> Plan:
    """``HqxHkvxSqxSkvxD`` by dure's own paged attention."""
    s, kind = sequences(shape, OWN_PAGE), DTYPES[dtype]
    rows = tile(s.queries, OWN_ROWS)
    past = s.length - s.queries
    # An item's positions lie in one run of so many, and so in one piece of keys.
    cuts = [past, *range((past // rows + 1) * rows, s.length, rows), s.length]
    starts = [
        (n, n * s.queries + cuts[item] - past, cuts[item + 1] - cuts[item])
        for n in range(s.count)
        for item in balanced(list(range(len(cuts) - 1)))
    ]
    positions = indices(np.tile(np.arange(past, s.length), s.count))
    work = indices(starts)
    lists = {
        3: (positions, 0, s.length - 1),
        # Every page is there: nothing that a load leaves out has to be filled in.
        4: (s.block_table(), 0, s.count * s.pages - 1),
        5: (indices([s.length] * s.count), 0, s.length),
        6: (indices(work[:, 0]), 0, s.count - 1),
        7: (indices(work[:, 1]), 0, s.tokens - 1),
        8: (indices(work[:, 2]), int(work[:, 2].min()), int(work[:, 2].max())),
    }
    pool = tensor(kind, s.heads, s.slots, s.size)
    q = tensor(kind, s.tokens, s.heads, s.group, s.size)
    launch = call(
        grouped_attention,
        [q, pool, pool, *[None] * 7, q],
        {"bq": tile(rows, 16), "bh": 1, "piece": max(OWN_PAGE, tile(s.length, OWN_PIECE))},
        {
            "rows": rows,
            "bg": power_of_two(s.group),
            "bd": power_of_two(s.size),
            "page": OWN_PAGE,
            "scale": s.size**-0.5,
        },
        lists,
    )
    return Plan((launch,), s.flops, s.bytes(dtype))


def attention_measured(shape: Shape, dtype: str) -> Plan:
    """``HqxHkvxSqxSkvxD`` by the algorithm of the kernel that was measured."""
    s, kind = sequences(shape), DTYPES[dtype]
    pool = tensor(kind, s.heads, s.slots, s.size)
    q = tensor(kind, s.heads, s.tokens, s.group, s.size)
    bq = tile(s.tokens, BLOCK_QUERIES)
    blocks = np.arange(-(-s.tokens // bq))
    last = np.minimum((blocks + 1) * bq, s.tokens) - 1
    lists = {
        3: (indices([s.length] * s.count), 0, s.length),
        4: (s.block_table(), -1, s.count * s.pages - 1),
        5: (indices(np.arange(s.count + 1) * s.queries), 0, s.tokens),
        6: (indices(blocks * bq // s.queries), 0, s.count - 1),
        7: (indices(last // s.queries + 1), 0, s.count),
    }
    launch = call(
        ragged_attention,
        [q, pool, pool, *[None] * 5, q],
        {},
        {
            "bq": bq,
            "group": s.group,
            "bh": power_of_two(s.heads),
            "bd": power_of_two(s.size),
            "page": PAGE,
            "piece": PAGE * tile(s.pages, BLOCK_PAGES),
            "scale": s.size**-0.5,
        },
        lists,
    )
    return Plan((launch,), s.flops, s.bytes(dtype))


def encoder(shape: Shape, dtype: str) -> Plan:
    """``BHxSxD`` in one kernel."""
    h, s, d = shape
    kind = tensor(DTYPES[dtype], h, s, d)
    launch = call(
        dense_attention,
        [kind] * 4,
        {"bq": tile(s), "bk": tile(s)},
        {
            "bd": power_of_two(d),
            "group": 1,
            "scale": d**-0.5,
            "causal": False,
            "apart": False,
        },
    )
    return Plan((launch,), 4 * h * s * s * d, bytes_of(launch.types))


def encoder_measured(shape: Shape, dtype: str) -> Plan:
    """``BHxSxD`` with its scores in memory: scores, softmax, values."""
    h, s, d = shape
    kind = DTYPES[dtype]
    q, scores, rows = tensor(kind, h, s, d), tensor(kind, h, s, s), tensor(kind, h * s, s)
    tiles = {"bm": tile(s), "bn": tile(s)}
    first = call(attention_scores, [q, q, scores], tiles, {"bd": power_of_two(d), "scale": d**-0.5})
    if s <= WHOLE_ROW:
        second = call(softmax_rows, [rows, rows], {"bm": 8}, {"bd": power_of_two(s)})
    else:
        second = call(softmax, [rows, rows], {"bm": 1, "bd": 1024})
    tiles = {"bm": tile(s), "bn": tile(d), "bk": tile(s)}
    third = call(batched_matmul, [scores, q, q], tiles, {"transposed": False})
    return Plan((first, second, third), 4 * h * s * s * d, 4 * bytes_of([q]))


#: dure's own programs.
TABLE: dict[str, Row] = {
    "gemm": ("MxKxN", ALL, gemm),
    **{
        f"gemm_{stage}": ("MxKxN", ALL, partial(gemm_stage, stage))
        for stage in ("bias", "gelu", "silu", "residual")
    },
    "ffn_gated": ("MxDxF", ALL, ffn_gated),
    "ffn_gelu": ("MxDxF", ALL, ffn_gelu),
    "attn": ("HqxHkvxSqxSkvxD", FLOATS, attention),
    "attn_enc": ("BHxSxD", FLOATS, encoder),
}
#: The algorithms that ran where they were measured, where they are known and other than those.
MEASURED: dict[str, Row] = {
    "attn": ("HqxHkvxSqxSkvxD", FLOATS, attention_measured),
    "attn_enc": ("BHxSxD", FLOATS, encoder_measured),
}
