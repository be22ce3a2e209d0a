"""Results beside reference values: what counts as an error, and what the report says."""

from __future__ import annotations

import numpy as np
import pytest
from programs import Program, copy_program, matmul_program, toy_chip

from dure.ir import dtypes
from dure.sim.check import compare, relative_errors

CHIP = toy_chip()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_right_matmul_has_no_difference(kind: str) -> None:
    dtype = dtypes.DTYPES[kind].numpy
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=s).astype(dtype) for s in ((20, 30), (30, 10)))
    c = np.zeros((20, 10), np.float32)
    function = matmul_program(20, 10, 30, (8, 8, 8), dtype=kind)
    right = a.astype(np.float64) @ b.astype(np.float64)
    assert compare(function, CHIP, [a, b, c], [None, None, right], seeds=(0, 1)) is None
    assert not c.any(), "the caller's arrays were written"
    wrong = right.copy()
    wrong[3, 4] *= 1.5
    found = compare(function, CHIP, [a, b, c], [None, None, wrong])
    assert found is not None
    assert (found.name, found.place) == ("c", (3, 4))
    assert found.relative == pytest.approx(
        abs(right[3, 4]) * 0.5 / max(abs(wrong[3, 4]), np.sqrt(np.mean(wrong**2))), rel=0.1
    )
    assert "'c' is" in str(found) and "[3, 4]" in str(found)


def test_a_race_is_a_difference() -> None:
    p = Program("racy", grid=(1,))
    x, y = p.tensor("x", (8, 8)), p.tensor("y", (8, 8), access="out")
    tile = p.buffer("tile", (8, 8))
    p.load("in", x, tile, (0, 0))
    p.store("out", y, tile, (0, 0))
    values = np.ones((8, 8), np.float32)
    found = compare(p.build(), CHIP, [values, 0 * values], [None, values], seeds=range(10))
    assert found is not None and found.relative == np.inf


def test_errors() -> None:
    want = np.array([1.0, -2.0, 0.0, np.nan, np.inf, 1e-9])
    have = np.array([1.0, -2.2, 0.0, np.nan, -np.inf, np.nan])
    errors = relative_errors(have, want)
    assert errors[[0, 2, 3]].tolist() == [0, 0, 0]
    assert errors[1] == pytest.approx(0.1)
    assert errors[[4, 5]].tolist() == [np.inf, np.inf]
    x = np.zeros((0, 4), np.float32)
    assert compare(copy_program(0, 4, 4), CHIP, [x, x.copy()], [None, x]) is None


def test_integers_must_be_equal() -> None:
    p = Program("ints", grid=(1,))
    x, y = p.tensor("x", (4,), "int32"), p.tensor("y", (4,), "int32", access="out")
    tile, full = p.buffer("tile", (4,), "int32"), p.semaphore("full")
    p.load("in", x, tile, (0,))
    p.signal("in", full)
    p.wait("out", full)
    p.store("out", y, tile, (0,))
    values = np.array([1000000, 2, 3, 4], np.int32)
    arrays = [values, np.zeros_like(values)]
    assert compare(p.build(), CHIP, arrays, [None, values]) is None
    found = compare(p.build(), CHIP, arrays, [None, values + np.int32([1, 0, 0, 0])])
    assert found is not None and found.place == (0,)
