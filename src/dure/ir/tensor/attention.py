"""Rotary embedding, writing to a paged KV cache, and attention over it for a ragged batch.

A step's rows are the tokens of all its sequences, one after another.  ``positions[t]`` is row t's
place in its sequence and ``slots[t]`` where its key and value go in the pools, whose logical shape
is (slots, kv_heads, head_dim) with slot = page * page_size + place in the page.  Attention's work
is a flat list made by the host: item w covers rows ``work_start[w] .. + work_rows[w]`` of sequence
``work_sequence[w]``, whose pages are ``block_table[s]`` (-1 where absent) and which has
``context[s]`` tokens in the cache once this step's are written.

Rope can be preceded by an RMS norm of each head (``norm`` and its weight).

An encoder's attention is not ``causal``: a row sees all of its sequence.  With ``sinks`` each head
has one more logit, which takes its share of the softmax and has no value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir.core import Cost, Op, OpDef, Region, declare
from dure.ir.dtypes import Array
from dure.ir.expr import const
from dure.ir.rules import broken
from dure.ir.tensor.checks import (
    Doubles,
    Indices,
    Operand,
    count,
    doubles,
    elements,
    equal,
    extent,
    finish,
    floating,
    index,
    rank,
    static,
    stored,
    stored_bytes,
    take,
    traffic,
)
from dure.ir.tensor.norms import rms_normalize
from dure.ir.types import TensorType, Type

ROPE_ORDERS = ("llama", "neox")


def _check_rotation(x: TensorType, rest: Sequence[TensorType], attrs: Mapping[str, Any]) -> None:
    """``rest`` is cos, sin, positions and, with ``norm``, the norm's weight."""
    if attrs["order"] not in ROPE_ORDERS:
        raise broken(f"rope order '{attrs['order']}'", f"an order is one of {ROPE_ORDERS}")
    cos, sin = (rank(floating(t, "a rope table"), 2, "a rope table") for t in rest[:2])
    if cos.shape != sin.shape:
        raise broken(f"rope tables of {cos} and {sin}", "both tables have one shape")
    half = static(cos.shape[1], "the width of a rope table")
    if 2 * half > static(x.shape[2], "the size of a head"):
        raise broken(f"rope tables of {2 * half} for heads of {x.shape[2]}", "tables fit the head")
    index(rest[2], "the positions of rope")
    equal(rest[2].shape[0], x.shape[0], "the number of positions")
    if attrs["norm"]:
        equal(rank(rest[3], 1, "a head's norm").shape[0], x.shape[2], "the extent of a head's norm")


def rotate(x: Operand, rest: Sequence[Operand], attrs: Mapping[str, Any]) -> Doubles:
    """Rope of ``x`` (T, H, D), after the head's norm if there is one."""
    values = doubles(x)
    if attrs["norm"]:
        values = rms_normalize(values, doubles(rest[3]), attrs["eps"])
    cos, sin = (take(doubles(t), rest[2])[:, None, :] for t in rest[:2])
    half = cos.shape[-1]
    if attrs["order"] == "neox":
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    result = values.copy()
    a, b = values[..., first], values[..., second]
    result[..., first] = a * cos - b * sin
    result[..., second] = b * cos + a * sin
    return result


def _rope_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, *rest = count(operands, 4 + bool(attrs["norm"]), "rope")
    rank(floating(x, "the operand of rope"), 3, "the operand of rope")
    _check_rotation(x, rest, attrs)
    return [stored(x.shape, "")]


def _rope(attrs: Mapping[str, Any], x: Operand, *rest: Operand) -> Operand:
    return finish(rotate(x, rest, attrs), attrs)


def _row_cost(op: Op) -> Cost:
    """A row of the tables for each token."""
    x, cos = op.operands[0].tensor, op.operands[1].tensor
    rows = extent(cos.shape[0])
    unused = max(0, rows - extent(x.shape[0])) * stored_bytes(cos) // max(1, rows)
    return Cost(6 * elements(x), traffic(op) - 2 * unused)


