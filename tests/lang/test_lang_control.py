"""Loops, ifs, helper functions and what they carry, in all modes."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest

import dure
import dure.lang as dl

RNG = np.random.default_rng(6)
OFFSET = 3


def twice(x: Any, *, by: Any = 2) -> Any:
    """Called from kernels."""
    return x * by


def clamp(x: Any, low: Any, high: Any) -> Any:
    return dl.minimum(dl.maximum(x, low), high)


@dure.kernel
def fibonacci(y: dl.Tensor, n: dl.const):
    a, b = dl.zeros((n,), dl.int32), dl.ones((n,), dl.int32)
    pair = (a, b)
    for _ in dl.range(y.shape[0] // n):
        a, b = b, a + b
        pair = (pair[1], pair[0] + pair[1])
    dl.store(y, (0,), a)
    dl.store(y, (1,), pair[0])


def test_loops_carry_several_values_and_tuples(anyhow: str) -> None:
    y = np.zeros(40, np.int32)
    fibonacci[1](y, n=4)
    np.testing.assert_array_equal(y[:8], 55)


@dure.kernel
def nested(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    i = dl.program_id(0)
    total = dl.zeros((bm,), dl.float32)
    for j in dl.range(dl.cdiv(x.shape[1], bn)):
        part = dl.zeros((bm, bn), dl.float32)
        for k in range(2, 5):
            scale = k * (j + 1)
            part = part + dl.load(x, (i, j), (bm, bn)) * scale
        total += dl.sum(part, 1)
    dl.store(y, (i,), total)


@pytest.mark.parametrize("columns", [0, 1, 7, 16])
def test_nested_loops_and_run_time_bounds(anyhow: str, columns: int) -> None:
    x = RNG.standard_normal((6, columns)).astype(np.float32)
    y = np.full(6, 7, np.float32)
    nested(x, y, bm=4, bn=4)
    expected = (x * 9 * (np.arange(columns) // 4 + 1)).sum(1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@dure.kernel
def steps(y: dl.Tensor, start: dl.const, step: dl.const):
    total = dl.zeros((4,), dl.int32)
    for k in dl.range(start, y.shape[0], step):
        total = total * 3 + k
    dl.store(y, (0,), total)


@pytest.mark.parametrize(("start", "step"), [(0, 1), (3, 4), (50, 1), (1, 7)])
def test_start_and_step(anyhow: str, start: int, step: int) -> None:
    y = np.zeros(21, np.int32)
    steps[1](y, start=start, step=step)
    total = 0
    for k in range(start, 21, step):
        total = total * 3 + k
    assert y[0] == np.int64(total).astype(np.int32)


@dure.kernel
def branches(y: dl.Tensor, limit: dl.const):
    i = dl.program_id(0)
    value = dl.full((4,), -1, dl.int32)
    at = i
    if i == 0:
        value = dl.arange(4)
        at = i + 1
    elif i < limit and (i != 2 or limit > 9):
        if i % 2 == 1:
            value = value + i
        else:
            value = dl.full((4,), 100, dl.int32)
    else:
        value = value * 5
        at = i + 2
    dl.store(y, (i,), value + at)


@pytest.mark.parametrize("limit", [0, 3, 10])
def test_run_time_ifs(anyhow: str, limit: int) -> None:
    y = np.zeros(24, np.int32)
    branches(y, limit=limit)
    expected: list[int] = []
    for i in range(6):
        if i == 0:
            expected += [1, 2, 3, 4]
        elif i < limit and (i != 2 or limit > 9):
            expected += [(-1 + i if i % 2 else 100) + i] * 4
        else:
            expected += [-5 + i + 2] * 4
    np.testing.assert_array_equal(y, expected)


@dure.kernel
def stores_in_branches(x: dl.Tensor, y: dl.Tensor, n: dl.const):
    i = dl.program_id(0)
    tile = dl.load(x, (i,), (n,))
    if i > 0:
        before = dl.load(x, (i - 1,), (n,))
        dl.store(y, (i,), tile - before)
    else:
        dl.store(y, (i,), tile)


def test_a_condition_guards_an_index(anyhow: str) -> None:
    x = RNG.standard_normal(16).astype(np.float32)
    y = np.zeros_like(x)
    stores_in_branches(x, y, n=4)
    np.testing.assert_array_equal(y, x - np.concatenate([np.zeros(4, np.float32), x[:-4]]))


@dure.kernel
def everything_static(
    x: dl.Tensor, bias: dl.Tensor, y: dl.Tensor, *extras: dl.Tensor, config: dl.const, n: dl.const
):
    """A docstring."""
    i = dl.program_id(0)
    tile: Any = dl.load(x, (i,), (n,))
    if bias is not None and not config.plain:
        tile += dl.load(bias, (i,), (n,))
    for count, extra in enumerate(extras, 1):
        tile += dl.load(extra, (i,), (n,)) * count
    parts = [tile * k for k in dl.static_range(1, 4) if k != 2]
    for part, scale in zip(parts, (1, 2), strict=True):
        tile = tile + part * scale

    def inner(value, more=OFFSET):
        return value + more

    tile = inner(clamp(twice(tile, by=config.factor), low=-9.0, high=9.0))
    tile = config.last(tile)
    name = f"{config.mode}_{n}"
    if name in ("fast_8", "slow_8"):
        tile = tile + (1 if "fast" in name else 2)
    dl.store(y, (i,), tile)


@pytest.mark.parametrize("with_bias", [True, False])
def test_what_is_decided_when_compiling(anyhow: str, with_bias: bool) -> None:
    config = Config(plain=False, factor=0.5, mode="fast", last=partial(twice, by=3.0))
    x, bias, e0, e1 = RNG.standard_normal((4, 11)).astype(np.float32)
    y = np.zeros_like(x)
    everything_static(x, bias if with_bias else None, y, e0, e1, config=config, n=8)
    tile = x + (bias if with_bias else 0) + e0 + 2 * e1
    tile = tile + tile + tile * 3 * 2
    expected = (np.clip(tile * 0.5, -9, 9) + OFFSET) * 3 + 1
    np.testing.assert_allclose(y, expected, rtol=1e-5)


class Config(SimpleNamespace):
    """A hashable bag of constants."""

    def __hash__(self) -> int:
        return id(self)


def test_static_choices_and_returns(anyhow: str) -> None:
    def pick(kind: str, a: Any, b: Any) -> Any:
        if kind == "a":
            return a
        return b if kind == "b" else a + b

    @dure.kernel
    def choose(y: dl.Tensor, kind: dl.const):
        dl.store(y, (0,), pick(kind, dl.full((4,), 1, dl.int32), dl.full((4,), 2, dl.int32)))

    y = np.zeros(4, np.int32)
    for kind, expected in (("a", 1), ("b", 2), ("c", 3)):
        choose[1](y, kind=kind)
        assert (y == expected).all()


def test_a_function_that_is_passed_in(anyhow: str) -> None:
    @dure.kernel
    def apply(x: dl.Tensor, y: dl.Tensor, n: dl.const, epilogue: dl.const):
        i = dl.program_id(0)
        dl.store(y, (i,), epilogue(dl.load(x, (i,), (n,)), i))

    x = RNG.standard_normal(10).astype(np.float32)
    y = np.zeros_like(x)
    for scale in (2.0, 3.0):

        def scaled(tile: Any, i: Any, by: float = scale) -> Any:
            return tile * by + i

        apply(x, y, n=4, epilogue=scaled)
        np.testing.assert_allclose(y, x * scale + np.arange(10) // 4, rtol=1e-6)


def test_unary_plus_chains_and_conditions(anyhow: str) -> None:
    @dure.kernel
    def conditions(y: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        inside = 1 <= i < 3
        at = (i if inside else 0) + (5 if not inside and i > 3 else 0)
        if inside or i == 4:
            at = at + 100
        dl.store(y, (i,), +dl.full((n,), at, dl.int32))

    y = np.zeros(12, np.int32)
    conditions(y, n=2)
    np.testing.assert_array_equal(y[::2], [0, 101, 102, 0, 105, 5])


def test_num_programs(anyhow: str) -> None:
    @dure.kernel
    def counted(y: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        dl.store(y, (i,), dl.full((n,), i * 10 + dl.num_programs(0), dl.int32))

    y = np.zeros(6, np.int32)
    counted[3](y, n=2)
    np.testing.assert_array_equal(y[::2], np.arange(3) * 10 + 3)


@dure.kernel
def inner_kernel(x: dl.Tensor, y: dl.Tensor, n: dl.const, scale: dl.const = 2.0):
    i = dl.program_id(0)
    dl.store(y, (i,), dl.load(x, (i,), (n,)) * scale)


def test_a_kernel_called_from_a_kernel_is_inlined(anyhow: str) -> None:
    @dure.kernel
    def outer(x: dl.Tensor, y: dl.Tensor):
        inner_kernel(x, y, 4, scale=3.0)

    x = RNG.standard_normal(10).astype(np.float32)
    y = np.zeros_like(x)
    outer(x, y)
    np.testing.assert_allclose(y, x * 3, rtol=1e-6)


def test_annotations_of_other_forms(anyhow: str) -> None:
    @dure.kernel
    def gather(
        table: dl.Tensor,
        rows: Annotated[dl.Tensor, dl.Index(0, None)],
        bias: dl.Tensor | None,
        y: dl.Tensor,
    ):
        i = dl.program_id(0)
        tile = dl.load(table, (rows[i], 0), (1, 4))
        if bias is not None:
            tile = tile + dl.load(bias, (0,), (4,))
        dl.store(y, (i, 0), tile)

    table = RNG.standard_normal((5, 4)).astype(np.float32)
    rows, y = np.array([4, 0, 4], np.int32), np.zeros((3, 4), np.float32)
    gather(table, rows, None, y)
    np.testing.assert_array_equal(y, table[rows])
    gather(table, rows, table[0], y)
    np.testing.assert_allclose(y, table[rows] + table[0], rtol=1e-6)


def test_assertions_on_sizes_are_checked_at_the_launch(anyhow: str) -> None:
    @dure.kernel
    def even(x: dl.Tensor, y: dl.Tensor):
        dl.static_assert(x.shape[0] % 2 == 0, "an even number of elements")
        i = dl.program_id(0)
        dl.store(y, (i,), dl.load(x, (i,), (4,)))

    for size in (6, 7):
        x, y = np.ones(size, np.float32), np.zeros(size, np.float32)
        if size % 2 == 0:
            even(x, y)
            assert (y == 1).all()
        else:
            with pytest.raises(dure.KernelError, match="an even number of elements"):
                even(x, y)


def test_a_choice_between_tiles_and_names_that_stay_none(anyhow: str) -> None:
    @dure.kernel
    def choose(x: dl.Tensor, y: dl.Tensor):
        i = dl.program_id(0)
        nothing = None
        before = dl.load(x, (i - 1,), (4,)) if i > 0 else dl.zeros((4,), dl.float32)
        if i > 1:
            nothing = None
        for _ in dl.range(2):
            nothing = None
        if nothing is None:
            dl.store(y, (i,), before)

    x, y = RNG.standard_normal(12).astype(np.float32), np.ones(12, np.float32)
    choose(x, y)
    np.testing.assert_array_equal(y, np.r_[np.zeros(4, np.float32), x[:8]])
