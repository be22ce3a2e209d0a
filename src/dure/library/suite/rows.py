"""Cases that work row by row or element by element: norms, softmax, elementwise, reductions, scans,
choices, transposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from dure.library import elementwise
from dure.library.activation import activation_function
from dure.library.norm import layer_norm, rms_norm, rms_norm_rows, softmax, softmax_rows
from dure.library.reduction import reduce_last, reduce_middle
from dure.library.sampling import argmax, top_k
from dure.library.scan import cumulative_sum
from dure.library.suite.case import (
    TOLERANCES,
    Array,
    Case,
    Drawn,
    Shape,
    empty,
    normal,
    silu,
    values,
)
from dure.library.transpose import transpose

_SIZES: tuple[Shape, ...] = ((1, 1), (3, 5), (2, 300), (9, 64))
_TILES = {"bm": 2, "bd": 32}
_COLUMNS = {"bm": 4, "bn": 32}


def draw_norm(
    kernel: Any, dtype: str, options: bool, rng: np.random.Generator, size: Shape
) -> Drawn:
    """A norm, with weight, bias and residual or without."""
    m, d = size
    x = (normal(rng, "f32", m, d) * 3 + 1).astype(normal(rng, dtype, 1).dtype)
    weight = normal(rng, dtype, d) if options else None
    bias = normal(rng, dtype, d) if options else None
    residual = normal(rng, dtype, m, d) if options else None
    z = values(x)
    if kernel is layer_norm:
        z = z - z.mean(1, keepdims=True)
    z = z / np.sqrt((z**2).mean(1, keepdims=True) + 1e-5)
    z = z if weight is None else z * values(weight)
    if kernel is layer_norm and bias is not None:
        z = z + values(bias)
    z = z if residual is None else z + values(residual)
    weights = [weight, bias] if kernel is layer_norm else [weight]
    arguments = [x, *weights, residual, empty(dtype, m, d)]
    consts: dict[str, object] = {"epsilon": 1e-5}
    if kernel is rms_norm_rows:
        consts["bd"] = 1 << (d - 1).bit_length()
    return Drawn(arguments, {len(arguments) - 1: z}, consts)


def draw_softmax(kernel: Any, dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """A softmax of each row."""
    m, d = size
    x = normal(rng, dtype, m, d)
    e = np.exp(values(x) - values(x).max(1, keepdims=True))
    consts = {"bd": 1 << (d - 1).bit_length()} if kernel is softmax_rows else {}
    return Drawn([x, empty(dtype, m, d)], {1: e / e.sum(1, keepdims=True)}, consts)


def norm_cases() -> Iterable[Case]:
    """Norms and softmax."""
    for dtype in ("f32", "bf16"):
        tolerance = max(TOLERANCES[dtype], 1e-4)
        for kernel, item in ((rms_norm, "rmsnorm"), (layer_norm, "layernorm")):
            for options in (False, True):
                name = f"{item}{' with weight and residual' if options else ''} {dtype}"
                draw = partial(draw_norm, kernel, dtype, options)
                large = (kernel.__name__, "4096x4096", dtype)
                yield Case(name, item, kernel, draw, _SIZES, _TILES, large, tolerance)
        draw = partial(draw_norm, rms_norm_rows, dtype, True)
        large, name = ("rms_norm", "4096x4096", dtype), f"rmsnorm of whole rows {dtype}"
        yield Case(name, "rmsnorm", rms_norm_rows, draw, _SIZES, {"bm": 2}, large, tolerance)
        for kernel in (softmax, softmax_rows):
            name = f"softmax{' of whole rows' if kernel is softmax_rows else ''} {dtype}"
            tiles = {"bm": 2} if kernel is softmax_rows else _TILES
            draw = partial(draw_softmax, kernel, dtype)
            large = (kernel.__name__, "4096x4096", dtype)
            yield Case(name, "softmax", kernel, draw, _SIZES, tiles, large, tolerance)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "gelu_erf": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / 2**0.5)),
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrt": np.sqrt,
}


def draw_binary(
    function: str, dtype: str, repeated: bool, rng: np.random.Generator, size: Shape
) -> Drawn:
    """Two tensors, or a tensor and a row that is repeated."""
    a = normal(rng, dtype, *size)
    b = normal(rng, dtype, size[-1]) if repeated else normal(rng, dtype, *size)
    if function == "div":
        b = np.where(np.abs(values(b)) < 0.5, 1.0, values(b)).astype(b.dtype)
    single = ((False,) * len(size), (False,) * b.ndim)
    apply = elementwise.apply(elementwise.function_of(function, 1.0), single, len(size))
    expected = _BINARY[function](values(a), values(b))
    return Drawn([empty(dtype, *size), a, b], {0: expected}, {"function": apply})


def draw_unary(function: str, dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """A function of one tensor."""
    x = normal(rng, dtype, *size)
    x = np.abs(values(x)).astype(x.dtype) if function == "sqrt" else x
    tile = (
        activation_function(function)
        if function in ("silu", "gelu_erf", "tanh", "sigmoid")
        else elementwise.function_of(function, 1.0)
    )
    apply = elementwise.apply(tile, ((False,) * len(size),), len(size))
    expected = _UNARY[function](values(x))
    return Drawn([empty(dtype, *size), x], {0: expected}, {"function": apply})


def elementwise_cases() -> Iterable[Case]:
    """One to four axes, one and two operands."""
    shapes: dict[int, tuple[Shape, ...]] = {
        1: ((1,), (3,), (1000,)),
        2: ((1, 1), (3, 5), (5, 300)),
        3: ((1, 1, 1), (2, 3, 70)),
        4: ((1, 1, 1, 1), (2, 3, 5, 33)),
    }
    fulls = {1: "16777216", 2: "4096x4096", 3: "16x1024x1024", 4: "4x16x512x512"}
    for rank, sizes in shapes.items():
        tiles = {"bn": 32} if rank == 1 else _COLUMNS
        for function in ("add", "mul") if rank != 2 else tuple(_BINARY):
            for dtype in ("f32", "bf16"):
                repeated = function == "mul" and rank > 1
                name = f"{function} of {rank} axes{' and a row' if repeated else ''} {dtype}"
                large = (f"elementwise_{rank}d", fulls[rank], dtype)
                draw = partial(draw_binary, function, dtype, repeated)
                kernel = elementwise.KERNELS[rank]
                yield Case(
                    name, "elementwise", kernel, draw, sizes, tiles, large, TOLERANCES[dtype]
                )
    for function in _UNARY:
        large = ("elementwise_2d", "4096x4096", "bf16")
        draw = partial(draw_unary, function, "f32")
        kernel = elementwise.KERNELS[2]
        yield Case(f"{function} f32", "elementwise", kernel, draw, shapes[2], _COLUMNS, large, 1e-4)


_REDUCTIONS = {"sum": np.sum, "mean": np.mean, "prod": np.prod, "max": np.max, "min": np.min}


def draw_reduction(
    combiner: str, last: bool, dtype: str, rng: np.random.Generator, size: Shape
) -> Drawn:
    """A reduction of the last axis of two, or of the middle one of three."""
    x = normal(rng, dtype, *size)
    if combiner == "prod":
        x = np.clip(values(x), 0.8, 1.2).astype(x.dtype)
    shape = size[:1] if last else (size[0], size[2])
    expected = _REDUCTIONS[combiner](values(x), 1)
    return Drawn([x, empty(dtype, *shape)], {1: expected}, {"combiner": combiner})


def reduction_cases() -> Iterable[Case]:
    """Every combiner."""
    middle: tuple[Shape, ...] = ((1, 1, 1), (3, 5, 7), (2, 17, 70))
    for combiner in _REDUCTIONS:
        for dtype in ("f32", "bf16") if combiner in ("sum", "max") else ("f32",):
            tolerance = max(TOLERANCES[dtype], 1e-4)
            draw = partial(draw_reduction, combiner, True, dtype)
            large = ("reduce_last", "4096x4096", dtype)
            name = f"{combiner} of rows {dtype}"
            yield Case(name, "reductions", reduce_last, draw, _SIZES, _COLUMNS, large, tolerance)
            draw = partial(draw_reduction, combiner, False, dtype)
            large = ("reduce_middle", "64x256x1024", dtype)
            name = f"{combiner} of the middle axis {dtype}"
            tiles = {"bi": 32}
            yield Case(name, "reductions", reduce_middle, draw, middle, tiles, large, tolerance)


def draw_cumulative(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """Running sums of each row."""
    x = normal(rng, dtype, *size)
    return Drawn([x, empty(dtype, *size)], {1: values(x).cumsum(1)})


def draw_transpose(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """A matrix the other way round."""
    x = normal(rng, dtype, *size)
    return Drawn([x, empty(dtype, size[1], size[0])], {1: values(x).T})


def draw_argmax(rng: np.random.Generator, size: Shape) -> Drawn:
    """Rows of few distinct numbers, so that there are ties."""
    x = np.round(normal(rng, "f32", *size) * 2)
    index = np.full(size[0], 77, np.int32)
    return Drawn([x, index], {1: x.argmax(1)})


def draw_top_k(rng: np.random.Generator, size: Shape) -> Drawn:
    """The largest of each row, with ties."""
    m, n, k = size
    x = np.round(normal(rng, "f32", m, n) * 2)
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(values(x), order, 1)
    indices = np.full((m, k), 77, np.int32)
    return Drawn([x, empty("f32", m, k), indices], {1: found, 2: order})


def other_cases() -> Iterable[Case]:
    """Scans, choices and transposition."""
    for dtype in ("f32", "bf16"):
        draw = partial(draw_cumulative, dtype)
        large = ("cumulative_sum", "4096x4096", dtype)
        yield Case(
            f"cumulative sum {dtype}",
            "cumulative sum",
            cumulative_sum,
            draw,
            _SIZES,
            _COLUMNS,
            large,
            max(TOLERANCES[dtype], 1e-4),
        )
    for dtype in ("f32", "bf16", "int8"):
        draw = partial(draw_transpose, dtype)
        large = ("transpose", "4096x4096", dtype)
        tiles = {"bm": 16, "bn": 32}
        sizes = ((1, 1), (3, 5), (2, 300), (40, 33))
        yield Case(f"transpose {dtype}", "transpose", transpose, draw, sizes, tiles, large)
    large = ("argmax", "64x128256", "f32")
    yield Case("argmax", "argmax", argmax, draw_argmax, _SIZES, _COLUMNS, large)
    large = ("top_k", "64x128256x8", "f32")
    sizes: tuple[Shape, ...] = ((1, 1, 1), (3, 5, 2), (2, 100, 8))
    yield Case("top-k", "top-k", top_k, draw_top_k, sizes, _COLUMNS, large)


def cases() -> list[Case]:
    """All of this module."""
    groups = (norm_cases, elementwise_cases, reduction_cases, other_cases)
    return [case for group in groups for case in group()]
