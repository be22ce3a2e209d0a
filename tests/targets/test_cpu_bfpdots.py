"""Dots of block floating point on the CPU, at every level: the bits of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_kernels import POOL
from guarded import guarded_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_cpu_blockdots import random_blocks

from dure.errors import DureError
from dure.ir.blocks import Blocks, quantize, rounded
from dure.ir.core import op_definition
from dure.ir.dtypes import FORMATS, BlockFormat, bfloat16, bfp9_block32, float32, takes_bfp
from dure.ir.expr import const, symbol
from dure.ir.layout import PlaneLayouts, row_planes
from dure.ir.pack import pack, packed_bytes
from dure.ir.types import TensorType, shape_of
from dure.library.matmul import matmul
from dure.runtime.host import host_features, host_levels
from dure.targets.cpu.launch import compile_kernel
from dure.targets.cpu.packing import activation_layout, packed_layout

WEIGHTS = [f for f in FORMATS.values() if takes_bfp(f)]


def in_memory(blocks: Blocks, layout: PlaneLayouts, rows: int) -> np.ndarray:
    """Bytes that hold the blocks, with room for ``rows``."""
    size = packed_bytes(layout, blocks.format, (rows, blocks.shape[1]), 1)
    return pack(blocks, layout, blocks.format, guarded_bytes(size))


def native(
    left: Blocks,
    weight: Blocks,
    *,
    bm: int,
    bn: int = 32,
    tiled: bool = True,
    packed: bool = True,
    workers: int = 2,
) -> np.ndarray:
    """``left @ weight.T`` on the CPU target."""
    host, (columns, length), rows = host_features(), weight.shape, left.shape[0]
    lanes = host.vector_bits // 32
    kind = TensorType(shape_of(columns, length), weight.format, None, 1)
    own = row_planes(weight.format, [columns, length], 1)
    layout = packed_layout(kind, lanes, pairs=True) if packed else own
    assert isinstance(layout, PlaneLayouts)
    symbolic = symbol("M", "size", 0, 4096)
    x = TensorType((symbolic, const(length)), bfp9_block32, None, 1)
    left_layout = activation_layout(x) if tiled else row_planes(bfp9_block32, left.shape, 1)
    types = [
        x.with_layout(left_layout),
        kind.with_layout(layout),
        TensorType((symbolic, const(columns)), float32),
    ]
    bk = max(64, weight.format.block)
    kernel = compile_kernel(matmul.specialize(types, {"bm": bm, "bn": bn, "bk": bk}), host, POOL)
    y = np.full((rows, columns), np.nan, np.float32)
    padded = -(-columns // lanes) * lanes if packed else columns
    a = in_memory(left, left_layout, rows)
    w = in_memory(weight, layout, padded)
    kernel.run([a.ctypes.data, w.ctypes.data, y.ctypes.data], [rows], workers)
    return y


def reference(left: Blocks, weight: Blocks) -> np.ndarray:
    dot = op_definition("dot").semantics
    assert dot is not None
    return dot({}, left, weight.transposed((1, 0)), np.zeros((left.shape[0], weight.shape[0])))


def random_left(rows: int, length: int, seed: int) -> Blocks:
    x = np.random.default_rng(seed).standard_normal((rows, length)).astype(np.float32)
    return quantize(x, bfp9_block32)


def assert_same(left: Blocks, weight: Blocks, **how: Any) -> None:
    """The bits of the reference; NaN where it has NaN."""
    found, expected = native(left, weight, **how), reference(left, weight)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    there = ~np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[there], expected.view(np.uint32)[there])


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("format", WEIGHTS, ids=str)
@pytest.mark.parametrize("bm", [1, 8, 48])
def test_every_format(
    format: BlockFormat, bm: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    assert_same(random_left(53, 512, 2), random_blocks(format, 41, 512, 1), bm=bm)


@pytest.mark.parametrize("rows", [0, 1, 9, 16, 17, 31, 32, 49, 100])
@pytest.mark.parametrize(("columns", "length"), [(1, 32), (16, 96), (33, 160), (80, 64)])
def test_shapes(rows: int, columns: int, length: int) -> None:
    left, weight = random_left(rows, length, 3), random_blocks(FORMATS["q4_1"], columns, length, 4)
    for bm, workers in ((64, 1), (32, 2), (8, 2), (1, 1)):
        assert_same(left, weight, bm=bm, workers=workers)


@pytest.mark.parametrize("format", WEIGHTS, ids=str)
@pytest.mark.parametrize("bm", [4, 32])
def test_other_layouts(format: BlockFormat, bm: int) -> None:
    left, weight = random_left(37, 256, 5), random_blocks(format, 20, 256, 6)
    assert_same(left, weight, bm=bm, bn=16, packed=False)
    assert_same(left, weight, bm=bm, tiled=False)


@pytest.mark.parametrize("bm", [1, 8, 32])
def test_numbers_at_the_edges(bm: int) -> None:
    """Infinity, NaN, subnormal and huge numbers, zeros, and scales of both signs."""
    weight = random_blocks(FORMATS["q4_1"], 48, 128, 7)
    scales = weight.planes["d"], weight.planes["m"]
    for row, (d, m) in enumerate([(0, 0), (np.nan, 1), (1, np.inf), (-1, 3), (6e-8, 0), (0, -5)]):
        for plane, value in zip(scales, (d, m), strict=True):
            plane[row] = value
    scales[0][8], scales[1][8] = 65504, -65504
    x = np.random.default_rng(8).standard_normal((40, 128)).astype(np.float32)
    for row, value in enumerate([np.nan, np.inf, 1e-30, 1e-42, 1e30, 1e24, 0, -1e-20, 1e20]):
        x[row, 40] = value
    x[9], x[10], x[11] = 0, 1e-38, 1e18
    assert_same(quantize(x, bfp9_block32), weight, bm=bm)


@given(
    hnp.arrays(np.float32, (3, 64), elements=st.floats(-1e9, 1e9, width=32)),
    st.integers(0, 1 << 16),
)
@settings(max_examples=30, deadline=None)
def test_any_numbers(x: np.ndarray, seed: int) -> None:
    left, weight = quantize(x, bfp9_block32), random_blocks(FORMATS["q4_0"], 16, 64, seed)
    np.testing.assert_array_equal(
        native(left, weight, bm=1).view(np.uint32), native(left, weight, bm=16).view(np.uint32)
    )
    assert_same(left, weight, bm=16)


@pytest.mark.parametrize("format", WEIGHTS, ids=str)
def test_a_rounded_weight_is_near(format: BlockFormat) -> None:
    """Within one of its block's units, of which it is 256 at most, and a bfloat16 number."""
    weight = random_blocks(format, 64, 512, 9)
    codes, power = rounded(weight)
    unit = np.repeat(power, 32, -1)
    values = codes * unit
    assert np.all(np.abs(values - weight.decode()) <= 1.1 * unit)
    assert np.abs(codes).max() <= 256
    np.testing.assert_array_equal(values.astype(bfloat16.numpy).astype(np.float64), values)


def test_weights_of_more_bits_are_refused() -> None:
    x = TensorType(shape_of(4, 64), bfp9_block32, None, 1)
    w = TensorType(shape_of(32, 64), FORMATS["q8_0"], None, 1)
    y = TensorType(shape_of(4, 32), float32)
    with pytest.raises(DureError, match="four bits"):
        matmul.specialize([x, w, y], {"bm": 4, "bn": 32, "bk": 32})
