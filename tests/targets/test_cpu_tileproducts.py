"""Products of bfloat16 tiles: by tile registers where the host has them, else as any other."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cpu_kernels import check
from guarded import guarded

import dure
import dure.lang as dl
from dure import library
from dure.ir.dtypes import bfloat16
from dure.ir.expr import const
from dure.ir.types import TensorType
from dure.library.matmul import matmul_kn
from dure.runtime.host import features_of, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu.codegen import emit_kernel

RNG = np.random.default_rng(5)
SIZES = [
    (1, 1, 1),
    (5, 7, 9),
    (33, 65, 300),
    (17, 3, 31),
    (97, 130, 1111),
    (16, 32, 64),
    (40, 8, 0),
]
#: bm, bn, bk: fewer rows and columns than a tile register's, and more than one cut of K.
TILES = [(1, 32, 64), (4, 8, 32), (48, 24, 64), (64, 128, 512), (16, 1, 32)]


def drawn(*shape: int) -> np.ndarray:
    """bfloat16 numbers that end in front of memory that nobody may touch."""
    return guarded(RNG.standard_normal(shape).astype(ml_dtypes.bfloat16))


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


@pytest.fixture(params=host_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DURE_CPU_LEVEL", request.param)
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_the_same_bits_whatever_the_tile(
    size: tuple[int, int, int], turned: bool, level: str
) -> None:
    m, n, k = size
    x, w = drawn(m, k), drawn(k, n)
    right = guarded(np.ascontiguousarray(w.T)) if turned else w
    found: list[np.ndarray] = []
    for bm, bn, bk in TILES:
        y = guarded(np.full((m, n), np.nan, np.float32))
        kernel = library.matmul if turned else library.matmul_kn
        kernel(x, right, y, bm=bm, bn=bn, bk=bk)
        found.append(y)
    np.testing.assert_allclose(found[0], wide(x) @ wide(w), rtol=2e-5, atol=1e-4)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("turned", [False, True])
def test_what_lies_beside_an_operand_counts_nowhere(turned: bool, level: str) -> None:
    """Rows and columns behind the views are NaN."""
    x = np.full((40, 100), np.nan, ml_dtypes.bfloat16)
    w = np.full((90, 60), np.nan, ml_dtypes.bfloat16)
    x[:21, :37], w[:37, :19] = drawn(21, 37), drawn(37, 19)
    left, right = x[:21, :37], w[:37, :19]
    y = np.full((30, 40), np.nan, np.float32)
    kernel = library.matmul if turned else library.matmul_kn
    kernel(left, right.T if turned else right, y[:21, :19], bm=32, bn=32, bk=64)
    np.testing.assert_allclose(y[:21, :19], wide(left) @ wide(right), rtol=1e-5, atol=1e-4)
    assert np.isnan(y[21:]).all() and np.isnan(y[:, 19:]).all()


def test_what_is_no_number_stays_in_its_row(level: str) -> None:
    x, w = drawn(20, 64), drawn(64, 48)
    x[3, 5], x[4, 6], x[18, 0] = np.nan, np.inf, -np.inf
    y = np.zeros((20, 48), np.float32)
    library.matmul_kn(x, w, y, bm=32, bn=64, bk=64)
    assert np.isnan(y[3]).all()
    assert not np.isfinite(y[[4, 18]]).any()
    rest = np.delete(np.arange(20), [3, 4, 18])
    np.testing.assert_allclose(y[rest], wide(x[rest]) @ wide(w), rtol=1e-5, atol=1e-4)


@dure.kernel
def added(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    """A batch of computed operands, added to ones."""
    left = (dl.load(x, (0, 0, 0), (2, bm, bk)) * 2.0).to(dl.bfloat16)
    right = dl.load(w, (0, 0, 0), (2, bk, bn))
    dl.store(y, (0, 0, 0), dl.dot(left, right, dl.full((2, bm, bn), 1.0, dl.float32)))


@pytest.mark.parametrize("size", [(1, 1, 1), (40, 20, 30), (64, 32, 64)])
def test_a_batch_that_adds_to_what_is_there(size: tuple[int, int, int], level: str) -> None:
    m, n, k = size
    x, w = (RNG.integers(-4, 5, s).astype(ml_dtypes.bfloat16) for s in ((2, m, k), (2, k, n)))
    check(added, [x, w, np.zeros((2, m, n), np.float32)], {"bm": 64, "bn": 32, "bk": 64})


def test_tile_registers_are_used() -> None:
    """Also by machines that only write the code."""
    kind = TensorType((const(256), const(256)), bfloat16)
    kernel = matmul_kn.specialize([kind, kind, kind], {"bm": 64, "bn": 64, "bk": 64})
    host = features_of("amx")
    text = assembly(emit_kernel(kernel, host).llvm_ir, host)
    assert text.count("tdpbf16ps") == 4
