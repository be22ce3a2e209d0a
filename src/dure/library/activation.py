"""Activations: plain functions of a float32 tile, inlined into the kernels that apply them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import dure.lang as dl
from dure.errors import IRError

#: A function of one float32 tile.
Activation: TypeAlias = Callable[[Any], Any]

_SQRT_2_OVER_PI = 0.7978845608028654
_SQRT_HALF = 0.7071067811865476


def identity(x: Any) -> Any:
    """``x``"""
    return x


def silu(x: Any) -> Any:
    """``x * sigmoid(x)``, also called swish."""
    return x * dl.sigmoid(x)


def gelu_tanh(x: Any) -> Any:
    """GELU by the tanh approximation (Hendrycks and Gimpel, 2016), as Gemma uses it.

    ``0.5 (1 + tanh u)`` is ``sigmoid(2 u)``.
    """
    inner = (x * x * 0.044715 + 1.0) * (x * (2.0 * _SQRT_2_OVER_PI))
    return x * dl.sigmoid(inner)


def gelu_erf(x: Any) -> Any:
    """GELU by the error function."""
    return x * 0.5 * (dl.erf(x * _SQRT_HALF) + 1.0)


def relu(x: Any) -> Any:
    """``max(x, 0)``"""
    return dl.maximum(x, 0.0)


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``"""
    return dl.sigmoid(x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return dl.tanh(x)


ACTIVATIONS: dict[str, Activation] = {
    f.__name__: f for f in (identity, silu, gelu_tanh, gelu_erf, relu, sigmoid, tanh)
}


def activation_function(name: str) -> Activation:
    """The activation of this name; raises :class:`IRError` for an unknown one."""
    found = ACTIVATIONS.get(name)
    if found is None:
        raise IRError(
            f"unknown activation '{name}'",
            rule="an activation is one that the library has",
            fix=f"one of {', '.join(ACTIVATIONS)}",
        )
    return found
