"""Rows of tiles in vectors: stores brought onto cache lines, stores past the caches, reductions."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import POOL, check

import dure
import dure.lang as dl
from dure.ir.types import TensorType
from dure.runtime.host import features_of, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu import distant
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.launch import compile_kernel

RNG = np.random.default_rng(8)


@dure.kernel
def scaled(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bd: dl.const):
    """``y = x * w + 1``, with a row of w."""
    i, j = dl.program_id(0), dl.program_id(1)
    weight = dl.load(w, (j,), (bd,))[None, :]
    dl.store(y, (i, j), dl.load(x, (i, j), (bm, bd)) * weight + 1.0)


@dure.kernel
def highest_and_sum(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bd: dl.const):
    """Behind a row's end its numbers count as 7."""
    i = dl.program_id(0)
    rows = dl.load(x, (i, 0), (bm, bd), fill=7.0).to(dl.float32)
    both = dl.max(rows, 1, keepdims=True) + dl.sum(rows * 0.5, 1, keepdims=True)
    dl.store(y, (i, 0), both)


def shifted(shape: tuple[int, int], by: int) -> np.ndarray:
    """An array whose first number lies so many numbers behind a cache line."""
    memory = np.zeros(shape[0] * shape[1] + 64, np.float32)
    start = (-memory.ctypes.data % 64) // 4 + by
    return memory[start : start + shape[0] * shape[1]].reshape(shape)


def run(shape: tuple[int, int], by: int, level: str, consts: dict[str, int]) -> None:
    """In place, and beside guards that nothing may touch."""
    x = RNG.integers(-9, 10, shape).astype(np.float32)
    w = RNG.integers(-9, 10, shape[1]).astype(np.float32)
    types = [TensorType(tuple(a.shape), dl.float32) for a in (x, w, x)]
    kernel = compile_kernel(scaled.specialize(types, consts), features_of(level), POOL)
    around = shifted((shape[0] + 2, shape[1]), by)
    around[:] = 77
    y = around[1:-1]
    y[:] = x
    kernel.run([a.ctypes.data for a in (y, w, y)], [])
    np.testing.assert_array_equal(y, x * w + 1)
    assert (around[0] == 77).all() and (around[-1] == 77).all()


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("columns", [1, 15, 16, 100, 128, 129, 200, 256, 300])
@pytest.mark.parametrize("by", [0, 1, 3, 15])
def test_rows_that_begin_anywhere(level: str, columns: int, by: int) -> None:
    run((3, columns), by, level, {"bm": 2, "bd": 128})
    run((3, columns), by, level, {"bm": 1, "bd": 256})


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("columns", [129, 256, 300])
@pytest.mark.parametrize("by", [0, 1, 15])
def test_stores_past_the_caches(
    level: str, columns: int, by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for tensors that no cache holds."""
    monkeypatch.setattr(distant, "_FAR", 0)
    run((3, columns), by, level, {"bm": 1, "bd": 256})


def test_only_large_tensors_are_stored_past_the_caches() -> None:
    host = features_of("avx512") if "avx512" in host_levels() else features_of(host_levels()[0])
    rows = host.l2_bytes // 64

    def text(count: int) -> str:
        types = [TensorType((count, 256), dl.float32), TensorType((256,), dl.float32)]
        function = scaled.specialize([*types, types[0]], {"bm": 1, "bd": 256})
        return assembly(emit_kernel(function, host).llvm_ir, host)

    assert "vmovntps" in text(2 * rows) and "vmovntps" not in text(rows)


@pytest.mark.parametrize("bd", [8, 48, 64, 100, 256])
@pytest.mark.parametrize("columns", [0, 1, 17, 64, 99, 256, 300])
def test_reductions_along_rows(bd: int, columns: int) -> None:
    x = RNG.integers(-9, 10, (5, columns)).astype(np.float32)
    check(highest_and_sum, [x, np.zeros((5, 1), np.float32)], {"bm": 2, "bd": bd})
    check(
        highest_and_sum, [x.astype(np.float16), np.zeros((5, 1), np.float32)], {"bm": 1, "bd": bd}
    )


@pytest.mark.parametrize("place", [0, 37, 63, 64, 90])
def test_a_row_with_a_number_that_is_none(place: int) -> None:
    x = RNG.integers(-9, 10, (2, 100)).astype(np.float32)
    x[1, place] = np.nan
    found = check(highest_and_sum, [x, np.zeros((2, 1), np.float32)], {"bm": 1, "bd": 128})
    assert np.isnan(found[1][1, 0]) and not np.isnan(found[1][0, 0])
