"""Elementwise ops on whole tensors, with NumPy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir.core import OpDef, Region, declare
from dure.ir.expr import Const, Expr
from dure.ir.rules import broken
from dure.ir.tensor.checks import (
    ACTIVATIONS,
    Doubles,
    Operand,
    count,
    doubles,
    finish,
    floating,
    per_element,
    sigmoid,
    stored,
)
from dure.ir.types import TensorType, Type

_Function = Callable[[Sequence[Doubles], float], Doubles]


def _unary(function: Callable[[Doubles], Doubles]) -> tuple[int, _Function]:
    def apply(operands: Sequence[Doubles], value: float) -> Doubles:
        return function(operands[0])

    return 1, apply


def _binary(function: Callable[[Doubles, Doubles], Doubles]) -> tuple[int, _Function]:
    def apply(operands: Sequence[Doubles], value: float) -> Doubles:
        return function(operands[0], operands[1])

    return 2, apply


def _scale(operands: Sequence[Doubles], value: float) -> Doubles:
    return operands[0] * np.float64(np.float32(value))


def _softcap(operands: Sequence[Doubles], value: float) -> Doubles:
    return value * np.tanh(operands[0] / value)


#: name -> (operands, function of the operands and of ``value``)
FUNCTIONS: dict[str, tuple[int, _Function]] = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "div": _binary(np.divide),
    "max": _binary(np.maximum),
    "min": _binary(np.minimum),
    "scale": (1, _scale),
    "softcap": (1, _softcap),
    "neg": _unary(np.negative),
    "exp": _unary(np.exp),
    "sqrt": _unary(np.sqrt),
    **{name: _unary(function) for name, function in ACTIVATIONS.items() if name},
}


def broadcast_shape(shapes: Sequence[tuple[Expr, ...]]) -> tuple[Expr, ...]:
    """NumPy's broadcast of symbolic shapes: an extent of 1 stretches, others must be equal."""
    longest = max(len(shape) for shape in shapes)
    result: list[Expr] = []
    for axis in range(-longest, 0):
        chosen: Expr | None = None
        for shape in shapes:
            if -axis > len(shape):
                continue
            extent = shape[axis]
            one = isinstance(extent, Const) and extent.value == 1
            chosen_one = isinstance(chosen, Const) and chosen.value == 1
            if chosen is None or chosen_one:
                chosen = extent
            elif extent is not chosen and not one:
                raise broken(
                    f"shapes {' and '.join(str(list(map(str, s))) for s in shapes)}",
                    "extents are equal, or 1, from the last axis on",
                    "reshape one of the operands",
                )
        assert chosen is not None
        result.append(chosen)
    return tuple(result)


def _typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    name: str = attrs["function"]
    if name not in FUNCTIONS:
        raise broken(f"elementwise '{name}'", f"a function is one of {', '.join(FUNCTIONS)}")
    tensors = count(operands, FUNCTIONS[name][0], name)
    for position, operand in enumerate(tensors):
        floating(operand, f"operand {position} of {name}")
    shape = broadcast_shape([t.shape for t in tensors])
    if attrs["quantize"]:
        return [stored(shape, attrs["quantize"])]
    return [TensorType(shape, tensors[0].dtype)]


def _semantics(attrs: Mapping[str, Any], *operands: Operand) -> Operand:
    function = FUNCTIONS[attrs["function"]][1]
    with np.errstate(all="ignore"):
        result = function([doubles(o) for o in operands], float(attrs["value"]))
    if attrs["quantize"]:
        return finish(result, attrs)
    assert isinstance(operands[0], np.ndarray)
    return result.astype(operands[0].dtype)


declare(
    OpDef(
        "elementwise",
        "tensor",
        _typing,
        _semantics,
        per_element(4),
        defaults={"value": 1.0, "quantize": ""},
        exact=False,
        error_bound=8.0,
        doc="elementwise(a[, b]) {function, value, quantize}: one of FUNCTIONS, broadcast",
    )
)


def clamped_swiglu(gate: Doubles, up: Doubles, limit: float, alpha: float) -> Doubles:
    """gpt-oss' gate: ``(up + 1) * gate * sigmoid(alpha * gate)``, both clamped before."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + 1) * gate * sigmoid(alpha * gate)


def _swiglu_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    gate, up = count(operands, 2, "clamped_swiglu")
    floating(gate, "the gate of clamped_swiglu")
    floating(up, "the second operand of clamped_swiglu")
    if gate.shape != up.shape:
        raise broken(f"clamped_swiglu of {gate} and {up}", "both have one shape")
    if not attrs["limit"] > 0:
        raise broken(f"a limit of {attrs['limit']}", "the limit is positive")
    return [stored(gate.shape, "")]


def _swiglu(attrs: Mapping[str, Any], gate: Operand, up: Operand) -> Operand:
    limit, alpha = (float(np.float32(attrs[name])) for name in ("limit", "alpha"))
    return finish(clamped_swiglu(doubles(gate), doubles(up), limit, alpha), attrs)


declare(
    OpDef(
        "clamped_swiglu",
        "tensor",
        _swiglu_typing,
        _swiglu,
        per_element(8),
        defaults={"limit": 7.0, "alpha": 1.702},
        exact=False,
        error_bound=8.0,
        doc="clamped_swiglu(gate, up) {limit, alpha}: (up + 1) * gate * sigmoid(alpha * gate), with"
        " gate at most limit and up within -limit .. limit",
    )
)
