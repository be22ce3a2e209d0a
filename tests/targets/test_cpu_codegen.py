"""The CPU target against the reference interpreter, construct by construct."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from cpu_kernels import POOL, check, run_cpu, symbolic

import dure
import dure.lang as dl
from dure.errors import KernelError
from dure.ir.dtypes import DTYPES
from dure.ir.expr import const, evaluate
from dure.ir.interpret import bind_sizes
from dure.ir.types import TensorType
from dure.runtime.pool import Pool
from dure.targets.cpu.launch import compile_kernel

RNG = np.random.default_rng(7)


def randoms(*shape: int, dtype: str = "float32") -> np.ndarray:
    kind = DTYPES[dtype]
    if kind.is_integer:
        low, high = (-100, 100) if kind.kind == "int" else (0, 200)
        return RNG.integers(low, high, shape).astype(kind.numpy)
    if kind.kind == "bool":
        return RNG.integers(0, 2, shape).astype(np.bool_)
    return (RNG.standard_normal(shape) * 3).astype(kind.numpy)


@dure.kernel
def unary(x: dl.Tensor, y: dl.Tensor, function: dl.const, bm: dl.const, bn: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i, j), function(dl.load(x, (i, j), (bm, bn))).to(y.dtype))


@dure.kernel
def binary(
    x: dl.Tensor, z: dl.Tensor, y: dl.Tensor, function: dl.const, bm: dl.const, bn: dl.const
):
    i, j = dl.program_id(0), dl.program_id(1)
    a, b = dl.load(x, (i, j), (bm, bn)), dl.load(z, (i, j), (bm, bn))
    dl.store(y, (i, j), function(a, b).to(y.dtype))


SHAPES = [(1, 1), (5, 7), (3, 16), (9, 100), (64, 33), (0, 4)]
EXACT_UNARY = ["abs", "floor", "ceil", "round", "sqrt"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT_UNARY)
def test_exact_functions(name: str, shape: tuple[int, int]) -> None:
    x = np.abs(randoms(*shape)) if name == "sqrt" else randoms(*shape)
    check(unary, [x, np.zeros_like(x)], {"function": getattr(dl, name), "bm": 4, "bn": 16})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["exp", "exp2", "tanh", "sigmoid", "erf", "sin", "cos", "log", "log2", "rsqrt"]
)
def test_transcendental_functions(name: str, dtype: str) -> None:
    x = randoms(7, 50, dtype=dtype)
    x = np.abs(x) if name in ("log", "log2", "rsqrt") else x
    tolerance = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    consts = {"function": getattr(dl, name), "bm": 2, "bn": 32}
    check(unary, [x, np.zeros_like(x)], consts, tolerance=tolerance)


def test_elementary_functions_at_the_edges() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([[0.0, -0.0, inf, -inf, nan, 1e-40, -1e-40, 88.9, -104.5, 3e38]], np.float32)
    for name in ("exp", "exp2", "tanh", "sigmoid", "erf", "log", "log2", "abs", "floor", "round"):
        found = check(
            unary,
            [x, np.zeros_like(x)],
            {"function": getattr(dl, name), "bm": 1, "bn": 16},
            tolerance=3e-6,
        )[1]
        assert np.isnan(found[0, 4]), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "int8", "uint8"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "minimum", "maximum"])
def test_arithmetic(name: str, dtype: str) -> None:
    chosen = {"add": add, "sub": sub, "mul": mul}.get(name) or getattr(dl, name)
    x, z = randoms(6, 40, dtype=dtype), randoms(6, 40, dtype=dtype)
    check(binary, [x, z, np.zeros_like(x)], {"function": chosen, "bm": 4, "bn": 32})


@pytest.mark.parametrize("dtype", ["int4", "uint4", "uint2", "float4_e2m1fn"])
def test_elements_that_share_a_byte_are_refused(dtype: str) -> None:
    """They would be read, and stored, as if each had a byte of its own."""
    kind = TensorType((const(8), const(64)), DTYPES[dtype])
    function = unary.specialize([kind, kind], {"function": lambda x: x, "bm": 4, "bn": 32})
    with pytest.raises(KernelError, match=f"a plain tensor of {dtype}") as caught:
        compile_kernel(function)
    assert "dl.load(x" in caught.value.where and caught.value.rule and caught.value.fix


def add(a, b):
    return a + b


def sub(a, b):
    return a - b


def mul(a, b):
    return a * b


def floordiv(a, b):
    return a // b


def mod(a, b):
    return a % b


def bits(a, b):
    return ((a & b) | (a ^ b)) + (a << (b & 7)) + (a >> (b & 3))


def divide(a, b):
    return a / b


def power(a, b):
    return a**b


def compared(a, b):
    return dl.where((a < b) | (a == b), a, b * 2)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
@pytest.mark.parametrize("function", [floordiv, mod, bits, compared])
def test_integer_arithmetic(function, dtype: str) -> None:
    x, z = randoms(5, 33, dtype=dtype), randoms(5, 33, dtype=dtype)
    z[0, :4] = 0
    check(binary, [x, z, np.zeros_like(x)], {"function": function, "bm": 2, "bn": 16})


@pytest.mark.parametrize("function", [divide, compared])
def test_float_arithmetic(function) -> None:
    x, z = randoms(5, 33), randoms(5, 33)
    check(binary, [x, z, np.zeros_like(x)], {"function": function, "bm": 2, "bn": 16})


def test_power() -> None:
    x, z = np.abs(randoms(5, 33)), randoms(5, 33)
    consts = {"function": power, "bm": 2, "bn": 16}
    check(binary, [x, z, np.zeros_like(x)], consts, tolerance=2e-6)


CASTS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int32", "int8", "uint8"]


@pytest.mark.parametrize("target", CASTS)
@pytest.mark.parametrize("source", CASTS)
def test_casts(source: str, target: str) -> None:
    x = randoms(4, 40, dtype=source)
    if DTYPES[source].is_float:
        x[0, :6] = np.array([0, -0.0, 1e-3, 240, 300, -1e-6], np.float32).astype(x.dtype)
    y = np.zeros(x.shape, DTYPES[target].numpy)

    check(unary, [x, y], {"function": same, "bm": 4, "bn": 16})


def test_every_kind_of_number_is_rounded_to_bfloat16() -> None:
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 1 << 32, (64, 80), np.uint32)
    # Subnormal numbers in some vectors, and among them those that lie between two neighbours.
    bits[:20] &= 0x807FFFFF
    bits[20:40, 3] = rng.integers(0, 1 << 8, 20, np.uint32) << 15
    x = bits.view(np.float32)
    y = np.zeros(x.shape, DTYPES["bfloat16"].numpy)
    numbers = np.where(np.isnan(x), np.inf, x)
    check(unary, [numbers, y], {"function": same, "bm": 4, "bn": 16})
    check(unary, [numbers, y], {"function": same, "bm": 4, "bn": 64})
    found = [x, np.zeros_like(y)]
    run_cpu(
        unary.specialize(list(map(symbolic, found, "xy")), {"function": same, "bm": 4, "bn": 64}),
        found,
    )
    np.testing.assert_array_equal(np.isnan(found[1]), np.isnan(x))


def same(x):
    return x


@dure.kernel
def rows(x: dl.Tensor, y: dl.Tensor, function: dl.const, bm: dl.const, bn: dl.const):
    i = dl.program_id(0)
    tile = dl.load(x, (i, 0), (bm, bn))
    dl.store(y, (i, 0), function(tile, 1, keepdims=True).to(y.dtype))


@dure.kernel
def columns(x: dl.Tensor, y: dl.Tensor, function: dl.const, bm: dl.const, bn: dl.const):
    i = dl.program_id(0)
    tile = dl.load(x, (0, i), (bm, bn))
    dl.store(y, (0, i), function(tile, 0, keepdims=True).to(y.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("name", ["sum", "max", "min", "argmax", "argmin"])
@pytest.mark.parametrize("width", [1, 8, 32, 64, 24])
def test_reductions(name: str, dtype: str, width: int) -> None:
    x = randoms(6, width, dtype=dtype)
    result = np.int32 if name.startswith("arg") else x.dtype
    exact = name != "sum" or dtype == "int32"
    tolerance = 0.0 if exact else {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    function = getattr(dl, name)
    consts = {"function": function, "bm": 4, "bn": width}
    check(rows, [x, np.zeros((6, 1), result)], consts, tolerance=tolerance)
    consts = {"function": function, "bm": width, "bn": 4}
    check(columns, [x.T.copy(), np.zeros((1, 6), result)], consts, tolerance=tolerance)


def test_argmax_takes_the_lowest_index_and_the_first_nan() -> None:
    x = np.zeros((3, 64), np.float32)
    x[1, 40:] = 5
    x[2, 20] = np.nan
    consts = {"function": dl.argmax, "bm": 1, "bn": 64}
    found = check(rows, [x, np.zeros((3, 1), np.int32)], consts)[1]
    np.testing.assert_array_equal(found[:, 0], [0, 40, 20])


@dure.kernel
def softmax(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    i = dl.program_id(0)
    tile = dl.load(x, (i, 0), (bm, bn), fill=-1e30)
    e = dl.exp(tile - dl.max(tile, 1, keepdims=True))
    dl.store(y, (i, 0), e / dl.sum(e, 1, keepdims=True))


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (8, 64), (70, 200)])
def test_softmax(shape: tuple[int, int]) -> None:
    x = randoms(*shape)
    y = check(softmax, [x, np.zeros_like(x)], {"bm": 8, "bn": 256}, tolerance=1e-5)[1]
    np.testing.assert_allclose(y.sum(1), 1, rtol=1e-5)


@dure.kernel
def scan(x: dl.Tensor, y: dl.Tensor, axis: dl.const, bm: dl.const, bn: dl.const):
    dl.store(y, (0, 0), dl.cumsum(dl.load(x, (0, 0), (bm, bn)), axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_cumsum(axis: int) -> None:
    x = randoms(8, 32, dtype="int32")
    check(scan, [x, np.zeros_like(x)], {"axis": axis, "bm": 8, "bn": 32})
    x = randoms(8, 32)
    check(scan, [x, np.zeros_like(x)], {"axis": axis, "bm": 8, "bn": 32}, tolerance=1e-5)


@dure.kernel
def moved(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    tile = dl.load(x, (j, i), (bn, bm)).T
    dl.store(y, (i, j), tile + dl.arange(bm)[:, None].to(dl.float32))


def test_transpose_and_iota() -> None:
    x = randoms(40, 21)
    check(moved, [x, np.zeros((21, 40), np.float32)], {"bm": 8, "bn": 16})


@dure.kernel
def folded(x: dl.Tensor, y: dl.Tensor):
    tile = dl.load(x, (0, 0), (8, 32))
    dl.store(y, (0, 0, 0), (tile * 2.0).reshape((8, 4, 8)) + 1.0)


def test_reshape() -> None:
    check(folded, [randoms(8, 32), np.zeros((8, 4, 8), np.float32)], {})


@dure.kernel
def cut_anew(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor):
    total = dl.zeros((4, 512), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], 16)):
        total = dl.dot(dl.load(x, (0, k), (4, 16)), dl.load(w, (k, 0), (16, 512)), total)
    dl.store(y, (0, 0, 0), total.reshape((8, 4, 64)) + 1.0)


def test_rows_that_lie_apart_are_cut_anew() -> None:
    x, w = np.rint(4 * randoms(4, 40)), np.rint(4 * randoms(40, 512))
    y = np.zeros((8, 4, 64), np.float32)
    found = check(cut_anew, [x, w, y], {})[2]
    np.testing.assert_array_equal(found, (x @ w).reshape(8, 4, 64) + 1)


@dure.kernel
def carried_on(x: dl.Tensor, w: dl.Tensor, y: dl.Tensor, z: dl.Tensor):
    zeros = dl.zeros((8, 32), dl.float32)
    first = dl.dot(dl.load(x, (0, 0), (8, 16)), dl.load(w, (0, 0), (16, 32)), zeros)
    total = first
    for _ in dl.range(3):
        before = total
        for k in dl.range(dl.cdiv(x.shape[1], 16)):
            total = dl.dot(dl.load(x, (0, k), (8, 16)) * 0.5, dl.load(w, (k, 0), (16, 32)), total)
        total = total + before
    dl.store(y, (0, 0), total)
    dl.store(z, (0, 0), first)


def test_a_loop_keeps_what_is_read_after_it() -> None:
    x, w = np.rint(4 * randoms(8, 40)), np.rint(4 * randoms(40, 32))
    y, z = np.zeros((8, 32), np.float32), np.zeros((8, 32), np.float32)
    check(carried_on, [x, w, y, z], {})


@dure.kernel
def running(x: dl.Tensor, y: dl.Tensor, z: dl.Tensor, bn: dl.const):
    i = dl.program_id(0)
    top = dl.full((1, bn), -1e30, dl.float32)
    total = dl.zeros((1, bn), dl.float32)
    for r in dl.range(x.shape[0]):
        row = dl.load(x, (r, i), (1, bn))
        higher = dl.maximum(top, row)
        total = total * dl.exp(top - higher) + dl.exp(row - higher)
        top = higher
    dl.store(y, (0, i), top)
    dl.store(z, (0, i), total)


@pytest.mark.parametrize("length", [0, 1, 9])
def test_loop_with_two_carried_values(length: int) -> None:
    x = randoms(length, 50)
    arrays = [x, np.zeros((1, 50), np.float32), np.zeros((1, 50), np.float32)]
    check(running, arrays, {"bn": 32}, tolerance=1e-5)


@dure.kernel
def swapped(x: dl.Tensor, y: dl.Tensor):
    a = dl.load(x, (0, 0), (1, 16))
    b = dl.load(x, (1, 0), (1, 16))
    for _ in dl.range(x.shape[0]):
        a, b = b, a + b
    dl.store(y, (0, 0), a)
    dl.store(y, (1, 0), b)


def test_loop_that_exchanges_what_it_carries() -> None:
    check(swapped, [randoms(5, 16, dtype="int32"), np.zeros((2, 16), np.int32)], {})


@dure.kernel
def chosen(x: dl.Tensor, pick: dl.Index(0, 3), y: dl.Tensor):
    i = dl.program_id(0)
    which = pick[i]
    tile = dl.load(x, (i, 0), (1, 32))
    if which == 0:
        result = tile * 2.0
    else:
        result = tile + dl.load(x, (which, 0), (1, 32))
    dl.store(y, (i, 0), result)


def test_condition_on_an_index() -> None:
    pick = np.array([0, 3, 1, 0, 2], np.int32)
    x = randoms(5, 20)
    y = np.zeros_like(x)
    types = [symbolic(x, "x"), symbolic(pick, "p"), symbolic(y, "y")]
    check(chosen, [x, pick, y], {}, types=types)


@dure.kernel
def gathered(table: dl.Tensor, rows: dl.Index(-1, 7), y: dl.Tensor, bn: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    which = dl.load(rows, (i,), (4,), fill=-1)
    dl.store(y, (i, j), dl.load(table, (which, j), (4, bn), fill=9.0))


def test_gather_of_rows_by_a_list() -> None:
    rows_ = np.array([3, -1, 0, 7, 7, 2], np.int32)
    check(gathered, [randoms(8, 40), rows_, np.zeros((6, 40), np.float32)], {"bn": 32})


@dure.kernel
def scattered(x: dl.Tensor, rows: dl.Index(-1, 7, unique=True), y: dl.Tensor, bn: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    which = dl.load(rows, (i,), (4,), fill=-1)
    dl.store(y, (which, j), dl.load(x, (i, j), (4, bn)))


def test_scatter_of_rows_by_a_list() -> None:
    rows_ = np.array([3, -1, 0, 7, 6, 2], np.int32)
    check(scattered, [randoms(6, 40), rows_, np.zeros((8, 40), np.float32)], {"bn": 32})


@dure.kernel
def multiplied(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.int32 if a.dtype == dl.int8 else dl.float32)
    for k in dl.range(dl.cdiv(a.shape[1], bk)):
        acc += dl.load(a, (i, k), (bm, bk)) @ dl.load(b, (k, j), (bk, bn))
    dl.store(c, (i, j), acc.to(c.dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 9), (33, 65, 40), (17, 100, 0)])
def test_matmul(dtype: str, size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = randoms(m, k, dtype=dtype), randoms(k, n, dtype=dtype)
    c = np.zeros((m, n), np.int32 if dtype == "int8" else np.float32)
    consts = {"bm": 16, "bn": 32, "bk": 16}
    check(multiplied, [a, b, c], consts, tolerance=0 if dtype == "int8" else 2e-4)


@dure.kernel
def combined(x: dl.Tensor, y: dl.Tensor, bn: dl.const):
    i = dl.program_id(0)
    dl.store(y, (0, 0), dl.load(x, (i, 0), (1, bn)), combine="add")


def test_combine_has_a_fixed_order() -> None:
    x, y = randoms(9, 32), np.ones((1, 32), np.float32)
    function = combined.specialize([symbolic(x, "x"), symbolic(y, "y")], {"bn": 32})
    # No store says how many instances there are: the grid is a size of its own.
    bound = bind_sizes(function, [x, y], {"grid.0": 9})
    sizes = [evaluate(s, bound) for s in function.symbols]
    compile_kernel(function, None, POOL).run([x.ctypes.data, y.ctypes.data], sizes)
    expected = np.ones(32, np.float32)
    for row in x:
        expected = expected + row
    np.testing.assert_array_equal(y[0], expected)


@dure.kernel
def with_a_dead_sum(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    tile = dl.load(x, (i, j), (bm, bn))
    dead = dl.reduce(tile.to(dl.int32), 0, lambda a, b: a + b, 0, keepdims=True)
    dead = dl.broadcast_to(dead, (bm, bn))
    dl.store(y, (i, j), tile)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_nothing_stored_needs_reads_nothing(shape: tuple[int, int]) -> None:
    """Its operands are computed only as far as others need them, and the next page isn't ours."""
    x = randoms(*shape)
    same = symbolic(x, "x")
    consts = {"bm": 8, "bn": 2}
    check(with_a_dead_sum, [x, np.zeros_like(x)], consts, types=[same, same])


