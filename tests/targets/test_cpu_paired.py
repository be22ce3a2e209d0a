"""KV pools of which two neighbouring numbers lie in a word, as tile registers take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from guarded import guarded_bytes

import dure.library as library
from dure.ir.core import Function
from dure.ir.dtypes import DTYPES, bfloat16
from dure.ir.expr import const
from dure.ir.layout import Layout
from dure.ir.lowering import Use
from dure.ir.pack import pack, unpack
from dure.ir.types import TensorType, shape_of
from dure.runtime.host import features_of, host_features, host_levels
from dure.runtime.llvm import assembly
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.launch import compile_kernel
from dure.targets.cpu.target import CpuTarget

PAGE, PAGES, HEADS, SIZE, GROUP = 32, 6, 2, 64, 3
SLOTS = PAGE * PAGES
RNG = np.random.default_rng(3)
Array = np.ndarray[Any, Any]


@pytest.fixture(params=host_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DURE_CPU_LEVEL", request.param)
    return request.param


def pool_type(is_key: bool) -> TensorType:
    """A pool as a host with tile registers has it."""
    kind = TensorType(shape_of(SLOTS, HEADS, SIZE), bfloat16)
    op: Any = SimpleNamespace(name="attention", attr=lambda _: PAGE)
    layout = CpuTarget(features_of("amx")).state_layout(kind, [Use(op, 1 if is_key else 2)])
    assert isinstance(layout, Layout) and any(d.extent == 2 for axis in layout.axes for d in axis)
    return kind.with_layout(layout)


def packed(values: Array, kind: TensorType) -> Array:
    layout = kind.layout
    assert isinstance(layout, Layout)
    return pack(values, layout, bfloat16, guarded_bytes(values.nbytes))


def type_of(array: Array, most: int = 0) -> TensorType:
    kind = TensorType(
        shape_of(*array.shape), next(d for d in DTYPES.values() if d.numpy == array.dtype)
    )
    return replace(kind, index=(const(0), const(most))) if array.dtype == np.int32 else kind


def run(function: Function, arrays: Sequence[Array]) -> None:
    compile_kernel(function, host_features()).run([a.ctypes.data for a in arrays], [])


def cache(length: int) -> tuple[list[Array], Array]:
    """Pools with a sequence of so many tokens, NaN elsewhere, and its pages."""
    order = RNG.permutation(PAGES).astype(np.int32)
    slots = (order[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:length]
    pools: list[Array] = []
    for _ in range(2):
        pool = np.full((SLOTS, HEADS, SIZE), np.nan, ml_dtypes.bfloat16)
        pool[slots] = RNG.standard_normal((length, HEADS, SIZE)).astype(ml_dtypes.bfloat16)
        pools.append(pool)
    return pools, order[None, :]


@pytest.mark.parametrize(("length", "rows"), [(1, 1), (150, 1), (192, 1), (150, 19), (192, 64)])
@pytest.mark.parametrize("window", [0, 70])
def test_attention_has_the_same_bits_in_either_layout(
    length: int, rows: int, window: int, level: str
) -> None:
    pools, table = cache(length)
    q = RNG.standard_normal((rows, HEADS * GROUP, SIZE)).astype(np.float32)
    positions = np.arange(length - rows, length, dtype=np.int32)
    work = [np.array([0], np.int32), np.array([0], np.int32), np.array([rows], np.int32)]
    lists = [positions, table, np.array([length], np.int32), *work]
    limits = [SLOTS, PAGES - 1, SLOTS, 0, 0, rows]
    consts = {"bq": 64, "group": GROUP, "bg": 4, "bd": SIZE, "page": PAGE, "piece": 64}
    numbers = {"scale": 0.125, "window": window, "apart": True, "runs": 2}
    found: list[Array] = []
    for paired in (False, True):
        kinds = [pool_type(True), pool_type(False)] if paired else [type_of(p) for p in pools]
        stored = [packed(p, k) for p, k in zip(pools, kinds, strict=True)] if paired else pools
        y = np.full((rows, HEADS * GROUP * SIZE), np.nan, np.float32)
        types = [type_of(q), *kinds]
        types += [type_of(a, most) for a, most in zip(lists, limits, strict=True)]
        types += [None, type_of(y)]
        function = library.paged_attention.specialize(types, {**consts, **numbers})
        run(function, [q, *stored, *lists, y])
        found.append(y)
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[0], found[1])
    if rows == 64:
        # Alone, the last token has the bits that it has among others.
        last = alone(pools, q, lists, limits, {**consts, **numbers})
        np.testing.assert_array_equal(found[0][-1:], last)


def alone(
    pools: list[Array],
    q: Array,
    lists: list[Array],
    limits: list[int],
    consts: dict[str, Any],
) -> Array:
    """The result of the last token as a step of its own."""
    own = [lists[0][-1:].copy(), *lists[1:5], np.array([1], np.int32)]
    one, y = q[-1:].copy(), np.zeros((1, q[0].size), np.float32)
    types = [type_of(one), *(type_of(p) for p in pools)]
    types += [type_of(a, most) for a, most in zip(own, limits, strict=True)]
    function = library.paged_attention.specialize([*types, None, type_of(y)], consts)
    run(function, [one, *pools, *own, y])
    return y


@pytest.mark.parametrize("is_key", [True, False])
def test_a_write_leaves_what_lies_beside_it(is_key: bool, level: str) -> None:
    kind = pool_type(is_key)
    pool = RNG.standard_normal((SLOTS, HEADS, SIZE)).astype(ml_dtypes.bfloat16)
    buffer = packed(pool, kind)
    x = RNG.standard_normal((9, HEADS, SIZE)).astype(np.float32)
    slots = RNG.permutation(SLOTS)[:9].astype(np.int32)
    slots[::4] = -1
    places = replace(type_of(slots), index=(const(-1), const(SLOTS - 1)), unique=True)
    consts = {"bt": 1, "bh": 1, "bd": SIZE}
    function = library.kv_write.specialize([kind, type_of(x), places], consts)
    first = replace(function.params[0], access="inout")
    run(replace(function, params=(first, *function.params[1:])), [buffer, x, slots])
    pool[slots[slots >= 0]] = x[slots >= 0].astype(ml_dtypes.bfloat16)
    assert isinstance(kind.layout, Layout)
    found = unpack(buffer, kind.layout, bfloat16, pool.shape, -1)
    np.testing.assert_array_equal(found.view(np.uint16), pool.view(np.uint16))


def test_tiles_are_loaded_where_they_lie() -> None:
    """Of many queries no keys and values are copied but those of the last piece."""
    host = features_of("amx")
    ints = [np.zeros(n, np.int32) for n in ((64,), (1, PAGES), (1,), (1,), (1,), (1,))]
    limits = [SLOTS, PAGES - 1, SLOTS, 0, 0, 64]
    q, y = np.zeros((64, 6, SIZE), np.float32), np.zeros((64, 6 * SIZE), np.float32)
    types = [type_of(q), pool_type(True), pool_type(False)]
    types += [type_of(a, most) for a, most in zip(ints, limits, strict=True)]
    consts = {"bq": 64, "group": GROUP, "bg": 4, "bd": SIZE, "page": PAGE, "piece": 64}
    function = library.paged_attention.specialize(
        [*types, None, type_of(y)], {**consts, "scale": 0.125, "apart": True, "runs": 2}
    )
    text = assembly(emit_kernel(function, host).llvm_ir, host)
    assert text.count("tdpbf16ps") > 0
    assert text.count("vpermt2w") <= 4
