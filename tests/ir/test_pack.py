"""Layouts of block-quantized bytes: GGUF's, bit for bit against the gguf package, and any other."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.errors import IRError, ModelFileError
from dure.frontends.gguf.layouts import ELEMENT_TYPES, element_type, layout_of
from dure.frontends.gguf.types import BLOCK, GGMLType
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.dtypes import BlockFormat, DType
from dure.ir.layout import Digit, Layout, PlaneLayouts, row_major, row_planes, strided
from dure.ir.pack import pack, packed_bytes, unpack

QUANTIZED = [k for k, v in ELEMENT_TYPES.items() if isinstance(v, BlockFormat)]


def random_bytes(kind: GGMLType, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random rows whose float16 fields are finite."""
    rng = np.random.default_rng(seed)
    size = BLOCK[kind].nbytes
    raw = rng.integers(0, 256, (rows, blocks, size), np.uint8)
    halves = rng.standard_normal((rows, blocks, 2)).astype(np.float16).view(np.uint8)
    first = size - 2 if kind == GGMLType.Q6_K else 0
    raw[..., first : first + 2] = halves[..., :2]
    if kind in (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q4_1, GGMLType.Q5_1):
        raw[..., 2:4] = halves[..., 2:]
    return raw.reshape(-1)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_gguf_bytes_decode_as_ggml_does_bit_for_bit(kind: GGMLType) -> None:
    rows, blocks = 5, 3
    shape = (rows, blocks * BLOCK[kind].elements)
    raw = random_bytes(kind, rows, blocks)
    element, layout = element_type(kind), layout_of(kind, shape)
    values = unpack(raw, layout, element, shape)
    assert isinstance(values, Blocks)
    reference = gguf.quants.dequantize(raw.reshape(rows, -1), gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(values.decode().view(np.uint32), reference.view(np.uint32))
    assert packed_bytes(layout, element, shape) == raw.size
    np.testing.assert_array_equal(pack(values, layout, element), raw)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_formats_account_for_every_bit(kind: GGMLType) -> None:
    element = element_type(kind)
    assert element.bits * BLOCK[kind].elements == BLOCK[kind].nbytes * 8


@pytest.mark.parametrize("kind", [k for k in ELEMENT_TYPES if k not in QUANTIZED])
def test_plain_types(kind: GGMLType) -> None:
    element = element_type(kind)
    assert isinstance(element, DType)
    raw = np.random.default_rng(0).integers(0, 256, 6 * element.bits // 8, np.uint8)
    values = unpack(raw, layout_of(kind, (2, 3)), element, (2, 3))
    assert isinstance(values, np.ndarray)
    assert values.tobytes() == raw.tobytes()


def test_three_axes() -> None:
    raw = random_bytes(GGMLType.Q4_K, 6, 2)
    deep = unpack(raw, layout_of(GGMLType.Q4_K, (2, 3, 512)), dtypes.q4_k, (2, 3, 512))
    flat = unpack(raw, layout_of(GGMLType.Q4_K, (6, 512)), dtypes.q4_k, (6, 512))
    assert isinstance(deep, Blocks)
    assert isinstance(flat, Blocks)
    np.testing.assert_array_equal(deep.decode().reshape(6, 512), flat.decode())


def permuted_rows(format: BlockFormat, rows: int, length: int, order: list[int]) -> PlaneLayouts:
    """Planes one after another, each with blocks before rows or rows before blocks."""
    planes: list[tuple[str, Layout]] = []
    offset = 3
    for number, plane in enumerate(format.planes):
        entries, bits = length // plane.per, plane.dtype.bits
        if order[number % len(order)]:
            axes = ((Digit(None, bits),), (Digit(None, rows * bits),))
        else:
            axes = ((Digit(None, entries * bits),), (Digit(None, bits),))
        planes.append((plane.name, Layout(axes, offset)))
        offset += rows * entries * bits
    return PlaneLayouts(tuple(planes))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(QUANTIZED),
    st.integers(0, 4),
    st.integers(0, 2),
    st.lists(st.integers(0, 1), min_size=1, max_size=7),
    st.integers(0, 1000),
)
def test_any_layout_gives_the_values_back(
    kind: GGMLType, rows: int, blocks: int, order: list[int], seed: int
) -> None:
    format = element_type(kind)
    assert isinstance(format, BlockFormat)
    shape = (rows, blocks * format.block)
    raw = random_bytes(kind, rows, blocks, seed)
    values = unpack(raw, layout_of(kind, shape), format, shape)
    assert isinstance(values, Blocks)
    for layout in (permuted_rows(format, *shape, order), row_planes(format, shape, 1)):
        again = unpack(pack(values, layout, format), layout, format, shape)
        assert isinstance(again, Blocks)
        for name, plane in values.planes.items():
            np.testing.assert_array_equal(again.planes[name], plane)


@given(
    st.sampled_from(sorted(dtypes.DTYPES)), st.integers(0, 5), st.integers(0, 70), st.integers(0, 9)
)
def test_plain_numbers_at_any_bit(name: str, count: int, offset: int, gap: int) -> None:
    dtype = dtypes.DTYPES[name]
    rng = np.random.default_rng(count)
    layout = Layout(((Digit(None, dtype.bits + gap),),), offset)
    if dtype.kind == "bool":
        values = rng.integers(0, 2, count).astype(np.bool_)
    elif dtype.bits < 8:
        low = -(1 << dtype.bits - 1) if dtype.kind == "int" else 0
        values = rng.integers(low, low + (1 << dtype.bits), count).astype(dtype.numpy)
    else:
        values = rng.integers(0, 256, count * dtype.bits // 8, np.uint8).view(dtype.numpy)
    filled = np.full(packed_bytes(layout, dtype, (count,)), 0xFF, np.uint8)
    again = unpack(pack(values, layout, dtype, filled), layout, dtype, (count,))
    assert isinstance(again, np.ndarray)
    assert again.tobytes() == values.tobytes()


def test_named_errors() -> None:
    with pytest.raises(ModelFileError, match="IQ2_XS are not supported"):
        element_type(GGMLType.IQ2_XS)
    with pytest.raises(ModelFileError, match="Q4_K tensor of shape"):
        layout_of(GGMLType.Q4_K, (2, 100))
    with pytest.raises(IRError, match="a layout that touches bits 0 to 192"):
        unpack(np.zeros(20, np.uint8), row_major((2, 3), 32), dtypes.float32, (2, 3))
    with pytest.raises(IRError, match="of 1 axes for a tensor of rank 2"):
        unpack(np.zeros(20, np.uint8), strided([1], 8), dtypes.int8, (2, 2))
    with pytest.raises(IRError, match="plain numbers have one layout"):
        unpack(np.zeros(20, np.uint8), strided([1], 8), dtypes.q8_0, (32,))
    short = Layout(((Digit(2, 16), Digit(2, 8)),))
    with pytest.raises(IRError, match="longer than its layout"):
        unpack(np.zeros(20, np.uint8), short, dtypes.int8, (5,))
