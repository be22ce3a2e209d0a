"""Loops around one dot on the CPU target: convolutions and batched products."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import check, symbolic

import dure
import dure.lang as dl
from dure import library
from dure.runtime.host import features_of, host_features, host_levels
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.endings import Ending
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.values import Tile

RNG = np.random.default_rng(3)


def whole(*shape: int, dtype: type | np.dtype = np.float32) -> np.ndarray:
    """Numbers whose sums are exact."""
    return RNG.integers(-4, 5, shape).astype(dtype)


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("taps", [0, 1, 3])
@pytest.mark.parametrize("tile", [(1, 32, 32, 32), (4, 16, 8, 16), (8, 8, 64, 64), (1, 1, 4, 4)])
def test_taps_are_added_up(tile: tuple[int, int, int, int], taps: int, level: str) -> None:
    """Rows and columns of the image, channels in and out that tiles don't divide."""
    bh, bw, bo, bc = tile
    x, w, bias = whole(2, 7, 19, 21), whole(37, taps, taps, 21), whole(37)
    y = np.zeros((2, 7, 19, 37), np.float32)
    consts = {"bh": bh, "bw": bw, "bo": bo, "bc": bc, "pad_h": taps // 2, "pad_w": taps // 2}
    check(library.conv2d, [x, w, bias, y], consts, host=features_of(level))


@pytest.mark.parametrize("level", host_levels())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(1, 1, 1), (40, 20, 30), (70, 33, 300), (5, 40, 0)], ids=str)
def test_batched_products(size: tuple[int, int, int], dtype: str, level: str) -> None:
    m, n, k = size
    kind = dl.bfloat16.numpy if dtype == "bfloat16" else np.dtype(dtype)
    host = features_of(level)
    for transposed in (False, True):
        w = whole(2, n, k, dtype=kind) if transposed else whole(2, k, n, dtype=kind)
        arrays = [whole(2, m, k, dtype=kind), w, np.zeros((2, m, n), np.float32)]
        consts = {"bm": 64, "bn": 32, "bk": 64, "transposed": transposed}
        check(library.batched_matmul, arrays, consts, host=host)


@dure.kernel
def halved(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, b: dl.const):
    """The sums are used in every turn, too."""
    acc = dl.zeros((b, b), dl.float32)
    for n in dl.range(x.shape[0]):
        left = dl.load(x, (n, 0, 0), (1, b, b)).reshape((b, b))
        acc = dl.dot(left, dl.load(w, (0, 0), (b, b)), acc * 0.5)
    dl.store(y, (0, 0), acc)


def test_sums_that_a_turn_changes() -> None:
    check(halved, [whole(3, 32, 32), whole(32, 32), np.zeros((32, 32), np.float32)], {"b": 32})


def test_the_nests_of_the_library_end_with_their_store(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Ending] = []
    write = Ending.write_all

    def noted(self: Ending, sums: Tile, rows: Extent, columns: Extent) -> None:
        found.append(self)
        write(self, sums, rows, columns)

    monkeypatch.setattr(Ending, "write_all", noted)
    image, three = np.zeros((1, 8, 8, 64), np.float32), np.zeros((2, 64, 64), np.float32)
    for kernel, arrays, consts, expected in (
        (library.conv2d, [image] * 4, {"bh": 8, "bw": 8, "bo": 64, "bc": 64}, 1),
        (library.batched_matmul, [three] * 3, {"bm": 64, "bn": 64, "bk": 64}, 1),
        (halved, [three, three[0], three[0]], {"b": 32}, 0),
    ):
        kinds = [
            symbolic(a[0, 0, 0] if i == 2 and a.ndim == 4 else a, f"t{i}")
            for i, a in enumerate(arrays)
        ]
        emit_kernel(kernel.specialize(kinds, consts), host_features())
        assert len(found) == expected
        found.clear()
