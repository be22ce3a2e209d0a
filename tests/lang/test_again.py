"""Launches like earlier ones: what they run, and what is none of them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import dure
import dure.lang as dl
from dure.errors import KernelError
from dure.lang.again import Again
from dure.lang.kernel import Kernel
from dure.library.indices import Places
from dure.runtime import direct
from dure.runtime.direct import MOST, Direct
from dure.runtime.pool import shared_pool

Array = np.ndarray[Any, Any]

FACTOR = 2.0


def made() -> Kernel:
    """A kernel of its own."""

    @dure.kernel
    def scaled(x: dl.Tensor, y: dl.Tensor, z: dl.Tensor, bn: dl.const = 8, more: dl.const = 0):
        i = dl.program_id(0)
        dl.store(z, (i,), dl.load(x, (i,), (bn,)) * FACTOR + dl.load(y, (i,), (bn,)) + more)

    return scaled


def arrays(n: int, dtype: str = "float32") -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(n)
    x, y = (rng.integers(-8, 8, n).astype(dtype) for _ in range(2))
    return x, y, np.zeros(n, dtype)


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch was made by a pattern."""
    found: list[bool] = []
    original = Again.__call__

    def noted(self: Again, args: Any, keywords: Any) -> bool:
        found.append(original(self, args, keywords))
        return found[-1]

    monkeypatch.setattr(Again, "__call__", noted)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_a_second_launch_is_direct(n: int, dtype: str, direct_calls: list[bool]) -> None:
    kernel = made()
    for turn in range(3):
        x, y, z = arrays(n, dtype)
        x += turn  # other arrays, of the same kind
        kernel(x, y, z)
        np.testing.assert_array_equal(z, (x * 2 + y).astype(dtype))
    assert direct_calls == [True, True]


def test_consts_are_told_apart_with_their_types(direct_calls: list[bool]) -> None:
    kernel = made()
    x, y, z = arrays(20)
    for more in (0, 1, 1.0, True, 0):
        kernel(x, y, z, more=more)
        np.testing.assert_array_equal(z, x * 2 + y + float(more))
    assert direct_calls == [False, False, False, True]
    kernel(x, y, z, bn=16, more=1)
    kernel(x, y, z, bn=16, more=1)
    np.testing.assert_array_equal(z, x * 2 + y + 1)
    assert direct_calls[4:] == [False, True]


def test_signs_of_zero_and_nans_are_consts_of_their_own(direct_calls: list[bool]) -> None:
    @dure.kernel
    def filled(x: dl.Tensor, z: dl.Tensor, value: dl.const):
        i = dl.program_id(0)
        dl.store(z, (i,), dl.where(dl.load(x, (i,), (8,)) > 100, 1.0, value))

    x, _, z = arrays(20)
    for text in ("0.0", "-0.0", "nan", "-0.0", "0.0", "nan"):
        filled(x, z, value=float(text))
        np.testing.assert_array_equal(np.signbit(z), text == "-0.0")
        np.testing.assert_array_equal(z, float(text))
    assert direct_calls == [False, False, True, True, True]


def test_arguments_that_are_none_are_part_of_the_pattern(direct_calls: list[bool]) -> None:
    @dure.kernel
    def added(a: dl.Tensor | None, b: dl.Tensor | None, z: dl.Tensor, bn: dl.const = 8):
        i = dl.program_id(0)
        total = dl.zeros((bn,), dl.float32)
        for x in (a, b):
            if x is not None:
                total = total * 2.0 + dl.load(x, (i,), (bn,))
        dl.store(z, (i,), total)

    x, y, z = arrays(20)
    for a, b in ((x, None), (x, None), (None, y), (x, y), (None, y), (None, None), (x, y)):
        added(a, b, z)
        zero = np.zeros_like(x)
        first = zero if a is None else a
        np.testing.assert_array_equal(z, first if b is None else first * 2 + b)
    assert direct_calls == [True, False, False, True, False, True]


@pytest.mark.parametrize(
    "other",
    [
        lambda a: a[::2],
        lambda a: a[::-1],
        lambda a: a[:-1],
        lambda a: a.astype("float16"),
        lambda a: np.stack([a, a], 1)[:, 0],
    ],
)
def test_another_kind_of_array_takes_the_longer_way(
    other: Callable[[Array], Array], direct_calls: list[bool]
) -> None:
    kernel = made()
    x, y, z = arrays(32)
    kernel(x, y, z)
    x, y, z = (other(a.copy()) for a in (x, y, z))
    for _ in range(2):
        z[...] = 0
        kernel(x, y, z)
        np.testing.assert_array_equal(z, (x * np.float32(2) + y).astype(z.dtype))
    assert direct_calls == [False, True]


def test_checks_are_made_of_what_fits_no_pattern() -> None:
    kernel = made()
    x, y, z = arrays(32)
    kernel(x, y, z)
    whole = np.zeros(48, np.float32)
    whole[:] = 1
    with pytest.raises(KernelError, match="share memory"):
        kernel(whole[:32], y, whole[16:])
    kernel(whole[:32], y, z)  # what is only read may be anywhere
    with pytest.raises(KernelError, match="share memory"):
        kernel(z, y, z)
    z.flags.writeable = False
    with pytest.raises(KernelError, match="read-only"):
        kernel(x, y, z)
    with pytest.raises(KernelError):
        kernel(x, y)
    with pytest.raises(KernelError):
        kernel(x, y, [1.0] * 32)


