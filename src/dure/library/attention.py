"""Causal attention over a paged KV cache, for a ragged batch of prefill chunks and decodes.

The host cuts the step's tokens into work items (:mod:`dure.serve.work`): one item is a run of
consecutive tokens of one sequence.  Keys are walked in pieces of a fixed size, aligned to their
absolute position, in ascending order within a run of keys, with an online softmax: so a token's
result has the same bits alone, in a batch and in any chunking.  A piece's pages come as one index
list.  Masks are made of positions; what a page holds beyond a sequence's length is replaced before
it is used, so that not even a NaN left there can leak.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places, RowCounts

#: The running maximum starts here: finite, so that exp(m - m) is 1 where nothing was seen yet.
LOWEST = -1.0e30
#: Pieces beside one another that belong to one run of keys, so that memory is read in long rows.
STRETCH = 4


@dure.kernel
def paged_attention(
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
    group: dl.const,
    bg: dl.const,
    bd: dl.const,
    page: dl.const,
    piece: dl.const,
    scale: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
    apart: dl.const = False,
    runs: dl.const = 1,
):
    """Attention of q (T, H, D) to the cached keys and values, into y (T, H * D).

    The pools are (slots, KV heads, D) with ``page`` slots a page; ``block_table`` (S, pages) holds
    each sequence's pages (-1: absent) and ``context`` (S,) its length with this step's tokens.
    Work item w is the tokens ``work_start[w] .. + work_rows[w]`` of sequence ``work_sequence[w]``,
    at most ``bq``; grid (W, KV heads).  ``group`` query heads share a KV head and ``bg`` is the
    power of two that covers them; ``bd`` covers D.  ``window`` of 0 sees everything, else the last
    ``window`` positions. A single token takes all heads of its group in one tile; more take one
    head after another.  Where it isn't ``causal`` a token sees all of its sequence, and there is no
    window.  ``sinks`` (H,), which may be None, are one more logit a head, which has no value.
    Products are of float32 numbers; where the pools are bfloat16, of bfloat16 numbers, to which
    queries (times ``scale``) and weights are rounded: sums are of float32 numbers all the same.
    ``apart`` walks the pieces that all queries of a tile see
    whole in a loop of their own, without masks; the bits are the same.  Of the
    stretches of :data:`STRETCH` pieces every ``runs``-th belongs to one run of keys, and what is
    summed over each run is joined in the runs' order: as :mod:`dure.library.attention_runs` does,
    so that workers can share a token's keys.
    """
    item, kv_head = dl.program_id(0), dl.program_id(1)
    sequence, start, rows = work_sequence[item], work_start[item], work_rows[item]
    stop = min(start + rows, q.shape[0])
    own_q, own_positions, own_y = q[start:stop], positions[start:stop], y[start:stop]
    cache = (k_pool, v_pool, block_table, sequence, kv_head, context[sequence])
    numbers = (page, piece, scale, window, softcap, causal, apart, runs)
    if rows == 1:
        heads = own_q[:, kv_head * group : kv_head * group + group]
        tile = dl.load(heads, (0, 0, 0), (1, bg, bd)).reshape((bg, bd))
        sink = sink_tile(sinks, kv_head * group, group, bg)
        result = attend(tile, own_positions, 1, bg, cache, numbers, sink)
        store_group(own_y, kv_head * group, result, group, q.shape[2])
    else:
        for member in dl.range(group):
            head = kv_head * group + member
            tile = dl.load(own_q, (0, head, 0), (bq, 1, bd)).reshape((bq, bd))
            own_sink = sink_tile(sinks, head, 1, 1)
            result = attend(tile, own_positions, bq, 1, cache, numbers, own_sink)
            store_head(own_y, head, result, q.shape[2])


def store_group(y: Any, first: Any, tile: Any, group: Any, size: Any) -> None:
    """Store the rows of a tile as the columns of the heads from ``first`` on."""
    place = dl.arange(tile.shape[0])[:, None]
    for member in dl.static_range(group):
        row = dl.sum(dl.where(place == member, tile, 0.0), 0, keepdims=True)
        store_head(y, first + member, row, size)


def sink_tile(sinks: Any, first: Any, count: Any, rows: Any) -> Any:
    """The sinks of ``count`` heads as a column of ``rows``, or None where there are none."""
    if sinks is None:
        return None
    tile = dl.load(sinks[first : first + count], (0,), (rows,))
    return tile.to(dl.float32).reshape((rows, 1))


def store_head(y: Any, head: Any, tile: Any, size: Any) -> None:
    """Store one head's columns; adding zero makes -0 the same number on every way here."""
    tile = convert(tile + 0.0, y.dtype)
    if tile.shape[1] == size:
        dl.store(y, (0, head), tile)
    else:
        dl.store(y[:, head * size : head * size + size], (0, 0), tile)


