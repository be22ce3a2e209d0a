"""The attentions of public TPU measurements, in the blocks in which they ran.

Causal attention takes a block of queries of one sequence through blocks of its pages, all KV heads
in one instruction where they fit.  Attention of an encoder has its scores in float32, in the
scratchpad where they fit and else in the far memory.
"""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.attention import LOWEST
from dure.library.convert import convert
from dure.library.indices import Places


@dure.kernel
def causal_attention_blocks(
    q: dl.Tensor,
    k_pool: dl.Tensor,
    v_pool: dl.Tensor,
    block_table: Places,
    y: dl.Tensor,
    bq: dl.const,
    group: dl.const,
    bh: dl.const,
    bd: dl.const,
    page: dl.const,
    piece: dl.const,
    length: dl.const,
    scale: dl.const,
):
    """Causal attention of q (S, Hkv, Sq, ``group``, D) to cached keys and values, into y of q's
    shape.

    The pools are (Hkv, slots, D) with ``page`` slots a page; ``block_table`` (S, pages) holds the
    pages of each sequence, all ``length`` positions long, of which the queries are the last.
    Keys come in blocks of ``piece``, up to the last that a query of the block of ``bq`` may see;
    ``bh`` KV heads are one instance's; ``bd`` covers D.
    """
    s, h, i = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    rows = bq * group
    query = dl.load(q, (s, h, i, 0, 0), (1, bh, bq, group, bd)).reshape((bh, rows, bd))
    past = length - q.shape[2] + i * bq
    position = past + dl.arange(rows)[:, None] // group
    highest = dl.full((bh, rows, 1), LOWEST, dl.float32)
    total = dl.zeros((bh, rows, 1), dl.float32)
    acc = dl.zeros((bh, rows, bd), dl.float32)
    for p in dl.range(dl.cdiv(min(past + bq, length), piece)):
        pages = dl.load(block_table, (s, p), (1, piece // page), fill=0)
        pages = pages.reshape((piece // page,))
        keys = dl.load(k_pool, (h, pages, 0), (bh, piece, bd))
        scores = dl.dot(query, dl.transpose(keys, (0, 2, 1))) * scale
        allowed = p * piece + dl.arange(piece)[None, :] <= position
        scores = dl.where(allowed[None, :, :], scores, LOWEST)
        top = dl.maximum(highest, dl.max(scores, 2, keepdims=True))
        weights = dl.exp(scores - top)
        correction = dl.exp(highest - top)
        total = total * correction + dl.sum(weights, 2, keepdims=True)
        values = dl.load(v_pool, (h, pages, 0), (bh, piece, bd))
        acc = dl.dot(weights.to(v_pool.dtype), values, acc * correction)
        highest = top
    result = convert(acc / total, y.dtype).reshape((1, bh, bq, group, bd))
    dl.store(y, (s, h, i, 0, 0), result)


@dure.kernel
def encoder_scores(
    q: dl.Tensor,
    k: dl.Tensor,
    y: dl.Tensor,
    bh: dl.const,
    bq: dl.const,
    bs: dl.const,
    bd: dl.const,
    scale: dl.const,
):
    """``y = q @ k.T * scale`` a head, for q and k (H, S, D), y (H, S, S); ``bs`` is S, ``bd`` D."""
    h, i = dl.program_id(0), dl.program_id(1)
    query = dl.load(q, (h, i, 0), (bh, bq, bd))
    keys = dl.load(k, (h, 0, 0), (bh, bs, bd))
    scores = dl.dot(query, dl.transpose(keys, (0, 2, 1))) * scale
    dl.store(y, (h, i, 0), convert(scores, y.dtype))


@dure.kernel
def encoder_values(
    scores: dl.Tensor,
    v: dl.Tensor,
    y: dl.Tensor,
    bh: dl.const,
    bq: dl.const,
    bs: dl.const,
    bd: dl.const,
):
    """``y = softmax(scores) @ v`` a head, for scores (H, S, S), v and y (H, S, D)."""
    h, i = dl.program_id(0), dl.program_id(1)
    part = dl.load(scores, (h, i, 0), (bh, bq, bs)).to(dl.float32)
    weights = dl.exp(part - dl.max(part, 2, keepdims=True))
    total = dl.sum(weights, 2, keepdims=True)
    result = dl.dot(weights.to(v.dtype), dl.load(v, (h, 0, 0), (bh, bs, bd))) / total
    dl.store(y, (h, i, 0), convert(result, y.dtype))


@dure.kernel
def encoder_attention(
    q: dl.Tensor,
    k: dl.Tensor,
    v: dl.Tensor,
    y: dl.Tensor,
    bh: dl.const,
    bq: dl.const,
    bs: dl.const,
    bd: dl.const,
    scale: dl.const,
):
    """Attention without a mask of whole heads (H, S, D), whose scores stay in the scratchpad."""
    h, i = dl.program_id(0), dl.program_id(1)
    query = dl.load(q, (h, i, 0), (bh, bq, bd))
    keys = dl.load(k, (h, 0, 0), (bh, bs, bd))
    scores = dl.dot(query, dl.transpose(keys, (0, 2, 1))) * scale
    weights = dl.exp(scores - dl.max(scores, 2, keepdims=True))
    total = dl.sum(weights, 2, keepdims=True)
    result = dl.dot(weights.to(v.dtype), dl.load(v, (h, 0, 0), (bh, bs, bd))) / total
    dl.store(y, (h, i, 0), convert(result, y.dtype))
