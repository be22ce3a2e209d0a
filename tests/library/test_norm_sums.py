"""Norms whose blocks are added up one after another, and of whole rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dure.ir.dtypes import float32
from dure.library.build import build
from dure.library.call import tensor
from dure.library.norm import layer_norm_rows, rms_norm, rms_norm_sums
from dure.library.operators_common import call
from dure.sim.values import run_values
from dure.targets import chip, chip_names


@pytest.mark.parametrize("kernel", [rms_norm, rms_norm_sums])
@pytest.mark.parametrize(("rows", "columns", "bm", "bd"), [(1, 1, 1, 1), (5, 37, 2, 16)])
@pytest.mark.parametrize(("weighted", "added"), [(True, True), (False, False), (True, False)])
def test_a_norm_by_blocks(
    kernel: Callable[..., None],
    rows: int,
    columns: int,
    bm: int,
    bd: int,
    weighted: bool,
    added: bool,
) -> None:
    draw = np.random.default_rng(columns)
    x, more = draw.standard_normal((2, rows, columns)).astype(np.float32)
    weight = draw.standard_normal(columns).astype(np.float32)
    y = np.zeros_like(x)
    arguments = (x, weight if weighted else None, more if added else None, y)
    kernel(*arguments, bm=bm, bd=bd, epsilon=1e-6)
    wanted = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6)
    wanted = wanted * weight if weighted else wanted
    np.testing.assert_allclose(y, wanted + more if added else wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", chip_names())
@pytest.mark.parametrize("columns", [37, 64])
def test_a_layer_norm_of_whole_rows_on_bytes(name: str, columns: int) -> None:
    """Columns that a tile has and a row hasn't are no part of the mean or the variance."""
    rows, width = 5, 64
    draw = np.random.default_rng(columns)
    x, more = (draw.standard_normal((2, rows, columns)) + 3).astype(np.float32)
    weight, bias = draw.standard_normal((2, columns)).astype(np.float32)
    y = np.full_like(x, 77)
    types = [tensor(float32, *a.shape) for a in (x, weight, bias, more, y)]
    consts = {"bd": width, "epsilon": 1e-6, "padded": width != columns}
    made = call(layer_norm_rows, types, {"bm": 2}, consts)
    function = build(made, chip(name), tiles=made.tiles).compiled.function
    run_values(function, chip(name), [x, weight, bias, more, y], seed=1)
    centred = x - x.mean(1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) * weight + bias + more
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
