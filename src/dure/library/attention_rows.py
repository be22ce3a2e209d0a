"""Grouped attention for engines that work on elements as they pass.

It computes what :func:`~dure.library.attention_grouped.grouped_attention` does, by the same pieces
in the same order.  Scores are lowered by their maximum, raised to a power, added up and narrowed
one after another, which is one pass of an engine that can.  Two pieces are under way at a time: the
scores of one are computed while those of the piece in front of it are weighed, whose values are
added up then; and what the first piece of the next tile needs, while the last one's are.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.attention import LOWEST
from dure.library.attention_grouped import multiplied, swapped, visible
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places, RowCounts

#: A score that is lowered by its square counts for nothing; a power of two that 16 bits hold.
_HIDDEN = 32768.0


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
    pages: dl.const,
    piece: dl.const,
    scale: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
):
    """:func:`~dure.library.attention_grouped.grouped_attention` to pools (KV heads, slots, D), with
    a block table (sequences * pages), sequence by sequence.

    Work items are as long as ``bq``, or longer.
    """
    whole = piece % rows == 0 or (rows % bq == 0 and piece % bq == 0)
    dl.static_assert(not causal or whole, "the positions of a tile of queries lie in one piece")
    item, heads = dl.program_id(0), dl.program_id(1)
    sequence, start, count = work_sequence[item], work_start[item], work_rows[item]
    stop = start + count
    own_positions, own_q, own_y = positions[start:stop], q[start:stop], y[start:stop]
    numbers = (bq, bh, bg, bd, page, piece, window, softcap, causal)
    sink = None if sinks is None else dl.load(sinks, (heads, 0, 0), (bh, bg, 1)).to(dl.float32)
    narrow = dl.zeros((bh, bq * bg, piece), multiplied(q.dtype, k_pool.dtype))
    turned = dl.zeros((bh, piece, bq * bg), multiplied(q.dtype, k_pool.dtype))
    acc = dl.zeros((bh, bq * bg, bd), dl.float32)
    blocks = dl.cdiv(count, bq)
    query = queries(own_q, 0, heads, scale, k_pool, numbers)
    for block in dl.range(blocks):
        first = own_positions[block * bq]
        place = (k_pool, v_pool, block_table, sequence * pages, heads, context[sequence])
        kept = (narrow, turned, acc)
        more = (own_q, min(block + 1, blocks - 1), scale)
        acc, factor, narrow, turned, query = attended(query, first, sink, place, numbers, kept, more)
        result = convert(acc * factor, y.dtype)
        dl.store(own_y, (block, heads, 0, 0), swapped(result.reshape((bh, bq, bg, bd))))


def queries(q: Any, block: Any, heads: Any, scale: Any, k_pool: Any, numbers: Any) -> Any:
    """A tile of queries as columns (bh, D, rows)."""
    bq, bh, bg, bd, _, _, _, _, _ = numbers
    tile = dl.load(q, (block, heads, 0, 0), (bq, bh, bg, bd))
    tile = convert(tile.to(dl.float32) * scale, multiplied(q.dtype, k_pool.dtype))
    return dl.transpose(swapped(tile).reshape((bh, bq * bg, bd)), (0, 2, 1))


def attended(
    columns: Any, first: Any, sink: Any, place: Any, numbers: Any, kept: Any, more: Any
) -> Any:
    """The sums (bh, rows, D) of a tile of queries, the first at position ``first``, what to
    multiply them by, the last weights, and the queries of the tile after it.

    The first turn adds up weights that were left by the tile before.  What that gives counts for
    nothing: it is scaled by the first piece's fall from the lowest number, which is zero.
    """
    narrow, turned, acc = kept
    query = dl.transpose(columns, (0, 2, 1))
    length = place[5]
    bq, bh, bg, bd, _, piece, window, softcap, causal = numbers
    rows = bq * bg
    highest = dl.full((bh, rows, 1), LOWEST, dl.float32)
    total = dl.zeros((bh, rows, 1), dl.float32)
    begin = max(first + 1 - window, 0) // piece if window else 0
    last = first // piece if causal else max(dl.cdiv(length, piece), 1) - 1
    seen = (first, length, last)
    # What the end needs is on its way before the loop: lists, before what waits for one.
    second = max(last - 1, begin)
    pages = pages_of(place, begin, numbers)
    last_pages = pages_of(place, last, numbers)
    second_pages = pages_of(place, second, numbers)
    keys = columns_of(query, place, pages, numbers)
    present = (last * piece + dl.arange(piece) < length)[None, :, None]
    final = dl.load(place[0], (place[4], last_pages, 0), (bh, piece, bd)).to(query.dtype)
    final = dl.where(present, final, 0.0)
    third = max(last - 2, begin)
    third_values = present_values(query, place, pages_of(place, third, numbers), third, numbers)
    second_values = present_values(query, place, second_pages, second, numbers)
    last_values = present_values(query, place, last_pages, last, numbers)
    # A product hides what the queries of a tile don't see: of each query its row.
    hidden = visible(piece, (last * piece, first, bq, 1, window, length, causal))
    hidden = dl.where(hidden, 0.0, -_HIDDEN).to(dl.bfloat16)
    hidden = dl.broadcast_to(hidden, (bh, bq, piece))
    spread = dl.arange(bq)[:, None] == dl.arange(rows)[None, :] // bg
    spread = dl.where(spread, _HIDDEN, 0.0).to(dl.bfloat16)
    spread = dl.broadcast_to(spread[None, :, :], (bh, bq, rows))
    fall = dl.zeros((bh, rows, 1), dl.float32)
    for p in dl.range(begin, last):
        # Both lists on their way, before what waits for one.
        next_pages = pages_of(place, max(min(p + 1, last - 1), begin), numbers)
        pages = pages_of(place, max(p - 2, begin), numbers)
        scores = dl.dot(query, keys)
        keys = columns_of(query, place, next_pages, numbers)
        values = values_of(query, place, pages, numbers)
        acc = dl.dot(dl.transpose(turned, (0, 2, 1)), values, acc) * fall
        scores = seen_scores(scores, p, seen, numbers, window > 0)
        top = dl.maximum(highest, dl.max(scores, 2, keepdims=True))
        drop = highest - top
        turned = dl.transpose(narrow, (0, 2, 1))
        weights = weighed(scores, top, p, seen, numbers)
        sums = dl.sum(weights, 2, keepdims=True)
        narrow = weights.to(query.dtype)
        fall = dl.exp(drop)
        total = total * fall + sums
        highest = top
    keys = dl.transpose(final, (0, 2, 1))
    if softcap or window:
        scores = seen_scores(dl.dot(query, keys), last, seen, numbers, True)
    else:
        scores = dl.dot(query, keys, dl.dot(dl.transpose(spread, (0, 2, 1)), hidden))
    acc = dl.dot(dl.transpose(turned, (0, 2, 1)), third_values, acc) * fall
    top = dl.maximum(highest, dl.max(scores, 2, keepdims=True))
    drop = highest - top
    turned = dl.transpose(narrow, (0, 2, 1))
    columns = queries(more[0], more[1], place[4], more[2], place[0], numbers)
    weights = weighed(scores, top, last, seen, numbers)
    sums = dl.sum(weights, 2, keepdims=True)
    narrow = weights.to(query.dtype)
    fall = dl.exp(drop)
    total = total * fall + sums
    acc = dl.dot(dl.transpose(turned, (0, 2, 1)), second_values, acc) * fall
    acc = dl.dot(narrow, last_values, acc)
    if sink is not None:
        sink = dl.broadcast_to(sink.reshape((bh, 1, bg, 1)), (bh, bq, bg, 1))
        sink = sink.reshape((bh, rows, 1))
        both = dl.maximum(top, sink)
        fall = dl.exp(top - both)
        return acc, fall / (total * fall + dl.exp(sink - both)), narrow, turned, columns
    return acc, 1.0 / dl.where(total > 0.0, total, 1.0), narrow, turned, columns


def pages_of(place: Any, p: Any, numbers: Any) -> Any:
    """The pages of a piece; behind a sequence's last ones, those of another."""
    count = numbers[5] // numbers[4]
    return dl.load(place[2], (place[3] + p * count,), (count,), step=(1,), fill=0)


