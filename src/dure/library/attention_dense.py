"""Attention over dense keys and values: flash style in one kernel, or with the scores in memory.

Tensors are (heads, positions, D).  The queries are the last of the keys' positions where the
attention is causal.  Dots take the element type of q and k as they are and add in float32; the
weights are rounded to v's type before they meet v.
"""

from __future__ import annotations

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
):
    """Attention of q (Hq, Sq, D) to k and v (Hkv, Skv, D) into y (Hq, Sq, D).

    Where it is ``causal``, query t sits at position ``Skv - Sq + t`` and sees itself and what is
    before it, the last ``window`` positions of that where ``window`` isn't 0; else it sees all.
    ``group`` query heads share a KV head.
    A tile of ``bq`` queries walks the keys that any of them sees in blocks of ``bk``, in ascending
    order, with an online softmax; ``bd`` covers D.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    kv = h // group
    past = k.shape[1] - q.shape[1]
    query = dl.load(q, (h, i, 0), (1, bq, bd)).reshape((bq, bd))
    position = (past + i * bq + dl.arange(bq))[:, None]
    begin = max(past + i * bq + 1 - window, 0) // bk if causal and window else 0
    seen = min(past + (i + 1) * bq, k.shape[1]) if causal else k.shape[1]
    end = dl.cdiv(seen, bk)
    highest = dl.full((bq, 1), LOWEST, dl.float32)
    total = dl.zeros((bq, 1), dl.float32)
    acc = dl.zeros((bq, bd), dl.float32)
    for b in dl.range(begin, end):
        key = (b * bk + dl.arange(bk))[None, :]
        keys = dl.load(k, (kv, b, 0), (1, bk, bd)).reshape((bk, bd))
        scores = dl.dot(query, keys.T) * scale
        if softcap:
            scores = dl.tanh(scores * (1.0 / softcap)) * softcap
        allowed = key < k.shape[1]
        if causal:
            allowed = (key <= position) & allowed
            if window:
                allowed = allowed & (key > position - window)
        scores = dl.where(allowed, scores, LOWEST)
        top = dl.maximum(highest, dl.max(scores, 1, keepdims=True))
        weights = dl.where(allowed, dl.exp(scores - top), 0.0)
        correction = dl.exp(highest - top)
        total = total * correction + dl.sum(weights, 1, keepdims=True)
        values = dl.load(v, (kv, b, 0), (1, bk, bd)).reshape((bk, bd))
        acc = dl.dot(weights.to(v.dtype), values, acc * correction)
        highest = top
    result = acc / dl.where(total > 0.0, total, 1.0)
    dl.store(y, (h, i, 0), convert(result, y.dtype).reshape((1, bq, bd)))


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
