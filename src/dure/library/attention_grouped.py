"""Attention over a paged KV cache whose tiles hold all query heads that share a KV head.

This is the attention of chips; :mod:`dure.library.attention` has the one of the host, whose tiles
are a head's.  Keys are walked in pieces of a fixed size, aligned to their absolute position, in
ascending order, with an online softmax: a token's result depends on neither the batch nor on how
its tokens are cut.  Pieces that every query of a tile sees whole need no masks and get none; in
the others scores are masked by position, and values beyond a sequence's length are replaced before
they are used, so that not even a NaN left in a page can leak.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.attention import LOWEST
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places, RowCounts


@dure.kernel
def grouped_attention(
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
    heads_first: dl.const = True,
    ahead: dl.const = 0,
):
    """Attention of q (T, KV heads, ``group``, D) to the cached keys and values, into y like q.

    The pools are (KV heads, slots, D), or (slots, KV heads, D) where not ``heads_first``, with
    ``page`` slots a page; ``block_table`` (S, pages) holds
    each sequence's pages (-1: absent) and ``context`` (S,) its length with this step's tokens.
    Work item w is the tokens ``work_start[w] .. + work_rows[w]`` of sequence ``work_sequence[w]``,
    whose positions lie in one aligned run of ``rows``, taken in tiles of ``bq``.  ``bh`` KV heads
    are one instance's; ``bg`` covers the group and ``bd`` D.
    ``window`` of 0 sees everything, else the last ``window`` positions.  Where it isn't ``causal``
    a token sees all of its sequence, and there is no window.  ``sinks`` (KV heads, ``group``, 1),
    which may be None, are one more logit a head, which has no value.  With ``ahead`` of 1 a piece's
    scores come before the weights of the piece in front of it meet their values, so that engines of
    products and of exponentials work at the same time; it costs a tile of scores more.  With 2 its
    keys, besides, are turned before those weights are: for an engine that turns what it multiplies.
    """
    dl.static_assert(not causal or piece % rows == 0, "an item's positions lie in one piece")
    item, heads = dl.program_id(0), dl.program_id(1)
    pools = (k_pool, v_pool, None, None)
    lists = (positions, block_table, context, work_sequence, work_start, work_rows)
    numbers = (bq, bh, bg, bd, page, piece, window, softcap, causal, heads_first)
    attend_item(q, y, pools, sinks, lists, (item, heads), (scale, ahead), numbers)


@dure.kernel
def quantized_attention(
    q: dl.Tensor,
    k_pool: dl.Tensor,
    v_pool: dl.Tensor,
    k_scales: dl.Tensor,
    v_scales: dl.Tensor,
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
    ahead: dl.const = 0,
):
    """:func:`grouped_attention` to pools of codes, heads first, that their scales (KV heads, slots,
    1) make keys and values.  Codes are multiplied as they are; the keys' scales go into the scores,
    the values' into the weights.
    """
    dl.static_assert(not causal or piece % rows == 0, "an item's positions lie in one piece")
    item, heads = dl.program_id(0), dl.program_id(1)
    pools = (k_pool, v_pool, k_scales, v_scales)
    lists = (positions, block_table, context, work_sequence, work_start, work_rows)
    numbers = (bq, bh, bg, bd, page, piece, window, softcap, causal, True)
    attend_item(q, y, pools, sinks, lists, (item, heads), (scale, ahead), numbers)


def attend_item(
    q: Any, y: Any, pools: Any, sinks: Any, lists: Any, ids: Any, how: Any, numbers: Any
) -> None:
    """The results of a work item for an instance's heads."""
    positions, block_table, context, work_sequence, work_start, work_rows = lists
    bq, bh, bg, bd, _, _, _, _, _, _ = numbers
    (item, heads), (scale, ahead) = ids, how
    sequence, start, count = work_sequence[item], work_start[item], work_rows[item]
    stop = start + count
    own_q, own_positions, own_y = q[start:stop], positions[start:stop], y[start:stop]
    cache = (pools, block_table, sequence, heads, context[sequence])
    sink = None if sinks is None else dl.load(sinks, (heads, 0, 0), (bh, bg, 1)).to(dl.float32)
    for block in dl.range(dl.cdiv(count, bq)):
        tile = dl.load(own_q, (block, heads, 0, 0), (bq, bh, bg, bd))
        tile = convert(tile.to(dl.float32) * scale, multiplied(q.dtype, pools[0].dtype))
        query = swapped(tile).reshape((bh, bq * bg, bd))
        first = own_positions[block * bq]
        result = convert(attend(query, first, cache, numbers, sink, ahead), y.dtype)
        result = swapped(result.reshape((bh, bq, bg, bd)))
        dl.store(own_y, (block, heads, 0, 0), result)


