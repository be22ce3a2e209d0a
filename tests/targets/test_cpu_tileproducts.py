"""Products of bfloat16 tiles: by tile registers where the host has them, else as any other."""

from __future__ import annotations

from collections.abc import Iterator

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
from dure.lang.launch import CpuRunner, executing
from dure.library.matmul import matmul_kn
from dure.runtime.host import features_of, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.launch import compile_kernel

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
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Launches compile for this level, whatever was compiled for another one."""
    monkeypatch.setenv("DURE_CPU_LEVEL", request.param)
    with executing(lambda function: CpuRunner(compile_kernel(function))):
        yield request.param


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


def of_any_size(*shape: int) -> np.ndarray:
    """bfloat16 numbers of all magnitudes, subnormals among them, whose sums are finite."""
    bits = RNG.integers(0, 1 << 16, shape).astype(np.uint16)
    bits &= np.where(RNG.random(shape) < 0.5, 0xBFFF, 0x9FFF).astype(np.uint16)
    return guarded(bits.view(ml_dtypes.bfloat16))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("turned", [False, True])
def test_few_rows_have_the_bits_of_many(rows: int, turned: bool, level: str) -> None:
    """Also where products and sums are subnormal."""
    for n, k in ((16, 32), (70, 64), (33, 100), (7, 2100)):
        x, w = of_any_size(rows, k), of_any_size(k, n)
        right = guarded(np.ascontiguousarray(w.T)) if turned else w
        kernel = library.matmul if turned else library.matmul_kn
        found: list[np.ndarray] = []
        for bm in (1, 2, 4, 8, 32):
            y = guarded(np.full((rows, n), np.nan, np.float32))
            kernel(x, right, y, bm=bm, bn=64, bk=64)
            found.append(y.view(np.uint32))
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)


@dure.kernel
def of_computed(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    """A right operand that is computed, from numbers that tiles would take for zero."""
    left = dl.load(x, (0, 0), (bm, bk))
    right = (dl.load(w, (0, 0), (bk, bn)) * 2.0**100).to(dl.bfloat16)
    dl.store(y, (0, 0), dl.dot(left, right))


def test_only_products_take_subnormals_for_zero(level: str) -> None:
    x = np.ones((2, 4), ml_dtypes.bfloat16)
    w = np.full((4, 20), 2.0**-130, np.float32)
    y = np.zeros((2, 20), np.float32)
    of_computed(x, w, y, bm=2, bn=32, bk=32)
    np.testing.assert_array_equal(y, np.full((2, 20), 4 * 2.0**-30, np.float32))
    assert np.all(w * np.float32(0.5) == np.float32(2.0**-131))


def test_few_rows_read_the_right_operand_where_it_lies() -> None:
    kind = TensorType((const(4), const(256)), bfloat16)
    right = TensorType((const(256), const(256)), bfloat16)
    host = features_of("amx")
    consts = {"bm": 4, "bn": 64, "bk": 64}
    for kernel, tiles in ((library.matmul, 4), (matmul_kn, 0)):
        function = kernel.specialize([kind, right, kind], consts)
        text = assembly(emit_kernel(function, host).llvm_ir, host)
        assert text.count("tdpbf16ps") == tiles
        assert text.count("ldmxcsr") == (0 if tiles else 2)
