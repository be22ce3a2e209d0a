"""Elementwise functions of one or more tensors, with NumPy's broadcasting, up to four axes.

A kernel's ``function(inputs, index, shape) -> tile`` computes one tile; :func:`apply` makes one
from a plain function of tiles and, for each input, the axes along which it is repeated.  The grid
counts the last axis first, so that instances next to each other touch memory next to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import dure
import dure.lang as dl
from dure.library.activation import ACTIVATIONS
from dure.library.convert import convert

#: ``function(inputs, index, shape) -> tile``
TileFunction: TypeAlias = Callable[[Any, Any, Any], Any]


@dure.kernel
def elementwise_1d(y: dl.Tensor, *inputs: dl.Tensor, bn: dl.const, function: dl.const):
    """``y = function(*inputs)`` for y (N,)."""
    index = (dl.program_id(0),)
    dl.store(y, index, convert(function(inputs, index, (bn,)), y.dtype))


@dure.kernel
def elementwise_2d(
    y: dl.Tensor, *inputs: dl.Tensor, bm: dl.const, bn: dl.const, function: dl.const
):
    """``y = function(*inputs)`` for y (M, N)."""
    index = (dl.program_id(1), dl.program_id(0))
    dl.store(y, index, convert(function(inputs, index, (bm, bn)), y.dtype))


@dure.kernel
def elementwise_3d(
    y: dl.Tensor, *inputs: dl.Tensor, bm: dl.const, bn: dl.const, function: dl.const
):
    """``y = function(*inputs)`` for y (B, M, N)."""
    index = (dl.program_id(2), dl.program_id(1), dl.program_id(0))
    dl.store(y, index, convert(function(inputs, index, (1, bm, bn)), y.dtype))


@dure.kernel
def elementwise_4d(
    y: dl.Tensor, *inputs: dl.Tensor, bm: dl.const, bn: dl.const, function: dl.const
):
    """``y = function(*inputs)`` for y (A, B, M, N)."""
    index = (dl.program_id(3), dl.program_id(2), dl.program_id(1), dl.program_id(0))
    dl.store(y, index, convert(function(inputs, index, (1, 1, bm, bn)), y.dtype))


KERNELS = {1: elementwise_1d, 2: elementwise_2d, 3: elementwise_3d, 4: elementwise_4d}


@cache
def spread(position: int, single: tuple[bool, ...], rank: int) -> TileFunction:
    """The float32 tile of ``inputs[position]`` in a result of ``rank`` axes.

    The input has ``len(single)`` axes, the last ones of the result's; it is repeated along those
    where it is ``single`` and along the ones that it lacks.
    """
    own = len(single)
    skipped = rank - own

    def load(inputs: Any, index: Any, shape: Any) -> Any:
        x = inputs[position]
        if own == 1:
            at = (0 if single[0] else index[skipped],)
            extents = (1 if single[0] else shape[skipped],)
        elif own == 2:
            at = (
                0 if single[0] else index[skipped],
                0 if single[1] else index[skipped + 1],
            )
            extents = (
                1 if single[0] else shape[skipped],
                1 if single[1] else shape[skipped + 1],
            )
        elif own == 3:
            at = (
                0 if single[0] else index[skipped],
                0 if single[1] else index[skipped + 1],
                0 if single[2] else index[skipped + 2],
            )
            extents = (
                1 if single[0] else shape[skipped],
                1 if single[1] else shape[skipped + 1],
                1 if single[2] else shape[skipped + 2],
            )
        else:
            at = (
                0 if single[0] else index[0],
                0 if single[1] else index[1],
                0 if single[2] else index[2],
                0 if single[3] else index[3],
            )
            extents = (
                1 if single[0] else shape[0],
                1 if single[1] else shape[1],
                1 if single[2] else shape[2],
                1 if single[3] else shape[3],
            )
        tile = dl.load(x, at, extents).to(dl.float32)
        if skipped == 1:
            tile = dl.expand_dims(tile, 0)
        elif skipped == 2:
            tile = dl.expand_dims(dl.expand_dims(tile, 0), 0)
        elif skipped == 3:
            tile = dl.expand_dims(dl.expand_dims(dl.expand_dims(tile, 0), 0), 0)
        return dl.broadcast_to(tile, shape)

    return load


@cache
def apply(
    function: Callable[..., Any], single: tuple[tuple[bool, ...], ...], rank: int
) -> TileFunction:
    """``function`` of one or two inputs; ``single[n]``: along which axes input n is repeated."""
    first = spread(0, single[0], rank)
    if len(single) == 1:

        def unary(inputs: Any, index: Any, shape: Any) -> Any:
            return function(first(inputs, index, shape))

        return unary
    second = spread(1, single[1], rank)

    def binary(inputs: Any, index: Any, shape: Any) -> Any:
        return function(first(inputs, index, shape), second(inputs, index, shape))

    return binary


def add(a: Any, b: Any) -> Any:
    """``a + b``"""
    return a + b


def subtract(a: Any, b: Any) -> Any:
    """``a - b``"""
    return a - b


def multiply(a: Any, b: Any) -> Any:
    """``a * b``"""
    return a * b


def divide(a: Any, b: Any) -> Any:
    """``a / b``"""
    return a / b


def maximum(a: Any, b: Any) -> Any:
    """The larger of both."""
    return dl.maximum(a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of both."""
    return dl.minimum(a, b)


def negative(x: Any) -> Any:
    """``-x``"""
    return -x


def exponential(x: Any) -> Any:
    """``exp(x)``"""
    return dl.exp(x)


def square_root(x: Any) -> Any:
    """The square root of x."""
    return dl.sqrt(x)


@cache
def scaled(factor: float) -> Callable[[Any], Any]:
    """``x * factor``"""

    def scale(x: Any) -> Any:
        return x * factor

    return scale


@cache
def softcapped(cap: float) -> Callable[[Any], Any]:
    """``cap * tanh(x / cap)``"""
    inverse = 1.0 / cap

    def softcap(x: Any) -> Any:
        return dl.tanh(x * inverse) * cap

    return softcap


@cache
def clamped_swiglu(limit: float, alpha: float) -> Callable[[Any, Any], Any]:
    """gpt-oss' gate: ``(up + 1) * gate * sigmoid(alpha * gate)``, both clamped by ``limit``."""

    def swiglu(gate: Any, up: Any) -> Any:
        gate = dl.minimum(gate, limit)
        up = dl.maximum(dl.minimum(up, limit), -limit)
        return (up + 1.0) * gate * dl.sigmoid(gate * alpha)

    return swiglu


@cache
def gated(activation: str) -> Callable[[Any, Any], Any]:
    """``activation(gate) * up``"""
    function = ACTIVATIONS[activation]

    def gate_of(gate: Any, up: Any) -> Any:
        return function(gate) * up

    return gate_of


_PLAIN: dict[str, Callable[..., Any]] = {
    "add": add,
    "sub": subtract,
    "mul": multiply,
    "div": divide,
    "max": maximum,
    "min": minimum,
    "neg": negative,
    "exp": exponential,
    "sqrt": square_root,
    **ACTIVATIONS,
}


def function_of(name: str, value: float) -> Callable[..., Any]:
    """The function of tiles that the tensor op ``elementwise`` calls ``name``."""
    if name == "scale":
        return scaled(value)
    if name == "softcap":
        return softcapped(value)
    return _PLAIN[name]
