"""Launching: specialisations, grids, foreign arrays, open tile sizes, import time."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dure
import dure.lang as dl
from dure import library
from dure.compiler.tiles import TileMachine, estimate, live_bytes, ranked
from dure.errors import KernelError
from dure.ir.core import Function
from dure.ir.expr import symbol
from dure.ir.types import TensorType
from dure.lang import launch as launching
from dure.runtime.arrays import ArrayView

RNG = np.random.default_rng(8)


@dure.kernel
def double(x: dl.Tensor, y: dl.Tensor, n: dl.const = 8):
    i = dl.program_id(0)
    dl.store(y, (i,), dl.load(x, (i,), (n,)) * 2)


@dure.kernel
def matmul(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(a.shape[1], bk)):
        acc += dl.load(a, (i, k), (bm, bk)) @ dl.load(b, (k, j), (bk, bn))
    dl.store(c, (i, j), acc.to(c.dtype))


class Counting:
    """An executor that counts what it compiles, and runs nothing."""

    def __init__(self) -> None:
        self.functions: list[Function] = []
        self.grids: list[tuple[int, ...]] = []

    def __call__(self, function: Function) -> launching.Runner:
        self.functions.append(function)

        def run(views: Any, sizes: Any) -> None:
            self.grids.append(tuple(sizes))

        return run


def floats(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def test_one_compilation_serves_every_size() -> None:
    counting = Counting()
    with launching.executing(counting):
        for size in (1, 7, 8, 100, 1000):
            double(floats(size), floats(size))
    assert len(counting.functions) == 1
    with launching.executing(counting):
        double(floats(20)[::2], floats(10))
        double(floats(20), floats(20), 16)
        double(floats(20), floats(20), n=16)
    assert len(counting.functions) == 3


def test_consts_that_python_calls_equal_are_different() -> None:
    @dure.kernel
    def filled(y: dl.Tensor, value: dl.const):
        i = dl.program_id(0)
        tile = dl.full((4,), 1, dl.int32) * value
        dl.store(y, (i,), tile.to(dl.float32) if value is not True else tile.to(dl.float32) * 5)

    y = np.zeros(4, np.float32)
    for value, expected in ((1, 1), (True, 5), (1.0, 1)):
        filled(y, value=value)
        assert (y == expected).all()


@dataclass(frozen=True)
class Boxed:
    number: float


@dure.kernel
def constant(y: dl.Tensor, value: dl.const):
    number = value[0] if isinstance(value, tuple) else value() if callable(value) else value
    number = number.number if isinstance(number, Boxed) else number
    dl.store(y, (dl.program_id(0),), dl.full((4,), number, dl.float32))


@pytest.mark.parametrize("of", [float, lambda v: (v,), lambda v: lambda: v, Boxed])
def test_zeros_of_either_sign_are_different_consts(of: Callable[[float], Any]) -> None:
    y = np.ones(4, np.float32)
    for value in (0.0, -0.0, 0.0, -0.0):
        constant(y, value=of(value))
        assert (y == 0).all()
        assert (np.signbit(y) == np.signbit(value)).all()


def test_a_nan_is_the_const_that_it_was_before() -> None:
    counting = Counting()
    with launching.executing(counting):
        for text in ("nan", "nan", "inf"):  # each a new object
            constant(floats(8), value=float(text))
            constant(floats(8), value=(float(text),))
            constant(floats(8), value=Boxed(float(text)))
    assert len(counting.functions) == 6


GRIDS = {
    "int": lambda m: 2,
    "tuple": (2,),
    "numpy": np.int64(2),
    "function": lambda m: (dl.cdiv(m.y.shape[0], m["n"]),),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids(anyhow: str, name: str) -> None:
    x, y = floats(13), np.zeros(13, np.float32)
    double[GRIDS[name]](x, y)
    np.testing.assert_array_equal(y, x * 2)


def test_a_smaller_grid_does_less(anyhow: str) -> None:
    x, y = floats(13), np.zeros(13, np.float32)
    double[1](x, y)
    np.testing.assert_array_equal(y[:8], x[:8] * 2)
    assert (y[8:] == 0).all()


def test_nothing_runs_on_empty_arrays() -> None:
    counting = Counting()
    with launching.executing(counting):
        double(floats(0), floats(0))
    assert counting.grids == []
    with launching.executing(counting), pytest.raises(KernelError, match="has 3 elements"):
        double(floats(3), floats(0))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.int64, np.float64])
def test_element_types(anyhow: str, dtype: type) -> None:
    x = RNG.integers(-20, 20, 11).astype(dtype)
    y = np.zeros_like(x)
    double(x, y)
    np.testing.assert_array_equal(y, x * np.array(2, dtype))


class Interface:
    """An array by ``__array_interface__`` alone."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


