"""The load program's relayouts against reference packing, there and back, for every format."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest

from dure.ir.dtypes import DType, bfloat16, float16, float32
from dure.ir.expr import const
from dure.ir.pack import pack, unpack
from dure.ir.sizes import tensor_bytes
from dure.ir.stored import STORED_FORMATS, stored_bytes, stored_type
from dure.ir.types import TensorType
from dure.runtime import llvm
from dure.runtime.host import host_features
from dure.targets.cpu.packing import packed_layout
from dure.targets.cpu.relayout import emit_relayout

Bytes = npt.NDArray[np.uint8]


def _move(source: TensorType, target: TensorType, data: Bytes) -> Bytes:
    host = host_features()
    code = emit_relayout("relayout", source, target, host.function_attributes)
    module = llvm.load_object(llvm.compile_module(code.definition, host))
    function = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    )(module.address("relayout"))
    result = np.zeros(tensor_bytes(target), np.uint8)
    middle = code.panels // 2
    function(data.ctypes.data, result.ctypes.data, 0, middle)
    function(data.ctypes.data, result.ctypes.data, middle, code.panels)
    return result


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("format", STORED_FORMATS, ids=str)
@pytest.mark.parametrize(("rows", "blocks"), [(32, 2), (21, 3), (3, 1)])
def test_blocks_move_to_panels_and_back(format, lanes, rows, blocks):
    shape = (rows, blocks * format.block)
    plain = TensorType((const(shape[0]), const(shape[1])), format, quantized_axis=1)
    stored = stored_type(plain)
    packed = plain.with_layout(packed_layout(plain, lanes))
    data = np.random.default_rng(1).integers(0, 256, stored_bytes(shape, format), np.uint8)
    moved = _move(stored, packed, data)
    blocks_of_file = unpack(data, stored.layout, format, shape, 1)
    expected = np.zeros_like(moved)
    written = pack(blocks_of_file, packed.layout, format)
    expected[: len(written)] = written
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(_move(packed, stored, moved), data)
    if rows % lanes == 0:
        assert len(moved) == len(data)


@pytest.mark.parametrize("dtype", [float32, float16, bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(48, 40), (5, 7), (1, 1)])
def test_floats_move_to_panels_and_back(dtype: DType, shape: tuple[int, int]):
    plain = TensorType((const(shape[0]), const(shape[1])), dtype)
    packed = plain.with_layout(packed_layout(plain, 16))
    rng = np.random.default_rng(2)
    values = rng.standard_normal(shape).astype(dtype.numpy)
    data = np.frombuffer(values.tobytes(), np.uint8)
    moved = _move(plain, packed, data)
    panels = -(-shape[0] // 16)
    padded = np.zeros((panels * 16, shape[1]), dtype.numpy)
    padded[: shape[0]] = values
    expected = padded.reshape(panels, 16, shape[1]).transpose(0, 2, 1)
    np.testing.assert_array_equal(moved, np.frombuffer(expected.tobytes(), np.uint8))
    np.testing.assert_array_equal(_move(packed, plain, moved), data)
