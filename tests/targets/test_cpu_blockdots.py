"""Dots of quantized activations and weights at every level of the host's instructions."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import POOL
from guarded import guarded_bytes

from dure.ir.blocks import Blocks, quantize
from dure.ir.core import op_definition
from dure.ir.dtypes import (
    ACTIVATION_FORMATS,
    FORMATS,
    BlockFormat,
    float32,
    int8_block32,
    int16_block32,
)
from dure.ir.expr import const, symbol
from dure.ir.layout import PlaneLayouts, row_planes
from dure.ir.pack import pack
from dure.ir.types import TensorType, shape_of
from dure.library.matmul import matmul
from dure.runtime.host import features_of, host_features, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.launch import compile_kernel
from dure.targets.cpu.packing import packed_bytes, packed_layout

WEIGHTS = [f for f in FORMATS.values() if f not in ACTIVATION_FORMATS]


def random_blocks(format: BlockFormat, rows: int, length: int, seed: int) -> Blocks:
    """Every code and scale that the format can hold may occur."""
    rng = np.random.default_rng(seed)
    planes = {}
    for plane in format.planes:
        shape = (rows, length // plane.per)
        if plane.dtype.is_float:
            planes[plane.name] = (rng.standard_normal(shape) * 0.1).astype(plane.dtype.numpy)
        elif plane.dtype.kind == "int":
            planes[plane.name] = rng.integers(-128, 128, shape).astype(np.int8)
        else:
            planes[plane.name] = rng.integers(0, 1 << plane.dtype.bits, shape).astype(np.uint8)
    return Blocks(format, 1, (rows, length), planes)


def in_memory(blocks: Blocks, layouts: PlaneLayouts, nbytes: int) -> np.ndarray:
    """Bytes that hold the blocks in this layout."""
    return pack(blocks, layouts, blocks.format, guarded_bytes(nbytes))


def native(
    x: np.ndarray,
    weight: Blocks,
    activations: BlockFormat,
    *,
    bm: int,
    bn: int,
    packed: bool = True,
    workers: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """``x @ weight.T`` on the CPU target, and the reference semantics of dot."""
    host = host_features()
    (rows, length), columns = x.shape, weight.shape[0]
    lanes = host.vector_bits // 32
    kind = TensorType(shape_of(columns, length), weight.format, None, 1)
    if packed:
        layout, nbytes = packed_layout(kind, lanes), packed_bytes(kind, lanes)
    else:
        layout = row_planes(weight.format, [columns, length], 1)
        nbytes = int(columns * length * weight.format.bits) // 8
    assert isinstance(layout, PlaneLayouts)
    m = symbol("M", "size", 0, 4096)
    left = quantize(x, activations)
    left_layout = row_planes(activations, [rows, length], 1)
    left_bytes = sum(length // p.per * p.dtype.bits // 8 for p in activations.planes) * rows
    types = [
        TensorType((m, const(length)), activations, None, 1),
        kind.with_layout(layout),
        TensorType((m, const(columns)), float32),
    ]
    bk = max(64, weight.format.block)
    kernel = compile_kernel(matmul.specialize(types, {"bm": bm, "bn": bn, "bk": bk}), host, POOL)
    y = np.full((rows, columns), np.nan, np.float32)
    a, w = in_memory(left, left_layout, left_bytes), in_memory(weight, layout, nbytes)
    kernel.run([a.ctypes.data, w.ctypes.data, y.ctypes.data], [rows], workers)
    dot = op_definition("dot").semantics
    assert dot is not None
    return y, dot({}, left, weight.transposed((1, 0)), np.zeros_like(y))


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("format", WEIGHTS, ids=str)
@pytest.mark.parametrize("bm", [8, 32])
def test_every_format(
    format: BlockFormat, bm: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    weight = random_blocks(format, 41, 512, 1)
    x = np.random.default_rng(2).standard_normal((27, 512)).astype(np.float32)
    y, expected = native(x, weight, int8_block32, bm=bm, bn=32)
    np.testing.assert_allclose(y, expected, rtol=0, atol=np.abs(expected).max() * 1e-6)


@pytest.mark.parametrize("format", WEIGHTS, ids=str)
def test_weights_in_their_own_layout(format: BlockFormat) -> None:
    weight = random_blocks(format, 20, 256, 3)
    x = np.random.default_rng(4).standard_normal((3, 256)).astype(np.float32)
    y, expected = native(x, weight, int8_block32, bm=4, bn=16, packed=False)
    np.testing.assert_allclose(y, expected, rtol=0, atol=np.abs(expected).max() * 1e-6)


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("name", ["q4_1", "q8_0", "q6_k"])
def test_two_byte_activations(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    weight = random_blocks(FORMATS[name], 32, 256, 5)
    x = np.random.default_rng(6).standard_normal((21, 256)).astype(np.float32)
    x[0, :32] = 0
    y, expected = native(x, weight, int16_block32, bm=32, bn=32)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=scale * 1e-6)
    exact = x.astype(np.float64) @ weight.decode().astype(np.float64).T
    assert np.abs(y - exact).max() < scale * 2e-4


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("activations", [int8_block32, int16_block32], ids=str)
def test_the_same_bits_whatever_the_tile_and_the_workers(
    activations: BlockFormat, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    weight = random_blocks(FORMATS["q4_k"], 64, 512, 7)
    x = np.random.default_rng(8).standard_normal((45, 512)).astype(np.float32)
    whole, _ = native(x, weight, activations, bm=64, bn=64)
    for bm, bn, workers in ((8, 32, 1), (1, 16, 2), (2, 64, 2), (16, 16, 2), (32, 64, 1)):
        other, _ = native(x, weight, activations, bm=bm, bn=bn, workers=workers)
        np.testing.assert_array_equal(whole, other)
    for row in (0, 12, 44):
        alone, _ = native(x[row : row + 1], weight, activations, bm=1, bn=32)
        np.testing.assert_array_equal(whole[row : row + 1], alone)


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("activations", [int8_block32, int16_block32], ids=str)
@pytest.mark.parametrize("format", WEIGHTS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_overflow_nowhere(
    format: BlockFormat,
    activations: BlockFormat,
    sign: int,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    weight = random_blocks(format, 16, 256, 9)
    for plane in format.groups["code"]:
        codes = weight.planes[plane.name]
        low, high = (-128, 127) if plane.dtype.kind == "int" else (0, (1 << plane.dtype.bits) - 1)
        codes[:8], codes[8:] = high, low
    x = np.full((19, 256), sign, np.float32)
    # Low bytes of -128, beside the largest codes.
    x[1] = sign * (1 - 127.5 / 32512)
    x[1, ::32] = sign
    x[2, ::2] *= -1
    x[3:] = np.resize(x[:3], (16, 256))
    y, expected = native(x, weight, activations, bm=32, bn=16)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(y, expected, rtol=0, atol=scale * 1e-6)


@pytest.mark.parametrize(
    ("level", "name", "instruction"),
    [
        *(
            ("avx2", "q4_1", "vpmaddubsw"),
            ("avx2", "q6_k", "vpmaddubsw"),
            ("avx2", "q8_0", "vpmaddwd"),
        ),
        *(("neon", "q4_1", "smlal"), ("neon", "q6_k", "smlal"), ("neon", "q8_0", "smull")),
        *(("amx", name, "tdpbssd") for name in ("q4_1", "q6_k", "q8_0")),
        *(("neon-dotprod", name, "sdot") for name in ("q4_1", "q6_k", "q8_0")),
    ],
)
def test_products_of_bytes_are_instructions(level: str, name: str, instruction: str) -> None:
    """Products of 32 bits take several times as long."""
    host = features_of(level)
    kind = TensorType(shape_of(32, 256), FORMATS[name], None, 1)
    rows = symbol("M", "size", 0, 4096)
    types = [
        TensorType((rows, const(256)), int8_block32, None, 1),
        kind.with_layout(packed_layout(kind, host.vector_bits // 32)),
        TensorType((rows, const(32)), float32),
    ]
    kernel = matmul.specialize(types, {"bm": 16, "bn": 32, "bk": 256})
    text = assembly(emit_kernel(kernel, host).llvm_ir, host)
    assert instruction in text
    assert "vpmulld" not in text


def test_extreme_activations() -> None:
    weight = random_blocks(FORMATS["q4_1"], 16, 64, 9)
    x = np.zeros((4, 64), np.float32)
    x[1] = 3e38
    x[2, 5] = 1e-40
    x[3, ::2] = -1
    with np.errstate(all="ignore"):
        y, expected = native(x, weight, int8_block32, bm=4, bn=16)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(y[finite], expected[finite], rtol=1e-5, atol=1e-6)
