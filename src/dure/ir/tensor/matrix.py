"""Products: linear layers in every weight format, batched matrix products, convolution.

A linear layer is ``y = x @ w.T`` with ``w`` of shape (N, K) as GGUF and PyTorch store it.  Its
epilogue, in this order: times ``scale``, plus ``bias``, ``activation``, soft cap, plus
``residual``, quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.core import Cost, Op, OpDef, Region, declare, op_definition
from dure.ir.expr import Expr, as_expr
from dure.ir.rules import broken
from dure.ir.tensor.checks import (
    ACTIVATIONS,
    Doubles,
    Operand,
    activation_name,
    count,
    doubles,
    elements,
    equal,
    extent,
    finish,
    floating,
    rank,
    static,
    stored,
    traffic,
)
from dure.ir.types import TensorType, Type

#: Flags of linear that announce an operand, in the operands' order.
LINEAR_OPTIONS = ("bias", "residual")


def _check_weight(x: TensorType, w: TensorType, name: str) -> Expr:
    """N of the product of ``x`` (..., K) and ``w`` (N, K)."""
    rank(w, 2, f"the weight of {name}")
    equal(w.shape[1], x.shape[-1], f"K of the weight of {name}")
    if not w.dtype.is_float:
        raise broken(f"a weight of {w.dtype}", "a weight holds floats or quantized blocks")
    if w.block is not None and w.quantized_axis % 2 != 1:
        raise broken(f"a weight of {w}", "a weight is quantized along K, its last axis")
    if x.block is not None:
        if x.block not in dtypes.ACTIVATION_FORMATS or x.quantized_axis % x.rank != x.rank - 1:
            raise broken(
                f"{name} of {x}",
                f"activations are float, {', '.join(map(str, dtypes.ACTIVATION_FORMATS))} along K",
            )
        if w.block is None:
            raise broken(
                f"{name} of {x} and a weight of {w.dtype}",
                "quantized activations meet quantized weights",
                "leave the activations in float32",
            )
        if x.block is dtypes.bfp9_block32 and not dtypes.takes_bfp(w.block):
            raise broken(
                f"{name} of {x} and a weight of {w.dtype}",
                "block floating point meets weights of four bits with a scale for 32 or more",
                "quantize the activations to int8_block32",
            )
    else:
        floating(x, f"the operand of {name}")
    return w.shape[0]


def multiply(x: Operand, w: Operand) -> Doubles:
    """``x @ w.T``, by the dot of the tile level where both are quantized: its roundings count."""
    if isinstance(x, Blocks):
        assert isinstance(w, Blocks)
        dot = op_definition("dot").semantics
        assert dot is not None
        rows = int(np.prod(x.shape[:-1]))
        planes = {n: p.reshape(rows, p.shape[-1]) for n, p in x.planes.items()}
        flat = Blocks(x.format, 1, (rows, x.shape[-1]), planes)
        zeros = np.zeros((rows, w.shape[0]), np.float32)
        product: Doubles = dot({}, flat, w.transposed((1, 0)), zeros)
        return product.reshape(*x.shape[:-1], w.shape[0]).astype(np.float64)
    return doubles(x) @ doubles(w).T


def _linear_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    flags = [name for name in LINEAR_OPTIONS if attrs[name]]
    tensors = count(operands, 2 + len(flags), "linear")
    x = tensors[0]
    columns = _check_weight(x, tensors[1], "linear")
    shape = (*x.shape[:-1], columns)
    activation_name(attrs["activation"])
    for flag, operand in zip(flags, tensors[2:], strict=True):
        floating(operand, f"the {flag} of linear")
        expected = (columns,) if flag == "bias" else shape
        if operand.shape != expected:
            raise broken(
                f"a {flag} of {operand} for a result of {list(map(str, shape))}",
                f"the {flag} of linear has the shape {list(map(str, expected))}",
            )
    return [stored(shape, attrs["quantize"])]


def _linear(attrs: Mapping[str, Any], x: Operand, w: Operand, *rest: Operand) -> Operand:
    optional = iter(rest)
    value = multiply(x, w) * np.float64(np.float32(attrs["scale"]))
    if attrs["bias"]:
        value = value + doubles(next(optional))
    value = ACTIVATIONS[attrs["activation"]](value)
    if attrs["softcap"]:
        value = attrs["softcap"] * np.tanh(value / attrs["softcap"])
    if attrs["residual"]:
        value = value + doubles(next(optional))
    return finish(value, attrs)


def _linear_cost(op: Op) -> Cost:
    x, result = op.operands[0].tensor, op.results[0].tensor
    return Cost(2 * elements(result) * extent(x.shape[-1]), traffic(op))


declare(
    OpDef(
        "linear",
        "tensor",
        _linear_typing,
        _linear,
        _linear_cost,
        defaults={
            "bias": False,
            "residual": False,
            "activation": "",
            "scale": 1.0,
            "softcap": 0.0,
            "quantize": "",
            "activation_bits": 8,
        },
        exact=False,
        error_bound=2.0,
        doc="linear(x, w, [bias], [residual])"
        " {bias, residual, activation, scale, softcap, quantize, activation_bits}",
    )
)


def _gated_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, gate, up = count(operands, 3, "gated_linear")
    columns = _check_weight(x, gate, "gated_linear")
    equal(_check_weight(x, up, "gated_linear"), columns, "N of the second weight")
    activation_name(attrs["activation"])
    return [stored((*x.shape[:-1], columns), attrs["quantize"])]


def _gated(attrs: Mapping[str, Any], x: Operand, gate: Operand, up: Operand) -> Operand:
    value = ACTIVATIONS[attrs["activation"]](multiply(x, gate)) * multiply(x, up)
    return finish(value, attrs)


def _gated_cost(op: Op) -> Cost:
    x, result = op.operands[0].tensor, op.results[0].tensor
    return Cost(4 * elements(result) * extent(x.shape[-1]), traffic(op))


declare(
    OpDef(
        "gated_linear",
        "tensor",
        _gated_typing,
        _gated,
        _gated_cost,
        defaults={"activation": "silu", "quantize": ""},
        exact=False,
        error_bound=2.0,
        doc="gated_linear(x, w_gate, w_up) {activation, quantize}:"
        " activation(x @ gate.T) * (x @ up.T)",
    )
)


def _batched_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    a, b = count(operands, 2, "batched_matmul")
    rank(floating(a, "the left operand"), 3, "the left operand")
    rank(floating(b, "the right operand"), 3, "the right operand")
    equal(b.shape[0], a.shape[0], "the batch of the right operand")
    equal(b.shape[1], a.shape[2], "K of the right operand")
    return [stored((a.shape[0], a.shape[1], b.shape[2]), "")]


def _batched(attrs: Mapping[str, Any], a: Operand, b: Operand) -> Operand:
    return finish(doubles(a) @ doubles(b), attrs)


def _batched_cost(op: Op) -> Cost:
    k = extent(op.operands[0].tensor.shape[2])
    return Cost(2 * elements(op.results[0].tensor) * k, traffic(op))


declare(
    OpDef(
        "batched_matmul",
        "tensor",
        _batched_typing,
        _batched,
        _batched_cost,
        exact=False,
        error_bound=2.0,
        doc="batched_matmul(a (B, M, K), b (B, K, N)): (B, M, N)",
    )
)


def _window(size: Expr, taps: int, axis: int, attrs: Mapping[str, Any]) -> Expr:
    """The extent of a convolution's result along a spatial axis."""
    reach = attrs["dilation"][axis] * (taps - 1) + 1
    return (size + (2 * attrs["padding"][axis] - reach)) // as_expr(attrs["stride"][axis]) + 1


