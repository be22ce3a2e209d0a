"""Products whose sums devices add up, on real bytes: what each device gets is what NumPy says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dure import targets
from dure.ir.dtypes import DTYPES
from dure.ir.types import static_extent
from dure.library.build import build
from dure.library.collective_product_ways import SummedProduct
from dure.library.collectives import Stage, Way
from dure.machine.chip import Chip
from dure.machine.group import group_of
from dure.sim.values import run_values

BF16, F32 = DTYPES["bfloat16"], DTYPES["float32"]


def seen(stage: Stage, arrays: dict[str, Any]) -> list[Any]:
    """A launch's arguments: views of what lies on all devices."""
    found: list[Any] = []
    for name, kind in zip(stage.arguments, stage.call.types, strict=True):
        if kind is None:
            continue
        shape = tuple(static_extent(e) or 0 for e in kind.shape)
        if name not in arrays:
            arrays[name] = np.full(shape, np.nan, kind.dtype.numpy)  # type: ignore[union-attr]
        piece = stage.seen(name)
        if piece is None:
            found.append(arrays[name].reshape(shape))
        else:
            whole = arrays[name].reshape(shape[0], piece[1], *shape[2:])
            found.append(whole[:, piece[0] : piece[0] + 1])
    return found


def run(way: Way, chip: Chip, arrays: dict[str, Any]) -> None:
    """Run a way's launches on bytes; ``arrays`` gets what lies between them."""
    for stage in way:
        built = build(stage.call, chip, tiles=stage.call.tiles)
        assert built.verdict is not None and built.verdict.ok
        views = seen(stage, arrays)
        whole = [np.ascontiguousarray(view) for view in views]
        run_values(built.compiled.function, chip, whole, seed=3)
        for view, given in zip(views, whole, strict=True):
            view[...] = given


@pytest.mark.parametrize("pieces", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "devices", "shape", "extra"),
    [
        ("rngd", 2, (6, 40, 36), (False, True)),
        ("rngd", 4, (2, 33, 20), (True, False)),
        ("tpu-v6e", 4, (10, 24, 12), (True, True)),
        ("tpu-v6e", 2, (4, 7, 2), (False, False)),
        pytest.param("tpu-v6e", 8, (6, 24, 24), (True, True), marks=pytest.mark.long),
        pytest.param("trainium2", 4, (130, 96, 24), (True, True), marks=pytest.mark.long),
        pytest.param("atom-max", 2, (70, 40, 80), (True, True), marks=pytest.mark.long),
        pytest.param("maia-100", 2, (70, 40, 80), (False, True), marks=pytest.mark.long),
    ],
)
def test_what_devices_get(
    name: str,
    devices: int,
    shape: tuple[int, int, int],
    extra: tuple[bool, bool],
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(name, devices, shape, extra, pieces, monkeypatch)


@pytest.mark.parametrize("pieces", [-1, 4])
@pytest.mark.parametrize(
    ("name", "devices", "shape", "extra"),
    [
        ("tpu-v6e", 4, (12, 24, 12), (True, True)),
        ("tpu-v6e", 4, (4, 7, 8), (False, False)),
        pytest.param("tpu-v6e", 9, (12, 20, 18), (False, True), marks=pytest.mark.long),
        pytest.param("trainium2", 4, (132, 96, 24), (True, True), marks=pytest.mark.long),
        pytest.param("trainium2", 16, (8, 32, 32), (False, True), marks=pytest.mark.long),
    ],
)
def test_one_axis_of_a_square_after_the_other(
    name: str,
    devices: int,
    shape: tuple[int, int, int],
    extra: tuple[bool, bool],
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(name, devices, shape, extra, pieces, monkeypatch)


def check(
    name: str,
    devices: int,
    shape: tuple[int, int, int],
    extra: tuple[bool, bool],
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare what devices get with NumPy, by the ways of so many pieces."""
    monkeypatch.setattr(SummedProduct, "worth", lambda *_: (pieces,))
    chip, (rows, depth, columns), (biased, residual) = targets.chip(name), shape, extra
    draw = np.random.default_rng(rows)

    def numbers(*extents: int) -> Any:
        # Small whole numbers, whose products and sums every float type here holds exactly.
        return draw.integers(-1, 2, extents).astype(BF16.numpy)

    x, w = numbers(devices, rows, depth), numbers(devices, depth, columns)
    expected = np.einsum("dmk,dkn->mn", x.astype(np.float64), w.astype(np.float64))
    given: dict[str, Any] = {"x": x, "w": w}
    if biased:
        given["bias"] = numbers(devices, columns).astype(F32.numpy)
        expected += given["bias"].astype(np.float64).sum(0)
    if residual:
        own = numbers(rows, columns)
        given["residual"] = np.stack([own] * devices)
        expected += own.astype(np.float64)
    what = SummedProduct(rows, depth, columns, BF16, BF16, F32 if biased else None, residual)
    for way in what.ways(group_of(chip, devices)):
        arrays = {key: array.copy() for key, array in given.items()}
        arrays["y"] = np.full((devices, rows, columns), np.nan, BF16.numpy)
        run(way, chip, arrays)
        assert np.array_equal(arrays["y"].astype(np.float64), np.stack([expected] * devices))


def test_which_ways_are_worth_building() -> None:
    group = group_of(targets.chip("tpu-v6e"), 2)

    def worth(rows: int, depth: int, columns: int) -> tuple[int, ...]:
        return SummedProduct(rows, depth, columns, BF16, BF16).worth(group)

    # Two devices send as much either way; what a long product hides is best sent at once.
    assert worth(1, 12800, 5120) == worth(2048, 25600, 5120) == (0,)
    assert worth(2048, 2048, 5120) == (1,)
    # Columns that can't be dealt out go to all.
    assert worth(2048, 2048, 5121) == (0,)
    # In a square of devices, what links take longest for goes along one axis after the other.
    group = group_of(targets.chip("tpu-v6e"), 4)
    assert worth(16384, 2048, 5120) == (-1, 1)
    assert worth(16384, 6400, 5120) == (2, 4)
