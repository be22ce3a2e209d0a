"""The portability checks: rules named at the line, live bytes, values cut in partitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_builder import Body, Kernel

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.blocks import Blocks, quantize
from dure.ir.core import Function, Op, Value, infer
from dure.ir.dtypes import Array
from dure.ir.expr import Symbol, cdiv, symbol
from dure.ir.portable import check_portable, live_tile_bytes
from dure.ir.portable_split import split_evaluator
from dure.ir.samples import random_array, random_blocks
from dure.ir.types import TileType


def kernel(
    body: Callable[[Kernel, Value, Symbol], Value], dtype: dtypes.DType = dtypes.float32
) -> Function:
    """y (n, 8) = body(x (n, 8)), a tile of (4, 8) at a time."""
    k = Kernel()
    n = k.size("n")
    x, y = k.tensor("x", (n, 8), dtype), k.tensor("y", (n, 8), access="out")
    i = k.program_id(cdiv(n, 4))
    result = body(k, k.load(x, (i, 0), (4, 8)), i)
    if result.tile.dtype is not dtypes.float32:
        result = k.emit("cast", result, dtype=dtypes.float32)
    k.store(y, (i, 0), result)
    return k.function()


def matmul(bm: int, bk: int, weights: dtypes.BlockFormat | dtypes.DType) -> Function:
    """y (m, n) = x (m, 512) @ w (n, 512).T; activations in int8 blocks for quantized weights."""
    k = Kernel("matmul")
    m, n = k.size("m"), k.size("n")
    quantized = isinstance(weights, dtypes.BlockFormat)
    x = k.tensor("x", (m, 512))
    w = k.tensor("w", (n, 512), weights, quantized_axis=1 if quantized else -1)
    y = k.tensor("y", (m, n), access="out")
    i, j = k.program_id(cdiv(m, bm)), k.program_id(cdiv(n, 16))

    def body(inner: Body, step: Symbol, carried: Sequence[Value]) -> Sequence[Value]:
        left = inner.load(x, (i, step), (bm, bk))
        if quantized:
            left = inner.emit("quantize", left, format="int8_block32")
        right = inner.emit("transpose", inner.load(w, (j, step), (16, bk)), order=(1, 0))
        return [inner.emit("dot", left, right, carried[0])]

    zero = k.full((bm, 16), 0.0, dtypes.float32)
    k.store(y, (i, j), k.loop(512 // bk, [zero], body)[0])
    return k.function()


@pytest.mark.parametrize("weights", [dtypes.float32, dtypes.q8_0, dtypes.q4_k])
def test_matmul_is_portable(weights: dtypes.BlockFormat | dtypes.DType) -> None:
    report = check_portable(matmul(128, 256, weights))
    assert report.partitions == (64, 128)
    assert (report.descriptors, report.lists) == (3, 0)
    assert report.notes == ()
    assert report.obligations == ()
    # The accumulator twice (carried and its next value), both operands, and the transposed weight.
    tile = 128 * 16 * 4
    assert report.live_tile_bytes >= 2 * tile + 128 * 256
    assert report.live_tile_bytes < 8 * tile + 128 * 256 * 8


def refused(function: Function, match: str) -> None:
    with pytest.raises(IRError, match=match):
        check_portable(function)


def test_rules_are_named() -> None:
    def emits(name: str, **attrs: object) -> Callable[[Kernel, Value, Symbol], Value]:
        return lambda k, x, i: k.emit(name, x, **attrs)

    check_portable(kernel(emits("neg")))
    check_portable(kernel(emits("cast", dtype=dtypes.float32), dtypes.float16))
    refused(kernel(emits("neg"), dtypes.float16), r"neg of float16(.|\n)*rule 10")
    refused(kernel(emits("neg"), dtypes.int8), r"neg of int8(.|\n)*rule 10")
    refused(kernel(emits("reduce", axis=0, combiner="sum"), dtypes.int64), "rule 10")

    def thirds(k: Kernel, x: Value, i: Symbol) -> Value:
        k.full((3, 8), 0.0, dtypes.float32)
        return x

    refused(kernel(thirds), r"tile of shape \(3, 8\)(.|\n)*rule 1")

    def endless(k: Kernel, x: Value, i: Symbol) -> Value:
        free = symbol("free", "size", 0, None)
        k.symbols.append(free)
        return k.loop(free, [x], lambda inner, step, carried: carried)[0]

    refused(kernel(endless), r"a loop of up to(.|\n)*rule 7(.|\n)*upper bound for free")

    def reshaped(k: Kernel, x: Value, i: Symbol) -> Value:
        flat = k.emit("reshape", x, shape=(2, 16))
        return k.emit("reshape", flat, shape=(4, 8))

    notes = check_portable(kernel(reshaped)).notes
    assert [n.rule for n in notes] == [14, 14]


def gather(axis: int, rank: int) -> Function:
    """Rows chosen by a list along one axis."""
    k = Kernel("gather")
    n = k.size("n")
    ids = k.index("ids", (n,), -1, 7)
    extents, tile = [8] * rank, [8] * rank
    tile[axis] = 4
    x = k.tensor("x", extents)
    y = k.tensor("y", [n if a == axis else 8 for a in range(rank)], access="out")
    i = k.program_id(cdiv(n, 4))
    listed = k.load(ids, (i,), (4,), fill=-1)
    at: list[Value | int] = [0] * rank
    at[axis] = listed
    found = k.load(x, at, tile)
    k.store(y, [i if a == axis else 0 for a in range(rank)], found)
    return k.function()


def test_run_time_indices() -> None:
    report = check_portable(gather(0, 3))
    assert report.lists == 1
    assert report.notes == ()
    assert [n.rule for n in check_portable(gather(0, 2)).notes] == [3]
    refused(gather(1, 2), "along its last axis")


def test_arguments_that_do_not_fit_together_are_asked_for() -> None:
    k = Kernel("ragged")
    n = k.size("n", 8)
    ends = k.index("ends", (2,), 0, n + 1000)
    y = k.tensor("y", (n + 1000,), access="out")
    one, other = k.index_load(ends, (0,), "one"), k.index_load(ends, (1,), "other")
    view = k.emit("view", y, axis=0, start=one + 999, stop=other)
    k.store(view, (0,), k.full((1,), 1.0, dtypes.float32))
    with pytest.raises(IRError, match="pass sampler="):
        check_portable(k.function())


def test_a_kernel_that_depends_on_the_cut_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(partitions: int) -> Callable[..., Array]:
        return lambda op, attrs, operands: np.zeros_like(operands[0])

    monkeypatch.setattr("dure.ir.portable.split_evaluator", broken)
    function = kernel(lambda k, x, i: k.emit("neg", x))
    with pytest.raises(IRError, match="split over 64 partitions gives other values"):
        check_portable(function)


def evaluated(op: Op, operands: Sequence[Array | Blocks], partitions: int) -> Array | Blocks:
    attrs = {**op.definition.defaults, **op.attrs}
    found = split_evaluator(partitions)(op, attrs, list(operands))
    assert isinstance(found, np.ndarray | Blocks)
    return found


def whole(op: Op, operands: Sequence[Array | Blocks]) -> Array | Blocks:
    assert op.definition.semantics is not None
    return op.definition.semantics({**op.definition.defaults, **op.attrs}, *operands)


def one(name: str, shape: tuple[int, ...], dtype: dtypes.DType, **attrs: object) -> Op:
    return infer(name, [Value(TileType(shape, dtype))], attrs)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["sum", "max", "min", "argmax", "argmin", "cumsum", "transpose", "neg"]),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3, 4, 64]),
    st.integers(0, 99),
)
def test_ops_in_parts(name: str, extents: list[int], partitions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(extents)
    axis = int(rng.integers(len(shape)))
    x = random_array(dtypes.int32, shape, rng)
    if name == "transpose":
        order = tuple(int(a) for a in rng.permutation(len(shape)))
        op = one(name, shape, dtypes.int32, order=order)
    elif name in ("cumsum", "neg"):
        op = one(name, shape, dtypes.int32, **({"axis": axis} if name == "cumsum" else {}))
    else:
        op = one("reduce", shape, dtypes.int32, axis=axis, combiner=name)
    np.testing.assert_array_equal(evaluated(op, [x], partitions), whole(op, [x]))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([dtypes.q8_0, dtypes.q4_1, dtypes.q6_k, dtypes.q5_k]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 32, 64]),
    st.integers(0, 99),
)
def test_quantized_dots_in_parts_have_the_same_bits(
    format: dtypes.BlockFormat, rows: int, partitions: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    left = quantize(random_array(dtypes.float32, (rows, 512), rng), dtypes.int8_block32)
    right = random_blocks(format, (4, 512), 1, rng).transposed((1, 0))
    start = random_array(dtypes.float32, (rows, 4), rng)
    types = [
        TileType((rows, 512), dtypes.int8_block32, 1),
        TileType((512, 4), format, 0),
        TileType((rows, 4), dtypes.float32),
    ]
    op = infer("dot", [Value(t) for t in types])
    operands = [left, right, start]
    found, expected = evaluated(op, operands, partitions), whole(op, operands)
    assert isinstance(found, np.ndarray)
    assert isinstance(expected, np.ndarray)
    assert found.tobytes() == expected.tobytes()


def test_batched_dots_in_parts() -> None:
    rng = np.random.default_rng(0)
    a, b = (random_array(dtypes.float32, s, rng) for s in ((3, 4, 8), (3, 8, 2)))
    c = random_array(dtypes.float32, (3, 4, 2), rng)
    op = infer("dot", [Value(TileType(x.shape, dtypes.float32)) for x in (a, b, c)])
    found, expected = evaluated(op, [a, b, c], 2), whole(op, [a, b, c])
    assert isinstance(found, np.ndarray)
    assert isinstance(expected, np.ndarray)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_live_bytes_count_loops_and_branches() -> None:
    k = Kernel()
    x, y = k.tensor("x", (8,)), k.tensor("y", (8,), access="out")
    first = k.load(x, (0,), (8,))
    second = k.emit("neg", first)
    third = k.emit("neg", second)
    assert live_tile_bytes(replace(k.function())) == 64
    (result,) = k.loop(
        3, [third], lambda inner, step, carried: [inner.emit("add", carried[0], first)]
    )
    k.store(y, (0,), result)
    # Alive at once: first, the initial value, the carried value and its sum.
    assert live_tile_bytes(k.function()) == 4 * 32
