"""Attention of few tokens over a paged KV cache, whose keys many cores share.

A token's keys are cut into runs of pieces, each an instance of its own (:func:`split_attention`);
a second kernel puts the runs' sums together (:func:`join_attention`).  Where the runs begin
follows from the token's position alone, so that its result doesn't depend on the batch.
"""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.attention import LOWEST
from dure.library.attention_grouped import multiplied, with_pieces
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places


@dure.kernel
def split_attention(
    q: dl.Tensor,
    k_pool: dl.Tensor,
    v_pool: dl.Tensor,
    k_scales: dl.Tensor | None,
    v_scales: dl.Tensor | None,
    positions: Places,
    block_table: OptionalPlaces,
    context: Places,
    work_sequence: Places,
    work_start: Places,
    highest: dl.Tensor,
    total: dl.Tensor,
    weighted: dl.Tensor,
    bh: dl.const,
    bg: dl.const,
    bd: dl.const,
    page: dl.const,
    piece: dl.const,
    splits: dl.const,
    scale: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
    ahead: dl.const = 0,
):
    """What :func:`~dure.library.attention_grouped.grouped_attention` computes of each of ``splits``
    runs of keys, for work items of one token: the highest score and the sum of weights below it
    (T, KV heads, splits, group, 1), and the weighted values (T, KV heads, splits, group, D), all
    in float32.  A run without keys has a sum of 0.  ``ahead`` is what it is there.
    """
    item, heads, part = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    sequence, start = work_sequence[item], work_start[item]
    cache = ((k_pool, v_pool, k_scales, v_scales), block_table, sequence, heads, context[sequence])
    numbers = (1, bh, bg, bd, page, piece, window, softcap, causal, True)
    tile = dl.load(q[start : start + 1], (0, heads, 0, 0), (1, bh, bg, bd))
    tile = convert(tile.to(dl.float32) * scale, multiplied(q.dtype, k_pool.dtype))
    query = tile.reshape((bh, bg, bd))
    first = positions[start]
    begin = max(first + 1 - window, 0) // piece if window else 0
    last = first // piece if causal else max(dl.cdiv(cache[4], piece), 1) - 1
    each = dl.cdiv(last + 1 - begin, splits)
    low = begin + part * each
    top, below = dl.full((bh, bg, 1), LOWEST, dl.float32), dl.zeros((bh, bg, 1), dl.float32)
    acc = dl.zeros((bh, bg, bd), dl.float32)
    span, sums = (low, min(low + each, last + 1), first), (top, below, acc)
    if ahead:
        if low <= last:
            top, below, acc = with_pieces(query, span, sums, cache, numbers, ahead)
    else:
        top, below, acc = with_pieces(query, span, sums, cache, numbers, ahead)
    place = (0, heads, part, 0, 0)
    dl.store(highest[start : start + 1], place, top.reshape((1, bh, 1, bg, 1)))
    dl.store(total[start : start + 1], place, below.reshape((1, bh, 1, bg, 1)))
    dl.store(weighted[start : start + 1], place, acc.reshape((1, bh, 1, bg, bd)))


@dure.kernel
def join_attention(
    highest: dl.Tensor,
    total: dl.Tensor,
    weighted: dl.Tensor,
    sinks: dl.Tensor | None,
    y: dl.Tensor,
    bh: dl.const,
    bs: dl.const,
    bg: dl.const,
    bd: dl.const,
    splits: dl.const,
):
    """The results y (T, KV heads, group, D) from what :func:`split_attention` gives, ``bs`` of the
    ``splits`` runs at a time; ``sinks`` (KV heads, ``group``, 1), which may be None, are one more
    logit a head, which has no value.
    """
    dl.static_assert(splits % bs == 0, "runs are taken so many at a time")
    token, heads = dl.program_id(0), dl.program_id(1)
    at, every = (token, heads), dl.load(highest, (token, heads, 0, 0, 0), (1, bh, splits, bg, 1))
    top = dl.max(every.reshape((bh, splits, bg, 1)), 1, keepdims=True)
    sink = None if sinks is None else dl.load(sinks, (heads, 0, 0), (bh, bg, 1))
    if sink is not None:
        sink = sink.to(dl.float32).reshape((bh, 1, bg, 1))
        top = dl.maximum(top, sink)
    acc = dl.zeros((bh, 1, bg, bd), dl.float32)
    below = dl.zeros((bh, 1, bg, 1), dl.float32)
    for run in dl.range(splits // bs):
        tops = every if bs == splits else dl.load(highest, (*at, run, 0, 0), (1, bh, bs, bg, 1))
        factors = dl.exp(tops.reshape((bh, bs, bg, 1)) - top)
        sums = dl.load(total, (*at, run, 0, 0), (1, bh, bs, bg, 1)).reshape((bh, bs, bg, 1))
        values = dl.load(weighted, (*at, run, 0, 0), (1, bh, bs, bg, bd))
        below = below + dl.sum(sums * factors, 1, keepdims=True)
        acc = acc + dl.sum(values.reshape((bh, bs, bg, bd)) * factors, 1, keepdims=True)
    if sink is not None:
        below = below + dl.exp(sink - top)
    result = acc / dl.where(below > 0.0, below, 1.0)
    dl.store(y, (token, heads, 0, 0), convert(result.reshape((1, bh, bg, bd)), y.dtype))
