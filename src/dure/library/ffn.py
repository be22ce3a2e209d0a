"""Gated feed-forward networks with weights (K, N): gate and up in one kernel, or the whole."""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.activation import silu
from dure.library.convert import convert


@dure.kernel
def gated_linear_kn(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    accumulator: dl.const = dl.float32,
    activation: dl.const = silu,
    scale: dl.const = 1.0,
):
    """``y = activation(x @ gate) * (x @ up)`` for x (M, K), w (K, 2 N) of gate then up, y (M, N).

    ``scale`` multiplies both products: what an integer accumulator stands for.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    gate, up = w[:, : y.shape[1]], w[:, y.shape[1] :]
    gated = dl.zeros((bm, bn), accumulator)
    linear = dl.zeros((bm, bn), accumulator)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        rows = dl.load(x, (i, k), (bm, bk))
        gated = dl.dot(rows, dl.load(gate, (k, j), (bk, bn)), gated)
        linear = dl.dot(rows, dl.load(up, (k, j), (bk, bn)), linear)
    result = activation(scaled(gated, scale)) * scaled(linear, scale)
    dl.store(y, (i, j), convert(result, y.dtype))


@dure.kernel
def gated_ffn(
    x: dl.Tensor,
    gate: dl.Tensor,
    up: dl.Tensor,
    down: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    bf: dl.const,
    activation: dl.const = silu,
):
    """``y = (activation(x @ gate) * (x @ up)) @ down`` in one kernel.

    x is (M, D), gate and up (D, F), down (F, N), y (M, N).  A block of ``bf`` hidden columns is
    made, rounded to x's type and multiplied by its rows of ``down`` before the next one: the
    hidden tensor is never in memory.  It is made again for each block of ``bn`` columns of y, so
    that a kernel whose ``bn`` covers N computes nothing twice.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for f in dl.range(dl.cdiv(gate.shape[1], bf)):
        gated = dl.zeros((bm, bf), dl.float32)
        linear = dl.zeros((bm, bf), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[1], bk)):
            rows = dl.load(x, (i, k), (bm, bk))
            gated = dl.dot(rows, dl.load(gate, (k, f), (bk, bf)), gated)
            linear = dl.dot(rows, dl.load(up, (k, f), (bk, bf)), linear)
        hidden = (activation(gated) * linear).to(x.dtype)
        acc = dl.dot(hidden, dl.load(down, (f, j), (bf, bn)), acc)
    dl.store(y, (i, j), convert(acc, y.dtype))


def scaled(tile: Any, scale: Any) -> Any:
    """``tile * scale``, in float32 whatever the tile holds."""
    return tile.to(dl.float32) if scale == 1.0 else tile.to(dl.float32) * scale
