"""Norms and softmax whose blocks cover a row, and those whose blocks don't: numbers and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dure.compiler.tiles import ranked
from dure.ir.dtypes import float32
from dure.ir.expr import symbol
from dure.ir.types import TensorType
from dure.lang.tune import cpu_machine
from dure.library.norm import layer_norm, rms_norm, softmax

EPSILON = 1e-5


def run_softmax(x: Any, y: Any, more: Any, **tiles: int) -> None:
    softmax(x, y, **tiles)


def run_layer_norm(x: Any, y: Any, more: Any, **tiles: int) -> None:
    layer_norm(x, more[0], more[1], None, y, epsilon=EPSILON, **tiles)


def run_rms_norm(x: Any, y: Any, more: Any, **tiles: int) -> None:
    rms_norm(x, more[0], None, y, epsilon=EPSILON, **tiles)


def wanted(run: Callable[..., None], x: np.ndarray, more: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if run is run_softmax:
        e = np.exp(x - x.max(1, keepdims=True, initial=-np.inf))
        return e / e.sum(1, keepdims=True)
    if run is run_rms_norm:
        return x / np.sqrt((x * x).mean(1, keepdims=True) + EPSILON) * more[0]
    centred = x - x.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + EPSILON) * more[0] + more[1]


RUNS = [run_softmax, run_layer_norm, run_rms_norm]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (5, 129), (3, 300), (0, 40), (2, 1000)])
@pytest.mark.parametrize("tiles", [(1, 64), (2, 128), (1, 320), (3, 1024)])
def test_blocks_and_whole_rows(
    run: Callable[..., None], dtype: Any, shape: tuple[int, int], tiles: tuple[int, int]
) -> None:
    draw = np.random.default_rng(shape[1])
    x = (draw.standard_normal(shape) * 3 + 1).astype(dtype)
    more = draw.standard_normal((2, shape[1])).astype(np.float32)
    around = np.full((shape[0] + 2, shape[1] + 3), 7, dtype)
    y = around[1:-1, 2:-1]
    run(x, y, more, bm=tiles[0], bd=tiles[1])
    tolerance = 3e-5 if dtype is np.float32 else 1e-2
    want = wanted(run, x, more)
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=tolerance, atol=tolerance)
    around[1:-1, 2:-1] = 7
    assert (around == 7).all(), "nothing else is written"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("columns", [100, 1000])
def test_a_rows_bits_are_its_own(run: Callable[..., None], columns: int) -> None:
    """Whatever other rows there are, wherever it lies and however many rows a tile has."""
    draw = np.random.default_rng(columns)
    x = draw.standard_normal((9, columns)).astype(np.float32)
    more = draw.standard_normal((2, columns)).astype(np.float32)
    all_rows, memory = np.empty_like(x), np.empty(columns + 16, np.float32)
    run(x, all_rows, more, bm=2, bd=1024)
    for row in range(9):
        for by in (0, 1, 7):
            alone = memory[by : by + columns].reshape(1, columns)
            run(x[row : row + 1], alone, more, bm=1, bd=1024)
            np.testing.assert_array_equal(alone[0], all_rows[row])


def test_softmax_of_what_is_masked() -> None:
    x = np.zeros((3, 200), np.float32)
    x[0, 1:], x[1, :], x[2, 3] = -np.inf, -np.inf, np.nan
    y = np.empty_like(x)
    with np.errstate(all="ignore"):
        softmax(x, y, bm=1, bd=256)
    assert y[0, 0] == 1 and not y[0, 1:].any() and np.isnan(y[1:]).all()


@pytest.mark.parametrize("columns", [1000, 4096])
def test_a_tile_is_chosen_that_covers_the_row(columns: int) -> None:
    types = [TensorType((symbol(f"{n}_0"), symbol(f"{n}_1")), float32) for n in "xy"]
    sizes = {"x_0": 512, "y_0": 512, "x_1": columns, "y_1": columns}

    def specialize(values: Any) -> Any:
        return softmax.specialize(types, values)

    chosen = ranked(specialize, ["bm", "bd"], sizes, cpu_machine())[0][1]
    assert columns <= chosen["bd"] <= columns + 64
