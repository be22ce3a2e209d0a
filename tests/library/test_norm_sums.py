"""Norms whose blocks are added up one after another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dure.library.norm import rms_norm, rms_norm_sums


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
