"""Elementwise functions of any number of tensors, with broadcasting.

A function is ``function(inputs, index, shape) -> tile``; :func:`apply` makes one from a plain
function of tiles and, for each input, the axes along which it has extent 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import dure
import dure.lang as dl
from dure.library.convert import convert

#: ``function(inputs, index, shape) -> tile``
TileFunction: TypeAlias = Callable[[Any, Any, Any], Any]


@dure.kernel
def elementwise(
    y: dl.Tensor,
    *inputs: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    function: dl.const,
):
    """``y = function(*inputs)`` for tensors of rank 2."""
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i, j), convert(function(inputs, (i, j), (bm, bn)), y.dtype))


@dure.kernel
def elementwise_4d(
    y: dl.Tensor,
    *inputs: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    function: dl.const,
):
    """``y = function(*inputs)`` for tensors of rank 4."""
    index = (dl.program_id(0), dl.program_id(1), dl.program_id(2), dl.program_id(3))
    dl.store(y, index, convert(function(inputs, index, (1, 1, bm, bn)), y.dtype))


@cache
def spread(position: int, single: tuple[bool, ...]) -> TileFunction:
    """The tile of ``inputs[position]``, repeated along the axes where it is ``single``."""

    def load(inputs: Any, index: Any, shape: Any) -> Any:
        at = tuple(0 if one else i for i, one in zip(index, single, strict=True))
        extents = tuple(1 if one else e for e, one in zip(shape, single, strict=True))
        return dl.broadcast_to(dl.load(inputs[position], at, extents), shape)

    return load


@cache
def apply(function: Callable[..., Any], single: tuple[tuple[bool, ...], ...]) -> TileFunction:
    """``function`` of one, two or three inputs; ``single[n]`` says where input n has extent 1."""
    loads = [spread(n, axes) for n, axes in enumerate(single)]
    first = loads[0]
    if len(loads) == 1:

        def unary(inputs: Any, index: Any, shape: Any) -> Any:
            return function(first(inputs, index, shape))

        return unary
    second = loads[1]
    if len(loads) == 2:

        def binary(inputs: Any, index: Any, shape: Any) -> Any:
            return function(first(inputs, index, shape), second(inputs, index, shape))

        return binary
    third = loads[2]

    def ternary(inputs: Any, index: Any, shape: Any) -> Any:
        return function(
            first(inputs, index, shape), second(inputs, index, shape), third(inputs, index, shape)
        )

    return ternary


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


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``."""
    return dl.where(condition != 0, a, b)
