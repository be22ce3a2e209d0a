"""Grouped attention with queries along columns, and several tiles of them side by side.

It computes what :func:`~dure.library.attention_grouped.grouped_attention` does, by the same pieces
in the same order.  Scores are (keys, queries): what is reduced lies in different rows, a row of
maxima serves all queries of a tile, and the values' product has as few rows as a head has elements.
The heads are in equal parts, whose tiles wait for nothing of one another, so that an instruction
can hold the product of one and the exponentials of another; for that nothing is decided in the loop
over pieces, and the last one, which not every query sees whole, comes after it.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.attention import LOWEST
from dure.library.attention_grouped import listed, swapped
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places, RowCounts


@dure.kernel
def attention_columns(
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
    parts: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
):
    """:func:`~dure.library.attention_grouped.grouped_attention` to pools (KV heads, slots, D).

    The KV heads are in so many equal ``parts``, of each of which an instance has ``bh``.
    """
    dl.static_assert(not causal or piece % rows == 0, "an item's positions lie in one piece")
    item, heads = dl.program_id(0), dl.program_id(1)
    sequence, start, count = work_sequence[item], work_start[item], work_rows[item]
    stop = start + count
    own_positions, own_q, own_y = positions[start:stop], q[start:stop], y[start:stop]
    numbers = (bq, bh, bg, bd, page, piece, window, softcap, causal)
    place = (block_table, sequence, heads, context[sequence])
    size = q.shape[1] // parts
    for block in dl.range(dl.cdiv(count, bq)):
        first = own_positions[block * bq]
        tiles = ()
        for n in dl.static_range(parts):
            own = own_q[:, n * size : n * size + size]
            tile = dl.load(own, (block, heads, 0, 0), (bq, bh, bg, bd)).to(dl.float32) * scale
            tile = convert(tile, k_pool.dtype)
            tiles = (*tiles, swapped(tile).reshape((bh, bq * bg, bd)))
        pools = (k_pool, v_pool, sinks)
        found = attended(tiles, first, pools, place, numbers)
        for n in dl.static_range(parts):
            result = convert(found[n], y.dtype).reshape((bh, bd, bq, bg))
            result = dl.transpose(result, (2, 0, 3, 1))
            dl.store(own_y[:, n * size : n * size + size], (block, heads, 0, 0), result)


def attended(queries: Any, first: Any, pools: Any, place: Any, numbers: Any) -> Any:
    """The results (bh, D, queries) of tiles of queries, the first at position ``first``."""
    bq, bh, bg, bd, _, piece, window, _, causal = numbers
    begin = max(first + 1 - window, 0) // piece if window else 0
    last = first // piece if causal else max(dl.cdiv(place[3], piece), 1) - 1
    highest, total, acc = (), (), ()
    for n in dl.static_range(len(queries)):
        start = begun(pools[2], n, len(queries), place[2], (bh, bq, bg, bd))
        highest, total, acc = (*highest, start[0]), (*total, start[1]), (*acc, start[2])
    for p in dl.range(begin, last):
        state, where = (highest, total, acc), (p, first, False)
        highest, total, acc = with_piece(queries, state, where, pools, place, numbers)
    for p in dl.range(last, last + 1):  # an index list takes a loop's index
        state, where = (highest, total, acc), (p, first, True)
        highest, total, acc = with_piece(queries, state, where, pools, place, numbers)
    results = ()
    for n in dl.static_range(len(queries)):
        results = (*results, acc[n] * (1.0 / dl.where(total[n] > 0.0, total[n], 1.0)))
    return results


def begun(sinks: Any, n: Any, parts: Any, heads: Any, shape: Any) -> Any:
    """Maxima, sums of weights and of weighted values before the first piece."""
    bh, bq, bg, bd = shape
    columns = bq * bg
    highest = dl.full((bh, 1, columns), LOWEST, dl.float32)
    total = dl.zeros((bh, 1, columns), dl.float32)
    if sinks is not None:
        size = sinks.shape[0] // parts
        sink = dl.load(sinks[n * size : n * size + size], (heads, 0, 0), (bh, bg, 1))
        sink = sink.to(dl.float32).reshape((bh, 1, 1, bg))
        highest = dl.broadcast_to(sink, (bh, 1, bq, bg)).reshape((bh, 1, columns))
        total = dl.full((bh, 1, columns), 1.0, dl.float32)
    return highest, total, dl.zeros((bh, bd, columns), dl.float32)


def with_piece(queries: Any, state: Any, where: Any, pools: Any, place: Any, numbers: Any) -> Any:
    """The states of all tiles with a piece more; ``where`` are the piece, the first query's
    position and whether the piece is the last.  All keys and values are asked for first.
    """
    p, first, last = where
    block_table, sequence, heads, length = place
    _, bh, _, bd, page, piece, window, softcap, _ = numbers
    pages = listed(block_table, sequence, p, piece // page)
    size = pools[0].shape[0] // len(queries)
    keys, values = (), ()
    for n in dl.static_range(len(queries)):
        own = n * size
        keys = (*keys, dl.load(pools[0][own : own + size], (heads, pages, 0), (bh, piece, bd)))
        values = (*values, dl.load(pools[1][own : own + size], (heads, pages, 0), (bh, piece, bd)))
    present = p * piece + dl.arange(piece) < length
    seen = visible(p * piece, first, length, numbers)
    highest, total, acc = (), (), ()
    for n in dl.static_range(len(queries)):
        scores = dl.dot(keys[n], dl.transpose(queries[n], (0, 2, 1)))
        if softcap:
            scores = dl.tanh(scores * (1.0 / softcap)) * softcap
        if window or last:
            scores = dl.where(seen, scores, LOWEST)
        top = dl.maximum(state[0][n], dl.max(scores, 1, keepdims=True))
        weights = dl.exp(scores - top)
        if window:
            weights = dl.where(seen, weights, 0.0)
        correction = dl.exp(state[0][n] - top)
        sums = state[1][n] * correction + dl.sum(weights, 1, keepdims=True)
        value = values[n]
        if last:
            value = dl.where(present[None, :, None], value, 0.0)
        weighted = state[2][n] * correction
        weighted = dl.dot(dl.transpose(value, (0, 2, 1)), weights.to(value.dtype), weighted)
        highest, total, acc = (*highest, top), (*total, sums), (*acc, weighted)
    return highest, total, acc


def visible(start: Any, first: Any, length: Any, numbers: Any) -> Any:
    """Which keys of a piece (rows) each query (column) sees."""
    bq, _, bg, _, _, piece, window, _, causal = numbers
    key = start + dl.arange(piece)[:, None]
    if not causal:
        return dl.broadcast_to(key < length, (piece, bq * bg))[None, :, :]
    position = first + dl.arange(bq * bg)[None, :] // bg
    allowed = key <= position
    if window:
        allowed = allowed & (key > position - window)
    return allowed[None, :, :]