def attend(
    query: Any, positions: Any, tokens: Any, heads: Any, cache: Any, numbers: Any, sink: Any
) -> Any:
    """The result (tokens * heads, D) of one query tile; ``positions`` is the view of its tokens.

    ``sink`` is None or the logits (rows or 1, 1) that start the softmax, with a value of zero.
    """
    _, _, _, window, _, _, _, runs = numbers
    seen_by = placed(query, positions, tokens, heads, cache, numbers)
    sums = started(sink, query.shape)
    if runs == 1:
        sums = run_of(seen_by, 0, sums, cache, numbers)
    else:
        # Without a window the first stretches are of the first runs.
        filled = runs if window else min(dl.cdiv(seen_by[5], STRETCH), runs)
        for run in dl.range(filled):
            own = run_of(seen_by, run, started(None, query.shape), cache, numbers)
            sums = joined(sums, own)
    return averaged(sums)


def placed(query: Any, positions: Any, tokens: Any, heads: Any, cache: Any, numbers: Any) -> Any:
    """The tile of queries as it meets keys, the position of each row, the first and the last one,
    and the first piece of keys that any of them sees and the one after the last.
    """
    _, piece, scale, window, _, causal, _, _ = numbers
    count = query.shape[0]
    query = (query.to(dl.float32) * scale).to(multiplied(cache[0].dtype))
    position = dl.load(positions, (0,), (tokens,), fill=-1)
    position = dl.broadcast_to(position[:, None], (tokens, heads)).reshape((count, 1))
    first = positions[0]
    last = first + positions.shape[0] - 1
    begin = max(first + 1 - window, 0) // piece if window else 0
    end = dl.cdiv(last + 1 if causal else cache[5], piece)
    return query, position, first, last, begin, end


def multiplied(cached: Any) -> Any:
    """The type in which queries and weights meet what is cached: bfloat16 as it is, for machines
    multiply it faster.
    """
    return cached if cached == dl.bfloat16 else dl.float32


def started(sink: Any, shape: Any) -> Any:
    """The sums (highest score, sum of weights, weighted values) before any key."""
    count, size = shape
    acc = dl.zeros((count, size), dl.float32)
    if sink is not None:
        highest, total = dl.broadcast_to(sink, (count, 1)), dl.full((count, 1), 1.0, dl.float32)
        return highest, total, acc
    return dl.full((count, 1), LOWEST, dl.float32), dl.zeros((count, 1), dl.float32), acc


def joined(sums: Any, others: Any) -> Any:
    """The sums over the keys of both.  Sums without keys change no bit."""
    top = dl.maximum(sums[0], others[0])
    one, other = dl.exp(sums[0] - top), dl.exp(others[0] - top)
    return top, sums[1] * one + others[1] * other, sums[2] * one + others[2] * other


def averaged(sums: Any) -> Any:
    """The result of sums; zero where no key was seen."""
    _, total, acc = sums
    return acc / dl.where(total > 0.0, total, 1.0)


