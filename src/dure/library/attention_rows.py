"""Grouped attention for engines that work on elements as they pass.

It computes what :func:`~dure.library.attention_grouped.grouped_attention` does, by the same pieces
in the same order.  Scores are lowered by their maximum, raised to a power, added up and narrowed
one after another, which is one pass of an engine that can; only what is narrow waits for the
values' product, which comes after the next piece's scores: so a piece's maxima and the transposed
weights of the one in front of it are at work at the same time.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.attention import LOWEST
from dure.library.attention_grouped import listed, multiplied, swapped, visible
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places, RowCounts


@dure.kernel
def attention_rows(
    q: dl.Tensor,
    k_pool: dl.Tensor,
    v_pool: dl.Tensor,
    positions: Places,
    block_table: OptionalPlaces,
    context: Places,
    work_sequence: Places,
    work_start: Places,
    work_rows: RowCounts,
    sinks: dl.Tensor | None,
    y: dl.Tensor,
    bq: dl.const,
    bh: dl.const,
    rows: dl.const,
    bg: dl.const,
    bd: dl.const,
    page: dl.const,
    piece: dl.const,
    scale: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
):
    """:func:`~dure.library.attention_grouped.grouped_attention` to pools (KV heads, slots, D).

    Work items are as long as ``bq``, or longer.
    """
    dl.static_assert(not causal or piece % rows == 0, "an item's positions lie in one piece")
    item, heads = dl.program_id(0), dl.program_id(1)
    sequence, start, count = work_sequence[item], work_start[item], work_rows[item]
    stop = start + count
    own_positions, own_q, own_y = positions[start:stop], q[start:stop], y[start:stop]
    numbers = (bq, bh, bg, bd, page, piece, window, softcap, causal)
    sink = None if sinks is None else dl.load(sinks, (heads, 0, 0), (bh, bg, 1)).to(dl.float32)
    for block in dl.range(dl.cdiv(count, bq)):
        first = own_positions[block * bq]
        tile = dl.load(own_q, (block, heads, 0, 0), (bq, bh, bg, bd))
        tile = convert(tile.to(dl.float32) * scale, multiplied(q.dtype, k_pool.dtype))
        query = swapped(tile).reshape((bh, bq * bg, bd))
        place = (k_pool, v_pool, block_table, sequence, heads, context[sequence])
        result = convert(attended(query, first, sink, place, numbers), y.dtype)
        dl.store(own_y, (block, heads, 0, 0), swapped(result.reshape((bh, bq, bg, bd))))


def attended(query: Any, first: Any, sink: Any, place: Any, numbers: Any) -> Any:
    """The result (bh, rows, D) of a tile of queries, the first at position ``first``."""
    k_pool, v_pool, block_table, sequence, heads, length = place
    bq, bh, bg, bd, page, piece, window, softcap, causal = numbers
    rows = bq * bg
    highest = dl.full((bh, rows, 1), LOWEST, dl.float32)
    total = dl.zeros((bh, rows, 1), dl.float32)
    if sink is not None:
        sink = dl.broadcast_to(sink.reshape((bh, 1, bg, 1)), (bh, bq, bg, 1))
        highest = sink.reshape((bh, rows, 1))
        total = dl.full((bh, rows, 1), 1.0, dl.float32)
    begin = max(first + 1 - window, 0) // piece if window else 0
    last = first // piece if causal else max(dl.cdiv(length, piece), 1) - 1
    acc = dl.zeros((bh, rows, bd), dl.float32)
    narrow = dl.zeros((bh, rows, piece), query.dtype)
    fall = dl.zeros((bh, rows, 1), dl.float32)
    for p in dl.range(begin, last + 1):
        pages = listed(block_table, sequence, p, piece // page)
        keys = dl.load(k_pool, (heads, pages, 0), (bh, piece, bd)).to(query.dtype)
        scores = dl.dot(query, dl.transpose(keys, (0, 2, 1)))
        if softcap:
            scores = dl.tanh(scores * (1.0 / softcap)) * softcap
        seen = (p * piece, first, bq, bg, window, length, causal)
        if window or p == last:
            scores = dl.where(visible(piece, seen), scores, LOWEST)
        top = dl.maximum(highest, dl.max(scores, 2, keepdims=True))
        drop = highest - top
        if p > begin:
            before = listed(block_table, sequence, max(p - 1, 0), piece // page)
            values = dl.load(v_pool, (heads, before, 0), (bh, piece, bd)).to(query.dtype)
            acc = dl.dot(narrow, values, acc * fall)
        weights = dl.exp(scores - top)
        if window:
            weights = dl.where(visible(piece, seen), weights, 0.0)
        sums = dl.sum(weights, 2, keepdims=True)
        narrow = weights.to(query.dtype)
        fall = dl.exp(drop)
        total = total * fall + sums
        highest = top
    for p in dl.range(last, last + 1):  # an index list takes a loop's index
        pages = listed(block_table, sequence, p, piece // page)
        values = dl.load(v_pool, (heads, pages, 0), (bh, piece, bd)).to(query.dtype)
        present = (p * piece + dl.arange(piece) < length)[None, :, None]
        acc = dl.dot(narrow, dl.where(present, values, 0.0), acc * fall)
    return acc / dl.where(total > 0.0, total, 1.0)