def columns_of(query: Any, place: Any, pages: Any, numbers: Any) -> Any:
    """The keys of a piece as columns, in the type of the queries."""
    keys = dl.load(place[0], (place[4], pages, 0), (numbers[1], numbers[5], numbers[3]))
    return dl.transpose(keys.to(query.dtype), (0, 2, 1))


def values_of(query: Any, place: Any, pages: Any, numbers: Any) -> Any:
    """The values of a piece."""
    values = dl.load(place[1], (place[4], pages, 0), (numbers[1], numbers[5], numbers[3]))
    return values.to(query.dtype)


def present_values(query: Any, place: Any, pages: Any, p: Any, numbers: Any) -> Any:
    """The values of a piece, zeros where the sequence has ended."""
    piece = numbers[5]
    present = (p * piece + dl.arange(piece) < place[5])[None, :, None]
    return dl.where(present, values_of(query, place, pages, numbers), 0.0)


def seen_scores(scores: Any, p: Any, seen: Any, numbers: Any, cut: Any) -> Any:
    """The scores of a piece; with ``cut``, the lowest number for those that a query doesn't see."""
    bq, _, bg, _, _, piece, window, softcap, causal = numbers
    if softcap:
        scores = dl.tanh(scores * (1.0 / softcap)) * softcap
    if cut:
        first, length, _ = seen
        scores = dl.where(
            visible(piece, (p * piece, first, bq, bg, window, length, causal)), scores, LOWEST
        )
    return scores


def weighed(scores: Any, top: Any, p: Any, seen: Any, numbers: Any) -> Any:
    """The weights of a piece."""
    bq, _, bg, _, _, piece, window, _, causal = numbers
    weights = dl.exp(scores - top)
    if window:
        first, length, _ = seen
        weights = dl.where(
            visible(piece, (p * piece, first, bq, bg, window, length, causal)), weights, 0.0
        )
    return weights
