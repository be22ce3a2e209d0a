"""Rope, KV writes and paged attention against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from library_runner import EXECUTORS, Execute

import dure.library as library
from dure.library.attention_rows import attention_rows
from dure.library.attention_runs import attention_runs, join_runs

settings.register_profile(
    "kernels",
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernels")
Floats = np.ndarray[Any, Any]


@pytest.fixture(params=EXECUTORS)
def execute(request: pytest.FixtureRequest) -> Execute:
    return request.param


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotate(x: Floats, cosines: Floats, sines: Floats, interleaved: bool) -> Floats:
    turn = 2 * cosines.shape[1]
    result = x.astype(np.float64)
    first = slice(0, turn, 2) if interleaved else slice(0, turn // 2)
    second = slice(1, turn, 2) if interleaved else slice(turn // 2, turn)
    a, b = result[..., first].copy(), result[..., second].copy()
    result[..., first] = a * cosines[:, None] - b * sines[:, None]
    result[..., second] = b * cosines[:, None] + a * sines[:, None]
    return result


@given(
    tokens=st.sampled_from([0, 1, 2, 7]),
    heads=st.sampled_from([1, 3, 4]),
    sizes=st.sampled_from([(16, 16), (12, 12), (24, 16)]),
    interleaved=st.booleans(),
    norm=st.booleans(),
    bt=st.sampled_from([1, 4]),
)
def test_rope_and_its_write_to_the_cache(
    execute: Execute,
    tokens: int,
    heads: int,
    sizes: tuple[int, int],
    interleaved: bool,
    norm: bool,
    bt: int,
) -> None:
    size, turn = sizes
    x, y = normal(1, tokens, heads, size), normal(0, tokens, heads, size)
    rng = np.random.default_rng(2)
    positions = rng.integers(0, 20, tokens).astype(np.int32)
    angle = np.arange(20)[:, None] * 0.2 ** np.arange(turn // 2)
    cosines, sines = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    weight = normal(3, size) if norm else None
    wide = x.astype(np.float64)
    if weight is not None:
        wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    expected = rotate(wide, cosines[positions], sines[positions], interleaved)
    consts = {
        "bt": bt,
        "bh": 2,
        "half": 8,
        "rest": 8 if turn < size else 0,
        "interleaved": interleaved,
        "epsilon": 1e-6,
    }
    execute(library.rope, [x, cosines, sines, positions, weight, y], **consts)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    slots = rng.permutation(30)[:tokens].astype(np.int32)
    slots[::3] = -1
    pool = np.full((30, heads, size), 7, np.float16)
    wanted = pool.astype(np.float64)
    wanted[slots[slots >= 0]] = expected[slots >= 0]
    tables = (slots, cosines, sines, positions, weight)
    execute(library.rope_kv_write, [pool, x, *tables], updates=True, **consts)
    np.testing.assert_allclose(pool, wanted, rtol=2e-3, atol=2e-3)
    pool = np.full((30, heads, size), 7, np.float16)
    wanted = pool.copy()
    wanted[slots[slots >= 0]] = x[slots >= 0]
    execute(library.kv_write, [pool, x, slots], updates=True, bt=bt, bh=2, bd=32)
    np.testing.assert_array_equal(pool, wanted)


class Cache:
    """Sequences of random keys and values, scattered over the pages of two pools."""

    def __init__(self, lengths: list[int], heads: int, size: int, page: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        pages = [-(-n // page) for n in lengths]
        order = rng.permutation(sum(pages) + 2).astype(np.int32)
        columns = 2 * -(-max(pages) // 2)
        self.table = np.zeros((len(lengths), columns), np.int32)
        shape = ((sum(pages) + 2) * page, heads, size)
        # Whatever is not written is NaN: it must never be seen.
        self.pools = [np.full(shape, np.nan, np.float16) for _ in range(2)]
        self.rows: list[list[Floats]] = [[], []]
        taken = 0
        for s, n in enumerate(lengths):
            own = order[taken : taken + pages[s]]
            taken += pages[s]
            self.table[s, : len(own)] = own
            slots = (own[:, None] * page + np.arange(page)).reshape(-1)[:n]
            for kind in range(2):
                rows = rng.standard_normal((n, heads, size)).astype(np.float16)
                self.rows[kind].append(rows)
                self.pools[kind][slots] = rows
        self.context = np.array(lengths, np.int32)

    def share(
        self,
        query: Floats,
        s: int,
        position: int,
        sink: Floats,
        scale: float,
        window: int,
        softcap: float,
    ) -> Floats:
        """The part (H, 1) of the softmax of one row (H, D) that sinks (H, 1) leave."""
        scores = self.scores(query, s, position, scale, window, softcap)
        weights = np.exp(scores).sum(-1, keepdims=True)
        return weights / (weights + np.exp(sink.astype(np.float64)))

    def scores(
        self, query: Floats, s: int, position: int, scale: float, window: int, softcap: float
    ) -> Floats:
        """Those (H, K) of one row (H, D) of sequence s."""
        first = max(0, position - window + 1) if window else 0
        keys = self.rows[0][s][first : position + 1].astype(np.float64)
        group = len(query) // keys.shape[1]
        scores = np.einsum("hd,khd->hk", query, np.repeat(keys, group, 1)) * scale
        return softcap * np.tanh(scores / softcap) if softcap else scores

    def attend(
        self, query: Floats, s: int, position: int, scale: float, window: int, softcap: float
    ) -> Floats:
        """One row (H, D) of sequence s."""
        first = max(0, position - window + 1) if window else 0
        values = self.rows[1][s][first : position + 1].astype(np.float64)
        group = len(query) // values.shape[1]
        scores = self.scores(query, s, position, scale, window, softcap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hk,khd->hd", weights, np.repeat(values, group, 1))


def run_attention(
    execute: Execute,
    cache: Cache,
    heads: int,
    parts: list[tuple[int, int]],
    *,
    apart: bool = False,
    runs: int = 1,
    **numbers: Any,
) -> tuple[Floats, Floats]:
    """The last ``count`` tokens of each (s, count): by the kernel, and by the reference."""
    size, bq = cache.pools[0].shape[2], 4
    positions: list[int] = []
    owners: list[int] = []
    work: list[tuple[int, int, int]] = []
    for s, count in parts:
        starts = range(0, count, bq)
        work += [(s, len(positions) + start, min(bq, count - start)) for start in starts]
        length = int(cache.context[s])
        positions += range(length - count, length)
        owners += [s] * count
    q = normal(5, len(positions), heads, size)
    y = np.zeros((len(positions), heads * size), np.float32)
    group = heads // cache.pools[0].shape[1]
    lists = [np.array(column, np.int32) for column in zip(*work, strict=True)]
    where = np.array(positions, np.int32)
    execute(
        library.paged_attention,
        [q, *cache.pools, where, cache.table, cache.context, *lists, None, y],
        bq=bq,
        group=group,
        bg=1 << (group - 1).bit_length(),
        bd=1 << (size - 1).bit_length(),
        page=4,
        piece=8,
        apart=apart,
        runs=runs,
        **numbers,
    )
    expected = np.stack(
        [cache.attend(q[t], owners[t], positions[t], **numbers).reshape(-1) for t in range(len(q))]
    )
    return y, expected


@given(
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 2)]),
    size=st.sampled_from([8, 12, 16]),
    window=st.sampled_from([0, 1, 5]),
    softcap=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_paged_attention_of_a_ragged_batch(
    execute: Execute,
    lengths: list[int],
    heads: tuple[int, int],
    size: int,
    window: int,
    softcap: float,
    seed: int,
) -> None:
    cache = Cache(lengths, heads[1], size, 4, seed)
    rng = np.random.default_rng(seed)
    parts = [(s, int(rng.integers(1, n + 1))) for s, n in enumerate(lengths)]
    found, expected = run_attention(
        execute, cache, heads[0], parts, scale=0.3, window=window, softcap=softcap
    )
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    # Pieces without masks give the same bits.
    apart, _ = run_attention(
        execute, cache, heads[0], parts, apart=True, scale=0.3, window=window, softcap=softcap
    )
    np.testing.assert_array_equal(apart, found)


def test_a_token_has_the_same_bits_alone_and_in_a_chunk(execute: Execute) -> None:
    cache = Cache([19, 6], 2, 16, 4, 1)
    numbers = {"scale": 0.25, "window": 7, "softcap": 0.0}
    chunk, _ = run_attention(execute, cache, 6, [(0, 7)], **numbers)
    batch, _ = run_attention(execute, cache, 6, [(0, 7), (1, 1)], **numbers)
    np.testing.assert_array_equal(chunk, batch[:7])
    # The same query row as the first of a chunk, and by itself in the decode tile.
    one = Cache([13, 6], 2, 16, 4, 1)
    for kind in range(2):
        one.pools[kind] = cache.pools[kind]
    one.table = cache.table
    alone, _ = run_attention(execute, one, 6, [(0, 1)], **numbers)
    np.testing.assert_array_equal(alone[0], chunk[0])


@given(
    lengths=st.lists(st.integers(1, 170), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (6, 2)]),
    window=st.sampled_from([0, 1, 50]),
    softcap=st.sampled_from([0.0, 3.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_runs_of_keys_are_joined_to_the_same_bits(
    execute: Execute,
    lengths: list[int],
    heads: tuple[int, int],
    window: int,
    softcap: float,
    sinks: bool,
    seed: int,
) -> None:
    size, group = 16, heads[0] // heads[1]
    cache = Cache(lengths, heads[1], size, 4, seed)
    numbers = {"scale": 0.3, "window": window, "softcap": softcap}
    consts = {"group": group, "bg": 1 << (group - 1).bit_length(), "bd": size, "runs": 4}
    pages = {"page": 4, "piece": 8, **numbers}
    q = normal(5, len(lengths), heads[0], size)
    sink = normal(7, heads[0]) if sinks else None
    order = np.arange(len(lengths), dtype=np.int32)
    where = np.array(lengths, np.int32) - 1
    lists = [q, *cache.pools, where, cache.table, cache.context, order, order]
    whole, joined = (np.zeros((len(q), heads[0] * size), np.float32) for _ in range(2))
    ones = np.ones(len(q), np.int32)
    execute(
        library.paged_attention, [*lists, ones, sink, whole], bq=4, apart=True, **consts, **pages
    )
    shape = len(q), heads[1], 4, group
    sums = [np.zeros((*shape, wide), np.float32) for wide in (1, 1, size)]
    execute(attention_runs, [*lists, *sums], **consts, **pages)
    execute(join_runs, [joined, *sums, order, sink], size=size, **consts)
    np.testing.assert_array_equal(joined, whole)
    for s, length in enumerate(lengths):
        expected = cache.attend(q[s], s, length - 1, **numbers)
        if sink is not None:
            expected = expected * cache.share(q[s], s, length - 1, sink[:, None], **numbers)
        np.testing.assert_allclose(whole[s].reshape(expected.shape), expected, rtol=2e-3, atol=2e-3)


def test_a_tokens_runs_do_not_depend_on_its_chunk(execute: Execute) -> None:
    cache = Cache([140], 2, 16, 4, 1)
    numbers = {"scale": 0.25, "window": 100, "softcap": 0.0, "apart": True, "runs": 4}
    chunk, _ = run_attention(execute, cache, 6, [(0, 9)], **numbers)
    cache.context[:] = 132
    alone, _ = run_attention(execute, cache, 6, [(0, 1)], **numbers)
    np.testing.assert_array_equal(alone[0], chunk[0])


def work_items(
    cache: Cache, parts: list[tuple[int, int]], rows: int
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The positions of the last ``count`` tokens of each (s, count), and work items of aligned runs
    of ``rows``.
    """
    positions: list[int] = []
    work: list[tuple[int, int, int]] = []
    for s, count in parts:
        length = int(cache.context[s])
        place = length - count
        while place < length:
            end = min(length, (place // rows + 1) * rows)
            work.append((s, len(positions), end - place))
            positions += range(place, end)
            place = end
    return positions, work


def run_grouped(
    execute: Execute, cache: Cache, parts: list[tuple[int, int]], bq: int, ahead: int = 0
) -> Floats:
    """The last ``count`` tokens of each (s, count) in work items of aligned runs of eight."""
    kv_heads, size, rows = *cache.pools[0].shape[1:], 8
    positions, work = work_items(cache, parts, rows)
    q = normal(5, 20, kv_heads, 2, size)[-len(positions) :]
    y = np.zeros_like(q)
    pools = [np.ascontiguousarray(pool.swapaxes(0, 1)) for pool in cache.pools]
    lists = [np.array(column, np.int32) for column in zip(*work, strict=True)]
    where = np.array(positions, np.int32)
    arguments = [q, *pools, where, cache.table, cache.context, *lists, None, y]
    consts = {"bq": bq, "bh": 1, "rows": rows, "bg": 2, "bd": size, "page": 4, "piece": 8}
    execute(library.grouped_attention, arguments, scale=0.3, ahead=ahead, **consts)
    return y


def test_a_token_of_a_group_has_the_same_bits_alone_and_in_a_chunk(execute: Execute) -> None:
    cache = Cache([20, 6], 2, 16, 4, 1)
    chunk = run_grouped(execute, cache, [(0, 13)], 8)
    for bq in (1, 4):
        for ahead in (0, 1, 2):
            found = run_grouped(execute, cache, [(0, 13)], bq, ahead)
            np.testing.assert_array_equal(found, chunk)
    alone = run_grouped(execute, cache, [(0, 1)], 1)
    np.testing.assert_array_equal(alone[0], chunk[-1])


@pytest.mark.parametrize(("rows", "early"), [(8, False), (64, False), (64, True)])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(0, 0.0, False), (11, 3.0, True)])
def test_attention_by_rows(
    rows: int, early: bool, window: int, softcap: float, sinks: bool
) -> None:
    cache = Cache([45, 6, 17], 2, 16, 4, 1)
    positions, work = work_items(cache, [(0, 41), (1, 6), (2, 9)], rows)
    q = normal(5, len(positions), 2, 2, 16)
    y = np.zeros_like(q)
    pools = [np.ascontiguousarray(pool.swapaxes(0, 1)) for pool in cache.pools]
    lists = [np.array(column, np.int32) for column in zip(*work, strict=True)]
    where, table = np.array(positions, np.int32), cache.table.reshape(-1)
    sink = normal(7, 2, 2, 1) if sinks else None
    consts = {"bq": 4, "bh": 1, "rows": rows, "bg": 2, "bd": 16, "page": 4, "piece": 8}
    numbers = {"scale": 0.3, "window": window, "softcap": softcap}
    EXECUTORS[0](
        attention_rows,
        [q, *pools, where, table, cache.context, *lists, sink, y],
        pages=cache.table.shape[1],
        aligned=4,
        early=early,
        **consts,
        **numbers,
    )
    for t, position in enumerate(positions):
        s = next(s for s, start, count in work if start <= t < start + count)
        row = q[t].reshape(4, 16)
        found = cache.attend(row, s, position, **numbers)
        if sink is not None:
            found = found * cache.share(row, s, position, sink.reshape(4, 1), **numbers)
        np.testing.assert_allclose(y[t].reshape(4, 16), found, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("causal, window", [(True, 0), (True, 1), (True, 21), (False, 0)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 70), (33, 70), (40, 40), (70, 130)])
def test_dense_attention_without_masks_has_the_same_bits(
    sizes: tuple[int, int], causal: bool, window: int
) -> None:
    """Blocks that all queries of a tile see whole, in a loop of their own or not."""
    queries, length = sizes
    q, k, v = normal(1, 4, queries, 24), normal(2, 2, length, 24), normal(3, 2, length, 24)
    consts = {"group": 2, "bd": 32, "scale": 0.2, "window": window, "causal": causal}
    for bq, bk in ((16, 16), (32, 8), (8, 64)):
        found = [np.full_like(q, np.nan) for _ in range(2)]
        for apart, y in enumerate(found):
            library.dense_attention(q, k, v, y, bq=bq, bk=bk, apart=bool(apart), **consts)
        assert np.isfinite(found[0]).all()
        np.testing.assert_array_equal(*found)
