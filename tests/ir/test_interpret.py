"""The reference interpreter against NumPy, and the rules that it alone can judge."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tile_builder import Kernel

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.blocks import quantize
from dure.ir.core import Function, Region, Value, infer
from dure.ir.expr import cdiv
from dure.ir.interpret import run
from dure.ir.types import TileType


def matmul(bm: int, bn: int, bk: int) -> Function:
    k = Kernel("matmul")
    m, n, depth = k.size("m"), k.size("n"), k.size("depth")
    a, b = k.tensor("a", (m, depth)), k.tensor("b", (depth, n))
    c = k.tensor("c", (m, n), access="out")
    i, j = k.program_id(cdiv(m, bm)), k.program_id(cdiv(n, bn))
    zero = k.full((bm, bn), 0.0, dtypes.float32)

    def body(inner, step, carried):
        left = inner.load(a, (i, step), (bm, bk))
        right = inner.load(b, (step, j), (bk, bn))
        return [inner.emit("dot", left, right, carried[0])]

    (total,) = k.loop(cdiv(depth, bk), [zero], body)
    k.store(c, (i, j), total)
    return k.function()


@pytest.mark.parametrize("shape", [(5, 7, 9), (16, 8, 4), (1, 1, 1), (0, 3, 2), (3, 3, 0)])
def test_matmul_with_cut_edges(shape: tuple[int, int, int]) -> None:
    m, n, depth = shape
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, depth), np.float32)
    b = rng.standard_normal((depth, n), np.float32)
    c = np.full((m, n), np.nan, np.float32)
    run(matmul(4, 4, 4), [a, b, c], seed=3)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), atol=1e-5)


def gather_rows(access: str = "out", unique: bool = False) -> Function:
    k = Kernel("gather")
    rows, count, width = k.size("rows"), k.size("count"), k.size("width")
    table = k.tensor("table", (rows, width))
    ids = k.index("ids", (count,), -1, rows - 1)
    out = k.tensor("out", (count, width), access="out")
    i = k.program_id(cdiv(count, 4))
    entries = k.load(ids, (i,), (4,), fill=-1)
    k.store(out, (i, 0), k.load(table, (entries, 0), (4, 8), fill=-5.0))
    return k.function()


def test_index_lists_absent_entries_and_fill() -> None:
    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    ids = np.array([5, -1, 0, 2, 2, 1], np.int32)
    out = np.zeros((6, 4), np.float32)
    run(gather_rows(), [table, ids, out])
    expected = np.where(ids[:, None] < 0, -5.0, table[np.maximum(ids, 0)])
    np.testing.assert_array_equal(out, expected)


def test_index_out_of_its_declared_range() -> None:
    table, out = np.zeros((6, 4), np.float32), np.zeros((3, 4), np.float32)
    with pytest.raises(IRError, match="holds 6 at"):
        run(gather_rows(), [table, np.array([0, 6, 1], np.int32), out])


def scatter(unique: bool, combine: str = "") -> Function:
    k = Kernel("scatter")
    rows, count = k.size("rows"), k.size("count")
    source = k.tensor("source", (count, 2))
    slots = k.index("slots", (count,), -1, rows - 1, unique)
    out = k.tensor("out", (rows, 2), access="inout")
    i = k.program_id(count)
    entry = k.load(slots, (i,), (1,))
    k.store(out, (entry, 0), k.load(source, (i, 0), (1, 2)), combine)
    return k.function()


def test_scatter_unique_combine_and_collisions() -> None:
    source = np.arange(8, dtype=np.float32).reshape(4, 2)
    slots = np.array([3, -1, 0, 2], np.int32)
    out = np.full((5, 2), 9, np.float32)
    run(scatter(True), [source, slots, out], seed=1)
    np.testing.assert_array_equal(out[[3, 0, 2]], source[[0, 2, 3]])
    np.testing.assert_array_equal(out[[1, 4]], 9)

    twice = np.array([3, 3, 0, 2], np.int32)
    with pytest.raises(IRError, match="more than once"):
        run(scatter(True), [source, twice, out])
    with pytest.raises(IRError, match="stores where another"):
        run(scatter(False), [source, twice, out])

    total = np.zeros((5, 2), np.float32)
    run(scatter(False, "add"), [source, twice, total], seed=2)
    np.testing.assert_array_equal(total[3], source[0] + source[1])


def test_combine_does_not_depend_on_the_order_of_instances() -> None:
    rng = np.random.default_rng(1)
    source = rng.standard_normal((64, 2), np.float32)
    slots = rng.integers(0, 2, 64).astype(np.int32)
    results = []
    for seed in (None, 1, 2):
        out = np.zeros((3, 2), np.float32)
        run(scatter(False, "add"), [source, slots, out], seed=seed)
        results.append(out.tobytes())
    assert len(set(results)) == 1


def test_reading_an_output_before_it_is_written() -> None:
    k = Kernel()
    n = k.size("n")
    x = k.tensor("x", (n,), access="out")
    k.store(x, (0,), k.load(x, (0,), (4,)))
    with pytest.raises(IRError, match="'x' is read before it is written"):
        run(k.function(), [np.zeros(4, np.float32)])


def test_reading_what_another_instance_stores() -> None:
    k = Kernel()
    n = k.size("n")
    x = k.tensor("x", (n,), access="inout")
    i = k.program_id(n)
    k.store(x, (i,), k.load(x, (n - 1 - i,), (1,)))
    with pytest.raises(IRError, match="grid instance"):
        run(k.function(), [np.zeros(4, np.float32)])


def test_store_into_an_input() -> None:
    k = Kernel()
    x = k.tensor("x", (4,))
    k.store(x, (0,), k.full((4,), 1.0, dtypes.float32))
    with pytest.raises(IRError, match="only read"):
        run(k.function(), [np.zeros(4, np.float32)])


def ragged() -> Function:
    """Row sums of ragged sequences: a view for each sequence, a loop over its tiles."""
    k = Kernel("ragged")
    total, count = k.size("total"), k.size("count")
    x = k.tensor("x", (total,))
    starts = k.index("starts", (count + 1,), 0, total)
    out = k.tensor("out", (count,), access="out")
    i = k.program_id(count)
    start, stop = k.index_load(starts, (i,), "start"), k.index_load(starts, (i + 1,), "stop")
    mine = k.emit("view", x, axis=0, start=start, stop=stop)

    def body(inner, step, carried):
        part = inner.emit("reduce", inner.load(mine, (step,), (4,)), axis=0, combiner="sum")
        return [inner.emit("add", carried[0], part)]

    zero = k.full((1,), 0.0, dtypes.float32)
    (found,) = k.loop(cdiv(stop - start, 4), [zero], body)
    k.store(out, (i,), found)
    return k.function()


def test_views_with_run_time_bounds() -> None:
    x = np.arange(20, dtype=np.float32)
    starts = np.array([0, 3, 3, 14, 20], np.int32)
    out = np.zeros(4, np.float32)
    run(ragged(), [x, starts, out])
    np.testing.assert_array_equal(out, [x[a:b].sum() for a, b in pairwise(starts)])
    with pytest.raises(IRError, match="view 14:3"):
        run(ragged(), [x, np.array([0, 14, 3, 14, 20], np.int32), out])


def test_condition_and_combiner_region() -> None:
    k = Kernel()
    n = k.size("n")
    x, out = k.tensor("x", (n,)), k.tensor("out", (n,), access="out")
    i = k.program_id(cdiv(n, 4))
    tile = k.load(x, (i,), (4,), fill=1.0)
    one = TileType((1,), dtypes.float32)
    args = (Value(one), Value(one))
    product = infer("mul", args)
    region = Region(args, (product,), (product.result,))
    attrs = {"axis": 0, "identity": 1.0}
    whole = k.add("reduce_with", [tile], attrs, [region]).result
    spread = k.emit("broadcast", whole, shape=(4,))
    (chosen,) = k.choose(i < 1, lambda b: [tile], lambda b: [spread])
    k.store(out, (i,), chosen)
    x_values = np.arange(1, 8, dtype=np.float32)
    result = np.zeros(7, np.float32)
    run(k.function(), [x_values, result])
    np.testing.assert_array_equal(result, [1, 2, 3, 4, 210, 210, 210])


def test_strided_windows_and_offsets() -> None:
    k = Kernel()
    n = k.size("n")
    x, out = k.tensor("x", (n,)), k.tensor("out", (4,), access="out")
    k.store(out, (0,), k.load(x, (1,), (4,), fill=-1.0, step=(2,), offset=(-1,), stride=(3,)))
    result = np.zeros(4, np.float32)
    run(k.function(), [np.arange(9, dtype=np.float32), result])
    np.testing.assert_array_equal(result, [1, 4, 7, -1])


def test_block_quantized_dot_and_store() -> None:
    k = Kernel()
    m, n = k.size("m"), k.size("n")
    x, w = k.tensor("x", (m, 64)), k.tensor("w", (n, 64), dtypes.q8_0)
    out = k.tensor("out", (m, n), access="out")
    kept = k.tensor("kept", (m, 64), dtypes.int8_block32, access="out")
    i = k.program_id(cdiv(m, 4))
    quantized = k.emit("quantize", k.load(x, (i, 0), (4, 64)), format="int8_block32")
    weights = k.emit("transpose", k.load(w, (0, 0), (8, 64)), order=(1, 0))
    zero = k.full((4, 8), 0.0, dtypes.float32)
    k.store(out, (i, 0), k.emit("dot", quantized, weights, zero))
    k.store(kept, (i, 0), quantized)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 64), np.float32)
    w_blocks = quantize(rng.standard_normal((7, 64), np.float32), dtypes.q8_0)
    result = np.zeros((5, 7), np.float32)
    storage = quantize(np.zeros((5, 64), np.float32), dtypes.int8_block32)
    run(k.function(), [values, w_blocks, result, storage])
    reference = quantize(values, dtypes.int8_block32)
    np.testing.assert_array_equal(storage.decode(), reference.decode())
    expected = reference.decode().astype(np.float64) @ w_blocks.decode().T.astype(np.float64)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


def test_arguments_that_do_not_fit() -> None:
    function = matmul(4, 4, 4)
    a, b, c = np.zeros((3, 4)), np.zeros((5, 6), np.float32), np.zeros((3, 6), np.float32)
    with pytest.raises(IRError, match="has 5 elements along axis 0, not 4"):
        run(function, [a.astype(np.float32), b, c])
    with pytest.raises(IRError, match="dtype float64"):
        run(function, [a, np.zeros((4, 6), np.float32), c])
    with pytest.raises(IRError, match="takes 3 arguments"):
        run(function, [b, c])
    with pytest.raises(IRError, match="declared to be at most 4096"):
        tall = np.zeros((5000, 1), np.float32)
        run(function, [tall, np.zeros((1, 1), np.float32), tall])
