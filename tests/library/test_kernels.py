"""Every library kernel against NumPy in float64, over odd, tiny, large and empty shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from library_runner import EXECUTORS, Execute

import dure.library as library
from dure.ir.blocks import Blocks, quantize
from dure.ir.dtypes import FORMATS, int8_block32
from dure.ir.stored import STORED_FORMATS
from dure.library import elementwise, epilogue
from dure.library.activation import activation_function
from dure.library.norm import layer_norm_rows

settings.register_profile(
    "kernels",
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernels")

Floats = np.ndarray[Any, Any]
extent = st.sampled_from([1, 2, 3, 5, 8, 17, 33])
rows = st.sampled_from([0, 1, 2, 7, 9, 40])
seeds = st.integers(0, 1 << 16)


@pytest.fixture(params=EXECUTORS)
def execute(request: pytest.FixtureRequest) -> Execute:
    return request.param


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def near(found: Floats, expected: Floats, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def weight(name: str, n: int, k: int, seed: int) -> Blocks:
    """A random block-quantized weight (n, k)."""
    from dure.ir.pack import unpack
    from dure.ir.stored import stored_bytes, stored_layout

    format = FORMATS[name]
    rng = np.random.default_rng(seed)
    layout = stored_layout((n, k), format)
    raw = rng.integers(0, 256, stored_bytes((n, k), format), np.uint8)
    found = unpack(raw, layout, format, (n, k), 1)
    assert isinstance(found, Blocks)
    for plane in format.planes:
        if plane.dtype.is_float:
            values = rng.uniform(0.001, 0.02, found.planes[plane.name].shape)
            found.planes[plane.name][...] = values.astype(plane.dtype.numpy)
    return found


@given(m=rows, n=extent, k=extent, tile=st.sampled_from([1, 8, 32]), seed=seeds)
def test_matmul(execute: Execute, m: int, n: int, k: int, tile: int, seed: int) -> None:
    x, w, y = normal(seed, m, k), normal(seed + 1, n, k), normal(0, m, n)
    execute(library.matmul, [x, w, y], bm=tile, bn=16, bk=16)
    near(y, x.astype(np.float64) @ w.T)
    execute(library.matmul_kn, [x, np.ascontiguousarray(w.T), y], bm=tile, bn=16, bk=16)
    near(y, x.astype(np.float64) @ w.T)


@given(m=rows, n=extent, k=extent, seed=seeds)
def test_matmul_with_a_whole_epilogue(execute: Execute, m: int, n: int, k: int, seed: int) -> None:
    x, w, y = normal(seed, m, k), normal(seed + 1, n, k), normal(0, m, n)
    bias, residual = normal(seed + 2, n), normal(seed + 3, m, n)
    stages = [
        epilogue.scaled(0.5),
        epilogue.bias(0),
        epilogue.activated("silu"),
        epilogue.softcapped(3.0),
        epilogue.residual(1),
    ]
    chain = epilogue.compose(stages)
    execute(library.matmul, [x, w, y, bias, residual], bm=8, bn=16, bk=16, epilogue=chain)
    z = x.astype(np.float64) @ w.T * 0.5 + bias
    near(y, 3 * np.tanh(z / (1 + np.exp(-z)) / 3) + residual)


@pytest.mark.parametrize("name", [f.name for f in STORED_FORMATS])
@given(m=st.sampled_from([1, 3, 9]), n=st.sampled_from([5, 40]), quantized=st.booleans())
def test_quantized_matmul(execute: Execute, name: str, m: int, n: int, quantized: bool) -> None:
    block = FORMATS[name].block
    w = weight(name, n, 2 * block, n)
    x, y = normal(m, m, 2 * block), normal(0, m, n)
    left = quantize(x, int8_block32) if quantized else x
    execute(library.matmul, [left, w, y], bm=8, bn=32, bk=block)
    values = left.decode() if isinstance(left, Blocks) else left
    near(y, values.astype(np.float64) @ w.decode().astype(np.float64).T, 1e-3)


@given(b=st.integers(1, 3), m=rows, n=extent, k=extent, transposed=st.booleans())
def test_batched_matmul(execute: Execute, b: int, m: int, n: int, k: int, transposed: bool) -> None:
    x, w, y = normal(1, b, m, k), normal(2, b, n, k), normal(0, b, m, n)
    right = w if transposed else np.ascontiguousarray(w.swapaxes(1, 2))
    tiles = {"bm": 4, "bn": 8, "bk": 16}
    execute(library.batched_matmul, [x, right, y], **tiles, transposed=transposed)
    near(y, np.einsum("bmk,bnk->bmn", x.astype(np.float64), w))


@given(
    m=rows,
    n=st.sampled_from([32, 96]),
    k=st.sampled_from([32, 64]),
    name=st.sampled_from(["silu", "gelu_tanh"]),
)
def test_gated_linear_into_int8_blocks(execute: Execute, m: int, n: int, k: int, name: str) -> None:
    x, gate, up = normal(1, m, k), normal(2, n, k), normal(3, n, k)
    result = quantize(np.zeros((m, n), np.float32), int8_block32)
    activation = activation_function(name)
    execute(library.gated_linear, [x, gate, up, result], bm=8, bn=32, bk=32, activation=activation)
    a = x.astype(np.float64) @ gate.T
    gated = a / (1 + np.exp(-a)) if name == "silu" else _gelu(a)
    expected = gated * (x @ up.T)
    step = np.abs(expected).reshape(m, n // 32, 32).max(-1, initial=0) / 127
    error = np.abs(result.decode() - expected).reshape(m, n // 32, 32)
    assert (error <= step[..., None] * 0.51 + 1e-4).all()


def _gelu(x: Floats) -> Floats:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@given(m=rows, d=st.sampled_from([1, 5, 31, 32, 70, 300]), options=st.integers(0, 3))
def test_norms_and_softmax(execute: Execute, m: int, d: int, options: int) -> None:
    x, y, res = normal(1, m, d) * 3 + 1, normal(0, m, d), normal(2, m, d)
    w, bias = (normal(3, d) if options & 1 else None), (normal(4, d) if options & 1 else None)
    residual = res if options & 2 else None
    wide = x.astype(np.float64)
    scale = 1.0 if w is None else w
    shift = (0.0 if residual is None else residual) + np.zeros((m, d))
    tiles = {"bm": 2, "bd": 32}
    execute(library.rms_norm, [x, w, residual, y], **tiles, epsilon=1e-5)
    near(y, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale + shift)
    execute(library.layer_norm, [x, w, bias, residual, y], **tiles, epsilon=1e-5)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale
    near(y, expected + (0.0 if bias is None else bias) + shift)
    whole = {"bm": 2, "bd": 1 << (d - 1).bit_length()}
    for padded in {True, whole["bd"] != d}:
        y[...] = 77
        given = [x, w, bias, residual, y]
        execute(layer_norm_rows, given, **whole, padded=padded, epsilon=1e-5)
        near(y, expected + (0.0 if bias is None else bias) + shift)
    execute(library.softmax, [x, y], **tiles)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    near(y, e / e.sum(-1, keepdims=True))


@given(m=rows, n=st.sampled_from([1, 5, 32, 100]), ties=st.booleans())
def test_argmax_and_top_k(execute: Execute, m: int, n: int, ties: bool) -> None:
    x = normal(m + n, m, n)
    if ties:
        x = np.round(x)
    x[:, n // 2] = -np.inf
    y = np.zeros(m, np.int32)
    execute(library.argmax, [x, y], bm=2, bn=32)
    np.testing.assert_array_equal(y, x.argmax(1))
    k = min(4, n)
    values, indices = np.zeros((m, k), np.float32), np.zeros((m, k), np.int32)
    execute(library.top_k, [x, values, indices], bm=2, bn=32)
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, 1))


REDUCTIONS = {"sum": np.sum, "mean": np.mean, "prod": np.prod, "max": np.max, "min": np.min}


@given(o=rows, n=extent, i=extent, name=st.sampled_from(sorted(REDUCTIONS)))
def test_reductions(execute: Execute, o: int, n: int, i: int, name: str) -> None:
    x, y = normal(1, o, n), normal(0, o)
    execute(library.reduce_last, [x, y], bm=4, bn=16, combiner=name)
    near(y, REDUCTIONS[name](x.astype(np.float64), 1))
    x, y = normal(2, o, n, i), normal(0, o, i)
    execute(library.reduce_middle, [x, y], bi=16, combiner=name)
    near(y, REDUCTIONS[name](x.astype(np.float64), 1))


@given(t=rows, v=extent, d=st.sampled_from([1, 31, 64, 100]), seed=seeds)
def test_embedding_and_gather(execute: Execute, t: int, v: int, d: int, seed: int) -> None:
    table, y = normal(seed, v, d), normal(0, t, d)
    ids = np.random.default_rng(seed).integers(0, v, t).astype(np.int32)
    execute(library.embedding, [table, ids, y], bd=32, scale=2.5)
    near(y, table[ids] * 2.5)
    absent = ids.copy()
    absent[::3] = -1
    execute(library.gather_rows, [table, absent, y], bt=4, bd=32)
    near(y, np.where((absent >= 0)[:, None], table[ids], 0))


def test_embedding_of_quantized_rows(execute: Execute) -> None:
    table = weight("q8_0", 9, 64, 1)
    ids, y = np.array([8, 0, 3], np.int32), normal(0, 3, 64)
    execute(library.embedding, [table, ids, y], bd=32)
    np.testing.assert_array_equal(y, table.decode()[ids])


SHAPES = [
    ((5, 70), (5, 70)),
    ((5, 70), (70,)),
    ((5, 1), (1, 70)),
    ((2, 3, 5, 7), (3, 1, 7)),
    ((4,), (4,)),
    ((4,), (1,)),
    ((2, 5, 7), (5, 1)),
    ((0, 7), (7,)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "max", "min"])
def test_elementwise_broadcasts(
    execute: Execute, shapes: tuple[tuple[int, ...], ...], name: str
) -> None:
    functions = {"sub": "subtract", "mul": "multiply", "div": "divide", "max": "maximum"}
    numpy = getattr(np, {**functions, "min": "minimum"}.get(name, name))
    a, b = (normal(i, *shape) for i, shape in enumerate(shapes))
    y = np.zeros(np.broadcast_shapes(*shapes), np.float32)
    rank = y.ndim
    single = tuple(
        tuple(e != f for e, f in zip(x.shape, y.shape[rank - x.ndim :], strict=True))
        for x in (a, b)
    )
    consts: dict[str, object] = {"bn": 32, "bm": 2} if rank > 1 else {"bn": 32}
    function = elementwise.apply(elementwise.function_of(name, 1.0), single, rank)
    execute(elementwise.KERNELS[rank], [y, a, b], **consts, function=function)
    near(y, numpy(a, b))


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu_erf", "relu", "sigmoid", "tanh"])
def test_activations(execute: Execute, name: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 501), [0.0, -0.0]]).astype(np.float32)[None]
    y = np.zeros_like(x)
    apply = elementwise.apply(activation_function(name), ((False, False),), 2)
    execute(library.elementwise_2d, [y, x], bm=1, bn=64, function=apply)
    wide = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    expected = {
        "silu": wide * sigmoid,
        "gelu_tanh": _gelu(wide),
        "gelu_erf": wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))),
        "relu": np.maximum(wide, 0),
        "sigmoid": sigmoid,
        "tanh": np.tanh(wide),
    }[name]
    near(y, expected, 1e-5)


@given(
    n=st.integers(1, 2),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    channels=st.tuples(st.sampled_from([1, 3, 17]), st.sampled_from([1, 5, 20])),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    pad=st.integers(0, 2),
    rows=st.integers(1, 3),
)
def test_conv2d(
    execute: Execute,
    n: int,
    size: tuple[int, int],
    channels: tuple[int, int],
    taps: tuple[int, int],
    stride: int,
    pad: int,
    rows: int,
) -> None:
    (h, w), (c, o), (kh, kw) = size, channels, taps
    x, f, bias = normal(1, n, h, w, c), normal(2, o, kh, kw, c), normal(3, o)
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    oh, ow = (h + 2 * pad - kh) // stride + 1, (w + 2 * pad - kw) // stride + 1
    expected = np.zeros((n, oh, ow, o)) + bias
    for i in range(kh):
        for j in range(kw):
            part = padded[:, i::stride, j::stride][:, :oh, :ow]
            expected += part @ f[:, i, j].T
    y = np.zeros(expected.shape, np.float32)
    execute(
        library.conv2d,
        [x, f, bias, y],
        bh=rows,
        bw=4,
        bo=8,
        bc=8,
        stride_h=stride,
        stride_w=stride,
        pad_h=pad,
        pad_w=pad,
    )
    near(y, expected)
