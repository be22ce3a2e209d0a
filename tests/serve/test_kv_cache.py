"""Pages, block tables and work lists."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.errors import UsageError
from dure.serve.kv import KVCache, Sequence
from dure.serve.work import BatchEntry, build_step


def make(sequences: int = 4, pool: int = 16, pages: int = 8, size: int = 4) -> KVCache:
    return KVCache(sequences=sequences, pool_pages=pool, pages_per_sequence=pages, page_size=size)


def check(cache: KVCache, live: list[Sequence]) -> None:
    """No page belongs to two, none is lost, and the table says what the sequences say."""
    held = [page for s in live for page in s.pages]
    assert len(set(held)) == len(held)
    assert len(held) + cache.free_pages == cache.pool_pages
    for s in live:
        row = cache.block_table[s.row]
        assert list(row[: len(s.pages)]) == s.pages
        assert (row[len(s.pages) :] == 0).all()
        assert len(s.pages) == -(-s.length // cache.page_size)


@given(st.lists(st.tuples(st.sampled_from("naetr"), st.integers(0, 20)), max_size=40))
def test_pages_are_neither_lost_nor_shared(actions: list[tuple[str, int]]) -> None:
    cache = make()
    live: list[Sequence] = []
    for what, number in actions:
        try:
            if what == "n":
                live.append(cache.sequence())
            elif live and what in "ae":
                sequence = live[number % len(live)]
                cache.extend(sequence, number)
                cache.commit(sequence)
            elif live and what == "t":
                sequence = live[number % len(live)]
                cache.truncate(sequence, min(number, sequence.length))
            elif live:
                cache.release(live.pop(number % len(live)))
        except UsageError:
            pass
        check(cache, live)


def test_limits_are_named() -> None:
    cache = make(sequences=1, pool=3, pages=2)
    sequence = cache.sequence()
    with pytest.raises(UsageError, match="in use"):
        cache.sequence()
    with pytest.raises(UsageError, match="in a context of 8"):
        cache.extend(sequence, 9)
    assert cache.free_pages == 3 and cache.context[0] == 0
    cache.release(sequence)
    with pytest.raises(UsageError, match="released"):
        cache.extend(sequence, 1)
    small = make(sequences=2, pool=1, pages=2)
    one, two = small.sequence(), small.sequence()
    small.extend(one, 4)
    with pytest.raises(UsageError, match="cache is full"):
        small.extend(two, 1)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 23)), min_size=1, max_size=4),
    st.sampled_from([1, 4, 8]),
)
def test_work_covers_every_token_once(parts: list[tuple[int, int]], rows: int) -> None:
    cache = make(pool=64)
    entries: list[BatchEntry] = []
    for before, count in parts:
        sequence = cache.sequence()
        cache.extend(sequence, before)
        cache.commit(sequence)
        cache.extend(sequence, count)
        entries.append(BatchEntry(sequence, np.arange(count, dtype=np.int32), (count - 1,)))
    step = build_step(cache, entries, rows)
    seen = np.zeros(len(step.tokens), int)
    for sequence, start, count in zip(
        step.work_sequence, step.work_start, step.work_rows, strict=True
    ):
        assert 1 <= count <= rows
        seen[start : start + count] += 1
        row = slice(start, start + count)
        first = step.positions[start]
        assert list(step.positions[row]) == list(range(first, first + count))
        for place in range(start, start + count):
            page = cache.block_table[sequence, step.positions[place] // 4]
            assert step.slots[place] == page * 4 + step.positions[place] % 4
    assert (seen == 1).all()
    assert len(set(step.slots.tolist())) == len(step.slots)
    ends = np.cumsum([count for _, count in parts]) - 1
    assert list(step.out_rows) == list(ends)
    for name, array in step.arrays().items():
        assert array.dtype == np.int32, name


def test_a_decode_step_is_prepared_quickly() -> None:
    cache = make(sequences=8, pool=512, pages=64, size=16)
    sequences = [cache.sequence() for _ in range(8)]
    token = np.array([1], np.int32)
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        for sequence in sequences:
            cache.extend(sequence, 1)
        build_step(cache, [BatchEntry(s, token, (0,)) for s in sequences], 32)
        for sequence in sequences:
            cache.commit(sequence)
        best = min(best, time.perf_counter() - start)
    assert best < 500e-6