def run_of(seen_by: Any, run: Any, sums: Any, cache: Any, numbers: Any) -> Any:
    """``sums`` with the keys of a run: of every ``runs`` stretches of pieces one; ``seen_by`` is
    what :func:`placed` gives.
    """
    query, position, first, last, begin, end = seen_by
    runs = numbers[7]
    own = (query, position, first, last)
    if runs == 1:
        return stretch(own, (begin, end), sums, cache, numbers)
    before = begin // STRETCH
    start = run + dl.cdiv(before - run, runs) * runs
    for number in dl.range(start, dl.cdiv(end, STRETCH), runs):
        span = max(number * STRETCH, begin), min(number * STRETCH + STRETCH, end)
        sums = stretch(own, span, sums, cache, numbers)
    return sums


def stretch(seen_by: Any, span: Any, sums: Any, cache: Any, numbers: Any) -> Any:
    """``sums`` with the pieces of a span."""
    query, position, first, last = seen_by
    _, piece, _, window, _, causal, apart, _ = numbers
    length = cache[5]
    begin, end = span
    if apart:
        # Pieces of which every query sees every key.
        start = dl.cdiv(max(last + 1 - window, 0), piece) if window else begin
        stop = min(first + 1 if causal else length, length) // piece
        start = max(begin, min(start, end)) if window else begin
        stop = max(start, min(stop, end))
        if window:
            for p in dl.range(begin, start):
                sums = walked(query, position, p, sums, cache, numbers, True)
        for p in dl.range(start, stop):
            sums = walked(query, position, p, sums, cache, numbers, False)
        begin = stop
    for p in dl.range(begin, end):
        sums = walked(query, position, p, sums, cache, numbers, True)
    return sums


def walked(
    query: Any, position: Any, p: Any, sums: Any, cache: Any, numbers: Any, masked: Any
) -> Any:
    """The sums (highest, total, acc) with piece p of the keys; not ``masked`` where all of it is
    seen by every query.
    """
    k_pool, v_pool, block_table, sequence, kv_head, length = cache
    page, piece, _, window, softcap, causal, _, _ = numbers
    highest, total, acc = sums
    count, size = query.shape
    pages = dl.load(block_table, (sequence, p), (1, piece // page), fill=0)
    pages = pages.reshape((piece // page,))
    key = p * piece + dl.arange(piece)
    keys = dl.load(k_pool, (pages, kv_head, 0), (piece, 1, size)).reshape((piece, size))
    scores = dl.dot(query, keys.T)
    if softcap:
        scores = dl.tanh(scores * (1.0 / softcap)) * softcap
    allowed = seen(key, position, length, (count, piece), window, causal) if masked else None
    if allowed is not None:
        scores = dl.where(allowed, scores, LOWEST)
    top = dl.maximum(highest, dl.max(scores, 1, keepdims=True))
    weights = dl.exp(scores - top)
    if allowed is not None:
        weights = dl.where(allowed, weights, 0.0)
    # As they are multiplied: a sum of the same numbers lets errors of rounding cancel.
    weights = weights.to(query.dtype)
    correction = dl.exp(highest - top)
    values = dl.load(v_pool, (pages, kv_head, 0), (piece, 1, size)).reshape((piece, size))
    if masked:
        values = dl.where((key < length)[:, None], values.to(query.dtype), 0.0)
    acc = dl.dot(weights, values, acc * correction)
    # After the product: a unit of tile registers that waits for long takes time to wake up.
    total = total * correction + dl.sum(weights.to(dl.float32), 1, keepdims=True)
    return top, total, acc


def seen(key: Any, position: Any, length: Any, shape: Any, window: Any, causal: Any) -> Any:
    """Which keys of a piece each query sees."""
    if causal:
        allowed = key[None, :] <= position
    else:
        allowed = dl.broadcast_to((key < length)[None, :], shape)
    if window:
        allowed = allowed & (key[None, :] > position - window)
    return allowed