class Dlpack:
    """An array by DLPack alone."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **keywords: Any) -> object:
        return self.array.__dlpack__(**keywords)


@pytest.mark.parametrize("wrap", [Interface, Dlpack, memoryview, lambda a: a])
def test_arrays_of_other_libraries(anyhow: str, wrap: Any) -> None:
    x, y = floats(10), np.zeros(10, np.float32)
    double(wrap(x), wrap(y))
    np.testing.assert_array_equal(y, x * 2)


def test_buffers_are_read_at_every_launch(anyhow: str) -> None:
    y = np.zeros(8, np.float32)
    for number in (1.0, 2.0, 3.0):
        x = np.full(8, number, np.float32)
        double(x, y)
        assert (y == number * 2).all()
        x[:] = 7
        double(x, y)
        assert (y == 14).all()


def test_threads_may_launch_at_once() -> None:
    arrays = [(floats(200), np.zeros(200, np.float32)) for _ in range(4)]

    def work(x: Any, y: Any) -> None:
        for _ in range(20):
            double(x, y)

    threads = [threading.Thread(target=work, args=pair) for pair in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, y in arrays:
        np.testing.assert_array_equal(y, x * 2)


def test_disjoint_views_of_one_array_are_no_overlap(anyhow: str) -> None:
    base = floats(20)
    before = base.copy()
    double(base[::2], base[1::2])
    np.testing.assert_array_equal(base[1::2], before[::2] * 2)


def test_absent_arguments_and_extras(anyhow: str) -> None:
    @dure.kernel
    def total(y: dl.Tensor, bias: dl.Tensor, *more: dl.Tensor, scale: dl.const = 1):
        i = dl.program_id(0)
        tile = dl.zeros((4,), dl.float32)
        if bias is not None:
            tile = tile + dl.load(bias, (i,), (4,))
        for x in more:
            tile = tile + dl.load(x, (i,), (4,)) * scale
        dl.store(y, (i,), tile)

    y, bias, a, b = np.zeros(6, np.float32), floats(6), floats(6), floats(6)
    total(y, bias, a, b, scale=2)
    np.testing.assert_allclose(y, bias + a * 2 + b * 2, rtol=1e-6)
    total(y, None)
    assert (y == 0).all()
    total(y, None, a)
    np.testing.assert_array_equal(y, a)


OFFSET: float = 1.0


def test_a_global_that_changes_compiles_anew(anyhow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @dure.kernel
    def shifted(x: dl.Tensor, y: dl.Tensor):
        i = dl.program_id(0)
        dl.store(y, (i,), dl.load(x, (i,), (4,)) + OFFSET + more)

    x, y, more = floats(4), np.zeros(4, np.float32), 2.0
    shifted(x, y)
    np.testing.assert_allclose(y, x + 3, rtol=1e-6)
    monkeypatch.setitem(globals(), "OFFSET", 5.0)
    more = 10.0
    shifted(x, y)
    np.testing.assert_allclose(y, x + 15, rtol=1e-6)


def test_equal_functions_are_one_const() -> None:
    @dure.kernel
    def apply(x: dl.Tensor, y: dl.Tensor, function: dl.const):
        i = dl.program_id(0)
        dl.store(y, (i,), function(dl.load(x, (i,), (4,))))

    counting = Counting()
    with launching.executing(counting):
        for scale in (2.0, 2.0, 3.0):
            apply(floats(4), floats(4), lambda tile, by=scale: tile * by)
    assert len(counting.functions) == 2


# --- interpret ----------------------------------------------------------------------------------


def test_print_and_assert_work_under_interpret(capsys: pytest.CaptureFixture[str]) -> None:
    @dure.kernel
    def talkative(x: dl.Tensor, y: dl.Tensor):
        i = dl.program_id(0)
        tile = dl.load(x, (i,), (4,))
        print("instance", i, np.asarray(tile).tolist())
        assert float(np.asarray(tile).sum()) < 100, "too large"
        dl.store(y, (i,), tile)

    x, y = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    dl.interpret(talkative)(x, y)
    assert capsys.readouterr().out.splitlines()[1] == "instance 1 [4.0, 5.0, 6.0, 7.0]"
    with pytest.raises(AssertionError, match="too large"):
        dl.interpret(talkative)[2](x * 100, y)
    capsys.readouterr()
    talkative(x * 100, y)
    np.testing.assert_array_equal(y, x * 100)
    assert capsys.readouterr().out == ""


def test_a_debugger_sees_the_kernels_names() -> None:
    seen: dict[str, Any] = {}

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_name == "double":
            seen.update(frame.f_locals)
            return trace
        return None

    sys.settrace(trace)
    try:
        dl.interpret(double)[1](floats(4), np.zeros(4, np.float32))
    finally:
        sys.settrace(None)
    assert seen["i"] == 0
    assert seen["x"].shape == (4,)


# --- open tile sizes ----------------------------------------------------------------------------


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from dure.lang import tune

    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_MEMORY", {})
    yield tmp_path


def test_open_tile_sizes_are_chosen_and_remembered(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = floats(20, 30), floats(30, 17), np.zeros((20, 17), np.float32)
    matmul(a, b, c)
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)
    stored = (cache_folder / "tiles.json").read_text()
    tune_module = sys.modules["dure.lang.tune"]
    monkeypatch.setattr(tune_module, "_MEMORY", {})

    def no_ranking(*_: object) -> object:
        raise AssertionError("chosen again")

    monkeypatch.setattr(tune_module, "ranked", no_ranking)
    c[:] = 0
    matmul(a, b, c)
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)
    assert (cache_folder / "tiles.json").read_text() == stored


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": 3}', '{"a": {"b": null}}'])
def test_a_damaged_file_of_choices_is_ignored(cache_folder: Path, damage: str) -> None:
    (cache_folder / "tiles.json").write_text(damage)
    a, b, c = floats(5, 6), floats(6, 7), np.zeros((5, 7), np.float32)
    matmul(a, b, c)
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)


def test_tune_measures_on_copies(cache_folder: Path) -> None:
    a, b, c = floats(33, 40), floats(40, 17), np.full((33, 17), 7, np.float32)
    found = dure.tune(matmul, a, b, c, bk=8, budget=0.5)
    assert set(found) == {"bm", "bn"}
    assert (c == 7).all()
    matmul(a, b, c, bk=8)
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)
    with pytest.raises(KernelError, match="no open const"):
        dure.tune(matmul, a, b, c, bm=8, bn=8, bk=8)


MACHINE = TileMachine(2, 16, 1e11, 2e10, ((32768, 1e11), (1048576, 5e10)), 1e10)


def matrices() -> list[TensorType | None]:
    return [TensorType((symbol(f"{n}_0"), symbol(f"{n}_1")), dl.float32) for n in "abc"]


def test_an_open_const_that_is_no_tile_size_is_named(cache_folder: Path) -> None:
    @dure.kernel
    def apply(x: dl.Tensor, y: dl.Tensor, epilogue: dl.const):
        i = dl.program_id(0)
        dl.store(y, (i,), epilogue(dl.load(x, (i,), (4,))))

    with pytest.raises(KernelError, match="choosing a tile size for epilogue"):
        apply(floats(4), floats(4))


def test_the_estimate_sees_edges_and_idle_workers() -> None:
    sizes = dict.fromkeys(("a_0", "a_1", "b_0", "b_1", "c_0", "c_1"), 64)

    def seconds(bm: int, bn: int, **changed: int) -> float:
        function = matmul.specialize(matrices(), {"bm": bm, "bn": bn, "bk": 64})
        return estimate(function, {**sizes, **changed}, MACHINE).seconds

    assert seconds(64, 32) < seconds(64, 64), "one instance leaves a worker idle"
    assert seconds(32, 64) < seconds(32, 64, c_0=65), "a tile beyond the edge costs"
    assert seconds(32, 32) < seconds(1, 32), "narrow tiles use the multipliers badly"


def test_the_estimate_sees_copies_of_what_lies_turned() -> None:
    sizes = dict.fromkeys(("a_0", "a_1", "b_0", "b_1", "c_0", "c_1"), 256)

    def seconds(kernel: Any, bm: int) -> float:
        function = kernel.specialize(matrices(), {"bm": bm, "bn": 64, "bk": 64})
        return estimate(function, sizes, MACHINE).seconds

    turned, plain = (
        [seconds(kernel, bm) for bm in (16, 128)] for kernel in (library.matmul, library.matmul_kn)
    )
    assert turned[0] / plain[0] > turned[1] / plain[1] > 1, "they serve all rows of a tile"


def test_the_estimate_of_products_by_tile_registers() -> None:
    """They are fast, but for the copies of operands, which serve all rows of a tile."""
    kinds: list[TensorType | None] = [
        TensorType((symbol(f"{n}_0"), symbol(f"{n}_1")), dl.bfloat16) for n in "abc"
    ]
    sizes = dict.fromkeys(("a_0", "a_1", "b_0", "b_1", "c_0", "c_1"), 256)
    tiles = replace(MACHINE, tile_flops=16 * MACHINE.dot_flops)

    def seconds(bm: int, machine: TileMachine) -> float:
        function = library.matmul_kn.specialize(kinds, {"bm": bm, "bn": 64, "bk": 64})
        return estimate(function, sizes, machine).seconds

    assert seconds(128, tiles) < seconds(128, MACHINE)
    gains = [seconds(bm, MACHINE) / seconds(bm, tiles) for bm in (16, 32, 128)]
    assert gains == sorted(gains)
    few, more = (seconds(4, replace(tiles, few_rows=rows)) for rows in (4, 3))
    assert few < more, "few rows read the right operand where it lies"


def test_the_estimate_of_instances_that_get_longer() -> None:
    """Two of them take as long as two of the mean length."""

    @dure.kernel
    def rising(x: dl.Tensor, y: dl.Tensor, bm: dl.const):
        i = dl.program_id(0)
        total = dl.zeros((bm, 64), dl.float32)
        for k in dl.range(i * 8, i * 8 + 8 * (i + 1)):
            total = total + dl.load(x, (k, 0), (bm, 64))
        dl.store(y, (i, 0), total)

    types = [TensorType((symbol(f"{n}_0"), symbol(f"{n}_1")), dl.float32) for n in "xy"]
    function = rising.specialize(types, {"bm": 8})
    sizes = {"x_0": 512, "x_1": 64, "y_1": 64}
    one, two = (estimate(function, {**sizes, "y_0": rows}, MACHINE).seconds for rows in (8, 16))
    assert one < two < 2 * one


def test_live_bytes_of_a_matmul() -> None:
    function = matmul.specialize(matrices(), {"bm": 16, "bn": 32, "bk": 8})
    tiles = 4 * (16 * 8 + 8 * 32)
    assert tiles < live_bytes(function.body) <= 4 * tiles + 8 * 16 * 32


def test_what_does_not_compile_is_not_chosen() -> None:
    def specialize(values: Any) -> Function:
        if values["n"] < 64:
            raise KernelError("too small")
        return double.specialize(
            [TensorType((symbol(f"{n}_0"),), dl.float32) for n in "xy"], values
        )

    found = ranked(specialize, ["n"], {"x_0": 1000, "y_0": 1000}, MACHINE)
    assert found[0][1]["n"] >= 64
    with pytest.raises(KernelError, match="too small"):
        ranked(lambda values: specialize({"n": 1}), ["n"], {"x_0": 9, "y_0": 9}, MACHINE)


def test_a_dot_grows_as_long_as_it_repays() -> None:
    def best(*sizes: int) -> dict[str, int]:
        m, n, k = sizes
        extents = {"a_0": m, "a_1": k, "b_0": n, "b_1": k, "c_0": m, "c_1": n}
        one = replace(MACHINE, workers=1)

        def specialize(values: Any) -> Function:
            return matmul.specialize(matrices(), values)

        return ranked(specialize, ["bm", "bn", "bk"], extents, one)[0][1]

    assert best(4096, 4096, 4096)["bm"] > 512
    assert best(128, 4096, 4096)["bm"] <= 128


def test_import_is_quick() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import dure;"
        "print(time.perf_counter() - start, 'numpy' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert all("False" in r.stdout for r in runs)
    assert min(float(r.stdout.split()[0]) for r in runs) < 0.2


def test_array_view_is_what_runners_get() -> None:
    seen: list[ArrayView] = []

    def executor(function: Function) -> launching.Runner:
        return lambda views, sizes: seen.extend(views)

    x = floats(6)
    with launching.executing(executor):
        double(x, np.zeros(6, np.float32))
    assert seen[0].address == x.ctypes.data
