"""Normalisation of rows: RMS norm, layer norm, softmax.

A row is walked in blocks of ``bd`` columns; partial sums stay apart, one a column of the block,
until the end, so that the sum's order depends on the row's length alone.  Where a block covers the
row, it is one tile, and softmax computes each exponential once.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import NEGATIVE_INFINITY, convert


@dure.kernel
def rms_norm(
    x: dl.Tensor,
    weight: dl.Tensor | None,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bd: dl.const,
    epsilon: dl.const,
):
    """``y = x / sqrt(mean(x^2) + epsilon) * weight (+ residual)`` a row, for x, residual, y (M, D).

    ``weight`` (D,) and ``residual`` may be None.  y may hold int8 blocks of 32.
    """
    i = dl.program_id(0)
    count = dl.full((bm, 1), x.shape[1], dl.float32)
    if x.shape[1] <= bd:
        row = dl.load(x, (i, 0), (bm, bd)).to(dl.float32)
        factor = dl.rsqrt(dl.sum(row * row, 1, keepdims=True) / count + epsilon)
        scaled((x, weight, residual, y), (i, 0), factor, (bm, bd))
    else:
        squares = dl.zeros((bm, bd), dl.float32)
        for c in dl.range(dl.cdiv(x.shape[1], bd)):
            part = dl.load(x, (i, c), (bm, bd)).to(dl.float32)
            squares = squares + part * part
        factor = dl.rsqrt(dl.sum(squares, 1, keepdims=True) / count + epsilon)
        for c in dl.range(dl.cdiv(x.shape[1], bd)):
            scaled((x, weight, residual, y), (i, c), factor, (bm, bd))


@dure.kernel
def rms_norm_sums(
    x: dl.Tensor,
    weight: dl.Tensor | None,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bd: dl.const,
    epsilon: dl.const,
):
    """Like :func:`rms_norm`, with the sum of each block of a row added to that of those before: for
    engines that square and add up elements as they pass.  The sum's order depends on ``bd`` too.
    """
    i = dl.program_id(0)
    total = dl.zeros((bm, 1), dl.float32)
    for c in dl.range(dl.cdiv(x.shape[1], bd)):
        part = dl.load(x, (i, c), (bm, bd)).to(dl.float32)
        total = total + dl.sum(part * part, 1, keepdims=True)
    mean = total / dl.full((bm, 1), x.shape[1], dl.float32)
    factor = dl.rsqrt(mean + epsilon)
    for c in dl.range(dl.cdiv(x.shape[1], bd)):
        scaled((x, weight, residual, y), (i, c), factor, (bm, bd))


def scaled(tensors: Any, index: Any, factor: Any, sizes: Any) -> None:
    """Store a block of x times its rows' factors, with the weight and the residual where there are
    any.
    """
    x, weight, residual, y = tensors
    bm, bd = sizes
    out = dl.load(x, index, (bm, bd)).to(dl.float32) * factor
    if weight is not None:
        out = out * dl.load(weight, index[1:], (bd,)).to(dl.float32)[None, :]
    if residual is not None:
        out = out + dl.load(residual, index, (bm, bd)).to(dl.float32)
    dl.store(y, index, convert(out, y.dtype))


@dure.kernel
def rms_norm_rows(
    x: dl.Tensor,
    weight: dl.Tensor | None,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bd: dl.const,
    epsilon: dl.const,
):
    """Like :func:`rms_norm`, with whole rows in a tile: ``bd`` covers D, and x is read once."""
    i = dl.program_id(0)
    rows = dl.load(x, (i, 0), (bm, bd)).to(dl.float32)
    mean = dl.sum(rows * rows, 1, keepdims=True) / dl.full((bm, 1), x.shape[1], dl.float32)
    out = rows * dl.rsqrt(mean + epsilon)
    if weight is not None:
        out = out * dl.load(weight, (0,), (bd,)).to(dl.float32)[None, :]
    if residual is not None:
        out = out + dl.load(residual, (i, 0), (bm, bd)).to(dl.float32)
    dl.store(y, (i, 0), convert(out, y.dtype))


@dure.kernel
def rms_norm_folded(
    x: dl.Tensor,
    weight: dl.Tensor,
    y: dl.Tensor,
    parts: dl.const,
    columns: dl.const,
    epsilon: dl.const,
):
    """``y = x / sqrt(mean(x^2) + epsilon) * weight`` for x and y (M, parts, columns), whose last
    two axes are one row, weight (parts, columns); a row an instance.

    A single long row leaves most lanes of an engine idle that has one row a lane; folded, its parts
    lie on lanes of their own.
    """
    i = dl.program_id(0)
    row = dl.load(x, (i, 0, 0), (1, parts, columns)).reshape((parts, columns)).to(dl.float32)
    total = dl.sum(dl.sum(row * row, 1, keepdims=True), 0, keepdims=True)
    scale = dl.rsqrt(total * (1.0 / (parts * columns)) + epsilon)
    scaled = row * scale * dl.load(weight, (0, 0), (parts, columns)).to(dl.float32)
    dl.store(y, (i, 0, 0), convert(scaled, y.dtype).reshape((1, parts, columns)))


@dure.kernel
def layer_norm(
    x: dl.Tensor,
    weight: dl.Tensor | None,
    bias: dl.Tensor | None,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bd: dl.const,
    epsilon: dl.const,
):
    """``y = (x - mean) / sqrt(variance + epsilon) * weight + bias (+ residual)`` a row.

    x, residual and y are (M, D); ``weight`` and ``bias`` (D,), and ``residual``, may be None.  The
    variance is that of the differences from the mean.
    """
    i = dl.program_id(0)
    count = dl.full((bm, 1), x.shape[1], dl.float32)
    if x.shape[1] <= bd:
        rows = dl.load(x, (i, 0), (bm, bd)).to(dl.float32)
        mean = dl.sum(rows, 1, keepdims=True) / count
        inside = (dl.arange(bd) < x.shape[1])[None, :]
        difference = dl.where(inside, rows - mean, 0.0)
        squares = dl.sum(difference * difference, 1, keepdims=True)
        factor = dl.rsqrt(squares / count + epsilon)
        normed((x, weight, bias, residual, y), (i, 0), mean, factor, (bm, bd))
    else:
        sums = dl.zeros((bm, bd), dl.float32)
        for c in dl.range(dl.cdiv(x.shape[1], bd)):
            sums = sums + dl.load(x, (i, c), (bm, bd)).to(dl.float32)
        mean = dl.sum(sums, 1, keepdims=True) / count
        squares = dl.zeros((bm, bd), dl.float32)
        for c in dl.range(dl.cdiv(x.shape[1], bd)):
            inside = (c * bd + dl.arange(bd) < x.shape[1])[None, :]
            difference = dl.load(x, (i, c), (bm, bd)).to(dl.float32) - mean
            difference = dl.where(inside, difference, 0.0)
            squares = squares + difference * difference
        factor = dl.rsqrt(dl.sum(squares, 1, keepdims=True) / count + epsilon)
        for c in dl.range(dl.cdiv(x.shape[1], bd)):
            normed((x, weight, bias, residual, y), (i, c), mean, factor, (bm, bd))


def normed(tensors: Any, index: Any, mean: Any, factor: Any, sizes: Any) -> None:
    """Store a block of a layer norm."""
    x, weight, bias, residual, y = tensors
    bm, bd = sizes
    out = (dl.load(x, index, (bm, bd)).to(dl.float32) - mean) * factor
    if weight is not None:
        out = out * dl.load(weight, index[1:], (bd,)).to(dl.float32)[None, :]
    if bias is not None:
        out = out + dl.load(bias, index[1:], (bd,)).to(dl.float32)[None, :]
    if residual is not None:
        out = out + dl.load(residual, index, (bm, bd)).to(dl.float32)
    dl.store(y, index, convert(out, y.dtype))


@dure.kernel
def layer_norm_rows(
    x: dl.Tensor,
    weight: dl.Tensor | None,
    bias: dl.Tensor | None,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bd: dl.const,
    epsilon: dl.const,
    padded: dl.const = True,
):
    """Like :func:`layer_norm`, with whole rows in a tile: ``bd`` covers D, and x is read once.
    ``padded`` says that ``bd`` may be more than D.
    """
    i = dl.program_id(0)
    rows = dl.load(x, (i, 0), (bm, bd)).to(dl.float32)
    count = dl.full((bm, 1), x.shape[1], dl.float32)
    difference = rows - dl.sum(rows, 1, keepdims=True) / count
    if padded:
        difference = dl.where((dl.arange(bd) < x.shape[1])[None, :], difference, 0.0)
    squares = dl.sum(difference * difference, 1, keepdims=True)
    out = difference * dl.rsqrt(squares / count + epsilon)
    if weight is not None:
        out = out * dl.load(weight, (0,), (bd,)).to(dl.float32)[None, :]
    if bias is not None:
        out = out + dl.load(bias, (0,), (bd,)).to(dl.float32)[None, :]
    if residual is not None:
        out = out + dl.load(residual, (i, 0), (bm, bd)).to(dl.float32)
    dl.store(y, (i, 0), convert(out, y.dtype))


@dure.kernel
def softmax(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bd: dl.const):
    """``y = exp(x - max) / sum(exp(x - max))`` a row, for x, y (M, D).

    A row of nothing but -inf has no distribution: it gives NaN, as in NumPy and PyTorch.
    """
    if x.shape[1] <= bd:
        softmax_of_rows(x, y, (bm, bd))
    else:
        softmax_of_blocks(x, y, (bm, bd))


def softmax_of_blocks(x: Any, y: Any, sizes: Any) -> None:
    """A softmax of rows that are walked in blocks of columns."""
    i = dl.program_id(0)
    bm, bd = sizes
    highest = dl.full((bm, bd), NEGATIVE_INFINITY, dl.float32)
    for c in dl.range(dl.cdiv(x.shape[1], bd)):
        highest = dl.maximum(
            highest, dl.load(x, (i, c), (bm, bd), fill=NEGATIVE_INFINITY).to(dl.float32)
        )
    top = dl.max(highest, 1, keepdims=True)
    sums = dl.zeros((bm, bd), dl.float32)
    for c in dl.range(dl.cdiv(x.shape[1], bd)):
        part = dl.load(x, (i, c), (bm, bd), fill=NEGATIVE_INFINITY).to(dl.float32)
        sums = sums + dl.exp(part - top)
    factor = 1.0 / dl.sum(sums, 1, keepdims=True)
    for c in dl.range(dl.cdiv(x.shape[1], bd)):
        part = dl.load(x, (i, c), (bm, bd), fill=NEGATIVE_INFINITY).to(dl.float32)
        dl.store(y, (i, c), convert(dl.exp(part - top) * factor, y.dtype))


@dure.kernel
def softmax_rows(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bd: dl.const):
    """Like :func:`softmax`, with whole rows in a tile: ``bd`` covers D, and x is read once."""
    softmax_of_rows(x, y, (bm, bd))


def softmax_of_rows(x: Any, y: Any, sizes: Any) -> None:
    """A softmax of rows that a tile holds: each exponential is computed once."""
    i = dl.program_id(0)
    bm, bd = sizes
    rows = dl.load(x, (i, 0), (bm, bd), fill=NEGATIVE_INFINITY).to(dl.float32)
    weights = dl.exp(rows - dl.max(rows, 1, keepdims=True))
    factor = 1.0 / dl.sum(weights, 1, keepdims=True)
    dl.store(y, (i, 0), convert(weights * factor, y.dtype))
