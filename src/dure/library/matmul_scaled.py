"""Matmul with weights of few bits as two plain tensors: codes, and the scales that they stand for.

A weight (K, N) is ``codes * scales``: codes are (K, N) numbers of any type; scales are (1, N), one
a column, or (ceil(K / group), N), one for each ``group`` codes of a column, of which the last may
have fewer.  Codes are converted to the activations' type, which holds each of them exactly.

Activations may be codes of the weights' own type, int8 or float8, with a scale for each row
(:mod:`dure.library.quantized`): codes meet codes, and scales of rows are multiplied into the result
like those of columns.

Scales of columns are multiplied into the result.  Scales of groups are multiplied into the float32
sums of the groups' products: what a vector engine has to do for a weight is one conversion, and
its work on sums grows with the rows.  ``early`` multiplies them into the weights instead, which
are then rounded to the activations' type.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.activation import silu
from dure.library.convert import convert
from dure.library.epilogue import identity
from dure.library.indices import Places
from dure.library.moe import biased, both_biased, of_expert


@dure.kernel
def matmul_scaled(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    rows: dl.Tensor | None,
    y: dl.Tensor,
    *extras: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    group: dl.const = 0,
    early: dl.const = False,
    epilogue: dl.const = identity,
):
    """``y = epilogue((rows * x) @ (codes * scales))`` for x (M, K), rows (M, 1) or None, y (M, N);
    ``group`` of 0 means a scale a column, and else divides ``bk``.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    numbers = (bm, bn, bk, group, early)
    acc = by_row(product(x, codes, scales, (i, None, j), numbers), rows, i)
    dl.store(y, (i, j), convert(epilogue(acc, extras, i, j), y.dtype))


@dure.kernel
def gated_linear_scaled(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    rows: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    group: dl.const = 0,
    early: dl.const = False,
    activation: dl.const = silu,
):
    """``y = activation(x @ gate) * (x @ up)``, with both products as in :func:`matmul_scaled`:
    codes and scales have gate's columns, then up's.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    n = y.shape[1]
    numbers = (bm, bn, bk, group, early)
    gated = by_row(product(x, codes[:, :n], scales[:, :n], (i, None, j), numbers), rows, i)
    linear = by_row(product(x, codes[:, n:], scales[:, n:], (i, None, j), numbers), rows, i)
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
    early: dl.const = False,
):
    """``y[t] = x[t] @ (codes[e] * scales[e]) + bias[e]`` for the rows ``starts[e] .. stops[e]`` of
    each expert e; codes are (E, K, N), scales (E, 1 or ceil(K / group), N), bias (E, N) or None.
    """
    e, j = dl.program_id(0), dl.program_id(1)
    numbers = (bm, bn, bk, group, early)
    own, result = of_expert(e, (starts, stops), x, y)
    for i in dl.range(dl.cdiv(own.shape[0], bm)):
        acc = product(own, codes, scales, (i, e, j), numbers)
        dl.store(result, (i, j), convert(biased(acc, bias, e, j), y.dtype))


@dure.kernel
def grouped_gated_scaled(
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
    gating: dl.const,
    group: dl.const = 0,
    early: dl.const = False,
):
    """``gating`` of both products, as :func:`grouped_matmul_scaled` has them: codes, scales and
    bias have gate's columns, then up's.
    """
    e, j = dl.program_id(0), dl.program_id(1)
    n, numbers = y.shape[1], (bm, bn, bk, group, early)
    own, result = of_expert(e, (starts, stops), x, y)
    for i in dl.range(dl.cdiv(own.shape[0], bm)):
        opened = product(own, codes[:, :, :n], scales[:, :, :n], (i, e, j), numbers)
        linear = product(own, codes[:, :, n:], scales[:, :, n:], (i, e, j), numbers)
        opened, linear = both_biased(opened, linear, bias, e, j, n)
        dl.store(result, (i, j), convert(gating(opened, linear), y.dtype))


def product(x: Any, codes: Any, scales: Any, place: Any, numbers: Any) -> Any:
    """The float32 tile (bm, bn) of x times an expert's weights, or the only ones; sums of int8
    products are exact in int32 until they are scaled.
    """
    i, expert, j = place
    bm, bn, bk, group, early = numbers
    dl.static_assert(group == 0 or bk % group == 0, "a tile holds whole groups")
    steps = dl.cdiv(x.shape[1], bk)
    acc = dl.zeros((bm, bn), dl.int32 if x.dtype == dl.int8 else dl.float32)
    if group == 0 or early:
        for k in dl.range(steps):
            right = block(codes, expert, k, j, (bk, bn))
            if group:
                right = weighted(right, factors(scales, expert, k, j, (bk // group, bn)), x.dtype)
            acc = dl.dot(dl.load(x, (i, k), (bm, bk)), right.to(x.dtype), acc)
        if group:
            return acc
        return acc.to(dl.float32) * factors(scales, expert, 0, j, (1, bn)).to(dl.float32)
    count = bk // group
    # A step's sums are scaled in the next one, so that no engine waits for what it needs.
    sums = dl.zeros((count, bm, bn), dl.float32)
    for k in dl.range(steps):
        right = block(codes, expert, k, j, (bk, bn)).to(x.dtype).reshape((count, group, bn))
        acc = acc + scaled(sums, factors(scales, expert, max(k - 1, 0), j, (count, bn)))
        sums = dl.dot(parts(dl.load(x, (i, k), (bm, bk)), count), right)
    return acc + scaled(sums, factors(scales, expert, max(steps - 1, 0), j, (count, bn)))


def by_row(sums: Any, rows: Any, i: Any) -> Any:
    """A tile of sums, times the scales of its rows where x is codes."""
    return sums if rows is None else sums * dl.load(rows, (i, 0), (sums.shape[0], 1))


def block(codes: Any, expert: Any, k: Any, j: Any, shape: Any) -> Any:
    """A tile of codes (K, N), or of an expert's part of (E, K, N)."""
    if expert is None:
        return dl.load(codes, (k, j), shape)
    return dl.load(codes, (expert, k, j), (1, shape[0], shape[1])).reshape(shape)


def factors(scales: Any, expert: Any, k: Any, j: Any, shape: Any) -> Any:
    """A tile of scales; a scale that isn't there is one, since a power of two is never zero."""
    if expert is None:
        return dl.load(scales, (k, j), shape, fill=1)
    return dl.load(scales, (expert, k, j), (1, shape[0], shape[1]), fill=1).reshape(shape)


def parts(rows: Any, count: Any) -> Any:
    """Rows (bm, bk) as (count, bm, bk / count)."""
    bm, bk = rows.shape
    if bm == 1 or count == 1:
        return rows.reshape((count, bm, bk // count))
    return dl.transpose(rows.reshape((bm, count, bk // count)), (1, 0, 2))


def scaled(sums: Any, scales: Any) -> Any:
    """The sums (count, bm, bn) of groups, times their scales (count, bn), together."""
    count, bn = scales.shape
    return dl.sum(sums * scales.to(dl.float32).reshape((count, 1, bn)), 0)


def weighted(codes: Any, scales: Any, dtype: Any) -> Any:
    """The weights that codes and scales stand for; each is exact before it is rounded once."""
    bk, bn = codes.shape
    count = scales.shape[0]
    wide = dtype if scales.dtype == dtype else dl.float32
    blocks = codes.to(wide).reshape((count, bk // count, bn))
    return (blocks * scales.to(wide).reshape((count, 1, bn))).reshape((bk, bn))
