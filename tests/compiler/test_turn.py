"""Products computed the other way round, and arguments that lie transposed, on bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from dure.compiler.chip.orient import orientable
from dure.compiler.chip.pipeline import Options, compile_for
from dure.ir.core import Function, walk
from dure.ir.dtypes import bfloat16, float32
from dure.library import epilogue
from dure.library.build import tile_function
from dure.library.call import KernelCall, tensor
from dure.library.ffn import gated_linear_kn
from dure.library.matmul import matmul_kn
from dure.library.norm import rms_norm
from dure.sim.sanitizer import sanitize
from dure.sim.values import run_values
from dure.targets import chip

TARGET = chip("trainium2")
Array = npt.NDArray[np.float32]


def product(m: int, k: int, n: int, **tiles: int) -> KernelCall:
    """x (m, k) @ w (k, n) + r."""
    types = tuple(tensor(bfloat16, *s) for s in ((m, k), (k, n), (m, n), (m, n)))
    consts = {"epilogue": epilogue.compose([epilogue.residual(0)])}
    return KernelCall(matmul_kn, types, consts, tiles)


def gated(m: int, k: int, n: int, **tiles: int) -> KernelCall:
    types = tuple(tensor(bfloat16, *s) for s in ((m, k), (k, 2 * n), (m, n)))
    return KernelCall(gated_linear_kn, types, {}, tiles)


def results(function: Function) -> set[tuple[int, ...]]:
    """The shapes of what dots give."""
    found: set[tuple[int, ...]] = set()
    for op in walk(function.body):
        if op.name == "dot":
            found.add(op.result.tile.shape)
    return found


def run(function: Function, arrays: Sequence[Array]) -> Array:
    """What the last argument holds afterwards; the program is proved."""
    assert sanitize(function, TARGET).ok
    passed = [np.ascontiguousarray(a).astype(bfloat16.numpy) for a in arrays]
    run_values(function, TARGET, passed, seed=1)
    return passed[2 if len(passed) > 2 else -1].astype(np.float32)


def drawn(*shape: int, seed: int = 0) -> Array:
    wide = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return wide.astype(bfloat16.numpy).astype(np.float32)


@pytest.mark.parametrize(("m", "turned"), [(1, True), (8, True), (128, False)])
def test_few_rows_are_the_streamed_ones(m: int, turned: bool) -> None:
    call = product(m, 1280, 512, bm=m, bn=256, bk=128)
    function = compile_for(tile_function(call), TARGET, Options(oriented=False)).function
    assert results(function) == {(256, m) if turned else (m, 256)}
    x, w, r = drawn(m, 1280), drawn(1280, 512, seed=1) / 32, drawn(m, 512, seed=2)
    found = run(function, [x, w, np.full((m, 512), np.nan, np.float32), r])
    np.testing.assert_allclose(found, x @ w + r, atol=0.05, rtol=0.02)


def test_only_a_held_operand_asks_for_it() -> None:
    call = product(1, 1280, 512, bm=1, bn=256, bk=128)
    function = compile_for(tile_function(call), chip("rngd"), Options(oriented=False)).function
    assert all(rows == 1 for rows, _ in results(function))


def test_elementwise_ops_come_before_the_turn_back() -> None:
    call = gated(1, 1280, 256, bm=1, bn=128, bk=128)
    function = compile_for(tile_function(call), TARGET, Options(oriented=False)).function
    shapes = {op.result.tile.shape for op in walk(function.body) if op.name == "sigmoid"}
    assert shapes == {(128, 1)}
    x, w = drawn(1, 1280), drawn(1280, 512, seed=1) / 32
    found = run(function, [x, w, np.full((1, 256), np.nan, np.float32)])
    gate, up = (x @ w)[:, :256], (x @ w)[:, 256:]
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, atol=0.05, rtol=0.05)


def test_arguments_that_lie_transposed() -> None:
    call = gated(128, 256, 256, bm=128, bn=128, bk=128)
    tile = tile_function(call)
    assert orientable(tile, TARGET) == {"x", "y"}
    options = Options(oriented=False, standing=frozenset({"x", "y"}))
    function = compile_for(tile, TARGET, options).function
    assert not [op for op in walk(function.body) if op.attrs.get("stored")]
    x, w = drawn(128, 256), drawn(256, 512, seed=1) / 16
    found = run(function, [x.T, w, np.full((256, 128), np.nan, np.float32)])
    gate, up = (x @ w)[:, :256], (x @ w)[:, 256:]
    want = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(found.T, want, atol=0.02 * np.abs(want).max(), rtol=0.05)


def test_a_result_is_turned_on_its_way_out() -> None:
    types = (tensor(bfloat16, 128, 256), tensor(bfloat16, 256), None, tensor(bfloat16, 128, 256))
    call = KernelCall(rms_norm, types, {"epsilon": 1e-5}, {"bm": 128, "bd": 128})
    options = Options(oriented=False, standing=frozenset({"y"}))
    function = compile_for(tile_function(call), TARGET, options).function
    # The matrix engine turns it: it is the faster one, with a copy from where it writes to.
    turns = [op for op in walk(function.body) if op.name == "compute" and _transposes(op.regions)]
    assert {op.attr("queue") for op in turns} == {"tensor"}
    x, weight = drawn(128, 256), drawn(256, seed=1)
    found = run(function, [x, weight, np.full((256, 128), np.nan, np.float32)])
    want = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(found.T, want, atol=0.05, rtol=0.02)


def test_what_is_read_otherwise_stays() -> None:
    types = (tensor(float32, 128, 256), tensor(float32, 256), None, tensor(float32, 128, 256))
    call = KernelCall(rms_norm, types, {"epsilon": 1e-5}, {"bm": 128, "bd": 128})
    assert orientable(tile_function(call), TARGET) == {"y"}
    call = product(128, 256, 512, bm=128, bn=256, bk=128)
    assert orientable(tile_function(call), chip("rngd"), ("in",)) == frozenset()


def _transposes(regions: Sequence[object]) -> bool:
    return any(op.name == "transpose" for region in regions for op in region.ops)  # type: ignore[attr-defined]
