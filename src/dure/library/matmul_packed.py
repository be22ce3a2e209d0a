"""Matmul with 4-bit weights as two plain tensors: packed codes, and a scale for each 32 of them.

Weights are (K, N).  Row r of the codes (K / 2, N) of uint8 holds row r of the weight in its low
four bits and row K / 2 + r in its high four, so that nothing is ever interleaved along an axis:
a step is two dots.  A code is decoded by arithmetic.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.activation import silu
from dure.library.convert import convert
from dure.library.epilogue import identity

#: Weights that share a scale.
SCALED = 32


def int4_value(code: Any) -> Any:
    """A signed number of four bits from its code 0 .. 15, in float32."""
    return dl.where(code > 7, code - 16, code).to(dl.float32)


def e2m1_value(code: Any) -> Any:
    """A 4-bit float of the OCP microscaling formats: sign, two bits of exponent, one of mantissa.

    Twice the magnitude is ``(2 + m) << (e - 1)``, and ``m`` where e is 0: one of 0, 1, 2, 3, 4, 6,
    8, 12.
    """
    exponent, mantissa = (code >> 1) & 3, code & 1
    doubled = dl.where(exponent == 0, mantissa, (mantissa + 2) << dl.maximum(exponent - 1, 0))
    magnitude = doubled.to(dl.float32) * 0.5
    return dl.where(code > 7, -magnitude, magnitude)


def plain_scale(scale: Any) -> Any:
    """A scale that is a number."""
    return scale.to(dl.float32)


def e8m0_scale(scale: Any) -> Any:
    """A scale of eight bits of exponent: ``2 ** (code - 127)``."""
    return dl.exp2((scale.to(dl.int32) - 127).to(dl.float32))


@dure.kernel
def matmul_packed(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    y: dl.Tensor,
    *extras: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    value: dl.const = int4_value,
    scale: dl.const = plain_scale,
    epilogue: dl.const = identity,
):
    """``y = epilogue(x @ w)`` for x (M, K), codes (K / 2, N), scales (K / 32, N), y (M, N).

    K is a multiple of 64, and so that no block of scales is cut, ``bk`` of 32.  ``value`` and
    ``scale`` decode codes and scales.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    dl.static_assert(x.shape[1] % (2 * SCALED) == 0, "K is a multiple of 64")
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(codes.shape[0], bk)):
        low, high = decoded(codes, scales, (k, j), (bk, bn), value, scale)
        left, right = halves(x, i, k, (bm, bk))
        acc = dl.dot(left, low.to(x.dtype), acc)
        acc = dl.dot(right, high.to(x.dtype), acc)
    dl.store(y, (i, j), convert(epilogue(acc, extras, i, j), y.dtype))


@dure.kernel
def gated_linear_packed(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    value: dl.const = int4_value,
    scale: dl.const = plain_scale,
    activation: dl.const = silu,
):
    """``y = activation(x @ gate) * (x @ up)``: codes (K / 2, 2 N) and scales (K / 32, 2 N) are
    gate's columns, then up's.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    dl.static_assert(x.shape[1] % (2 * SCALED) == 0, "K is a multiple of 64")
    n = y.shape[1]
    gated = dl.zeros((bm, bn), dl.float32)
    linear = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(codes.shape[0], bk)):
        left, right = halves(x, i, k, (bm, bk))
        low, high = decoded(codes[:, :n], scales[:, :n], (k, j), (bk, bn), value, scale)
        gated = dl.dot(left, low.to(x.dtype), gated)
        gated = dl.dot(right, high.to(x.dtype), gated)
        low, high = decoded(codes[:, n:], scales[:, n:], (k, j), (bk, bn), value, scale)
        linear = dl.dot(left, low.to(x.dtype), linear)
        linear = dl.dot(right, high.to(x.dtype), linear)
    dl.store(y, (i, j), convert(activation(gated) * linear, y.dtype))


def halves(x: Any, i: Any, k: Any, shape: Any) -> Any:
    """The columns of x that meet the low and the high codes of block k."""
    half = x.shape[1] // 2
    return dl.load(x[:, :half], (i, k), shape), dl.load(x[:, half:], (i, k), shape)


def decoded(codes: Any, scales: Any, place: Any, shape: Any, value: Any, scale: Any) -> Any:
    """The weights of the low and of the high codes of a block, in float32."""
    packed = dl.load(codes, place, shape).to(dl.int32)
    half = scales.shape[0] // 2
    low = scaled_rows(value(packed & 15), scales[:half], place, scale)
    return low, scaled_rows(value(packed >> 4), scales[half:], place, scale)


def scaled_rows(weights: Any, scales: Any, place: Any, scale: Any) -> Any:
    """``weights`` (bk, bn) times their scales, one for each 32 rows."""
    rows, columns = weights.shape
    factors = scale(dl.load(scales, place, (rows // SCALED, columns)))
    blocks = weights.reshape((rows // SCALED, SCALED, columns))
    return (blocks * factors[:, None, :]).reshape((rows, columns))
