"""What becomes of a dot's accumulators behind its last step, on the CPU target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_kernels import check

import dure
import dure.lang as dl
from dure.runtime.host import features_of, host_features, host_levels
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.endings import Ending

RNG = np.random.default_rng(7)
SIZES = [(1, 1, 1), (5, 7, 9), (33, 65, 300), (97, 130, 1111), (64, 64, 64), (40, 40, 0)]
TILES = {"bm": 64, "bn": 64, "bk": 64}


@dure.kernel
def activated(
    x: dl.Tensor, w: dl.Tensor, b: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const
):
    """The sums are used twice, beside a row."""
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(w, (k, j), (bk, bn)), acc)
    row = dl.load(b, (j,), (bn,))[None, :]
    dl.store(y, (i, j), (acc + row) * dl.maximum(acc, 0.0))


@dure.kernel
def added(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    """To what the tensor has."""
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(w, (k, j), (bk, bn)), acc)
    dl.store(y, (i, j), acc + dl.load(y, (i, j), (bm, bn)))


@dure.kernel
def both(
    x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, z: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const
):
    """Two stores."""
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(w, (k, j), (bk, bn)), acc)
    dl.store(y, (i, j), acc)
    dl.store(z, (i, j), acc * 2.0)


@dure.kernel
def over(x: dl.Tensor, w: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    """The tensor that is multiplied is what is written."""
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc = dl.dot(dl.load(x, (0, k), (bm, bk)), dl.load(w, (k, 0), (bk, bn)), acc)
    dl.store(x, (0, 0), acc)


def whole(*shape: int) -> np.ndarray:
    """Numbers whose sums are exact."""
    return RNG.integers(-4, 5, shape).astype(np.float32)


def endings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that is given each ending that is made."""
    found: list[Any] = []
    make = Ending.__init__

    def noted(self: Any, *arguments: Any) -> None:
        found.append(self)
        make(self, *arguments)

    monkeypatch.setattr(Ending, "__init__", noted)
    return found


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_computed_of_the_sums(size: tuple[int, int, int], level: str) -> None:
    m, n, k = size
    host = features_of(level)
    x, w, zeros = whole(m, k), whole(k, n), np.zeros((m, n), np.float32)
    check(activated, [x, w, whole(n), zeros], TILES, host=host)
    check(added, [x, w, whole(m, n)], TILES, host=host)
    check(both, [x, w, zeros, zeros.copy()], TILES, host=host)


def test_a_tensor_that_is_multiplied_is_written_last() -> None:
    check(over, [whole(60, 300), whole(300, 60)], {"bm": 64, "bn": 320, "bk": 64})


def test_only_a_single_store_ends_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpu_kernels import symbolic

    found = endings(monkeypatch)
    matrix = np.zeros((64, 64), np.float32)
    for kernel, count, expected in ((added, 3, 1), (both, 4, 0), (over, 2, 0)):
        kinds = [symbolic(matrix, f"t{i}") for i in range(count)]
        emit_kernel(kernel.specialize(kinds, TILES), host_features())
        assert len(found) == expected
        found.clear()
