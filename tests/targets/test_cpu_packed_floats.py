"""Float tensors in packed and paged layouts: beyond an edge lies ``fill``, not padding.

Registers are of the host's width, and of those that other machines have: LLVM splits them.
"""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import POOL
from guarded import guarded, guarded_bytes
from registers import host_with

import dure
import dure.lang as dl
from dure.ir.dtypes import float32, int32
from dure.ir.expr import const, symbol
from dure.ir.layout import Digit, Layout
from dure.ir.pack import pack
from dure.ir.types import TensorType, shape_of
from dure.library.matmul import matmul
from dure.runtime.host import HostFeatures, host_features
from dure.targets.cpu.launch import compile_kernel
from dure.targets.cpu.packing import packed_bytes, packed_layout


@pytest.fixture(params=["host", 128, 256, 512])
def host(request: pytest.FixtureRequest) -> HostFeatures:
    return host_features() if request.param == "host" else host_with(request.param)


def packed(values: np.ndarray, host: HostFeatures) -> tuple[TensorType, np.ndarray]:
    """A (N, K) weight in panels, whose padding holds NaN."""
    kind, lanes = TensorType(shape_of(*values.shape), float32), host.vector_bits // 32
    layout = packed_layout(kind, lanes)
    buffer = guarded_bytes(packed_bytes(kind, lanes))
    buffer.view(np.float32)[:] = np.nan
    return kind.with_layout(layout), pack(values, layout, float32, buffer)


@dure.kernel
def column_sums(w: dl.Tensor, y: dl.Tensor, bn: dl.const, bk: dl.const):
    j = dl.program_id(0)
    tile = dl.load(w, (0, j), (bn, bk), fill=0)
    dl.store(y, (0, j), dl.sum(tile, 0, keepdims=True))


@dure.kernel
def transposed(w: dl.Tensor, y: dl.Tensor, bn: dl.const, bk: dl.const):
    j = dl.program_id(0)
    tile = dl.load(w, (0, j), (bn, bk), fill=7).T
    dl.store(y, (j, 0), dl.max(tile, 1, keepdims=True))


@pytest.mark.parametrize("rows", [1, 9, 16, 41])
def test_a_reduction_over_a_packed_axis_sees_fill(rows: int, host: HostFeatures) -> None:
    values = np.random.default_rng(1).standard_normal((rows, 48)).astype(np.float32)
    kind, buffer = packed(values, host)
    y = np.zeros((1, 48), np.float32)
    types = [kind, TensorType(shape_of(1, 48), float32)]
    function = column_sums.specialize(types, {"bn": 64, "bk": 16})
    compile_kernel(function, host, POOL).run([buffer.ctypes.data, y.ctypes.data], [])
    np.testing.assert_allclose(y[0], values.sum(0), rtol=1e-4, atol=1e-5)
    z = np.zeros((48, 1), np.float32)
    types = [kind, TensorType(shape_of(48, 1), float32)]
    function = transposed.specialize(types, {"bn": 64, "bk": 16})
    compile_kernel(function, host, POOL).run([buffer.ctypes.data, z.ctypes.data], [])
    np.testing.assert_array_equal(z[:, 0], np.maximum(values.max(0), 7))


@pytest.mark.parametrize("tile", [(4, 32), (1, 128), (128, 64)])
@pytest.mark.parametrize("rows", [1, 9, 41, 64])
def test_a_dot_with_a_packed_float_weight(
    rows: int, tile: tuple[int, int], host: HostFeatures
) -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((rows, 40)).astype(np.float32)
    x = guarded(rng.standard_normal((5, 40)).astype(np.float32))
    kind, buffer = packed(values, host)
    m = symbol("M", "size", 0, 64)
    types = [TensorType((m, const(40)), float32), kind, TensorType((m, const(rows)), float32)]
    function = matmul.specialize(types, {"bm": tile[0], "bn": tile[1], "bk": 16})
    y = guarded(np.full((5, rows), np.nan, np.float32))
    arguments = [x.ctypes.data, buffer.ctypes.data, y.ctypes.data]
    compile_kernel(function, host, POOL).run(arguments, [5])
    np.testing.assert_allclose(y, x @ values.T, rtol=1e-4, atol=1e-4)


@dure.kernel
def paged(pool: dl.Tensor, pages: dl.Index(-1, 3), q: dl.Tensor, y: dl.Tensor):
    listed = dl.load(pages, (0,), (4,), fill=-1)
    keys = dl.load(pool, (listed, 0), (64, 16), fill=0)
    dl.store(y, (0, 0), dl.dot(dl.load(q, (0, 0), (4, 16)), keys.T))


def test_absent_pages_of_a_paged_layout_read_fill() -> None:
    values = np.random.default_rng(3).standard_normal((64, 16)).astype(np.float32)
    # A page of 16 slots, the slots of a page side by side.
    layout = Layout(((Digit(None, 16 * 16 * 32), Digit(16, 32)), (Digit(None, 16 * 32),)))
    buffer = pack(values, layout, float32)
    pages = np.array([2, -1, 0, -1], np.int32)
    q = np.random.default_rng(4).standard_normal((4, 16)).astype(np.float32)
    y = np.full((4, 64), np.nan, np.float32)
    types = [
        TensorType(shape_of(64, 16), float32, layout),
        TensorType(shape_of(4), int32, index=(const(-1), const(3))),
        TensorType(shape_of(4, 16), float32),
        TensorType(shape_of(4, 64), float32),
    ]
    function = paged.specialize(types, {})
    arguments = [buffer.ctypes.data, pages.ctypes.data, q.ctypes.data, y.ctypes.data]
    compile_kernel(function, None, POOL).run(arguments, [])
    expected = np.zeros((4, 64), np.float32)
    expected[:, :16], expected[:, 32:48] = q @ values[32:48].T, q @ values[:16].T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
