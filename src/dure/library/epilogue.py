"""What a matmul does with its accumulator before it is stored: stages that compose.

An epilogue is a plain function ``epilogue(acc, extras, i, j) -> tile``, inlined where the kernel
calls it.  ``acc`` is the float32 accumulator tile of (bm, bn), ``extras`` the kernel's extra
tensors, ``i`` and ``j`` the tile's row and column.  A stage that reads a tensor is made with the
position of that tensor in ``extras``.  Equal stages are the same object, so that a kernel is
compiled once for each epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import dure.lang as dl
from dure.library.activation import activation_function

#: ``epilogue(acc, extras, i, j) -> tile``
Epilogue: TypeAlias = Callable[[Any, Any, Any, Any], Any]


def identity(acc: Any, extras: Any, i: Any, j: Any) -> Any:
    """The accumulator as it is."""
    return acc


@cache
def bias(position: int) -> Epilogue:
    """Add ``extras[position]`` of shape (N,) to every row."""

    def add_bias(acc: Any, extras: Any, i: Any, j: Any) -> Any:
        row = dl.load(extras[position], (j,), (acc.shape[1],)).to(dl.float32)
        return acc + row[None, :]

    return add_bias


@cache
def residual(position: int) -> Epilogue:
    """Add ``extras[position]`` of shape (M, N)."""

    def add_residual(acc: Any, extras: Any, i: Any, j: Any) -> Any:
        return acc + dl.load(extras[position], (i, j), acc.shape).to(dl.float32)

    return add_residual


@cache
def multiplied(position: int) -> Epilogue:
    """Multiply by ``extras[position]`` of shape (M, N)."""

    def multiply(acc: Any, extras: Any, i: Any, j: Any) -> Any:
        return acc * dl.load(extras[position], (i, j), acc.shape).to(dl.float32)

    return multiply


@cache
def scaled(factor: float) -> Epilogue:
    """Multiply by a number."""

    def scale(acc: Any, extras: Any, i: Any, j: Any) -> Any:
        return acc * factor

    return scale


@cache
def activated(name: str) -> Epilogue:
    """Apply the activation of this name (see :mod:`dure.library.activation`)."""
    function = activation_function(name)

    def activate(acc: Any, extras: Any, i: Any, j: Any) -> Any:
        return function(acc)

    return activate


@cache
def softcapped(cap: float) -> Epilogue:
    """``cap * tanh(x / cap)``."""

    def softcap(acc: Any, extras: Any, i: Any, j: Any) -> Any:
        return dl.tanh(acc * (1.0 / cap)) * cap

    return softcap


@cache
def _then(first: Epilogue, second: Epilogue) -> Epilogue:
    def both(acc: Any, extras: Any, i: Any, j: Any) -> Any:
        return second(first(acc, extras, i, j), extras, i, j)

    return both


def compose(stages: Sequence[Epilogue]) -> Epilogue:
    """The stages one after another; none at all is :func:`identity`."""
    if not stages:
        return identity
    total = stages[0]
    for stage in stages[1:]:
        total = _then(total, stage)
    return total