declare(
    OpDef(
        "rope",
        "tensor",
        _rope_typing,
        _rope,
        _row_cost,
        defaults={"order": "neox", "norm": False, "eps": 1e-6},
        exact=False,
        error_bound=4.0,
        doc="rope(x (T, H, D), cos (P, R/2), sin, positions (T), [norm (D)]) {order, norm, eps}",
    )
)


def _kv_write_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    optional = 3 + bool(attrs["norm"]) if attrs["order"] else 0
    if attrs["norm"] and not attrs["order"]:
        raise broken("kv_write with a norm and no rope", "a head's norm comes with rope")
    pool, x, slots, *rest = count(operands, 3 + optional, "kv_write")
    rank(floating(pool, "the pool of kv_write"), 3, "the pool of kv_write")
    rank(floating(x, "what kv_write writes"), 3, "what kv_write writes")
    for axis in (1, 2):
        equal(x.shape[axis], pool.shape[axis], f"extent {axis} of what kv_write writes")
    index(slots, "the slots of kv_write")
    equal(slots.shape[0], x.shape[0], "the number of slots")
    if rest:
        _check_rotation(x, rest, attrs)
    return [pool]


def _kv_write(
    attrs: Mapping[str, Any], pool: Array, x: Operand, slots: Indices, *rest: Operand
) -> Array:
    values = rotate(x, rest, attrs) if rest else doubles(x)
    result = pool.copy()
    kept = slots >= 0
    result[slots[kept]] = values[kept].astype(np.float32).astype(pool.dtype)
    return result


def _kv_write_cost(op: Op) -> Cost:
    x = op.operands[1].tensor
    written = int(elements(x) * op.operands[0].tensor.dtype.bits) // 8
    return Cost((6 if op.attr("order") else 1) * elements(x), stored_bytes(x) + written)


declare(
    OpDef(
        "kv_write",
        "tensor",
        _kv_write_typing,
        _kv_write,
        _kv_write_cost,
        defaults={"order": "", "norm": False, "eps": 1e-6},
        exact=False,
        error_bound=4.0,
        doc="kv_write(pool, x (T, H, D), slots (T), [cos, sin, positions, [norm]])"
        " {order, norm, eps}: the pool with rows written, in place; rope first where order is"
        " given; slot -1 is skipped",
    )
)


def _attention_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    operands = count(operands, 9 + bool(attrs["sinks"]), "attention")
    q, k, v, positions, table, *lists = operands[:9]
    for what, operand in (("the query", q), ("the key pool", k), ("the value pool", v)):
        rank(floating(operand, f"{what} of attention"), 3, f"{what} of attention")
    equal(k.shape[2], q.shape[2], "the size of a key's head")
    equal(v.shape[0], k.shape[0], "the slots of the value pool")
    equal(v.shape[1], k.shape[1], "the heads of the value pool")
    heads = static(q.shape[1], "the number of query heads")
    groups = static(k.shape[1], "the number of key heads")
    if groups == 0 or heads % groups:
        raise broken(
            f"{heads} query heads over {groups} key heads", "query heads divide among key heads"
        )
    equal(index(positions, "the positions of attention").shape[0], q.shape[0], "the positions")
    index(table, "the block table of attention", 2)
    names = ("context", "work_sequence", "work_start", "work_rows")
    for name, value in zip(names, lists, strict=True):
        index(value, f"{name} of attention")
    equal(lists[0].shape[0], table.shape[0], "the number of contexts")
    for name, value in zip(names[2:], lists[2:], strict=True):
        equal(value.shape[0], lists[1].shape[0], f"the length of {name}")
    for sinks in operands[9:]:
        rank(floating(sinks, "the sinks of attention"), 1, "the sinks of attention")
        equal(sinks.shape[0], q.shape[1], "the number of sinks")
    if attrs["window"] and not attrs["causal"]:
        raise broken("a window without causal", "a window reaches back from a row's position")
    if attrs["page_size"] < 1 or attrs["query_rows"] < 1:
        raise broken("page_size and query_rows of attention", "both are at least 1")
    width = heads * static(v.shape[2], "the size of a value's head")
    return [stored((q.shape[0], const(width)), attrs["quantize"])]


