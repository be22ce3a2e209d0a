"""Cases of attention: dense and causal, over a paged cache, and in steps with scores in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dure.library.attention import LOWEST, paged_attention
from dure.library.attention_columns import attention_columns
from dure.library.attention_dense import attention_scores, dense_attention
from dure.library.attention_grouped import grouped_attention
from dure.library.attention_ragged import ragged_attention
from dure.library.attention_rows import attention_rows
from dure.library.attention_split import join_attention, split_attention
from dure.library.suite.case import NUMPY, Array, Case, Drawn, Shape, empty, normal, values

#: Parts of the heads whose tiles are worked on side by side.
_PARTS = 2
#: Runs that a token's keys are cut in.
_RUNS = 2

_TOLERANCES = {"f32": 1e-4, "f16": 4e-3, "bf16": 3e-2}


def attended(
    q: Array,
    k: Array,
    v: Array,
    position: int,
    numbers: tuple[float, int, float],
    sinks: Array | None = None,
) -> Array:
    """One query of every head, (H, D), over the positions of k and v (S, Hkv, D) that it sees;
    ``sinks`` (H,) are one more logit each.
    """
    scale, window, softcap = numbers
    first = max(0, position - window + 1) if window else 0
    keys, weighted = k[first : position + 1], v[first : position + 1]
    group = len(q) // k.shape[1]
    scores = np.einsum("hd,khd->hk", q, np.repeat(keys, group, 1)) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if sinks is not None:
        scores = np.concatenate([scores, sinks[:, None]], -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hk,khd->hd", weights[:, : len(keys)], np.repeat(weighted, group, 1))


def draw_dense(
    dtype: str, window: int, softcap: float, causal: bool, rng: np.random.Generator, size: Shape
) -> Drawn:
    """Dense attention of ``(Hq, Hkv, Sq, Skv, D)``."""
    heads, kv_heads, queries, length, d = size
    q = normal(rng, dtype, heads, queries, d)
    k, v = normal(rng, dtype, kv_heads, length, d), normal(rng, dtype, kv_heads, length, d)
    scale = d**-0.5
    turned = [values(a).swapaxes(0, 1) for a in (q, k, v)]
    expected = np.stack(
        [
            attended(
                turned[0][t],
                turned[1],
                turned[2],
                length - queries + t if causal else length - 1,
                (scale, window, softcap),
            )
            for t in range(queries)
        ]
    ).swapaxes(0, 1)
    consts = {
        "bd": 1 << (d - 1).bit_length(),
        "group": heads // kv_heads,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "causal": causal,
    }
    return Drawn([q, k, v, empty(dtype, heads, queries, d)], {3: expected}, consts)


def dense_cases() -> Iterable[Case]:
    """Causal prefill, and attention without a mask."""
    sizes: tuple[Shape, ...] = (
        (1, 1, 1, 1, 1),
        (2, 1, 3, 3, 8),
        (4, 2, 5, 13, 12),
        (6, 2, 33, 70, 16),
    )
    tiles = {"bq": 16, "bk": 16}
    large = ("dense_attention", "32x8x2048x2048x128", "bf16")
    forms = (("f32", 0, 0.0), ("f32", 7, 0.0), ("f32", 0, 3.0), ("bf16", 0, 0.0), ("bf16", 9, 5.0))
    for dtype, window, softcap in forms:
        marks = (" window" if window else "") + (" softcap" if softcap else "")
        name = f"causal prefill attention{marks} {dtype}"
        draw = partial(draw_dense, dtype, window, softcap, True)
        item = "causal prefill attention"
        tolerance = _TOLERANCES[dtype]
        yield Case(name, item, dense_attention, draw, sizes, tiles, large, tolerance)
    for dtype in ("f32", "bf16"):
        draw = partial(draw_dense, dtype, 0, 0.0, False)
        large = ("attn_enc", "12x512x64", dtype)
        name = f"encoder attention in one kernel {dtype}"
        item = "encoder attention"
        tolerance = _TOLERANCES[dtype]
        yield Case(name, item, dense_attention, draw, sizes, tiles, large, tolerance)


@dataclass(frozen=True)
class Cache:
    """Sequences of keys and values, scattered over pages; what nobody wrote is NaN."""

    table: Array
    pools: tuple[Array, Array]
    rows: tuple[list[Array], list[Array]]
    context: Array


def scattered(
    rng: np.random.Generator, dtype: str, lengths: Sequence[int], shape: tuple[int, int], page: int
) -> Cache:
    """Random keys and values of ``shape`` (KV heads, D) for sequences of these lengths."""
    counts = [-(-n // page) for n in lengths]
    order = rng.permutation(sum(counts) + 2).astype(np.int32)
    table = np.full((len(lengths), max(counts)), 0, np.int32)
    slots = (sum(counts) + 2) * page
    pools = tuple(np.full((slots, *shape), np.nan, NUMPY[dtype]) for _ in range(2))
    rows: tuple[list[Array], list[Array]] = ([], [])
    taken = 0
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = order[taken : taken + count]
        taken += count
        table[s, :count] = own
        places = (own[:, None] * page + np.arange(page)).reshape(-1)[:length]
        for pool, kept in zip(pools, rows, strict=True):
            drawn = normal(rng, dtype, length, *shape)
            kept.append(values(drawn))
            pool[places] = drawn
    return Cache(table, (pools[0], pools[1]), rows, np.array(lengths, np.int32))


def ragged(rng: np.random.Generator, size: Shape) -> tuple[list[int], list[int]]:
    """Lengths of sequences, up to ``size[3]``, and how many of their last tokens are queries, up to
    ``size[2]``; the first sequence has the most of both.
    """
    _, _, queries, length, _, count = size
    lengths = [length, *(int(n) for n in rng.integers(1, length + 1, count - 1))]
    parts = [queries, *(int(rng.integers(1, min(queries, n) + 1)) for n in lengths[1:])]
    return lengths, parts


def draw_paged(
    dtype: str, window: int, softcap: float, rng: np.random.Generator, size: Shape
) -> Drawn:
    """``(Hq, Hkv, Sq, Skv, D, sequences)`` through dure's own kernel, four tokens a work item."""
    heads, kv_heads, _, _, d, _ = size
    lengths, parts = ragged(rng, size)
    page, bq = 4, 4
    cache = scattered(rng, dtype, lengths, (kv_heads, d), page)
    positions: list[int] = []
    work: list[tuple[int, int, int]] = []
    expected: list[Array] = []
    q = normal(rng, dtype, sum(parts), heads, d)
    scale = d**-0.5
    for s, (length, count) in enumerate(zip(lengths, parts, strict=True)):
        starts = range(0, count, bq)
        work += [(s, len(positions) + start, min(bq, count - start)) for start in starts]
        for place in range(length - count, length):
            own, numbers = values(q[len(positions)]), (scale, window, softcap)
            row = attended(own, cache.rows[0][s], cache.rows[1][s], place, numbers)
            expected.append(row.reshape(-1))
            positions.append(place)
    consts = {
        "bq": bq,
        "group": heads // kv_heads,
        "bg": 1 << (heads // kv_heads - 1).bit_length(),
        "bd": 1 << (d - 1).bit_length(),
        "page": page,
        "piece": 8,
        "scale": scale,
        "window": window,
        "softcap": softcap,
    }
    lists = [np.array(column, np.int32) for column in zip(*work, strict=True)]
    where = np.array(positions, np.int32)
    y = empty(dtype, sum(parts), heads * d)
    arguments = [q, *cache.pools, where, cache.table, cache.context, *lists, None, y]
    return Drawn(arguments, {10: np.stack(expected)}, consts)


@dataclass(frozen=True)
class Grouped:
    """A form of grouped attention."""

    dtype: str
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    causal: bool = True
    ahead: int = 0
    columns: bool = False
    rows: bool = False

    @property
    def name(self) -> str:
        """What sets it apart."""
        marks = {
            "window softcap": self.window,
            "sinks": self.sinks,
            "without a mask": not self.causal,
            "ahead": self.ahead == 1,
            "keys ahead": self.ahead == 2,
        }
        return "".join(f" {mark}" for mark, there in marks.items() if there) + f" {self.dtype}"


def draw_grouped(form: Grouped, rng: np.random.Generator, size: Shape) -> Drawn:
    """The same through the kernel whose tiles hold a KV head's group; heads of a cache come first.

    The tokens of a work item lie in one block of eight positions.
    """
    heads, kv_heads, _, _, d, _ = size
    group, page, rows, dtype = heads // kv_heads, 4, 8, form.dtype
    lengths, parts = ragged(rng, size)
    cache = scattered(rng, dtype, lengths, (kv_heads, d), page)
    q = normal(rng, dtype, sum(parts), kv_heads, group, d)
    sinks = normal(rng, "f32", kv_heads, group, 1) if form.sinks else None
    numbers = (d**-0.5, form.window, form.softcap)
    positions: list[int] = []
    work: list[tuple[int, int, int]] = []
    expected: list[Array] = []
    for s, (length, count) in enumerate(zip(lengths, parts, strict=True)):
        place = length - count
        while place < length:
            end = min(length, (place // rows + 1) * rows)
            work.append((s, len(positions), end - place))
            for own in range(place, end):
                row = values(q[len(positions)]).reshape(heads, d)
                last = own if form.causal else length - 1
                extra = None if sinks is None else sinks.reshape(heads)
                row = attended(row, cache.rows[0][s], cache.rows[1][s], last, numbers, extra)
                expected.append(row.reshape(kv_heads, group, d))
                positions.append(own)
            place = end
    consts = {
        "rows": rows,
        "bg": 1 << (group - 1).bit_length(),
        "bd": 1 << (d - 1).bit_length(),
        "page": page,
        "scale": numbers[0],
        "window": form.window,
        "softcap": form.softcap,
        "causal": form.causal,
        # What an encoder's rows give lies as it was made.
        **({"parts": _PARTS} if form.columns else {}),
        **({"pages": cache.table.shape[1], "aligned": 1} if form.rows else {}),
    }
    if not form.columns and not form.rows:
        consts |= {"heads_first": form.causal, "ahead": form.ahead}
    pools = [np.ascontiguousarray(p.swapaxes(0, 1)) if form.causal else p for p in cache.pools]
    lists = [np.array(column, np.int32) for column in zip(*work, strict=True)]
    where = np.array(positions, np.int32)
    y = empty(dtype, sum(parts), kv_heads, group, d)
    table = cache.table.reshape(-1) if form.rows else cache.table
    arguments = [q, *pools, where, table, cache.context, *lists, sinks, y]
    return Drawn(arguments, {10: np.stack(expected)}, consts)


def run_sums(
    query: Array, k: Array, v: Array, keys: tuple[int, int], softcap: float
) -> tuple[Array, Array, Array]:
    """The highest score, the sum of weights below it and the weighted values of scaled queries
    (Hkv, group, D) over a run of keys.
    """
    heads, group, d = query.shape
    if keys[0] >= keys[1]:
        empty_run = np.zeros((heads, group, 1))
        return empty_run + LOWEST, empty_run, np.zeros((heads, group, d))
    scores = np.einsum("hgd,khd->hgk", query, k[slice(*keys)])
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    sums = weights.sum(-1, keepdims=True)
    return top, sums, np.einsum("hgk,khd->hgd", weights, v[slice(*keys)])


def draw_split(form: Grouped, rng: np.random.Generator, size: Shape) -> Drawn:
    """One token of each sequence of ``(Hq, Hkv, 1, Skv, D, sequences)``, in runs of its keys."""
    dtype, window, softcap = form.dtype, form.window, form.softcap
    heads, kv_heads, _, _, d, _ = size
    group, page, piece = heads // kv_heads, 4, 4
    lengths, _ = ragged(rng, size)
    cache = scattered(rng, dtype, lengths, (kv_heads, d), page)
    q = normal(rng, dtype, len(lengths), kv_heads, group, d)
    found: list[list[Array]] = [[], [], []]
    for s, length in enumerate(lengths):
        begin = max(length - window, 0) if window else 0
        pieces = range(begin // piece, (length - 1) // piece + 1)
        each = -(-len(pieces) // _RUNS)
        for run in range(_RUNS):
            first = (pieces.start + run * each) * piece
            keys = max(first, begin), min(first + each * piece, length)
            sums = run_sums(
                values(q[s]) * d**-0.5, cache.rows[0][s], cache.rows[1][s], keys, softcap
            )
            for kept, value in zip(found, sums, strict=True):
                kept.append(value)
    shape = len(lengths), _RUNS, kv_heads, group
    expected = [np.stack(f).reshape(*shape, -1).swapaxes(1, 2) for f in found]
    consts = {
        "bg": 1 << (group - 1).bit_length(),
        "bd": 1 << (d - 1).bit_length(),
        "page": page,
        "piece": piece,
        "splits": _RUNS,
        "scale": d**-0.5,
        "window": window,
        "softcap": softcap,
        "ahead": form.ahead,
    }
    pools = [np.ascontiguousarray(p.swapaxes(0, 1)) for p in cache.pools]
    order = np.arange(len(lengths), dtype=np.int32)
    lists = [np.array(lengths, np.int32) - 1, cache.table, cache.context, order, order]
    results = [empty("f32", *e.shape) for e in expected]
    arguments = [q, *pools, None, None, *lists, *results]
    return Drawn(arguments, {10 + n: e for n, e in enumerate(expected)}, consts)


def draw_join(dtype: str, sunk: bool, rng: np.random.Generator, size: Shape) -> Drawn:
    """``(T, Hkv, group, D)`` of ``_RUNS`` runs, of which some have no keys."""
    tokens, heads, group, d = size
    shape = tokens, heads, _RUNS, group
    there = np.arange(_RUNS)[:, None, None] < rng.integers(1, _RUNS + 1)
    top = np.where(there, normal(rng, "f32", *shape, 1), LOWEST).astype(np.float32)
    sums = np.where(there, rng.uniform(1, 9, (*shape, 1)), 0).astype(np.float32)
    weighted = np.where(there, normal(rng, "f32", *shape, d), 0).astype(np.float32)
    sinks = normal(rng, "f32", heads, group, 1) if sunk else None
    wide = np.exp(top.astype(np.float64))
    whole = (sums * wide).sum(2) + (0 if sinks is None else np.exp(sinks.astype(np.float64)))
    consts = {
        "bg": 1 << (group - 1).bit_length(),
        "bd": 1 << (d - 1).bit_length(),
        "splits": _RUNS,
    }
    y = empty(dtype, tokens, heads, group, d)
    return Drawn([top, sums, weighted, sinks, y], {4: (weighted * wide).sum(2) / whole}, consts)


def draw_ragged(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """The same batch through the algorithm of the measured kernel, heads first."""
    heads, kv_heads, _, _, d, _ = size
    group = heads // kv_heads
    lengths, parts = ragged(rng, size)
    page, bq = 4, 4
    cache = scattered(rng, dtype, lengths, (kv_heads, d), page)
    tokens = sum(parts)
    starts = np.concatenate([[0], np.cumsum(parts)]).astype(np.int32)
    owner = np.repeat(np.arange(len(parts)), parts)
    scale = d**-0.5
    q = normal(rng, dtype, kv_heads, tokens, group, d)
    rows = values(q).swapaxes(0, 1).reshape(tokens, heads, d)
    expected = np.stack(
        [
            attended(
                rows[t],
                cache.rows[0][s],
                cache.rows[1][s],
                lengths[s] - parts[s] + t - int(starts[s]),
                (scale, 0, 0.0),
            )
            for t, s in enumerate(owner)
        ]
    )
    expected = expected.reshape(tokens, kv_heads, group, d).swapaxes(0, 1)
    firsts = np.arange(0, tokens, bq)
    lasts = np.minimum(firsts + bq, tokens) - 1
    consts = {
        "bq": bq,
        "group": group,
        "bh": 1 << (kv_heads - 1).bit_length(),
        "bd": 1 << (d - 1).bit_length(),
        "page": page,
        "piece": 8,
        "scale": scale,
    }
    pools = [np.ascontiguousarray(pool.swapaxes(0, 1)) for pool in cache.pools]
    ends = [owner[firsts].astype(np.int32), (owner[lasts] + 1).astype(np.int32)]
    y = empty(dtype, kv_heads, tokens, group, d)
    arguments = [q, *pools, cache.context, cache.table, starts, *ends, y]
    return Drawn(arguments, {8: expected}, consts)


def paged_cases() -> Iterable[Case]:
    """Decode of one token a sequence, and ragged batches."""
    decode: tuple[Shape, ...] = (
        (1, 1, 1, 1, 1, 1),
        (3, 1, 1, 5, 8, 2),
        (8, 2, 1, 21, 16, 3),
    )
    mixed: tuple[Shape, ...] = ((1, 1, 1, 1, 1, 1), (4, 2, 3, 9, 12, 2), (6, 2, 7, 21, 16, 3))
    item = "paged decode attention"
    large = ("paged_attention", "32x8x1x8192x128", "bf16")
    forms = (
        ("f32", 0, 0.0),
        ("f32", 5, 3.0),
        ("f16", 0, 0.0),
        ("bf16", 0, 0.0),
    )
    for dtype, window, softcap in forms:
        marks = (" window softcap" if window else "") + f" {dtype}"
        draw = partial(draw_paged, dtype, window, softcap)
        tolerance = _TOLERANCES[dtype]
        name = f"paged decode attention{marks}"
        yield Case(name, item, paged_attention, draw, decode, {}, large, tolerance)
        name = f"paged attention of a ragged batch{marks}"
        full = ("paged_attention", "32x8x512x2048x128", "bf16")
        yield Case(name, item, paged_attention, draw, mixed, {}, full, tolerance)
    tiles = {"bq": 4, "bh": 2, "piece": 8}
    plain, windowed = Grouped("f32"), Grouped("f32", 5, 3.0)
    sunk, encoder = Grouped("f32", 5, sinks=True), Grouped("bf16", causal=False)
    scores, keys = (Grouped("bf16", 5, 3.0, sinks=True, ahead=n) for n in (1, 2))
    for form in (plain, windowed, Grouped("bf16"), sunk, encoder, scores, keys):
        draw = partial(draw_grouped, form)
        for kind, sizes, dims in (
            ("decode", decode, "32x8x1x8192x128"),
            ("a ragged batch", mixed, "32x8x512x2048x128"),
        ):
            name = f"grouped attention of {kind}{form.name}"
            full, tolerance = ("attn", dims, "bf16"), _TOLERANCES[form.dtype]
            yield Case(name, item, grouped_attention, draw, sizes, tiles, full, tolerance)
    even: tuple[Shape, ...] = ((2, 2, 1, 1, 1, 1), (4, 2, 3, 9, 12, 2), (8, 4, 7, 21, 16, 3))
    columns = Grouped("bf16", columns=True)
    for form in (columns, Grouped("f32", 5, 3.0, sinks=True, columns=True)):
        draw, tolerance = partial(draw_grouped, form), _TOLERANCES[form.dtype]
        full, name = ("attn", "32x8x512x2048x128", "bf16"), f"attention by columns{form.name}"
        yield Case(name, item, attention_columns, draw, even, tiles, full, tolerance)
    for form in (Grouped("bf16", rows=True), Grouped("f32", 5, 3.0, sinks=True, rows=True)):
        draw, tolerance = partial(draw_grouped, form), _TOLERANCES[form.dtype]
        full, name = ("attn", "32x8x512x2048x128", "bf16"), f"attention by rows{form.name}"
        yield Case(name, item, attention_rows, draw, mixed, tiles, full, tolerance)
    yield from shared_cases()
    for dtype in ("f32", "bf16"):
        draw = partial(draw_ragged, dtype)
        full = ("ragged_attention", "32x8x512x2048x128", "bf16")
        name = f"paged attention as measured {dtype}"
        tolerance = _TOLERANCES[dtype]
        yield Case(name, item, ragged_attention, draw, mixed, {}, full, tolerance, pinned=True)


def shared_cases() -> Iterable[Case]:
    """Decode whose keys many cores share, and what puts their sums together."""
    # There is a core for each run: one that has many of them takes long to prove.
    decode: tuple[Shape, ...] = ((1, 1, 1, 1, 1, 1), (3, 1, 1, 5, 8, 2), (4, 2, 1, 21, 16, 2))
    item, large = "paged decode attention", ("attn", "32x8x1x8192x128", "bf16")
    plain, windowed = Grouped("bf16"), Grouped("f32", 5, 3.0)
    ahead = [replace(form, ahead=n) for form, n in ((windowed, 1), (plain, 2), (windowed, 2))]
    for form in (plain, windowed, *ahead):
        name = f"attention of runs of keys{form.name}"
        draw, tolerance = partial(draw_split, form), _TOLERANCES[form.dtype]
        yield Case(name, item, split_attention, draw, decode, {"bh": 1}, large, tolerance)
    sizes: tuple[Shape, ...] = ((1, 1, 1, 1), (2, 1, 3, 8), (3, 2, 4, 16))
    for dtype, sunk in (("bf16", False), ("f32", True)):
        name = f"sums of runs of keys{' sinks' if sunk else ''} {dtype}"
        draw, tolerance = partial(draw_join, dtype, sunk), _TOLERANCES[dtype]
        yield Case(name, item, join_attention, draw, sizes, {"bh": 1, "bs": 1}, large, tolerance)


def draw_scores(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """Scores of every query with every key."""
    h, queries, length, d = size
    q, k = normal(rng, dtype, h, queries, d), normal(rng, dtype, h, length, d)
    z = np.einsum("hqd,hkd->hqk", values(q), values(k)) * d**-0.5
    consts = {"bd": 1 << (d - 1).bit_length(), "scale": d**-0.5}
    return Drawn([q, k, empty(dtype, h, queries, length)], {2: z}, consts)


def score_cases() -> Iterable[Case]:
    """The first of the steps with scores in memory; the others are softmax and a batched matmul."""
    for dtype in ("f32", "bf16"):
        draw = partial(draw_scores, dtype)
        large = ("attention_scores", "96x128x128x64", dtype)
        sizes = ((1, 1, 1, 1), (2, 3, 5, 7), (3, 33, 40, 16))
        name = f"attention scores {dtype}"
        tiles = {"bm": 16, "bn": 16}
        tolerance = _TOLERANCES[dtype]
        yield Case(
            name, "encoder attention", attention_scores, draw, sizes, tiles, large, tolerance
        )


def cases() -> list[Case]:
    """All of this module."""
    return [case for group in (dense_cases, paged_cases, score_cases) for case in group()]
