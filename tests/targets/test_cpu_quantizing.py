"""Quantizing rows on the CPU, at every level of the host: the bits of the reference."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import POOL

import dure
import dure.lang as dl
from dure.ir.blocks import Blocks, quantize
from dure.ir.dtypes import (
    FORMATS,
    BlockFormat,
    bfp9_block32,
    float32,
    int8_block32,
    int16_block32,
)
from dure.ir.expr import const, symbol
from dure.ir.layout import row_planes
from dure.ir.pack import pack, unpack
from dure.ir.types import TensorType
from dure.runtime.host import features_of, host_features, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.launch import compile_kernel

Q8_0 = FORMATS["q8_0"]


@dure.kernel
def rows_to_codes(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bd: dl.const, format: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i, j), dl.quantize(dl.load(x, (i, j), (bm, bd)), format))


def specialized(length: int, block: int, format: BlockFormat):
    rows = symbol("M", "size", 0, 4096)
    types = [
        TensorType((rows, const(length)), float32),
        TensorType((rows, const(length)), format, None, 1),
    ]
    return rows_to_codes.specialize(types, {"bm": 2, "bd": block, "format": format})


def compiled(x: np.ndarray, block: int, format: BlockFormat) -> Blocks:
    """The rows as the CPU's code quantizes them, ``block`` columns an instance."""
    rows, length = x.shape
    kernel = compile_kernel(specialized(length, block, format), host_features(), POOL)
    layout = row_planes(format, [rows, length], 1)
    empty = quantize(np.zeros_like(x), format)
    nbytes = sum(rows * length // p.per * p.dtype.bits // 8 for p in format.planes)
    memory = pack(empty, layout, format, np.zeros(nbytes, np.uint8))
    kernel.run([x.ctypes.data, memory.ctypes.data], [rows], 2)
    found = unpack(memory, layout, format, (rows, length), 1)
    assert isinstance(found, Blocks)
    return found


def awkward(length: int) -> np.ndarray:
    """Rows of numbers of all sizes, of ties, of zeros, infinities, NaN and next to nothing."""
    rng = np.random.default_rng(length)
    x = rng.standard_normal((9, length)).astype(np.float32)
    x[1] *= np.exp2(rng.integers(-120, 120, length)).astype(np.float32)
    x[2] = 0
    x[2, ::7] = -0.0
    x[3] = 1e-40
    x[4] = rng.integers(-254, 255, length) / np.float32(2)
    x[4, ::32] = 127
    x[5, 3] = np.inf
    x[6, 5] = -np.nan
    x[7] = np.finfo(np.float32).max
    x[8] = np.finfo(np.float32).tiny
    return x


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("format", [int8_block32, int16_block32, bfp9_block32, Q8_0], ids=str)
@pytest.mark.parametrize(("length", "block"), [(32, 32), (96, 32), (576, 64), (512, 256)])
def test_the_bits_of_the_reference(
    length: int, block: int, format: BlockFormat, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    x = awkward(length)
    with np.errstate(all="ignore"):
        expected = quantize(x, format)
    found = compiled(x, block, format)
    for plane in format.planes:
        both = found.planes[plane.name], expected.planes[plane.name]
        # NumPy knows NaN of its own types only.
        wide = (side.astype(np.float64) for side in both)
        np.testing.assert_array_equal(*wide)


@pytest.mark.parametrize("level", ["x86-64", "avx2", "avx512", "neon"])
def test_rounding_calls_no_function(level: str) -> None:
    """A conversion that LLVM has no instruction for would be a call of the C library."""
    host = features_of(level)
    text = assembly(emit_kernel(specialized(64, 64, int8_block32), host).llvm_ir, host)
    assert "lrint" not in text