def _attention(
    attrs: Mapping[str, Any],
    q: Operand,
    k: Array,
    v: Array,
    positions: Indices,
    table: Indices,
    context: Indices,
    *rest: Operand,
) -> Operand:
    queries = doubles(q)
    work, sinks = rest[:3], doubles(rest[3]) if attrs["sinks"] else None
    tokens, heads, _ = queries.shape
    group = heads // k.shape[1]
    result = np.zeros((tokens, heads, v.shape[2]))
    page: int = attrs["page_size"]
    for sequence, start, rows in zip(*(np.asarray(w).tolist() for w in work), strict=True):
        length = int(context[sequence])
        pages = table[sequence, : -(-length // page)]
        slots = (pages[:, None] * page + np.arange(page)).reshape(-1)[:length].astype(np.int32)
        keys = np.repeat(take(doubles(k), slots), group, axis=1)
        values = np.repeat(take(doubles(v), slots), group, axis=1)
        for row in range(start, start + rows):
            last = int(positions[row]) if attrs["causal"] else length - 1
            result[row] = _attend(attrs, queries[row], keys, values, last, sinks)
    return finish(result.reshape(tokens, -1), attrs)


def _attend(
    attrs: Mapping[str, Any],
    query: Doubles,
    keys: Doubles,
    values: Doubles,
    position: int,
    sinks: Doubles | None,
) -> Doubles:
    """One row: ``query`` (H, D) over ``keys`` (L, H, D) and ``values`` (L, H, Dv), to ``position``.

    ``sinks`` (H,) take part in the softmax.
    """
    first = max(0, position - attrs["window"] + 1) if attrs["window"] else 0
    keys, values = keys[first : position + 1], values[first : position + 1]
    scores = np.einsum("hd,lhd->hl", query, keys) * np.float64(np.float32(attrs["scale"]))
    if attrs["softcap"]:
        scores = attrs["softcap"] * np.tanh(scores / attrs["softcap"])
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None])
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None] - top)
    weights /= total
    result: Doubles = np.einsum("hl,lhd->hd", weights, values)
    return result


def _attention_cost(op: Op) -> Cost:
    """Every query with every key of its sequence; of the pools the pages that the table names."""
    q, k_pool, v_pool, _, table = (operand.tensor for operand in op.operands[:5])
    length = extent(table.shape[1]) * op.attr("page_size")
    seen = min(extent(k_pool.shape[0]), extent(table.shape[0]) * length)
    unseen = extent(k_pool.shape[0]) - seen
    rows = sum(stored_bytes(pool) for pool in (k_pool, v_pool)) // max(1, extent(k_pool.shape[0]))
    return Cost(4 * elements(q) * length, traffic(op) - unseen * rows)


declare(
    OpDef(
        "attention",
        "tensor",
        _attention_typing,
        _attention,
        _attention_cost,
        defaults={
            "window": 0,
            "softcap": 0.0,
            "query_rows": 16,
            "quantize": "",
            "causal": True,
            "sinks": False,
        },
        exact=False,
        error_bound=8.0,
        doc="attention(q (T, H, D), k_pool, v_pool (slots, KH, D), positions (T),"
        " block_table (S, P), context (S), work_sequence, work_start, work_rows (W), [sinks (H)])"
        " {scale, window, softcap, page_size, query_rows, quantize, causal, sinks}: (T, H * D);"
        " window of 0 sees everything, else the last `window` positions, itself included",
    )
)
