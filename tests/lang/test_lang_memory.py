"""Loads and stores, views, index lists, windows and combining stores, in all modes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dure
import dure.lang as dl

RNG = np.random.default_rng(7)


@dure.kernel
def copy(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i, j), dl.load(x, (i, j), (bm, bn)))


@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (5, 9), (16, 3), (0, 4), (3, 0)])
@pytest.mark.parametrize("make", ["plain", "transposed", "reversed", "sliced", "offset"])
def test_copies_of_every_stride(anyhow: str, shape: tuple[int, int], make: str) -> None:
    m, n = shape
    base = RNG.standard_normal((2 * n + 3, 2 * m + 3)).astype(np.float32)
    x = {
        "plain": base[:n, :m].T.copy(),
        "transposed": base[:n, :m].T,
        "reversed": base[:n, :m].T[::-1, ::-1],
        "sliced": base[: 2 * n : 2, : 2 * m : 2].T,
        "offset": base[3 : 3 + n, 1 : 1 + m].T,
    }[make]
    out = np.full((m + 2, n + 2), 7, np.float32)
    copy(x, out[1:-1, 1:-1], bm=4, bn=8)
    np.testing.assert_array_equal(out[1:-1, 1:-1], x)
    out[1:-1, 1:-1] = 7
    assert (out == 7).all()


def test_fill_outside(anyhow: str) -> None:
    @dure.kernel
    def padded(x: dl.Tensor, y: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        dl.store(y, (i,), dl.load(x, (i,), (n,), fill=-5))

    x, y = np.arange(5, dtype=np.float32), np.zeros(12, np.float32)
    padded(x, y, n=4)
    np.testing.assert_array_equal(y, [0, 1, 2, 3, 4, *[-5] * 7])


def test_offset_stride_and_step(anyhow: str) -> None:
    @dure.kernel
    def window(x: dl.Tensor, y: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        tile = dl.load(x, (i,), (n,), step=(2 * n,), offset=(i - 1,), stride=(2,), fill=9)
        dl.store(y, (i,), tile)

    x, y = np.arange(30, dtype=np.int32), np.zeros(12, np.int32)
    window(x, y, n=4)
    places = (np.arange(3)[:, None] * 8 + np.arange(3)[:, None] - 1 + 2 * np.arange(4)).ravel()
    expected = np.where((places >= 0) & (places < 30), places, 9)
    np.testing.assert_array_equal(y, expected)


def test_strided_stores_leave_the_rest(anyhow: str) -> None:
    @dure.kernel
    def scatter(x: dl.Tensor, y: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        tile = dl.load(x, (i,), (n,))
        dl.store(y, (i,), tile, step=(2 * n,), stride=(2,), offset=(1,))

    x, y = np.arange(8, dtype=np.int32), np.zeros(15, np.int32)
    scatter[2](x, y, n=4)
    np.testing.assert_array_equal(y, [v for k in range(8) for v in (0, k)][:15])


@dure.kernel
def ragged(x: dl.Tensor, starts: dl.Index(0, None), y: dl.Tensor, n: dl.const):
    s = dl.program_id(0)
    start, stop = starts[s], starts[s + 1]
    own, mine = x[start:stop], y[start:stop]
    for k in dl.range(dl.cdiv(own.shape[0], n)):
        dl.store(mine, (k, 0), dl.load(own, (k, 0), (n, 4)) + s)


def test_views_cannot_touch_the_neighbour(anyhow: str) -> None:
    x = RNG.standard_normal((11, 4)).astype(np.float32)
    starts = np.array([0, 3, 3, 10, 11], np.int32)
    y = np.zeros_like(x)
    ragged[4](x, starts, y, n=4)
    owner = np.repeat(np.arange(4), np.diff(starts))
    np.testing.assert_allclose(y, x + owner[:, None], rtol=1e-6)


def test_columns_of_a_view(anyhow: str) -> None:
    @dure.kernel
    def halves(x: dl.Tensor, y: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        middle = x.shape[1] // 2
        left, right = x[:, :middle], x[:, middle:-1]
        dl.store(
            y[:, :-1],
            (i, 0),
            dl.load(left, (i, 0), (n, 4)) - dl.load(right, (i, 0), (n, 4), fill=0),
        )

    x = RNG.standard_normal((5, 7)).astype(np.float32)
    y = np.zeros((5, 4), np.float32)
    halves(x, y, n=2)
    np.testing.assert_allclose(y, np.c_[x[:, :3] - x[:, 3:6], np.zeros(5)])


@dure.kernel
def gather(table: dl.Tensor, rows: dl.Index(-1, None), y: dl.Tensor, bt: dl.const, page: dl.const):
    i = dl.program_id(0)
    found = dl.load(rows, (i,), (bt,))
    dl.store(y, (i, 0), dl.load(table, (found, 0), (bt * page, 8)))


@pytest.mark.parametrize("page", [1, 4])
def test_index_lists_of_rows_and_pages(anyhow: str, page: int) -> None:
    table = RNG.standard_normal((10 * page - page // 2, 8)).astype(np.float32)
    rows = np.array([9, 0, -1, 3, 3, 8], np.int32)
    y = np.zeros((6 * page, 8), np.float32)
    gather(table, rows, y, bt=4, page=page)
    padded = np.r_[table, np.zeros((page, 8), np.float32)]
    places = [(r if r >= 0 else 10) * page for r in rows]
    expected = [padded[p : p + page] if p < 10 * page else np.zeros((page, 8)) for p in places]
    np.testing.assert_array_equal(y, np.concatenate(expected))


def test_scatter_to_unique_rows(anyhow: str) -> None:
    @dure.kernel
    def scatter(x: dl.Tensor, slots: dl.Index(-1, None, unique=True), y: dl.Tensor):
        i = dl.program_id(0)
        dl.store(y, (dl.load(slots, (i,), (4,)), 0), dl.load(x, (i, 0), (4, 8)))

    x = RNG.standard_normal((6, 8)).astype(np.float32)
    slots = np.array([7, -1, 0, 2, -1, 5], np.int32)
    y = np.zeros((8, 8), np.float32)
    scatter(x, slots, y)
    expected = np.zeros((8, 8), np.float32)
    expected[slots[slots >= 0]] = x[slots >= 0]
    np.testing.assert_array_equal(y, expected)


def test_an_element_of_an_index_argument_of_two_axes(anyhow: str) -> None:
    @dure.kernel
    def pick(x: dl.Tensor, table: dl.Index(0, None), y: dl.Tensor, n: dl.const):
        s, j = dl.program_id(0), dl.program_id(1)
        dl.store(y, (s, j, 0), dl.load(x, (table[s, j], 0), (1, n)).reshape((1, 1, n)))

    x = RNG.standard_normal((5, 4)).astype(np.float32)
    table = RNG.integers(0, 5, (3, 2)).astype(np.int32)
    y = np.zeros((3, 2, 4), np.float32)
    pick(x, table, y, n=4)
    np.testing.assert_array_equal(y, x[table])


@pytest.mark.parametrize(("combine", "numpy"), [("add", np.add), ("max", np.maximum)])
def test_combining_stores(anyhow: str, combine: str, numpy: np.ufunc) -> None:
    @dure.kernel
    def reduce_rows(x: dl.Tensor, y: dl.Tensor, how: dl.const):
        i = dl.program_id(0)
        dl.store(y, (0, 0), dl.load(x, (i, 0), (1, 8)), combine=how)

    x = RNG.standard_normal((6, 8)).astype(np.float32)
    y = np.ones((1, 8), np.float32)
    reduce_rows[6](x, y, how=combine)
    np.testing.assert_allclose(y[0], numpy(numpy.reduce(x, 0), 1), rtol=1e-5)


def test_in_place(anyhow: str) -> None:
    @dure.kernel
    def double(x: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        dl.store(x, (i,), dl.load(x, (i,), (n,)) * 2)

    x = np.arange(10, dtype=np.float32)
    double(x, n=4)
    np.testing.assert_array_equal(x, np.arange(10) * 2)


@dure.kernel
def matmul(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(a.shape[1], bk)):
        acc += dl.load(a, (i, k), (bm, bk)) @ dl.load(b, (k, j), (bk, bn))
    dl.store(c, (i, j), acc.to(c.dtype))


@settings(max_examples=12, deadline=None, database=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.sampled_from([4, 8]))
def test_matmul_of_any_size(m: int, n: int, k: int, tile: int) -> None:
    a = RNG.standard_normal((m, k)).astype(np.float32)
    b = RNG.standard_normal((k, n)).astype(np.float32)
    c = np.full((m, n), 7, np.float32)
    matmul(a, b, c, bm=tile, bn=8, bk=4)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b, rtol=1e-5, atol=1e-5)


def test_matmul_as_in_the_design(anyhow: str) -> None:
    a = RNG.standard_normal((13, 21)).astype(np.float32)
    b = RNG.standard_normal((21, 10)).astype(np.float32)
    c = np.zeros((13, 10), np.float16)
    matmul[2, 2](a, b, c, 8, 8, 8)
    np.testing.assert_allclose(c, (a.astype(np.float64) @ b).astype(np.float16), rtol=2e-3)


def test_arrays_without_axes(anyhow: str) -> None:
    @dure.kernel
    def scale(x: dl.Tensor, y: dl.Tensor):
        dl.store(y, (), dl.load(x, (), ()) * 2)

    x, y = np.array(3, np.float32), np.array(0, np.float32)
    scale[1](x, y)
    assert y == 6


def test_tiles_of_five_axes(anyhow: str) -> None:
    @dure.kernel
    def increment(x: dl.Tensor, y: dl.Tensor):
        i = dl.program_id(0)
        at = (i, 0, 0, 0, 0)
        dl.store(y, at, dl.load(x, at, (1, 2, 2, 2, 4)) + 1)

    x = RNG.standard_normal((3, 2, 2, 2, 3)).astype(np.float32)
    y = np.zeros_like(x)
    increment(x, y)
    np.testing.assert_array_equal(y, x + 1)


def test_broadcast_and_fortran_arrays(anyhow: str) -> None:
    x = np.broadcast_to(np.arange(9, dtype=np.float32), (5, 9))
    y = np.zeros((5, 9), np.float32, order="F")
    copy(x, y, bm=4, bn=8)
    np.testing.assert_array_equal(y, x)


def test_a_total_is_stored_as_one_element(anyhow: str) -> None:
    @dure.kernel
    def total(x: dl.Tensor, y: dl.Tensor, n: dl.const = 8):
        acc = dl.zeros((n,), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[0], n)):
            acc += dl.load(x, (k,), (n,))
        dl.store(y, (0,), dl.sum(acc))

    y = np.zeros(1, np.float32)
    total(np.ones(100, np.float32), y)
    assert y[0] == 100