def multiplied(queries: Any, cached: Any) -> Any:
    """The type in which queries and cached keys are multiplied: the cache's, unless that is of
    eight bits and the queries' isn't.
    """
    if cached == dl.int8 or cached == dl.float8_e4m3fn:
        return queries
    return cached


def swapped(tile: Any) -> Any:
    """A tile with its first two axes swapped."""
    first, second, group, size = tile.shape
    if first == 1 or second == 1:
        return tile.reshape((second, first, group, size))
    return dl.transpose(tile, (1, 0, 2, 3))


def attend(query: Any, first: Any, cache: Any, numbers: Any, sink: Any, ahead: Any) -> Any:
    """The result (bh, bq * bg, D) of queries at the positions from ``first`` on.

    ``sink`` is None or the logits (bh, bg, 1) that start the softmax, with a value of zero.  The
    last piece has keys that not every query sees.
    """
    bq, bh, bg, bd, _, piece, window, _, causal, _ = numbers
    rows = bq * bg
    highest = dl.full((bh, rows, 1), LOWEST, dl.float32)
    total = dl.zeros((bh, rows, 1), dl.float32)
    if sink is not None:
        sink = dl.broadcast_to(sink.reshape((bh, 1, bg, 1)), (bh, bq, bg, 1))
        highest = sink.reshape((bh, rows, 1))
        total = dl.full((bh, rows, 1), 1.0, dl.float32)
    acc = dl.zeros((bh, rows, bd), dl.float32)
    begin = max(first + 1 - window, 0) // piece if window else 0
    last = first // piece if causal else max(dl.cdiv(cache[4], piece), 1) - 1
    sums, span = (highest, total, acc), (begin, last + 1, first)
    _, total, acc = with_pieces(query, span, sums, cache, numbers, ahead)
    return acc / dl.where(total > 0.0, total, 1.0)


def with_pieces(query: Any, span: Any, sums: Any, cache: Any, numbers: Any, ahead: Any) -> Any:
    """The highest score, and the sums of weights and of weighted values below it, with those of
    some pieces.  ``span`` are the first of them, the one after them, and the first query's
    position: the last of them may have keys that not every query sees.  With ``ahead`` there is
    at least one.
    """
    begin, end, first = span
    highest, total, acc = sums
    bq, bh, bg, _, _, piece, _, _, _, _ = numbers
    rows = bq * bg
    below, drop = dl.zeros((bh, rows, piece), dl.float32), dl.zeros((bh, rows, 1), dl.float32)
    if ahead == 2:
        keys = columns_of(query, begin, cache, numbers)
        for p in dl.range(begin, end - 1):
            scores = scored(query, keys, p, (first, False), cache, numbers)
            keys = columns_of(query, p + 1, cache, numbers)
            if p > begin:
                place = (max(p - 1, 0), first, False)
                total, acc = added((below, drop), (total, acc), place, cache, numbers, query.dtype)
            highest, below, drop = lowered(scores, highest)
        scores = scored(query, keys, end - 1, (first, True), cache, numbers)
        if end - 1 > begin:
            place = (max(end - 2, 0), first, False)
            total, acc = added((below, drop), (total, acc), place, cache, numbers, query.dtype)
        highest, below, drop = lowered(scores, highest)
    elif ahead:
        for p in dl.range(begin, end):
            keys = columns_of(query, p, cache, numbers)
            scores = scored(query, keys, p, (first, p == end - 1), cache, numbers)
            if p > begin:
                place = (max(p - 1, 0), first, False)
                total, acc = added((below, drop), (total, acc), place, cache, numbers, query.dtype)
            highest, below, drop = lowered(scores, highest)
    else:
        for p in dl.range(begin, end):
            ends, sums = (first, p == end - 1), (highest, total, acc)
            highest, total, acc = with_piece(query, p, ends, sums, cache, numbers)
    if ahead:
        place = (max(end - 1, 0), first, True)
        total, acc = added((below, drop), (total, acc), place, cache, numbers, query.dtype)
    return highest, total, acc


def with_piece(query: Any, p: Any, ends: Any, sums: Any, cache: Any, numbers: Any) -> Any:
    """The highest score, and the sums of weights and of weighted values below it, with those of
    piece ``p``; ``ends`` are the first query's position and whether the piece is the last.
    """
    first, is_last = ends
    highest, total, acc = sums
    keys = columns_of(query, p, cache, numbers)
    scores = scored(query, keys, p, ends, cache, numbers)
    highest, below, drop = lowered(scores, highest)
    place = (p, first, is_last)
    total, acc = added((below, drop), (total, acc), place, cache, numbers, query.dtype)
    return highest, total, acc


