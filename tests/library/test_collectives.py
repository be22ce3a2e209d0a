"""Collectives on real bytes: what each device gets is what NumPy says, on every chip with links."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dure import targets
from dure.errors import TargetError, UsageError
from dure.ir.dtypes import DTYPES
from dure.ir.types import static_extent
from dure.library.build import build
from dure.library.collectives import KINDS, Collective, Kind, Way
from dure.machine.group import group_of
from dure.sim.values import run_values

CHIPS = [name for name in targets.chip_names() if targets.chip(name).links]


def _run(way: Way, chip: Any, arrays: dict[str, Any]) -> None:
    """Run a way's launches on bytes; ``arrays`` gets what lies between them."""
    for stage in way:
        built = build(stage.call, chip, tiles=stage.call.tiles)
        assert built.verdict is not None and built.verdict.ok
        views: list[Any] = []
        for name, kind in zip(stage.arguments, stage.call.types, strict=True):
            if kind is None:
                continue
            shape = tuple(static_extent(e) or 0 for e in kind.shape)
            fresh = np.zeros(shape, kind.dtype.numpy)  # type: ignore[union-attr]
            views.append(arrays.setdefault(name, fresh).reshape(shape))
        run_values(built.compiled.function, chip, views, seed=3)


def _expected(kind: Kind, axis: int, x: Any) -> Any:
    n = len(x)
    if kind == "all_gather":
        return np.stack([np.concatenate(list(x), axis)] * n)
    if kind == "all_to_all":
        parts = np.stack(np.split(x, n, 1))
        return parts.reshape(n, -1, x.shape[2])
    total = x.sum(0)
    if kind == "all_reduce":
        return np.stack([total] * n)
    return np.stack(np.split(total, n, axis))


def _check(name: str, devices: int, what: Collective) -> None:
    chip = targets.chip(name)
    draw = np.random.default_rng(devices)
    # Small whole numbers, whose sums every float type holds exactly.
    x = draw.integers(-3, 4, (devices, what.rows, what.columns)).astype(what.dtype.numpy)
    residual = draw.integers(-3, 4, x.shape[1:]).astype(what.dtype.numpy)
    expected = _expected(what.kind, what.axis, x.astype(np.float64))
    for way in what.ways(group_of(chip, devices)):
        arrays = {"x": x.copy()}
        if what.residual:
            arrays["residual"] = np.stack([residual] * devices)
        _run(way, chip, arrays)
        found = arrays["y"].reshape(devices, *what.result(devices)).astype(np.float64)
        wanted = expected + residual.astype(np.float64) if what.residual else expected
        assert np.array_equal(found, wanted), (name, devices, what)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_devices_get(name: str, kind: Kind) -> None:
    odd = kind in ("all_reduce", "all_gather")
    _check(name, 4, Collective(kind, 7 if odd else 8, 12, DTYPES["bfloat16"], residual=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_other_numbers_of_devices(kind: Kind, devices: int) -> None:
    shape = (5, 9) if kind in ("all_reduce", "all_gather") else (devices * 2, devices * 5)
    _check("tpu-v6e", devices, Collective(kind, *shape, DTYPES["float32"]))
    _check("rngd", devices, Collective(kind, *shape, DTYPES["bfloat16"], axis=0))


@pytest.mark.parametrize("dtype", ["int32", "int8", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types(kind: Kind, dtype: str) -> None:
    _check("atom-max", 2, Collective(kind, 4, 6, DTYPES[dtype]))


def test_a_residual_is_added_once() -> None:
    _check("rngd", 4, Collective("all_reduce", 3, 8, DTYPES["bfloat16"], residual=True))


def test_parts_that_cannot_be_equal() -> None:
    group = group_of(targets.chip("rngd"), 4)
    with pytest.raises(UsageError, match="reduce_scatter of 3x6 over 4 devices"):
        Collective("reduce_scatter", 3, 6, DTYPES["float32"]).ways(group)


def test_a_chip_without_links() -> None:
    alone = targets.chip("rngd").model_copy(update={"links": {}})
    with pytest.raises(TargetError, match="2 devices of rngd"):
        group_of(alone, 2)
