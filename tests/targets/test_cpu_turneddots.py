"""Dots of a few rows whose right operand lies turned: multiplied as it is read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cpu_kernels import check
from guarded import guarded

import dure
import dure.lang as dl
from dure import library
from dure.ir.dtypes import float32
from dure.ir.expr import const
from dure.ir.types import TensorType
from dure.lang.launch import CpuRunner, executing
from dure.runtime.host import host_features, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.launch import compile_kernel

RNG = np.random.default_rng(13)


@dure.kernel
def added(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    """A computed left operand, added to ones."""
    left = dl.load(x, (0, 0), (bm, bk)) * 2.0
    acc = dl.dot(left, dl.load(w, (0, 0), (bn, bk)).T, dl.full((bm, bn), 1.0, dl.float32))
    dl.store(y, (0, 0), acc)


@dure.kernel
def batched(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    left, right = dl.load(x, (0, 0, 0), (2, bm, bk)), dl.load(w, (0, 0, 0), (2, bn, bk))
    scores = dl.dot(left, dl.transpose(right, (0, 2, 1)), dl.zeros((2, bm, bn), dl.float32))
    dl.store(y, (0, 0, 0), scores)


@dure.kernel
def listed(x: dl.Tensor, w: dl.Tensor, pages: dl.Index(-1, 3), y: dl.Tensor, bm: dl.const):
    """Rows of the right operand by a list, sixteen after one another."""
    own = dl.load(pages, (0,), (4,), fill=-1)
    rows = dl.load(w, (own, 0), (64, 32))
    dl.store(y, (0, 0), dl.dot(dl.load(x, (0, 0), (bm, 32)), rows.T))


@pytest.fixture(params=host_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Launches compile for this level, whatever was compiled for another one."""
    monkeypatch.setenv("DURE_CPU_LEVEL", request.param)
    with executing(lambda function: CpuRunner(compile_kernel(function))):
        yield request.param


def whole(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Numbers whose sums are exact, in front of memory that nobody may touch."""
    return guarded(RNG.integers(-4, 5, shape).astype(dtype))


SIZES = [(1, 1, 1), (2, 20, 30), (3, 64, 64), (4, 61, 50), (4, 3, 131), (1, 40, 0)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_edges(size: tuple[int, int, int], dtype: str, level: str) -> None:
    m, n, k = size
    w = whole(n, k, dtype=np.dtype(dtype).type)
    check(added, [whole(m, k), w, np.zeros((m, n), np.float32)], {"bm": 4, "bn": 64, "bk": 144})
    y = guarded(np.full((m, n), np.nan, np.float32))
    x = whole(m, k)
    for bn in (1, 8, 32):
        library.matmul(x, w, y, bm=4, bn=bn, bk=32)
        np.testing.assert_array_equal(y, x @ w.astype(np.float32).T)


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 30, 20), (2, 64, 64)], ids=str)
def test_a_batch(size: tuple[int, int, int], level: str) -> None:
    m, n, k = size
    for count in (1, 2):
        arrays = [whole(count, m, k), whole(count, n, k), np.zeros((count, m, n), np.float32)]
        check(batched, arrays, {"bm": 4, "bn": 64, "bk": 64})


def test_rows_by_a_list(level: str) -> None:
    pages = np.array([2, -1, 0, 3], np.int32)
    check(listed, [whole(3, 32), whole(64, 32), pages, np.zeros((3, 64), np.float32)], {"bm": 4})


def test_the_same_bits_as_more_rows(level: str) -> None:
    x, w = RNG.standard_normal((9, 300), np.float32), RNG.standard_normal((70, 300), np.float32)
    found: list[np.ndarray] = []
    for bm, bn, bk in ((1, 32, 64), (2, 8, 32), (4, 64, 16), (16, 64, 64), (16, 128, 512)):
        y = np.zeros((9, 70), np.float32)
        library.matmul(x, w, y, bm=bm, bn=bn, bk=bk)
        found.append(y)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_what_lies_beside_an_operand_counts_nowhere(level: str) -> None:
    x, w = np.full((2, 100), np.nan, np.float32), np.full((90, 60), np.nan, np.float32)
    x[:, :37], w[:19, :37] = whole(2, 37), whole(19, 37)
    y = np.full((2, 40), np.nan, np.float32)
    library.matmul(x[:, :37], w[:19, :37], y[:, :19], bm=2, bn=32, bk=64)
    np.testing.assert_array_equal(y[:, :19], x[:, :37] @ w[:19, :37].T)
    assert np.isnan(y[:, 19:]).all()


def test_nothing_is_copied() -> None:
    """The arena holds accumulators alone."""
    kinds = [TensorType((const(m), const(256)), float32) for m in (4, 256, 4)]
    function = library.matmul.specialize(kinds, {"bm": 4, "bn": 64, "bk": 64})
    code = emit_kernel(function, host_features())
    assert code.arena_bytes == 4 * 4 * 64
    assert "gather" not in assembly(code.llvm_ir, host_features())
