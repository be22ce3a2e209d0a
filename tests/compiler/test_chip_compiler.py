"""The compiler for chips: programs that verify, print, are proved, and compute the right values."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dure
import dure.lang as dl
from dure.compiler.chip.allocate import ScratchpadError
from dure.compiler.chip.counts import number
from dure.compiler.chip.host import from_chip, to_chip
from dure.compiler.chip.partition import (
    Partition,
    block_sums,
    core_splits,
    loads_of,
    partition,
    splits_of,
)
from dure.compiler.chip.pipeline import Compiled, Options, compile_for, prepare
from dure.compiler.chip.resident import Reuse
from dure.compiler.chip.search import choose
from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.core import Function, Op, Region, walk
from dure.ir.dtypes import DType
from dure.ir.expr import minimum, symbol
from dure.ir.interpret import run
from dure.ir.parser import parse_function
from dure.ir.printer import print_function
from dure.ir.types import TensorType, shape_of
from dure.ir.verifier import verify
from dure.library.call import index_tensor, tensor
from dure.library.matmul import matmul_kn
from dure.library.moe import grouped_linear, grouped_matmul
from dure.machine.chip import Chip
from dure.sim.sanitizer import sanitize
from dure.sim.timing import simulate
from dure.sim.values import run_values
from dure.targets import chip as find_chip
from dure.targets import chip_names

Array = np.ndarray[Any, Any]
CHIPS = chip_names()


@cache
def chip(name: str) -> Chip:
    return find_chip(name)


def product(m: int, n: int, k: int, tile: int, dtype: DType = dtypes.bfloat16) -> Function:
    def tensor(*shape: int) -> TensorType:
        return TensorType(shape_of(*shape), dtype)

    return matmul_kn.specialize(
        [tensor(m, k), tensor(k, n), tensor(m, n)], {"bm": tile, "bn": tile, "bk": tile}
    )


def matrices(m: int, n: int, k: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([m, n, k])
    x, w = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((m, k), (k, n)))
    return x, w, np.zeros((m, n), ml_dtypes.bfloat16)


def check(compiled: Compiled, target: Chip, m: int, n: int, k: int, seed: int = 0) -> None:
    """Verify, prove, run on bytes and compare with float64."""
    verify(compiled.function)
    verdict = sanitize(compiled.function, target)
    assert verdict.ok, verdict.render()
    x, w, y = matrices(m, n, k)
    passed = to_chip(compiled.function, [x, w, y])
    run_values(compiled.function, target, passed, seed=seed)
    from_chip(compiled.function, passed, [x, w, y])
    expected = x.astype(np.float64) @ w.astype(np.float64)
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(y.astype(np.float64) / scale, expected / scale, atol=8e-3)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(CHIPS),
    m=st.sampled_from([1, 3, 16, 40, 65]),
    n=st.sampled_from([1, 5, 32, 70]),
    k=st.sampled_from([1, 7, 32, 90]),
    tile=st.sampled_from([8, 16, 32]),
    stages=st.integers(2, 4),
    order=st.permutations([0, 1]),
    seed=st.integers(0, 99),
)
def test_a_matmul_of_any_size_in_any_plan(
    name: str, m: int, n: int, k: int, tile: int, stages: int, order: list[int], seed: int
) -> None:
    target = chip(name)
    function = product(m, n, k, tile)
    grid = (-(-m // tile), -(-n // tile))
    split = list(core_splits(grid, int(target.cores.base)))[seed % 3 : seed % 3 + 1] or [(1, 1)]
    options = Options(Partition(split[0], (order[0], order[1])), stages)
    check(compile_for(function, target, options), target, m, n, k, seed)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    "options",
    [
        Options(resident=(Reuse("x", 1),)),
        Options(resident=(Reuse("w", 0),)),
        Options(resident=(Reuse("x", 1), Reuse("w", 0))),
        Options(stage=Reuse("w", 0)),
        Options(resident=(Reuse("x", 1),), stage=Reuse("w", 0), stages=3),
    ],
)
def test_operands_that_stay(name: str, options: Options) -> None:
    target = chip(name)
    function = product(70, 50, 40, 16)
    alone = replace(options, plan=Partition((1, 1), (0, 1)))
    check(compile_for(function, target, alone), target, 70, 50, 40)


@pytest.mark.parametrize("name", CHIPS)
def test_padded_operands_that_stay(name: str) -> None:
    """What pads a tile is filled when it is loaded, and not at the turns at which it stays."""
    target, options = chip(name), Options(Partition((1, 1), (0, 1)), resident=(Reuse("x", 0),))
    check(compile_for(product(1, 50, 40, 16), target, options), target, 1, 50, 40)


def test_tiles_turned_together_lie_apart() -> None:
    """Two tiles that one engine turns, and that pass through a memory without room for both."""
    target, ends = chip("trainium2"), index_tensor(np.zeros(4, np.int32), 0, 4)
    x, w, y = (tensor(dtypes.bfloat16, *s) for s in ((4, 720), (4, 2880, 720), (4, 2880)))
    sizes = {"bm": 1, "bn": 1024, "bk": 256}
    function = grouped_linear.specialize([x, w, ends, ends, None, y], sizes)
    verdict = sanitize(compile_for(function, target).function, target)
    assert verdict.ok, verdict.render()


def test_splits_weigh_what_index_arguments_say() -> None:
    """Experts that have tokens go to different cores."""
    starts = np.array([0, 0, 2, 2, 2, 2, 2, 4], np.int32)
    stops = np.array([0, 2, 2, 2, 2, 2, 4, 4], np.int32)
    x, w, y = (tensor(dtypes.bfloat16, *s) for s in ((4, 64), (8, 64, 32), (4, 32)))
    ends = index_tensor(starts, 0, 4)
    sizes = {"bm": 2, "bn": 32, "bk": 32}
    function = grouped_matmul.specialize([x, w, ends, ends, None, y], sizes)
    loads = loads_of(function, (8, 1), {"starts": starts, "stops": stops})
    assert loads[1] is None and loads[0] is not None
    assert [load > 1 for load in loads[0]] == [False, True, False, False, False, False, True, False]
    assert next(splits_of(function, 3)) == (3, 1)
    busy = {split: max(block_sums(loads[0], split[0])) for split in core_splits((8, 1), 8, loads)}
    assert list(busy.values()) == sorted(busy.values())
    assert busy[8, 1] == busy[2, 1] - 3


def test_what_stays_is_loaded_once() -> None:
    target = chip("rngd")
    function, plan = product(512, 512, 256, 128), Partition((1, 1), (0, 1))
    usual = simulate(compile_for(function, target, Options(plan)).function, target)
    kept = Options(plan, resident=(Reuse("x", 1), Reuse("w", 0)))
    once = simulate(compile_for(function, target, kept).function, target)
    inputs = 2 * (512 * 256 + 256 * 512)
    assert once.bytes == inputs + 2 * 512 * 512
    assert usual.bytes == 4 * inputs + 2 * 512 * 512


def test_what_cannot_stay_is_named() -> None:
    with pytest.raises(KernelError, match="'y' can't stay") as caught:
        compile_for(product(64, 64, 64, 16), chip("rngd"), Options(resident=(Reuse("y", 0),)))
    assert "loads again" in caught.value.rule or "same tiles" in caught.value.rule


@pytest.mark.parametrize("name", CHIPS)
def test_a_program_prints_and_parses_back(name: str) -> None:
    compiled = compile_for(product(100, 70, 50, 32), chip(name))
    parsed = parse_function(compiled.text)
    verify(parsed)
    assert print_function(parsed) == compiled.text
    assert sanitize(parsed, chip(name)).ok
    assert simulate(parsed, chip(name)).ps == simulate(compiled.function, chip(name)).ps


@pytest.mark.parametrize("name", CHIPS)
def test_no_semaphore_is_superfluous(name: str) -> None:
    """Without any one of them, the program isn't proved any more."""
    target = chip(name)
    plan = Partition((1, 1), (0, 1))
    compiled = compile_for(product(96, 96, 96, 32), target, Options(plan))
    assert sanitize(compiled.function, target).ok
    semaphores = [op for op in compiled.function.body.ops if op.name == "semaphore"]
    assert semaphores
    for semaphore in semaphores:
        less = replace(compiled.function, body=_without(compiled.function.body, semaphore))
        assert not sanitize(less, target).ok, f"{semaphore.result.name} isn't needed"


