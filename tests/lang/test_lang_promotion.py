"""Types of operations on mixed operands: the rules of Triton."""

from __future__ import annotations

import numpy as np
import pytest

import dure.lang as dl
from dure.errors import KernelError
from dure.ir.dtypes import DTYPES
from dure.ir.types import TileType
from dure.lang.eager import Eager
from dure.lang.promotion import promote
from dure.lang.tile import Tile
from dure.lang.values import building


def tile(name: str) -> Tile:
    dtype = DTYPES[name]
    return Tile(TileType((2,), dtype), np.ones(2).astype(dtype.numpy))


PAIRS = [
    ("float32", "float16", "float32"),
    ("float64", "float32", "float64"),
    ("float16", "bfloat16", "float32"),
    ("bfloat16", "int32", "bfloat16"),
    ("float8_e4m3fn", "float8_e5m2", "float16"),
    ("float8_e4m3fn", "float16", "float16"),
    ("int8", "int32", "int32"),
    ("uint8", "int8", "uint8"),
    ("uint8", "int16", "int16"),
    ("bool", "int8", "int8"),
    ("bool", "float16", "float16"),
]


@pytest.mark.parametrize(("one", "other", "expected"), PAIRS)
def test_two_tiles(one: str, other: str, expected: str) -> None:
    with building(Eager((1,), (0,))):
        assert (tile(one) * tile(other)).dtype == DTYPES[expected]
        assert (tile(other) * tile(one)).dtype == DTYPES[expected]


@pytest.mark.parametrize("one", list(DTYPES))
@pytest.mark.parametrize("other", list(DTYPES))
def test_promotion_is_symmetric(one: str, other: str) -> None:
    assert promote(DTYPES[one], DTYPES[other]) == promote(DTYPES[other], DTYPES[one])


NUMBERS = [
    ("float16", 2.5, "float16"),
    ("int32", 2, "int32"),
    ("int8", 2, "int8"),
    ("int32", 2.5, "float32"),
    ("bool", 1, "int32"),
    ("bfloat16", True, "bfloat16"),
]


@pytest.mark.parametrize(("name", "number", "expected"), NUMBERS)
def test_a_number_adopts_the_tiles_type(name: str, number: float, expected: str) -> None:
    with building(Eager((1,), (0,))):
        assert (tile(name) + number).dtype == DTYPES[expected]
        assert (number + tile(name)).dtype == DTYPES[expected]


def test_true_division_is_float32_at_least() -> None:
    with building(Eager((1,), (0,))):
        assert (tile("int8") / tile("int8")).dtype is dl.float32
        assert (tile("float16") / 3).dtype is dl.float32
        assert (tile("float64") / 3).dtype is dl.float64


@pytest.mark.parametrize(("name", "number"), [("uint8", 300), ("int8", -129), ("uint8", -1)])
def test_a_number_that_does_not_fit_is_refused(name: str, number: int) -> None:
    with building(Eager((1,), (0,))), pytest.raises(KernelError, match=str(number)):
        tile(name) + number