def test_two_reads_may_be_the_same_array(direct_calls: list[bool]) -> None:
    kernel = made()
    x, _, z = arrays(32)
    kernel(x, x, z)
    kernel(x, x, z)
    np.testing.assert_array_equal(z, 3 * x)
    assert direct_calls == [True]


def test_a_name_that_changes(monkeypatch: pytest.MonkeyPatch, direct_calls: list[bool]) -> None:
    kernel = made()
    x, y, z = arrays(32)
    kernel(x, y, z)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    kernel(x, y, z)
    np.testing.assert_array_equal(z, 3 * x + y)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    x, y, z = arrays(33)
    kernel(x, y, z)
    np.testing.assert_array_equal(z, 2 * x + y)
    assert not any(direct_calls)


def test_what_a_closure_holds_changes(direct_calls: list[bool]) -> None:
    power = 1.0

    @dure.kernel
    def added(x: dl.Tensor, z: dl.Tensor, bn: dl.const = 8):
        i = dl.program_id(0)
        dl.store(z, (i,), dl.load(x, (i,), (bn,)) + power)

    x, _, z = arrays(9)
    added(x, z)
    added(x, z)
    power = 2.0
    added(x, z)
    np.testing.assert_array_equal(z, x + 2)
    assert direct_calls == [True, False]


def test_index_arguments_are_checked_each_time() -> None:
    @dure.kernel
    def picked(x: dl.Tensor, rows: Places, z: dl.Tensor, bn: dl.const = 4):
        i = dl.program_id(0)
        dl.store(z, (i,), dl.load(x, (dl.load(rows, (i,), (bn,)),), (bn,)))

    x, z = np.arange(8, dtype=np.float32), np.zeros(4, np.float32)
    rows = np.array([0, 3, 1, 7], np.int32)
    for _ in range(2):
        picked(x, rows, z)
        np.testing.assert_array_equal(z, [0, 3, 1, 7])
    rows[0] = -1
    with pytest.raises(KernelError, match="holds -1"):
        picked(x, rows, z)


def test_other_ways_to_run(direct_calls: list[bool]) -> None:
    kernel = made()
    x, y, z = arrays(16)
    kernel(x, y, z)
    z[:] = 0
    dl.interpret(kernel)(x, y, z)
    np.testing.assert_array_equal(z, 2 * x + y)
    z[:] = 0
    kernel[(2,)](x, y, z)
    np.testing.assert_array_equal(z, 2 * x + y)
    assert not any(direct_calls)


def test_nothing_to_run() -> None:
    kernel = made()
    x, y, z = arrays(0)
    for _ in range(2):
        kernel(x, y, z)


def test_more_shapes_than_are_kept(direct_calls: list[bool]) -> None:
    kernel = made()
    for n in (*range(1, MOST + 5), *range(1, MOST + 5)):
        x, y, z = arrays(n)
        kernel(x, y, z)
        np.testing.assert_array_equal(z, 2 * x + y)
    assert sum(direct_calls) == MOST


def test_threads_launch_the_same_kernel() -> None:
    kernel = made()
    failed: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            n = int(rng.integers(1, 40))
            x, y, z = arrays(n)
            x += seed
            kernel(x, y, z)
            if not np.array_equal(z, 2 * x + y):
                failed.append(seed)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_launches_anew() -> None:
    kernel = made()
    x, y, z = arrays(5000)
    kernel(x, y, z)
    child = os.fork()
    if child == 0:
        z[:] = 0
        kernel(x, y, z)
        kernel(x, y, z)
        os._exit(0 if np.array_equal(z, 2 * x + y) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    kernel(x, y, z)


def test_tuned_sizes_are_taken(direct_calls: list[bool]) -> None:
    @dure.kernel
    def doubled(x: dl.Tensor, z: dl.Tensor, bn: dl.const):
        i = dl.program_id(0)
        dl.store(z, (i,), dl.load(x, (i,), (bn,)) * 2)

    x, _, z = arrays(4096)
    doubled(x, z)
    doubled(x, z)
    dure.tune(doubled, x, z, budget=0.2)
    z[:] = 0
    doubled(x, z)
    np.testing.assert_array_equal(z, 2 * x)
    assert direct_calls == [True, False]


def test_unknown_objects_take_the_longer_way(
    monkeypatch: pytest.MonkeyPatch, direct_calls: list[bool]
) -> None:
    monkeypatch.setattr(direct, "_native", lambda: None)
    assert Direct.on(shared_pool()) is None
    kernel = made()
    x, y, z = arrays(12)
    for _ in range(2):
        kernel(x, y, z)
    np.testing.assert_array_equal(z, 2 * x + y)
    assert not any(direct_calls)


def test_these_objects_are_known() -> None:
    known = sys.implementation.name == "cpython"
    assert direct._known_objects() == known
