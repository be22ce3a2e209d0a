"""Loops that carry tiles element by element, which the CPU target turns inside out."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import check

import dure
import dure.lang as dl

RNG = np.random.default_rng(5)


@dure.kernel
def sums(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bd: dl.const):
    """Two values are carried; what lies behind the edge counts as 3 in one of them."""
    i = dl.program_id(0)
    low, high = dl.full((bm, bd), 1.0, dl.float32), dl.zeros((bm, bd), dl.float32)
    for c in dl.range(dl.cdiv(x.shape[1], bd)):
        part = dl.load(x, (i, c), (bm, bd), fill=3.0).to(dl.float32)
        inside = (c * bd + dl.arange(bd) < x.shape[1])[None, :]
        low, high = dl.minimum(low, part), high + dl.where(inside, part * part, 0.0) + low
    dl.store(y, (i, 0), (low + high).to(y.dtype))


@dure.kernel
def shifted(x: dl.Tensor, y: dl.Tensor, bd: dl.const):
    """The first and the last turn leave the tensor."""
    i = dl.program_id(0)
    total = dl.zeros((1, bd), dl.float32)
    for c in dl.range(x.shape[0]):
        total = total + dl.load(x, (c, i), (1, bd), offset=(-2, -1), stride=(1, 1))
    dl.store(y, (0, i), total)


@dure.kernel
def mixed(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bd: dl.const):
    """A carried tile that other elements of it are read from stays in memory."""
    i = dl.program_id(0)
    total = dl.zeros((bm, bd), dl.float32)
    for c in dl.range(dl.cdiv(x.shape[1], bd)):
        part = dl.load(x, (i, c), (bm, bd)).to(dl.float32)
        total = total - dl.max(total, 1, keepdims=True) + part
    dl.store(y, (i, 0), total.to(y.dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (4, 64), (5, 65), (9, 300), (3, 0), (0, 5)])
@pytest.mark.parametrize("tile", [(1, 8), (4, 32), (2, 20), (3, 128)])
def test_edges(dtype: type, shape: tuple[int, int], tile: tuple[int, int]) -> None:
    bm, bd = tile
    x = RNG.integers(-3, 4, shape).astype(dtype)
    check(sums, [x, np.zeros((shape[0], bd), np.float32)], {"bm": bm, "bd": bd})
    check(mixed, [x, np.zeros((shape[0], bd), np.float32)], {"bm": bm, "bd": bd})


@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (7, 33), (6, 64)])
def test_turns_that_leave_the_tensor(shape: tuple[int, int]) -> None:
    x = RNG.integers(-3, 4, shape).astype(np.float32)
    check(shifted, [x, np.zeros((1, shape[1]), np.float32)], {"bd": 16})


def test_a_maximum_that_is_not_a_number() -> None:
    x = RNG.integers(-3, 4, (4, 96)).astype(np.float32)
    x[1, 40], x[2, 95], x[3, 0] = np.nan, np.inf, -np.inf

    @dure.kernel
    def highest(x: dl.Tensor, y: dl.Tensor):
        top = dl.full((4, 32), -1.0, dl.float32)
        for c in dl.range(3):
            top = dl.maximum(top, dl.load(x, (0, c), (4, 32)))
        dl.store(y, (0, 0), top)

    check(highest, [x, np.zeros((4, 32), np.float32)], {})
