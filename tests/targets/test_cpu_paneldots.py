"""Dots of many rows, whose operands are copied in panels, on the CPU target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_kernels import check

import dure
import dure.lang as dl
from dure import library
from dure.runtime.host import host_features
from dure.targets.cpu.paneldots import blocking

RNG = np.random.default_rng(11)


@dure.kernel
def product(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.int32 if x.dtype == dl.int8 else dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(w, (k, j), (bk, bn)), acc)
    dl.store(y, (i, j), acc.to(y.dtype))


@dure.kernel
def one_dot(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    """The left operand is computed, the right one lies turned, K is cut at the tensor's edge."""
    rows = dl.load(x, (0, 0), (bm, bk)) * 2.0
    acc = dl.dot(rows, dl.load(w, (0, 0), (bn, bk)).T, dl.full((bm, bn), 1.0, dl.float32))
    dl.store(y, (0, 0), acc)


@dure.kernel
def batched(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    left, right = dl.load(x, (0, 0, 0), (2, bm, bk)), dl.load(w, (0, 0, 0), (2, bk, bn))
    dl.store(y, (0, 0, 0), dl.dot(left, right, dl.zeros((2, bm, bn), dl.float32)))


def whole(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Numbers whose sums are exact."""
    return RNG.integers(-4, 5, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 9), (33, 65, 300), (97, 130, 520), (40, 40, 0)])
def test_edges(dtype: str, size: tuple[int, int, int]) -> None:
    m, n, k = size
    kind = dl.bfloat16.numpy if dtype == "bfloat16" else np.dtype(dtype)
    x, w = whole(m, k, dtype=kind), whole(k, n, dtype=kind)
    y = np.zeros((m, n), np.int32 if dtype == "int8" else np.float32)
    check(product, [x, w, y], {"bm": 48, "bn": 64, "bk": 32})


@pytest.mark.parametrize("size", [(1, 1, 1), (20, 33, 50), (64, 64, 320), (61, 50, 301)])
def test_operands_that_are_computed_or_turned(size: tuple[int, int, int]) -> None:
    m, n, k = size
    arrays = [whole(m, k), whole(n, k), np.zeros((m, n), np.float32)]
    check(one_dot, arrays, {"bm": 64, "bn": 64, "bk": 320})


@pytest.mark.parametrize("size", [(1, 1, 1), (40, 20, 30), (64, 32, 64)])
def test_a_batch_of_dots(size: tuple[int, int, int]) -> None:
    m, n, k = size
    for count in (1, 2):
        arrays = [whole(count, m, k), whole(count, k, n), np.zeros((count, m, n), np.float32)]
        check(batched, arrays, {"bm": 64, "bn": 32, "bk": 64})


@pytest.mark.parametrize("turned", [False, True])
def test_the_same_bits_whatever_the_tile(turned: bool) -> None:
    x, w = RNG.standard_normal((70, 700), np.float32), RNG.standard_normal((700, 96), np.float32)
    found: list[np.ndarray] = []
    for bm, bn, bk in ((1, 32, 64), (4, 8, 32), (32, 32, 64), (64, 128, 512), (512, 512, 512)):
        y = np.zeros((70, 96), np.float32)
        if turned:
            library.matmul(x, np.ascontiguousarray(w.T), y, bm=bm, bn=bn, bk=bk)
        else:
            library.matmul_kn(x, w, y, bm=bm, bn=bn, bk=bk)
        found.append(y)
    np.testing.assert_allclose(found[0], x @ w, rtol=1e-4, atol=1e-4)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("turned", [False, True])
def test_columns_that_a_cache_holds_in_parts(dtype: str, turned: bool) -> None:
    host = replace(host_features(), l1d_bytes=4096, l2_bytes=16384)
    kind = dl.bfloat16.numpy if dtype == "bfloat16" else np.dtype(dtype)
    for m, n, k in ((70, 224, 300), (33, 100, 40), (5, 7, 9)):
        x, w, y = whole(m, k, dtype=kind), whole(k, n, dtype=kind), np.zeros((m, n), np.float32)
        kernel, right = (library.matmul, w.T.copy()) if turned else (library.matmul_kn, w)
        check(kernel, [x, right, y], {"bm": 96, "bn": 224, "bk": 64}, host=host)


@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (-1, 1), (3, -2)])
def test_arrays_that_are_not_contiguous(strides: tuple[int, int]) -> None:
    a, b = strides
    x, w = whole(80, 200)[::a, ::b], whole(200, 160)[::b, ::a]
    x, w = x[:, : w.shape[0]], w[: x.shape[1]]
    y = np.zeros((x.shape[0], 2 * w.shape[1]), np.float32)[:, ::2]
    library.matmul_kn(x, w, y, bm=64, bn=64, bk=64)
    np.testing.assert_array_equal(y, x @ w)
    for left, right in ((x.T.copy().T, w), (x, w.T.copy().T)):
        library.matmul_kn(left, right, y, bm=64, bn=64, bk=64)
        np.testing.assert_array_equal(y, x @ w)


def test_blocks_follow_from_registers_and_caches() -> None:
    host = replace(host_features(), vector_registers=16, l1d_bytes=32768, l2_bytes=524288)
    cuts = blocking(host, 8)
    assert (cuts.heights, cuts.width, cuts.depth, cuts.rows) == ((6, 4, 2, 1), 16, 256, 12)
    assert cuts.columns == 256
    wide = blocking(replace(host, vector_registers=32), 16)
    assert wide.heights == (14, 8, 4, 2, 1) and wide.width == 32
    tiny = blocking(replace(host, l1d_bytes=64, l2_bytes=64), 8)
    assert tiny.depth == 8 and tiny.rows == 6 and tiny.columns == tiny.width