def _without(region: Region, semaphore: Op) -> Region:
    kept = [
        replace(op, regions=tuple(_without(r, semaphore) for r in op.regions))
        for op in region.ops
        if op is not semaphore and semaphore.result not in op.operands
    ]
    return replace(region, ops=tuple(kept))


def test_partition_runs_each_instance_once() -> None:
    function = product(100, 70, 30, 16, dtypes.float32)
    x, w = (
        np.random.default_rng(1).standard_normal(s).astype(np.float32)
        for s in ((100, 30), (30, 70))
    )
    expected, found = np.zeros((100, 70), np.float32), np.zeros((100, 70), np.float32)
    run(function, [x, w, expected])
    for split in ((1, 1), (3, 2), (7, 5), (2, 1)):
        found[...] = np.nan
        cut = partition(function, Partition(split, (1, 0)))
        run(cut, [x, w, found])
        np.testing.assert_array_equal(found, expected)


def test_a_scratchpad_that_overflows_shows_who_holds_it() -> None:
    with pytest.raises(ScratchpadError) as caught:
        compile_for(product(4096, 4096, 4096, 2048), chip("mtia-v2"))
    message = str(caught.value)
    assert "matmul.py:" in message and "2048 x 2048" in message and "MiB" in message
    assert caught.value.needed > caught.value.size


