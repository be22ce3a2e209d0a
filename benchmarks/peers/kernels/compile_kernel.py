"""A kernel of 30 lines, as a user might write it, to be compiled."""

from __future__ import annotations

import dure
import dure.lang as dl


@dure.kernel
def gated_residual(
    x: dl.Tensor,
    gate: dl.Tensor,
    up: dl.Tensor,
    weight: dl.Tensor,
    residual: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
):
    """``y = silu(n @ gate.T) * (n @ up.T) + residual`` for n, the RMS norm of x."""
    i, j = dl.program_id(0), dl.program_id(1)
    squares = dl.zeros((bm, bk), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        part = dl.load(x, (i, k), (bm, bk)).to(dl.float32)
        squares = squares + part * part
    count = dl.full((bm, 1), x.shape[1], dl.float32)
    factor = dl.rsqrt(dl.sum(squares, 1, keepdims=True) / count + 1e-5)
    gated = dl.zeros((bm, bn), dl.float32)
    linear = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        part = dl.load(x, (i, k), (bm, bk)).to(dl.float32) * factor
        part = part * dl.load(weight, (k,), (bk,))[None, :]
        gated = dl.dot(part, dl.load(gate, (j, k), (bn, bk)).T, gated)
        linear = dl.dot(part, dl.load(up, (j, k), (bn, bk)).T, linear)
    z = gated * dl.sigmoid(gated) * linear
    z = z + dl.load(residual, (i, j), (bm, bn)).to(dl.float32)
    dl.store(y, (i, j), z.to(y.dtype))
