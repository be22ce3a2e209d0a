"""Attention over dense keys and values: flash style in one kernel, or with the scores in memory.

Tensors are (heads, positions, D).  The queries are the last of the keys' positions where the
attention is causal.  Dots take the element type of q and k as they are and add in float32; the
weights are rounded to v's type before they meet v.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.attention import LOWEST
from dure.library.convert import convert


@dure.kernel
def dense_attention(
    q: dl.Tensor,
    k: dl.Tensor,
    v: dl.Tensor,
    y: dl.Tensor,
    bq: dl.const,
    bk: dl.const,
    bd: dl.const,
    group: dl.const,
    scale: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
    apart: dl.const = True,
):
    """Attention of q (Hq, Sq, D) to k and v (Hkv, Skv, D) into y (Hq, Sq, D).

    Where it is ``causal``, query t sits at position ``Skv - Sq + t`` and sees itself and what is
    before it, the last ``window`` positions of that where ``window`` isn't 0; else it sees all.
    ``group`` query heads share a KV head.
    A tile of ``bq`` queries walks the keys that any of them sees in blocks of ``bk``, in ascending
    order, with an online softmax; ``bd`` covers D.  ``apart`` walks the blocks that all of them
    see whole in a loop of their own, without masks; the bits are the same.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    kv = h // group
    past = k.shape[1] - q.shape[1]
    query = dl.load(q, (h, i, 0), (1, bq, bd)).reshape((bq, bd))
    first, length = past + i * bq, k.shape[1]
    begin = max(first + 1 - window, 0) // bk if causal and window else 0
    end = dl.cdiv(min(first + bq, length) if causal else length, bk)
    sums = (dl.full((bq, 1), LOWEST, dl.float32), dl.zeros((bq, 1), dl.float32))
    sums = (*sums, dl.zeros((bq, bd), dl.float32))
    numbers = (bk, scale, window, softcap, causal)
    if apart:
        # Blocks of which every query sees every key.
        start, stop = begin, (min(first + 1, length) if causal else length) // bk
        if causal and window:
            start = max(begin, min(dl.cdiv(max(first + bq - window, 0), bk), end))
            for b in dl.range(begin, start):
                sums = _with_block(query, (k, v, kv, b), first, sums, numbers, True)
        stop = max(start, min(stop, end))
        for b in dl.range(start, stop):
            sums = _with_block(query, (k, v, kv, b), first, sums, numbers, False)
        begin = stop
    for b in dl.range(begin, end):
        sums = _with_block(query, (k, v, kv, b), first, sums, numbers, True)
    _, total, acc = sums
    result = acc / dl.where(total > 0.0, total, 1.0)
    dl.store(y, (h, i, 0), convert(result, y.dtype).reshape((1, bq, bd)))


def _with_block(query: Any, block: Any, first: Any, sums: Any, numbers: Any, masked: Any) -> Any:
    """The highest scores, the sums of weights and of weighted values, with those of a block of
    keys; not ``masked`` where all queries, the first of them at ``first``, see all of it.
    """
    k, v, kv, b = block
    bk, scale, _, softcap, _ = numbers
    highest, total, acc = sums
    bq, bd = query.shape
    keys = dl.load(k, (kv, b, 0), (1, bk, bd)).reshape((bk, bd))
    scores = dl.dot(query, keys.T) * scale
    if softcap:
        scores = dl.tanh(scores * (1.0 / softcap)) * softcap
    allowed = _seen(b * bk, first, (bq, bk), k.shape[1], numbers) if masked else None
    if allowed is not None:
        scores = dl.where(allowed, scores, LOWEST)
    top = dl.maximum(highest, dl.max(scores, 1, keepdims=True))
    weights = dl.exp(scores - top)
    if allowed is not None:
        weights = dl.where(allowed, weights, 0.0)
    correction = dl.exp(highest - top)
    total = total * correction + dl.sum(weights, 1, keepdims=True)
    values = dl.load(v, (kv, b, 0), (1, bk, bd)).reshape((bk, bd))
    acc = dl.dot(weights.to(v.dtype), values, acc * correction)
    return top, total, acc


def _seen(start: Any, first: Any, shape: Any, length: Any, numbers: Any) -> Any:
    """Which keys from ``start`` on each query sees."""
    _, _, window, _, causal = numbers
    key = (start + dl.arange(shape[1]))[None, :]
    allowed = key < length
    if causal:
        position = first + dl.arange(shape[0])[:, None]
        allowed = (key <= position) & allowed
        if window:
            allowed = allowed & (key > position - window)
    return allowed


@dure.kernel
def attention_scores(
    q: dl.Tensor,
    k: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bd: dl.const,
    scale: dl.const,
):
    """``y[h] = q[h] @ k[h].T * scale`` for q (H, Sq, D), k (H, Skv, D), y (H, Sq, Skv); ``bd``
    covers D.
    """
    h, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    query = dl.load(q, (h, i, 0), (1, bm, bd)).reshape((bm, bd))
    keys = dl.load(k, (h, j, 0), (1, bn, bd)).reshape((bn, bd))
    scores = dl.dot(query, keys.T) * scale
    dl.store(y, (h, i, j), convert(scores, y.dtype).reshape((1, bm, bn)))