def test_a_budget_is_kept() -> None:
    target = chip("tpu-v6e")
    function = product(512, 512, 512, 128)
    whole = compile_for(function, target)
    budget = whole.used["vmem"] - 50_000
    less = compile_for(function, target, Options(budget=budget))
    assert less.used["vmem"] <= budget < whole.used["vmem"]
    check(less, target, 512, 512, 512)
    with pytest.raises(ScratchpadError):
        compile_for(function, target, Options(budget=1000))


def test_strict_refuses_conversions() -> None:
    function = product(32, 32, 32, 16, dtypes.float16)
    target = chip("tpu-v6e")
    assert compile_for(function, target).conversions
    with pytest.raises(KernelError, match="float16"):
        compile_for(function, target, Options(strict=True))


@pytest.mark.parametrize("name", CHIPS)
def test_the_search_fits_and_is_no_slower_than_a_plain_choice(name: str) -> None:
    target = chip(name)

    def tensor(*shape: int) -> TensorType:
        return TensorType(shape_of(*shape), dtypes.bfloat16)

    types = [tensor(512, 768), tensor(768, 640), tensor(512, 640)]
    found = choose(lambda c: matmul_kn.specialize(types, c), ("bm", "bn", "bk"), target)
    assert sanitize(found.compiled.function, target).ok
    plain = compile_for(product(512, 640, 768, 64), target)
    assert found.timing.ps <= simulate(plain.function, target).ps


@dure.kernel
def _chain(x: dl.Tensor, y: dl.Tensor, bm: dl.const, n: dl.const):
    i = dl.program_id(0)
    tile = dl.load(x, (i, 0), (bm, n)).to(dl.float32)
    for _ in dl.range(3):
        top = dl.max(tile, 1, keepdims=True)
        tile = dl.exp(tile - top)
        tile = tile / dl.sum(tile, 1, keepdims=True)
    dl.store(y, (i, 0), tile.to(y.dtype))


@pytest.mark.parametrize("name", CHIPS)
def test_a_chain_that_a_loop_carries(name: str) -> None:
    target = chip(name)
    x = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    kind = TensorType(shape_of(20, 16), dtypes.float32)
    function = _chain.specialize([kind, kind], {"bm": 8, "n": 16})
    expected, found = np.zeros_like(x), np.zeros_like(x)
    run(function, [x, expected])
    compiled = compile_for(function, target)
    assert sanitize(compiled.function, target).ok
    for seed in range(3):
        run_values(compiled.function, target, [x, found], seed=seed)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@dure.kernel
def _last_differs(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, n: dl.const, turns: dl.const):
    acc, kept = dl.zeros((n, n), dl.float32), dl.zeros((n, n), dl.float32)
    for k in dl.range(turns):
        tile = dl.load(x, (0, k), (n, n))
        product = dl.dot(tile, dl.load(w, (k, 0), (n, n)))
        if k == turns - 1:
            product = dl.where(product > 0.0, product, 1.0)
        kept = dl.maximum(kept, product)
        acc = acc * 0.5
        if k == turns - 1:
            acc = dl.dot(dl.where(tile > 0.0, tile, 0.0), dl.load(w, (k, 0), (n, n)), acc)
        else:
            acc = dl.dot(tile, dl.load(w, (k, 0), (n, n)), acc)
    dl.store(y, (0, 0), acc + kept)


