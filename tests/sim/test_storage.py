"""Tiles in memories against a placement written element by element, and chips' own formats."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program, matmul_program, number, toy_chip

from dure.errors import TargetError
from dure.ir import dtypes
from dure.ir.dtypes import Array
from dure.ir.types import TileType
from dure.sim.arithmetic import FloatFormat
from dure.sim.sanitizer.cells import part
from dure.sim.storage import new_memory, place_tile, to_raws, to_values
from dure.sim.values import run_values

TYPES = ["float32", "bfloat16", "float8_e5m2", "int8", "int4", "uint2", "uint1", "bool", "int64"]


def _bit(shape: tuple[int, ...], place: tuple[int, ...], bits: int, partitions: int | None) -> Any:
    """(partition, bit) of an element, as the rule says it."""
    number = int(np.ravel_multi_index(place, shape))
    if partitions is None:
        return 0, number * bits
    row, column = divmod(number, shape[-1])
    row_bytes = -(-shape[-1] * bits // 8)
    return row % partitions, 8 * (row // partitions) * row_bytes + column * bits


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from([None, 1, 2, 4]),
    st.integers(0, 5),
)
def test_every_element_lies_where_the_rule_says(
    name: str, extents: list[int], partitions: int | None, address: int
) -> None:
    dtype, shape = dtypes.DTYPES[name], tuple(extents)
    kind = TileType(shape, dtype)
    place = place_tile(kind, partitions)
    top = 1 << min(dtype.bits, 16) if dtype.kind != "bool" else 2
    codes = np.random.default_rng(0).integers(0, top, shape)
    raw = codes.astype(np.dtype(f"uint{max(8, dtype.bits)}"))
    memory = new_memory(partitions or 1, address + place.size + 3)
    place.write(memory, address, [raw])
    assert np.array_equal(place.read(memory, address)[0], raw)
    bits = np.unpackbits(memory, axis=1, bitorder="little")
    touched = np.zeros_like(bits)
    for at in itertools.product(*map(range, shape)):
        partition, first = _bit(shape, at, dtype.bits, partitions)
        cut = slice(8 * address + first, 8 * address + first + dtype.bits)
        found = int.from_bytes(
            np.packbits(bits[partition, cut], bitorder="little").tobytes(), "little"
        )
        assert found == int(raw[at])
        touched[partition, cut] = 1
    assert np.all(bits[touched == 0] == 1), "a byte that isn't the tile's was written"


@pytest.mark.parametrize("name", TYPES)
def test_values_and_bits(name: str) -> None:
    dtype = dtypes.DTYPES[name]
    kind = TileType((3, 5), dtype)
    values = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype.numpy)
    np.testing.assert_array_equal(to_values(kind, to_raws(kind, values, {}), {}), values)


@pytest.mark.parametrize(
    ("exponent", "mantissa", "dtype"), [(5, 10, np.float16), (8, 7, ml_dtypes.bfloat16)]
)
def test_the_ieee_widths_are_numpys_own(exponent: int, mantissa: int, dtype: Any) -> None:
    format = FloatFormat(exponent, mantissa)
    codes = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(format.decode(codes), wide)
    same = ~np.isnan(wide)
    np.testing.assert_array_equal(format.encode(wide[same]), codes[same])
    assert np.isnan(format.decode(format.encode(wide[~same]))).all()
    values = (np.random.default_rng(0).normal(size=4000) * np.logspace(-40, 38, 4000)).astype(
        np.float32
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(format.round(values), values.astype(dtype).astype(np.float32))


def test_a_format_of_6_and_9_bits_rounds_to_its_nearest_value() -> None:
    format = FloatFormat(6, 9)
    codes = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = format.decode(codes)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(format.encode(values[finite]), codes[finite])
    known = np.unique(values[finite].astype(np.float64))
    drawn = np.random.default_rng(0).normal(size=5000) * np.logspace(-11, 9, 5000)
    rounded = format.round(drawn.astype(np.float32)).astype(np.float64)
    right = np.clip(np.searchsorted(known, drawn.astype(np.float32)), 1, len(known) - 1)
    nearest = np.minimum(
        abs(known[right] - drawn.astype(np.float32)),
        abs(known[right - 1] - drawn.astype(np.float32)),
    )
    np.testing.assert_array_equal(abs(rounded - drawn.astype(np.float32)), nearest)
    assert format.round(np.float32([2.0**40, -(2.0**40)])).tolist() == [np.inf, -np.inf]


FORMAT = {"exponent": number(6, "bit"), "mantissa": number(9, "bit")}


def test_a_chip_with_a_format_of_its_own_rounds_every_result_to_it() -> None:
    chip = toy_chip(formats={"float16": FORMAT})
    a = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float16)
    b = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float16)
    c = np.zeros((16, 16), np.float32)
    run_values(matmul_program(16, 16, 8, (8, 8, 8), dtype="float16"), chip, [a, b, c])
    own = [FloatFormat(6, 9).round(v).astype(np.float64) for v in (a, b)]
    np.testing.assert_allclose(c, own[0] @ own[1], rtol=1e-5, atol=1e-5)
    assert abs(c - a.astype(np.float64) @ b.astype(np.float64)).max() > 1e-4


def test_a_format_with_more_range_than_float16_keeps_it_inside() -> None:
    """300 squared is more than float16 holds; a format with 6 exponent bits carries it."""
    p = Program("range", grid=(1,))
    x, y = p.tensor("x", (4,), "float16"), p.tensor("y", (4,), "float16", access="out")
    tile, square = p.buffer("tile", (4,), "float16"), p.buffer("square", (4,), "float16")
    full, done = p.semaphore("full"), p.semaphore("done")
    p.load("in", x, tile, (0,))
    p.signal("in", full)
    p.wait("vec", full)
    p.compute("vec", ["vec"], [tile], [square], lambda t, v: t("mul", v, v))
    p.compute(
        "vec",
        ["vec"],
        [square],
        [square],
        lambda t, v: t("where", t("gt", v, t.full((4,), 0.5, "float16")), t("sqrt", v), v),
    )
    p.signal("vec", done)
    p.wait("out", done)
    p.store("out", y, square, (0,))
    function = p.build()
    x_values = np.array([300, 1, 0.5, 4096], np.float16)
    found: dict[bool, Array] = {}
    for own in (False, True):
        found[own] = np.zeros(4, np.float16)
        chip = toy_chip(formats={"float16": FORMAT}) if own else toy_chip()
        run_values(function, chip, [x_values, found[own]])
    assert found[False].tolist() == [np.inf, 1, 0.25, np.inf]
    assert found[True].tolist() == [300, 1, 0.25, 4096]


def test_a_format_must_fit_its_type() -> None:
    chip = toy_chip(
        formats={"float16": {"exponent": number(5, "bit"), "mantissa": number(9, "bit")}}
    )
    arrays = [
        np.zeros((8, 8), np.float16),
        np.zeros((8, 8), np.float16),
        np.zeros((8, 8), np.float32),
    ]
    with pytest.raises(TargetError, match="a format of 15 bits"):
        run_values(matmul_program(8, 8, 8, (8, 8, 8), dtype="float16"), chip, arrays)
    with pytest.raises(TargetError, match="2 to 8 exponent"):
        FloatFormat(9, 6)


def test_a_part_of_rows_in_neighbouring_partitions_is_one_rectangle() -> None:
    place = place_tile(TileType((256, 512), dtypes.bfloat16), 128)
    found = part(place, "sram", 64, ((0, 256), (0, 100)), inward=False)
    assert found == [("sram", 0, 128, 64, 264), ("sram", 0, 128, 64 + 1024, 264 + 1024)]
    found = part(place, "sram", 0, ((3, 5), (8, 16)), inward=False)
    assert found == [("sram", 3, 5, 16, 32)]
