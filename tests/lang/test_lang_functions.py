"""Every function of the language against NumPy, in all modes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

import dure
import dure.lang as dl

RNG = np.random.default_rng(5)


@dure.kernel
def unary(x: dl.Tensor, y: dl.Tensor, n: dl.const, function: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i,), function(dl.load(x, (i,), (n,))).to(y.dtype))


@dure.kernel
def binary(a: dl.Tensor, b: dl.Tensor, y: dl.Tensor, n: dl.const, function: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i,), function(dl.load(a, (i,), (n,)), dl.load(b, (i,), (n,))).to(y.dtype))


UNARY = {
    "exp": (dl.exp, np.exp, -10, 10),
    "exp2": (dl.exp2, np.exp2, -10, 10),
    "log": (dl.log, np.log, 0.01, 50),
    "log2": (dl.log2, np.log2, 0.01, 50),
    "sqrt": (dl.sqrt, np.sqrt, 0, 9),
    "rsqrt": (dl.rsqrt, lambda x: 1 / np.sqrt(x), 0.1, 9),
    "tanh": (dl.tanh, np.tanh, -4, 4),
    "sigmoid": (dl.sigmoid, lambda x: 1 / (1 + np.exp(-x)), -8, 8),
    "erf": (dl.erf, np.vectorize(math.erf), -3, 3),
    "sin": (dl.sin, np.sin, -3, 3),
    "cos": (dl.cos, np.cos, -3, 3),
    "floor": (dl.floor, np.floor, -5, 5),
    "ceil": (dl.ceil, np.ceil, -5, 5),
    "round": (dl.round, np.rint, -5, 5),
    "abs": (dl.abs, np.abs, -5, 5),
    "python_abs": (lambda x: abs(x), np.abs, -5, 5),
    "negative": (lambda x: -x, np.negative, -5, 5),
    "square": (lambda x: x**2, np.square, -5, 5),
    "cube": (lambda x: x**3, lambda x: x**3, -5, 5),
    "root": (lambda x: x**0.5, np.sqrt, 0, 5),
    "reversed_power": (lambda x: 2.0**x, np.exp2, -5, 5),
    "scaled": (lambda x: 2 * x + 1, lambda x: 2 * x + 1, -5, 5),
    "static_number": (lambda x: x * dl.sqrt(16.0), lambda x: x * 4, -5, 5),
    "clamped": (lambda x: dl.minimum(dl.maximum(x, -1.0), 1.0), lambda x: np.clip(x, -1, 1), -5, 5),
    "where": (lambda x: dl.where(x > 0, x, 0.5), lambda x: np.where(x > 0, x, 0.5), -5, 5),
    "cumsum": (lambda x: dl.cumsum(x, 0), np.cumsum, -1, 1),
    "sum": (lambda x: x - dl.sum(x, 0), lambda x: x - x.sum(), -1, 1),
    "sum_all": (lambda x: x - dl.sum(x), lambda x: x - x.sum(), -1, 1),
    "max": (lambda x: x - x.max(0), lambda x: x - x.max(), -1, 1),
    "min": (lambda x: x - dl.min(x, 0, keepdims=True), lambda x: x - x.min(), -1, 1),
    "prod": (lambda x: x * dl.prod(x, 0), lambda x: x * x.prod(), 0.7, 1.2),
    "reduce": (
        lambda x: x - dl.reduce(x, 0, lambda a, b: dl.maximum(a, b), -math.inf),
        lambda x: x - x.max(),
        -1,
        1,
    ),
}


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_float(anyhow: str, name: str) -> None:
    function, numpy, low, high = UNARY[name]
    x = RNG.uniform(low, high, 16).astype(np.float32)
    y = np.zeros_like(x)
    unary(x, y, n=16, function=function)
    np.testing.assert_allclose(y, numpy(x.astype(np.float64)), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_round_once(anyhow: str, dtype: type) -> None:
    x = RNG.uniform(-3, 3, 16).astype(dtype)
    y = np.zeros_like(x)
    unary(x, y, n=16, function=dl.exp)
    expected = np.exp(x.astype(np.float64)).astype(dtype).astype(np.float64)
    step = float(ml_dtypes.finfo(dtype).eps)
    tolerance = max(step, 1e-6)
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=tolerance)


BINARY = {
    "add": (lambda a, b: a + b, np.add),
    "sub": (lambda a, b: a - b, np.subtract),
    "mul": (lambda a, b: a * b, np.multiply),
    "floordiv": (lambda a, b: a // b, np.floor_divide),
    "mod": (lambda a, b: a % b, np.mod),
    "maximum": (dl.maximum, np.maximum),
    "minimum": (dl.minimum, np.minimum),
    "and": (lambda a, b: a & b, np.bitwise_and),
    "or": (lambda a, b: a | b, np.bitwise_or),
    "xor": (lambda a, b: a ^ b, np.bitwise_xor),
    "invert": (lambda a, b: ~a, lambda a, b: np.invert(a)),
    "shl": (lambda a, b: a << (b & 3), lambda a, b: np.left_shift(a, b & 3)),
    "lt": (lambda a, b: a < b, np.less),
    "le": (lambda a, b: a <= b, np.less_equal),
    "gt": (lambda a, b: a > b, np.greater),
    "ge": (lambda a, b: a >= b, np.greater_equal),
    "eq": (lambda a, b: a == b, np.equal),
    "ne": (lambda a, b: a != b, np.not_equal),
    "masks": (
        lambda a, b: (a > 0) & ~(b > 4) | (a == 2),
        lambda a, b: (a > 0) & ~(b > 4) | (a == 2),
    ),
    "where": (lambda a, b: dl.where(a < b, a, b), np.minimum),
    "power": (lambda a, b: a**3, lambda a, b: a**3),
}


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_integers(anyhow: str, name: str) -> None:
    function, numpy = BINARY[name]
    a = RNG.integers(-20, 20, 32).astype(np.int32)
    b = RNG.integers(1, 9, 32).astype(np.int32)
    y = np.zeros(32, np.int32)
    binary(a, b, y, n=16, function=function)
    np.testing.assert_array_equal(y, numpy(a, b).astype(np.int32))


FLOATS = ("add", "sub", "mul", "floordiv", "mod", "maximum", "minimum", "lt", "eq", "where")


@pytest.mark.parametrize("name", FLOATS)
def test_functions_of_two_floats(anyhow: str, name: str) -> None:
    function, numpy = BINARY[name]
    a, b = RNG.uniform(-9, 9, (2, 32)).astype(np.float32)
    y = np.zeros(32, np.float32)
    binary(a, b, y, n=16, function=function)
    np.testing.assert_allclose(y, numpy(a, b).astype(np.float32), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_argmax_gives_the_lowest_index(anyhow: str, name: str) -> None:
    @dure.kernel
    def choose(x: dl.Tensor, y: dl.Tensor, function: dl.const):
        dl.store(y, (0,), function(dl.load(x, (0, 0), (4, 8)), 1))

    x = RNG.integers(0, 3, (4, 8)).astype(np.float32)
    y = np.zeros(4, np.int32)
    choose[1](x, y, function=getattr(dl, name))
    np.testing.assert_array_equal(y, getattr(np, name)(x, axis=1))


def test_shapes(anyhow: str) -> None:
    @dure.kernel
    def shapes(x: dl.Tensor, y: dl.Tensor):
        tile = dl.load(x, (0, 0), (4, 8))
        row = dl.sum(tile, 0)[None, :]
        column = tile.sum(1, keepdims=True)
        moved = dl.transpose(tile.reshape((4, 2, 4)), (0, 2, 1)).reshape((4, -1))
        wide = dl.broadcast_to(dl.expand_dims(dl.arange(8), 0), (4, 8)).to(dl.float32)
        dl.store(y, (0, 0), tile.T.T + row + column + moved * wide + dl.ones((1, 8), dl.float32))

    x = RNG.standard_normal((4, 8)).astype(np.float32)
    y = np.zeros_like(x)
    shapes[1](x, y)
    moved = x.reshape(4, 2, 4).transpose(0, 2, 1).reshape(4, 8)
    expected = x + x.sum(0) + x.sum(1, keepdims=True) + moved * np.arange(8) + 1
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_batched_dot_with_accumulator(anyhow: str) -> None:
    @dure.kernel
    def dots(a: dl.Tensor, b: dl.Tensor, y: dl.Tensor):
        left, right = dl.load(a, (0, 0, 0), (2, 4, 8)), dl.load(b, (0, 0, 0), (2, 4, 8))
        start = dl.full((2, 4, 4), 3.0, dl.float32)
        dl.store(y, (0, 0, 0), dl.dot(left, right.permute(0, 2, 1), start))

    a, b = RNG.standard_normal((2, 2, 4, 8)).astype(np.float32)
    y = np.zeros((2, 4, 4), np.float32)
    dots[1](a, b, y)
    np.testing.assert_allclose(y, a @ b.transpose(0, 2, 1) + 3, rtol=1e-5, atol=1e-5)


def test_integer_dot_is_exact(anyhow: str) -> None:
    @dure.kernel
    def dots(a: dl.Tensor, b: dl.Tensor, y: dl.Tensor):
        acc = dl.zeros((8, 8), dl.int32)
        for k in range(2):
            acc = acc + dl.dot(dl.load(a, (0, k), (8, 16)), dl.load(b, (k, 0), (16, 8)))
        dl.store(y, (0, 0), acc)

    a = RNG.integers(-128, 128, (8, 32)).astype(np.int8)
    b = RNG.integers(-128, 128, (32, 8)).astype(np.int8)
    y = np.zeros((8, 8), np.int32)
    dots[1](a, b, y)
    np.testing.assert_array_equal(y, a.astype(np.int32) @ b.astype(np.int32))


def test_quantize_keeps_what_eight_bits_can(anyhow: str) -> None:
    @dure.kernel
    def there_and_back(x: dl.Tensor, y: dl.Tensor):
        tile = dl.quantize(dl.load(x, (0, 0), (4, 64)), dl.int8_block32)
        dl.store(y, (0, 0), tile.to(dl.float32))

    x = RNG.standard_normal((4, 64)).astype(np.float32)
    y = np.zeros_like(x)
    there_and_back[1](x, y)
    largest = np.abs(x.reshape(4, 2, 32)).max(-1, keepdims=True).repeat(32, -1).reshape(4, 64)
    assert (np.abs(x - y) <= largest / 127 * 0.5001).all()


def test_casts(anyhow: str) -> None:
    @dure.kernel
    def casts(x: dl.Tensor, y: dl.Tensor):
        tile = dl.load(x, (0,), (8,))
        dl.store(y, (0,), tile.to(dl.int8).to(dl.float16).to(dl.float32) + tile.to(dl.bool_))

    x = np.array([-300, -1.5, -0.2, 0, 0.9, 1.5, 2.5, 300], np.float32)
    y = np.zeros_like(x)
    casts[1](x, y)
    np.testing.assert_array_equal(y, np.clip(np.trunc(x), -128, 127) + (x != 0))


def test_index_scalars_are_numbers_of_tiles(anyhow: str) -> None:
    @dure.kernel
    def scalars(y: dl.Tensor, n: dl.const):
        i = dl.program_id(0)
        place = i * n + dl.arange(n)
        size = y.shape[0]
        value = dl.where(place < size - 1, place * 2, dl.full((n,), size, dl.int32))
        dl.store(y, (i,), value.to(dl.float32) + 1.0 / size + min(i, 1) + max(i, 2) + abs(i - 1))

    y = np.zeros(11, np.float32)
    scalars(y, n=4)
    place = np.arange(11)
    i = place // 4
    expected = np.where(place < 10, place * 2, 11) + 1 / 11
    expected = expected + np.minimum(i, 1) + np.maximum(i, 2) + np.abs(i - 1)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