@pytest.mark.parametrize("name", CHIPS)
def test_branches_update_what_a_loop_carries(name: str) -> None:
    target = chip(name)
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((16, 48), (48, 16)))
    expected, found = np.zeros((16, 16), np.float32), np.zeros((16, 16), np.float32)
    kinds = [TensorType(shape_of(*s), dtypes.bfloat16) for s in ((16, 48), (48, 16))]
    kinds.append(TensorType(shape_of(16, 16), dtypes.float32))
    function = _last_differs.specialize(kinds, {"n": 16, "turns": 3})
    run(function, [x, w, expected])
    compiled = compile_for(function, target)
    assert sanitize(compiled.function, target).ok
    for seed in range(3):
        passed = to_chip(compiled.function, [x, w, found])
        run_values(compiled.function, target, passed, seed=seed)
        from_chip(compiled.function, passed, [x, w, found])
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_a_branch_that_leaves_a_tile_copies_nothing() -> None:
    kinds = [TensorType(shape_of(*s), dtypes.bfloat16) for s in ((16, 48), (48, 16))]
    kinds.append(TensorType(shape_of(16, 16), dtypes.float32))
    function = _last_differs.specialize(kinds, {"n": 16, "turns": 3})
    body = compile_for(function, chip("rngd")).function.body
    branches = [op for op in walk(body) if op.name == "if"]
    assert len(branches) == 2
    computed = [[o.name for o in r.ops].count("compute") for op in branches for r in op.regions]
    # Only one changes the product; the sums differ in an operand that is made before.
    assert computed == [1, 0, 2, 1]


def test_a_large_transpose_leaves_the_slower_engine() -> None:
    """A run of vector ops is cut where another queue does the rest in less time."""

    @dure.kernel
    def weighted(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, n: dl.const):
        tile = dl.exp(dl.load(x, (0, 0), (n, n)).to(dl.float32)).to(dl.bfloat16)
        dl.store(y, (0, 0), dl.dot(tile, dl.load(w, (0, 0), (n, n))))

    for size, queue in ((512, "tensor"), (32, "vector")):
        kind = TensorType(shape_of(size, size), dtypes.bfloat16)
        result = TensorType(shape_of(size, size), dtypes.float32)
        function = weighted.specialize([kind, kind, result], {"n": size})
        found = compile_for(function, chip("trainium2")).function
        turned = [
            op.attr("queue")
            for op in walk(found.body)
            if op.name == "compute"
            and any(o.name == "transpose" and o.attrs.get("stored") for o in op.regions[0].ops)
        ]
        assert turned == [queue]


def test_the_tile_program_of_a_core_computes_the_same() -> None:
    target = chip("trainium2")
    prepared = prepare(product(100, 64, 64, 32), target, Partition((2, 2), (0, 1)))
    x, w, found = matrices(100, 64, 64)
    run(prepared.function, [np.ascontiguousarray(x.T), w, found])
    expected = np.zeros_like(found)
    run(product(100, 64, 64, 32), [x, w, expected])
    np.testing.assert_array_equal(found, expected)
    assert prepared.function.attrs["transposed"] == ("x",)


@dure.kernel
def _softly(x: dl.Tensor, y: dl.Tensor, bm: dl.const, n: dl.const):
    i = dl.program_id(0)
    tile = dl.load(x, (i, 0), (bm, n))
    dl.store(y, (i, 0), dl.where(tile > 0.0, tile * tile, dl.exp(tile)))


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.bfloat16])
def test_arithmetic_in_a_type_that_the_engines_lack(name: str, dtype: DType) -> None:
    """It is computed in float32 and rounded once, as the language says."""
    target = chip(name)
    kind = TensorType(shape_of(20, 30), dtype)
    function = _softly.specialize([kind, kind], {"bm": 8, "n": 32})
    x = np.random.default_rng(0).standard_normal((20, 30)).astype(dtype.numpy)
    expected, found = np.zeros_like(x), np.zeros_like(x)
    run(function, [x, expected])
    compiled = compile_for(function, target)
    assert sanitize(compiled.function, target).ok
    passed = to_chip(compiled.function, [x, found])
    run_values(compiled.function, target, passed)
    from_chip(compiled.function, passed, [x, found])
    wide, right = found.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_allclose(wide, right, rtol=8e-3, atol=1e-3)


def test_what_is_known_narrows_what_is_not() -> None:
    """Trips on cores whose runs of keys lie beyond the last one are none."""
    last, core = symbol("last", "loop", 0, 7), symbol("core", "grid", 0, 15)
    trips = minimum(last + 1, core + 1) - core
    assert [number(trips, {"core": c}, least=0) for c in range(16)] == [1] * 8 + [0] * 8
