"""Block-quantized tensors: plain Python and the IR's interpreter agree with dequantized NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dure
import dure.lang as dl
from dure.ir.blocks import Blocks, quantize
from dure.ir.dtypes import FORMATS, BlockFormat
from dure.ir.expr import const
from dure.ir.interpret import run
from dure.ir.types import TensorType

RNG = np.random.default_rng(9)


@dure.kernel
def linear(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc += dl.load(x, (i, k), (bm, bk)) @ dl.load(w, (j, k), (bn, bk)).T
    dl.store(y, (i, j), acc)


@dure.kernel
def dequantized(w: dl.Tensor, rows: dl.Index(0, None), y: dl.Tensor, bk: dl.const):
    i, k = dl.program_id(0), dl.program_id(1)
    row = w[1:]
    dl.store(y, (i, k), dl.load(row, (rows[i], k), (1, bk)).to(dl.float32))


def random_blocks(format: BlockFormat, shape: tuple[int, int]) -> Blocks:
    planes: dict[str, Any] = {}
    for plane in format.planes:
        extent = (shape[0], shape[1] // plane.per)
        if plane.dtype.is_float:
            planes[plane.name] = RNG.uniform(0.01, 0.1, extent).astype(plane.dtype.numpy)
        else:
            low = -(1 << (plane.dtype.bits - 1)) if plane.dtype.kind == "int" else 0
            numbers = RNG.integers(low + 1, low + (1 << plane.dtype.bits), extent)
            planes[plane.name] = numbers.astype(plane.dtype.numpy)
    return Blocks(format, 1, shape, planes)


def kind(array: Any) -> TensorType:
    shape = tuple(const(e) for e in array.shape)
    if isinstance(array, Blocks):
        return TensorType(shape, array.format, None, array.axis)
    return TensorType(shape, dl.int32 if array.dtype == np.int32 else dl.float32)


def both_ways(kernel: Any, arrays: list[Any], **consts: Any) -> None:
    """Run into the last array by plain Python, and check the IR's interpreter against it."""
    dl.interpret(kernel)(*arrays, **consts)
    again = np.zeros_like(arrays[-1])
    function = kernel.specialize([kind(a) for a in arrays], consts)
    run(function, [*arrays[:-1], again])
    np.testing.assert_allclose(again, arrays[-1], rtol=1e-5, atol=1e-4)


WEIGHTS = [name for name in FORMATS if name != "int8_block32"]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("quantized", [False, True])
def test_dots_with_block_quantized_weights(name: str, quantized: bool) -> None:
    w = random_blocks(FORMATS[name], (11, 512))
    x: Any = RNG.standard_normal((3, 512)).astype(np.float32)
    if quantized:
        x = quantize(x, FORMATS["int8_block32"])
    y = np.zeros((3, 11), np.float32)
    both_ways(linear, [x, w, y], bm=2, bn=8, bk=256)
    left = x.decode() if quantized else x
    expected = left.astype(np.float64) @ w.decode().astype(np.float64).T
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_of_a_view_are_dequantized(name: str) -> None:
    w = random_blocks(FORMATS[name], (6, 512))
    rows = np.array([3, 0, 4], np.int32)
    y = np.zeros((3, 512), np.float32)
    both_ways(dequantized, [w, rows, y], bk=256)
    np.testing.assert_array_equal(y, w.decode()[1:][rows])
