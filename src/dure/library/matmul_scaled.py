"""Matmul with weights of few bits as two plain tensors: codes, and the scales that they stand for.

A weight (K, N) is ``codes * scales``: codes are (K, N) numbers of any type; scales are (1, N), one
a column, or (ceil(K / group), N), one for each ``group`` codes of a column, of which the last may
have fewer.  Codes are converted to the activations' type, which holds each of them exactly, and
the scale is multiplied into the float32 sum of a group's products, not into every weight: what a
vector engine has to do for a weight is one conversion.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.activation import silu
from dure.library.convert import convert
from dure.library.epilogue import identity
from dure.library.indices import Places


@dure.kernel
def matmul_scaled(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    y: dl.Tensor,
    *extras: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    group: dl.const = 0,
    epilogue: dl.const = identity,
):
    """``y = epilogue(x @ (codes * scales))`` for x (M, K), y (M, N); ``group`` of 0 means a scale
    a column, and else divides ``bk``.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    dl.static_assert(group == 0 or bk % group == 0, "a tile holds whole groups")
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        rows = dl.load(x, (i, k), (bm, bk))
        acc = added(acc, rows, block(codes, None, k, j, (bk, bn)), scales, (None, k, j), group)
    acc = by_column(acc, scales, None, j, group)
    dl.store(y, (i, j), convert(epilogue(acc, extras, i, j), y.dtype))


@dure.kernel
def gated_linear_scaled(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    group: dl.const = 0,
    activation: dl.const = silu,
):
    """``y = activation(x @ gate) * (x @ up)``: codes and scales have gate's columns, then up's."""
    i, j = dl.program_id(0), dl.program_id(1)
    dl.static_assert(group == 0 or bk % group == 0, "a tile holds whole groups")
    n = y.shape[1]
    gate, gate_scales, up, up_scales = codes[:, :n], scales[:, :n], codes[:, n:], scales[:, n:]
    gated = dl.zeros((bm, bn), dl.float32)
    linear = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        rows = dl.load(x, (i, k), (bm, bk))
        place = (None, k, j)
        gated = added(gated, rows, block(gate, None, k, j, (bk, bn)), gate_scales, place, group)
        linear = added(linear, rows, block(up, None, k, j, (bk, bn)), up_scales, place, group)
    gated = by_column(gated, gate_scales, None, j, group)
    linear = by_column(linear, up_scales, None, j, group)
    dl.store(y, (i, j), convert(activation(gated) * linear, y.dtype))


@dure.kernel
def grouped_matmul_scaled(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    starts: Places,
    stops: Places,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    group: dl.const = 0,
):
    """``y[t] = x[t] @ (codes[e] * scales[e]) + bias[e]`` for the rows ``starts[e] .. stops[e]`` of
    each expert e; codes are (E, K, N), scales (E, 1 or ceil(K / group), N), bias (E, N) or None.
    """
    e, j = dl.program_id(0), dl.program_id(1)
    dl.static_assert(group == 0 or bk % group == 0, "a tile holds whole groups")
    own, result = x[starts[e] : stops[e]], y[starts[e] : stops[e]]
    for i in dl.range(dl.cdiv(own.shape[0], bm)):
        acc = dl.zeros((bm, bn), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[1], bk)):
            rows = dl.load(own, (i, k), (bm, bk))
            acc = added(acc, rows, block(codes, e, k, j, (bk, bn)), scales, (e, k, j), group)
        acc = by_column(acc, scales, e, j, group)
        if bias is not None:
            acc = acc + dl.load(bias, (e, j), (1, bn)).to(dl.float32)
        dl.store(result, (i, j), convert(acc, y.dtype))


def block(tensor: Any, expert: Any, k: Any, j: Any, shape: Any) -> Any:
    """A tile of a tensor (K, N), or of an expert's part of one (E, K, N)."""
    if expert is None:
        return dl.load(tensor, (k, j), shape)
    return dl.load(tensor, (expert, k, j), (1, shape[0], shape[1])).reshape(shape)


def added(acc: Any, rows: Any, codes: Any, scales: Any, place: Any, group: Any) -> Any:
    """``acc`` with the product of ``rows`` and a tile of codes, times its scales where a tile has
    scales of its own.
    """
    codes = codes.to(rows.dtype)
    if group == 0:
        return dl.dot(rows, codes, acc)
    (bm, bk), bn = rows.shape, codes.shape[1]
    count = bk // group
    factors = block(scales, place[0], place[1], place[2], (count, bn)).to(dl.float32)
    if count == 1:
        return acc + dl.dot(rows, codes) * factors
    left = rows.reshape((bm, count, group))
    left = left.reshape((count, 1, group)) if bm == 1 else dl.transpose(left, (1, 0, 2))
    sums = dl.dot(left, codes.reshape((count, group, bn)))
    return acc + dl.sum(sums * factors.reshape((count, 1, bn)), 0)


def by_column(acc: Any, scales: Any, expert: Any, j: Any, group: Any) -> Any:
    """The sums times the scales of their columns, where these are all that there are."""
    if group:
        return acc
    return acc * block(scales, expert, 0, j, (1, acc.shape[1])).to(dl.float32)