def columns_of(query: Any, p: Any, cache: Any, numbers: Any) -> Any:
    """Piece ``p``'s keys as columns (bh, D, piece)."""
    (k_pool, _, _, _), block_table, sequence, heads, _ = cache
    _, bh, _, bd, page, piece, _, _, _, heads_first = numbers
    pages = listed(block_table, sequence, p, piece // page)
    keys = cached(k_pool, pages, heads, (bh, piece, bd), heads_first).to(query.dtype)
    return dl.transpose(keys, (0, 2, 1))


def scored(query: Any, keys: Any, p: Any, ends: Any, cache: Any, numbers: Any) -> Any:
    """The scores (bh, rows, piece) of piece ``p``'s keys; ``ends`` are the first query's position
    and whether the piece is the last.
    """
    first, is_last = ends
    (_, _, k_scales, _), block_table, sequence, heads, length = cache
    bq, bh, bg, _, page, piece, window, softcap, causal, heads_first = numbers
    scores = dl.dot(query, keys)
    if k_scales is not None:
        pages = listed(block_table, sequence, p, piece // page)
        factors = cached(k_scales, pages, heads, (bh, piece, 1), heads_first)
        scores = scores * factors.reshape((bh, 1, piece))
    if softcap:
        scores = dl.tanh(scores * (1.0 / softcap)) * softcap
    if window or is_last:
        seen = (p * piece, first, bq, bg, window, length, causal)
        scores = dl.where(visible(piece, seen), scores, LOWEST)
    return scores


def lowered(scores: Any, highest: Any) -> Any:
    """The running maximum with these scores, the scores below it, and how far it rose."""
    top = dl.maximum(highest, dl.max(scores, 2, keepdims=True))
    return top, scores - top, highest - top


def added(lower: Any, sums: Any, place: Any, cache: Any, numbers: Any, dtype: Any) -> Any:
    """The sums of weights and of weighted values with those of a piece; ``place`` are the piece,
    the first query's position and whether the piece is the last; products are of ``dtype``.
    """
    below, drop = lower
    total, acc = sums
    p, first, last = place
    (_, v_pool, _, v_scales), block_table, sequence, heads, length = cache
    bq, bh, bg, bd, page, piece, window, _, causal, heads_first = numbers
    pages = listed(block_table, sequence, p, piece // page)
    values = cached(v_pool, pages, heads, (bh, piece, bd), heads_first).to(dtype)
    weights = dl.exp(below)
    if window:
        seen = (p * piece, first, bq, bg, window, length, causal)
        weights = dl.where(visible(piece, seen), weights, 0.0)
    narrow = weights
    if v_scales is not None:
        factors = cached(v_scales, pages, heads, (bh, piece, 1), heads_first)
        present = (p * piece + dl.arange(piece) < length)[None, None, :]
        narrow = weights * dl.where(present, factors.reshape((bh, 1, piece)), 0.0)
    narrow = narrow.to(dtype)
    correction = dl.exp(drop)
    total = total * correction + dl.sum(weights, 2, keepdims=True)
    acc = acc * correction
    if last:
        present = (p * piece + dl.arange(piece) < length)[None, :, None]
        acc = dl.dot(narrow, dl.where(present, values, 0.0), acc)
    else:
        acc = dl.dot(narrow, values, acc)
    return total, acc


def listed(block_table: Any, sequence: Any, p: Any, count: Any) -> Any:
    """The pages of a piece."""
    return dl.load(block_table, (sequence, p), (1, count), fill=0).reshape((count,))


def cached(pool: Any, pages: Any, heads: Any, shape: Any, heads_first: Any) -> Any:
    """A piece of keys or values (bh, piece, D)."""
    if heads_first:
        return dl.load(pool, (heads, pages, 0), shape)
    bh, piece, bd = shape
    tile = dl.load(pool, (pages, heads, 0), (piece, bh, bd))
    return swapped(tile.reshape((piece, bh, 1, bd))).reshape(shape)


def visible(piece: Any, seen: Any) -> Any:
    """Which of ``piece`` keys each row of queries sees."""
    start, first, bq, bg, window, length, causal = seen
    key = start + dl.arange(piece)[None, :]
    if not causal:
        return dl.broadcast_to(key < length, (bq * bg, piece))[None, :, :]
    position = first + dl.arange(bq * bg)[:, None] // bg
    allowed = key <= position
    if window:
        allowed = allowed & (key > position - window)
    return allowed[None, :, :]