@dure.kernel
def triangle(x: dl.Tensor, y: dl.Tensor):
    """Row i is the sum of as many of x as its number."""
    i = dl.program_id(0)
    total = dl.zeros((1,), dl.float32)
    for k in dl.range(i + 1):
        total = total + dl.load(x, (k,), (1,))
    dl.store(y, (i,), total)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 11, 64])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_instances_of_different_lengths_are_all_run(count: int, workers: int) -> None:
    """Workers take them from both ends."""
    x, y = np.arange(count, dtype=np.float32), np.full(count, np.nan, np.float32)
    kinds = [symbolic(x, "x"), symbolic(y, "y")]
    function = triangle.specialize(kinds, {})
    with closing(Pool(workers)) as pool:
        kernel = compile_kernel(function, None, pool)
        kernel.run([x.ctypes.data, y.ctypes.data], [count] * len(function.symbols), workers)
    np.testing.assert_array_equal(y, np.cumsum(x))


@dure.kernel
def doubled(x: dl.Tensor, y: dl.Tensor, block: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i,), dl.load(x, (i,), (block,)) * 2)


def test_a_kernel_that_was_compiled_is_written_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path))
    x, y = np.arange(37, dtype=np.float32), np.zeros(37, np.float32)
    kinds = [symbolic(x, "x")] * 2
    kernel = doubled.specialize(kinds, {"block": 16})
    first = compile_kernel(kernel, pool=POOL)
    # Another one of the same name isn't taken for it.
    other = doubled.specialize(kinds, {"block": 32})
    assert compile_kernel(other, pool=POOL).symbol != first.symbol
    monkeypatch.setattr("dure.targets.cpu.launch.emit_kernel", None)
    again = compile_kernel(kernel, pool=POOL)
    again.run([x.ctypes.data, y.ctypes.data], [37])
    np.testing.assert_array_equal(y, 2 * x)
    assert again.symbol == first.symbol
    with pytest.raises(TypeError):
        compile_kernel(kernel, pool=POOL, recorded=True)
