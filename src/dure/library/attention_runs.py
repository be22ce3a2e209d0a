"""Attention of few tokens whose keys the workers share.

The keys of a token and a KV head fall into runs, each an instance of :func:`attention_runs`;
:func:`join_runs` puts the sums of all runs together.  Both compute exactly what
:func:`~dure.library.attention.paged_attention` does with as many ``runs``, so that a token's result
has the same bits whichever way it is computed.
"""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.attention import (
    averaged,
    joined,
    placed,
    run_of,
    sink_tile,
    started,
    store_group,
)
from dure.library.indices import OptionalPlaces, Places


@dure.kernel
def attention_runs(
    q: dl.Tensor,
    k_pool: dl.Tensor,
    v_pool: dl.Tensor,
    positions: Places,
    block_table: OptionalPlaces,
    context: Places,
    work_sequence: Places,
    work_start: Places,
    highest: dl.Tensor,
    total: dl.Tensor,
    weighted: dl.Tensor,
    group: dl.const,
    bg: dl.const,
    bd: dl.const,
    page: dl.const,
    piece: dl.const,
    scale: dl.const,
    runs: dl.const,
    window: dl.const = 0,
    softcap: dl.const = 0.0,
    causal: dl.const = True,
):
    """The sums of each run of keys that :func:`paged_attention` joins, for work items of one token.

    Work item w gives ``highest`` and ``total`` (W, KV heads, runs, bg, 1) and ``weighted`` (W, KV
    heads, runs, bg, D), in float32; grid (runs, KV heads, W).
    """
    run, kv_head, item = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    sequence, start = work_sequence[item], work_start[item]
    stop = min(start + 1, q.shape[0])
    cache = (k_pool, v_pool, block_table, sequence, kv_head, context[sequence])
    numbers = (page, piece, scale, window, softcap, causal, True, runs)
    heads = q[start:stop, kv_head * group : kv_head * group + group]
    tile = dl.load(heads, (0, 0, 0), (1, bg, bd)).reshape((bg, bd))
    seen_by = placed(tile, positions[start:stop], 1, bg, cache, numbers)
    top, below, acc = run_of(seen_by, run, started(None, (bg, bd)), cache, numbers)
    place = (item, kv_head, run, 0, 0)
    dl.store(highest, place, top.reshape((1, 1, 1, bg, 1)))
    dl.store(total, place, below.reshape((1, 1, 1, bg, 1)))
    dl.store(weighted, place, acc.reshape((1, 1, 1, bg, bd)))


@dure.kernel
def join_runs(
    y: dl.Tensor,
    highest: dl.Tensor,
    total: dl.Tensor,
    weighted: dl.Tensor,
    work_start: Places,
    sinks: dl.Tensor | None,
    size: dl.const,
    group: dl.const,
    bg: dl.const,
    bd: dl.const,
    runs: dl.const,
):
    """The results y (T, H * ``size``) of the work items of which :func:`attention_runs` gives the
    sums.
    """
    item, kv_head = dl.program_id(0), dl.program_id(1)
    start = work_start[item]
    own_y = y[start : min(start + 1, y.shape[0])]
    sums = started(sink_tile(sinks, kv_head * group, group, bg), (bg, bd))
    for run in dl.range(runs):
        place = (item, kv_head, run, 0, 0)
        top = dl.load(highest, place, (1, 1, 1, bg, 1)).reshape((bg, 1))
        below = dl.load(total, place, (1, 1, 1, bg, 1)).reshape((bg, 1))
        acc = dl.load(weighted, place, (1, 1, 1, bg, bd)).reshape((bg, bd))
        sums = joined(sums, (top, below, acc))
    store_group(own_y, kv_head * group, averaged(sums), group, size)
