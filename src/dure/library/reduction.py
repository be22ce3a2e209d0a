"""Reductions along one axis of any tensor, seen as (outer, axis, inner)."""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import INFINITY, NEGATIVE_INFINITY, convert


@dure.kernel
def reduce_last(
    x: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    combiner: dl.const,
):
    """``y[m]`` is the sum, mean, prod, max or min of row m of x (M, N).

    Partial results stay apart, one a column of the block, until the end.
    """
    i = dl.program_id(0)
    total = dl.full((bm, bn), identity_of(combiner), dl.float32)
    for c in dl.range(dl.cdiv(x.shape[1], bn)):
        part = dl.load(x, (i, c), (bm, bn), fill=identity_of(combiner)).to(dl.float32)
        total = combine(combiner, total, part)
    result = collapse(combiner, total, 1)
    if combiner == "mean":
        result = result / dl.full((bm,), x.shape[1], dl.float32)
    dl.store(y, (i,), convert(result, y.dtype))


@dure.kernel
def reduce_middle(
    x: dl.Tensor,
    y: dl.Tensor,
    bi: dl.const,
    combiner: dl.const,
):
    """``y[o, i]`` is the reduction of ``x[o, :, i]`` for x (O, N, I), y (O, I), one row after
    another.
    """
    i, o = dl.program_id(0), dl.program_id(1)
    total = dl.full((1, 1, bi), identity_of(combiner), dl.float32)
    for n in dl.range(x.shape[1]):
        total = combine(combiner, total, dl.load(x, (o, n, i), (1, 1, bi)).to(dl.float32))
    if combiner == "mean":
        total = total / dl.full((1, 1, bi), x.shape[1], dl.float32)
    dl.store(y, (o, i), convert(total.reshape((1, bi)), y.dtype))


def identity_of(combiner: str) -> float:
    """What a reduction starts from."""
    if combiner == "prod":
        return 1.0
    if combiner == "max":
        return NEGATIVE_INFINITY
    if combiner == "min":
        return INFINITY
    return 0.0


def combine(combiner: str, a: Any, b: Any) -> Any:
    """One step of the reduction on two tiles."""
    if combiner == "prod":
        return a * b
    if combiner == "max":
        return dl.maximum(a, b)
    if combiner == "min":
        return dl.minimum(a, b)
    return a + b


def collapse(combiner: str, x: Any, axis: int) -> Any:
    """The reduction of a tile along an axis."""
    if combiner == "prod":
        return dl.prod(x, axis)
    if combiner == "max":
        return dl.max(x, axis)
    if combiner == "min":
        return dl.min(x, axis)
    return dl.sum(x, axis)
