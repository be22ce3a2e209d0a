"""Normalizations and softmax along the last axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir.core import OpDef, Region, declare
from dure.ir.rules import broken
from dure.ir.tensor.checks import (
    Doubles,
    Operand,
    count,
    doubles,
    equal,
    finish,
    floating,
    per_element,
    rank,
    stored,
)
from dure.ir.types import TensorType, Type


def _check_norm(tensors: Sequence[TensorType], weights: int, name: str) -> TensorType:
    x = floating(tensors[0], f"the operand of {name}")
    for position, weight in enumerate(tensors[1 : 1 + weights]):
        rank(floating(weight, f"weight {position} of {name}"), 1, f"weight {position} of {name}")
        equal(weight.shape[0], x.shape[-1], f"the extent of weight {position} of {name}")
    return x


def _check_residual(x: TensorType, tensors: Sequence[TensorType], name: str) -> None:
    for residual in tensors:
        if residual.shape != x.shape:
            raise broken(
                f"a residual of {residual} for {name} of {x}", "a residual has the result's shape"
            )


def rms_normalize(x: Doubles, weight: Doubles, eps: float) -> Doubles:
    """``x / sqrt(mean(x^2) + eps) * weight`` along the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rms_norm_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    tensors = count(operands, 2 + bool(attrs["residual"]), "rms_norm")
    x = _check_norm(tensors, 1, "rms_norm")
    _check_residual(x, tensors[2:], "rms_norm")
    return [stored(x.shape, attrs["quantize"])]


def _rms_norm(attrs: Mapping[str, Any], x: Operand, weight: Operand, *rest: Operand) -> Operand:
    result = rms_normalize(doubles(x), doubles(weight), attrs["eps"])
    return finish(result + doubles(rest[0]) if rest else result, attrs)


declare(
    OpDef(
        "rms_norm",
        "tensor",
        _rms_norm_typing,
        _rms_norm,
        per_element(4),
        defaults={"eps": 1e-5, "residual": False, "quantize": ""},
        exact=False,
        error_bound=8.0,
        doc="rms_norm(x, weight, [residual]) {eps, residual, quantize}: along the last axis",
    )
)


def _layer_norm_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    tensors = count(operands, 3 + bool(attrs["residual"]), "layer_norm")
    x = _check_norm(tensors, 2, "layer_norm")
    _check_residual(x, tensors[3:], "layer_norm")
    return [stored(x.shape, attrs["quantize"])]


def _layer_norm(
    attrs: Mapping[str, Any], x: Operand, weight: Operand, bias: Operand, *rest: Operand
) -> Operand:
    values = doubles(x)
    centred = values - values.mean(axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    result = centred / np.sqrt(variance + attrs["eps"]) * doubles(weight) + doubles(bias)
    return finish(result + doubles(rest[0]) if rest else result, attrs)


declare(
    OpDef(
        "layer_norm",
        "tensor",
        _layer_norm_typing,
        _layer_norm,
        per_element(6),
        defaults={"eps": 1e-5, "residual": False, "quantize": ""},
        exact=False,
        error_bound=8.0,
        doc="layer_norm(x, weight, bias, [residual]) {eps, residual, quantize}: on the last axis",
    )
)


def _softmax_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (x,) = count(operands, 1, "softmax")
    floating(x, "the operand of softmax")
    return [stored(x.shape, "")]


def _softmax(attrs: Mapping[str, Any], x: Operand) -> Operand:
    values = doubles(x)
    weights = np.exp(values - values.max(axis=-1, keepdims=True, initial=-np.inf))
    return finish(weights / weights.sum(axis=-1, keepdims=True), attrs)


declare(
    OpDef(
        "softmax",
        "tensor",
        _softmax_typing,
        _softmax,
        per_element(12),
        exact=False,
        error_bound=8.0,
        doc="softmax(x): along the last axis",
    )
)
