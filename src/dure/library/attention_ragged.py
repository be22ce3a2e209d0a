"""The algorithm of Pallas' ``ragged_paged_attention``, the kernel of public TPU measurements.

What sets it apart from :mod:`dure.library.attention`, step for step as in its public source (JAX,
``pallas/ops/tpu/ragged_paged_attention``): a block of queries may span several sequences, and is
multiplied whole by the keys of each; all keys of a sequence are walked, also those that no query
of the block may see; keys and values are masked before use; the result is normalised after every
block of keys.  The heads come first in every tensor here, where that kernel reads them strided
from its scratchpad.
"""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import NEGATIVE_INFINITY, convert
from dure.library.indices import OptionalPlaces, Places

#: What is added to a score that its query may not see.
MASKED = -2.3819763e38


@dure.kernel
def ragged_attention(
    q: dl.Tensor,
    k_pool: dl.Tensor,
    v_pool: dl.Tensor,
    context: Places,
    block_table: OptionalPlaces,
    q_starts: Places,
    first_sequence: Places,
    end_sequence: Places,
    y: dl.Tensor,
    bq: dl.const,
    group: dl.const,
    bh: dl.const,
    bd: dl.const,
    page: dl.const,
    piece: dl.const,
    scale: dl.const,
):
    """Causal attention of q (Hkv, T, ``group``, D) to cached keys and values, into y of its shape.

    The pools are (Hkv, slots, D) with ``page`` slots a page; ``block_table`` (S, pages) holds each
    sequence's pages and ``context`` (S,) its length with this step's tokens, which are rows
    ``q_starts[s] .. q_starts[s + 1]`` of q.  Tokens of block i, ``bq`` of them, belong to the
    sequences ``first_sequence[i] .. end_sequence[i]``.  Keys come in blocks of ``piece``; ``bh`` KV
    heads are one instance's; ``bd`` covers D.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    rows = bq * group
    query = dl.load(q, (h, i, 0, 0), (bh, bq, group, bd)).reshape((bh, rows, bd))
    token = i * bq + dl.arange(rows)[:, None] // group
    result = dl.zeros((bh, rows, bd), dl.float32)
    for s in dl.range(first_sequence[i], end_sequence[i]):
        start, stop, length = q_starts[s], q_starts[s + 1], context[s]
        position = token + (length - (stop - start) - start)
        highest = dl.full((bh, rows, 1), NEGATIVE_INFINITY, dl.float32)
        total = dl.zeros((bh, rows, 1), dl.float32)
        acc = dl.zeros((bh, rows, bd), dl.float32)
        for p in dl.range(dl.cdiv(length, piece)):
            pages = dl.load(block_table, (s, p), (1, piece // page), fill=0)
            pages = pages.reshape((piece // page,))
            key = p * piece + dl.arange(piece)
            present = (key < length)[None, :, None]
            keys = dl.load(k_pool, (h, pages, 0), (bh, piece, bd))
            keys = dl.where(present, keys.to(dl.float32), 0.0).to(k_pool.dtype)
            values = dl.load(v_pool, (h, pages, 0), (bh, piece, bd))
            values = dl.where(present, values.to(dl.float32), 0.0).to(v_pool.dtype)
            scores = dl.dot(query, dl.transpose(keys, (0, 2, 1))) * scale
            scores = scores + dl.where(position < key[None, :], MASKED, 0.0)[None, :, :]
            top = dl.max(scores, 2, keepdims=True)
            weights = dl.exp(scores - top)
            part = dl.dot(weights.to(v_pool.dtype), values)
            above = dl.maximum(highest, top)
            kept = dl.exp(highest - above) * total
            share = dl.exp(top - above)
            total = kept + share * dl.sum(weights, 2, keepdims=True)
            acc = (kept * acc + share * part) / total
            highest = above
        own = ((token >= start) & (token < stop))[None, :, :]
        result = dl.where(own, acc, result)
    result = convert(result, y.dtype).reshape((bh, bq, group, bd))
    dl.store(y, (h, i, 0, 0), result)
