"""Grouped attention for engines that work on elements as they pass.

It computes what :func:`~dure.library.attention_grouped.grouped_attention` does, by the same pieces,
that of a query's own position first and then the others in their order.  Scores are lowered by
their maximum, raised to a power, added up and narrowed one after another, which is one pass of an
engine that can.

Three pieces are under way at a time, so that no engine waits for another: while the scores of one
are computed, the weights of the piece before it are transposed, and those of the one before that
meet their values.  It goes on like that from a tile of queries to the next: only the piece of a
tile's own positions is hidden in parts, and there always is one, so it comes first, in front of the
loop over the others, and the last two pieces of the tile before end beside it.
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
    aligned: dl.const,
    bg: dl.const,
    bd: dl.const,
    page: dl.const,
    pages: dl.const,
    piece: dl.const,
    scale: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
    early: dl.const = False,
):
    """:func:`~dure.library.attention_grouped.grouped_attention` to pools (KV heads, slots, D), with
    a block table (sequences * pages), sequence by sequence.

    Work items are as long as ``bq``, or longer; they start at positions that ``aligned`` divides.
    With ``early``, for items of whole tiles, all page lists of a tile are on their way before what
    waits for one, and without a window its first keys come with the tile before: a proof of items
    of several lengths takes too long then.
    """
    whole = piece % rows == 0 or (aligned % bq == 0 and rows % bq == 0 and piece % bq == 0)
    dl.static_assert(not causal or whole, "the positions of a tile of queries lie in one piece")
    item, heads = dl.program_id(0), dl.program_id(1)
    sequence, start, count = work_sequence[item], work_start[item], work_rows[item]
    stop = start + count
    own_positions, own_q, own_y = positions[start:stop], q[start:stop], y[start:stop]
    numbers = (bq, bh, bg, bd, page, piece, window, softcap, causal)
    sink = None if sinks is None else dl.load(sinks, (heads, 0, 0), (bh, bg, 1)).to(dl.float32)
    place = (k_pool, v_pool, block_table, sequence * pages, heads, context[sequence])
    kind, columns = multiplied(q.dtype, k_pool.dtype), bq * bg
    narrow = dl.zeros((bh, columns, piece), kind)
    turned = dl.zeros((bh, piece, columns), kind)
    second, latest = dl.zeros((bh, piece, bd), kind), dl.zeros((bh, piece, bd), kind)
    acc = dl.zeros((bh, columns, bd), dl.float32)
    fall = dl.zeros((bh, columns, 1), dl.float32)
    total, highest = fall, fall
    spread = dl.arange(bq)[:, None] == dl.arange(columns)[None, :] // bg
    spread = dl.where(spread, _HIDDEN, 0.0).to(dl.bfloat16)
    spread = dl.broadcast_to(spread[None, :, :], (bh, bq, columns))
    blocks = dl.cdiv(count, bq)
    apart = (dl.arange(piece)[None, :] - dl.arange(bq)[:, None])[None, :, :]
    upright = queries(own_q, 0, heads, scale, k_pool, numbers)
    own_keys, hidden = own_piece(apart, own_positions[0], place, None, numbers)
    own_keys = dl.transpose(own_keys, (0, 2, 1))
    carried = early and not window
    if carried:
        keys = columns_of(upright, place, pages_of(place, 0, numbers), numbers)
    for block in dl.range(blocks + 1):
        # A turn more, for the end of the last tile.
        tile, following = min(block, blocks - 1), min(block + 1, blocks - 1)
        query, first = dl.transpose(upright, (0, 2, 1)), own_positions[tile * bq]
        begin, last = ends_of(first, place[5], numbers)
        stop = begin + (last - begin) * min(blocks - block, 1)
        seen = (first, place[5], last)
        second_last, latest_last = last - 2 * min((last - begin) // 2, 1), max(last - 1, begin)
        own_pages, next_own_pages, second_pages, latest_pages = None, None, None, None
        if early:
            next_last = ends_of(own_positions[following * bq], place[5], numbers)[1]
            own_pages = pages_of(place, last, numbers)
            next_own_pages = pages_of(place, next_last, numbers)
            second_pages = pages_of(place, second_last, numbers)
            latest_pages = pages_of(place, latest_last, numbers)
        own_values = present_values(query, place, last, own_pages, numbers)
        factor = factor_of(total, highest, sink, numbers)
        # The piece of the queries' own positions, and beside it the end of the tile before.
        if softcap or window:
            scores = seen_scores(dl.dot(query, own_keys), last, seen, numbers, True)
        else:
            mask = dl.dot(dl.transpose(spread, (0, 2, 1)), hidden)
            scores = dl.dot(query, own_keys, mask)
        acc = dl.dot(dl.transpose(turned, (0, 2, 1)), second, acc) * fall
        highest = dl.max(scores, 2, keepdims=True)
        own_rows, hidden = own_piece(
            apart, own_positions[following * bq], place, next_own_pages, numbers
        )
        acc = dl.dot(narrow, latest, acc)
        weights = weighed(scores, highest, last, seen, numbers)
        total = dl.sum(weights, 2, keepdims=True)
        narrow = weights.to(query.dtype)
        own_keys = dl.transpose(own_rows, (0, 2, 1))
        if not carried:
            keys = columns_of(query, place, pages_of(place, begin, numbers), numbers)
        fall = dl.zeros((bh, columns, 1), dl.float32)
        result = convert(acc * factor, y.dtype)
        second = present_values(query, place, second_last, second_pages, numbers)
        latest = present_values(query, place, latest_last, latest_pages, numbers)
        coming = queries(own_q, following, heads, scale, k_pool, numbers)
        if block > 0:
            result = swapped(result.reshape((bh, bq, bg, bd)))
            dl.store(own_y, (block - 1, heads, 0, 0), result)
        for p in dl.range(begin, stop):
            # Both lists on their way, before what waits for one.  The last turn's keys may be the
            # first of the next tile, which without a window are those of all tiles.
            if carried:
                after = max(min(p + 1, (last - 1 - p) * pages), 0)
            else:
                after = max(min(p + 1, last - 1), begin)
            next_pages = pages_of(place, after, numbers)
            pages_before = pages_of(place, max(p - 2, begin), numbers)
            scores = dl.dot(query, keys)  # pyright: ignore[reportPossiblyUnboundVariable]
            keys = columns_of(query, place, next_pages, numbers)
            values = values_of(query, place, pages_before, numbers)
            if p == begin + 1:
                acc = dl.dot(dl.transpose(turned, (0, 2, 1)), own_values, acc)
            else:
                acc = dl.dot(dl.transpose(turned, (0, 2, 1)), values, acc)
            acc = acc * fall
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
        upright = coming


def ends_of(first: Any, length: Any, numbers: Any) -> Any:
    """The first piece that queries from ``first`` on see, and the last."""
    _, _, _, _, _, piece, window, _, causal = numbers
    begin = max(first + 1 - window, 0) // piece if window else 0
    return begin, first // piece if causal else max(dl.cdiv(length, piece), 1) - 1


def queries(q: Any, block: Any, heads: Any, scale: Any, k_pool: Any, numbers: Any) -> Any:
    """A tile of queries as columns (bh, D, rows)."""
    bq, bh, bg, bd, _, _, _, _, _ = numbers
    tile = dl.load(q, (block, heads, 0, 0), (bq, bh, bg, bd))
    tile = convert(tile.to(dl.float32) * scale, multiplied(q.dtype, k_pool.dtype))
    return dl.transpose(swapped(tile).reshape((bh, bq * bg, bd)), (0, 2, 1))


def own_piece(apart: Any, first: Any, place: Any, pages: Any, numbers: Any) -> Any:
    """The last keys that queries from ``first`` on see, as columns, and what hides of them those
    that a query doesn't see: of each query its row.
    """
    bq, bh, _, bd, _, piece, window, softcap, causal = numbers
    _, last = ends_of(first, place[5], numbers)
    present = dl.arange(piece)[None, :, None] < place[5] - last * piece
    if pages is None:
        pages = pages_of(place, last, numbers)
    keys = dl.load(place[0], (place[4], pages, 0), (bh, piece, bd))
    keys = dl.where(present, keys, 0.0)
    if softcap or window:
        return keys, dl.zeros((bh, 1, 1), dl.bfloat16)
    if causal:
        hidden = apart > first - last * piece
    else:
        hidden = dl.arange(piece)[None, None, :] + last * piece >= place[5]
        hidden = dl.broadcast_to(hidden, (1, bq, piece))
    hidden = dl.where(hidden, -_HIDDEN, 0.0).to(dl.bfloat16)
    return keys, dl.broadcast_to(hidden, (bh, bq, piece))


def factor_of(total: Any, highest: Any, sink: Any, numbers: Any) -> Any:
    """What sums are multiplied by in the end."""
    if sink is None:
        return 1.0 / dl.where(total > 0.0, total, 1.0)
    bq, bh, bg, _, _, _, _, _, _ = numbers
    sink = dl.broadcast_to(sink.reshape((bh, 1, bg, 1)), (bh, bq, bg, 1))
    sink = sink.reshape((bh, bq * bg, 1))
    both = dl.maximum(highest, sink)
    fall = dl.exp(highest - both)
    return fall / (total * fall + dl.exp(sink - both))


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


def present_values(query: Any, place: Any, p: Any, pages: Any, numbers: Any) -> Any:
    """The values of a piece, whose pages may be there, zeros where the sequence has ended."""
    piece = numbers[5]
    if pages is None:
        pages = pages_of(place, p, numbers)
    present = dl.arange(piece)[None, :, None] < place[5] - p * piece
    values = values_of(query, place, pages, numbers)
    return dl.where(present, values, 0.0)


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