def _conv2d_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    tensors = count(operands, 2 + bool(attrs["bias"]), "conv2d")
    x = rank(floating(tensors[0], "the image of conv2d"), 4, "the image of conv2d")
    w = rank(floating(tensors[1], "the filter of conv2d"), 4, "the filter of conv2d")
    equal(w.shape[3], x.shape[3], "the filter's channels")
    if min(*attrs["stride"], *attrs["dilation"]) < 1 or min(attrs["padding"]) < 0:
        raise broken("a stride, dilation or padding out of range", "stride and dilation are >= 1")
    if attrs["bias"]:
        equal(tensors[2].shape[0], w.shape[0], "the extent of the bias")
    height = _window(x.shape[1], static(w.shape[1], "the filter's height"), 0, attrs)
    width = _window(x.shape[2], static(w.shape[2], "the filter's width"), 1, attrs)
    return [stored((x.shape[0], height, width, w.shape[0]), "")]


def _conv2d(attrs: Mapping[str, Any], x: Operand, w: Operand, *bias: Operand) -> Operand:
    (down, right), (high, wide) = attrs["stride"], attrs["dilation"]
    (top, left), filters = attrs["padding"], doubles(w)
    image = np.pad(doubles(x), ((0, 0), (top, top), (left, left), (0, 0)))
    rows = (image.shape[1] - high * (filters.shape[1] - 1) - 1) // down + 1
    columns = (image.shape[2] - wide * (filters.shape[2] - 1) - 1) // right + 1
    total = np.zeros((image.shape[0], rows, columns, filters.shape[0]))
    for i in range(filters.shape[1]):
        for j in range(filters.shape[2]):
            part = image[:, i * high :: down, j * wide :: right][:, :rows, :columns]
            total += part @ filters[:, i, j].T
    return finish(total + doubles(bias[0]) if bias else total, attrs)


def _conv2d_cost(op: Op) -> Cost:
    w = op.operands[1].tensor
    taps = elements(w) // max(1, extent(w.shape[0]))
    return Cost(2 * elements(op.results[0].tensor) * taps, traffic(op))


declare(
    OpDef(
        "conv2d",
        "tensor",
        _conv2d_typing,
        _conv2d,
        _conv2d_cost,
        defaults={"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "bias": False},
        exact=False,
        error_bound=2.0,
        doc="conv2d(x (B, H, W, C), w (O, KH, KW, C), [bias (O)])"
        " {stride, padding, dilation, bias}",
    )
)
