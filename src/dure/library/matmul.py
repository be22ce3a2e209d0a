"""Matmul: one kernel for every pair of element types, with an epilogue that is passed in.

Weights are (N, K), as GGUF and PyTorch keep them.  A block-quantized operand goes into ``dot`` as
it is: int8 blocks times any weight format is exact inside a block, a float operand means
dequantized weights. Every element of the result is accumulated over K in order, whatever the tile
sizes are.
"""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.epilogue import identity


@dure.kernel
def matmul(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    *extras: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    accumulator: dl.const = dl.float32,
    epilogue: dl.const = identity,
):
    """``y = epilogue(x @ w.T)`` for x (M, K), w (N, K), y (M, N).

    ``extras`` are the epilogue's tensors; ``accumulator`` is ``dl.int32`` where both operands
    are plain integers.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), accumulator)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(w, (j, k), (bn, bk)).T, acc)
    dl.store(y, (i, j), convert(epilogue(acc, extras, i, j), y.dtype))


@dure.kernel
def matmul_kn(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    *extras: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    accumulator: dl.const = dl.float32,
    epilogue: dl.const = identity,
):
    """``y = epilogue(x @ w)`` for w (K, N), as NumPy and ONNX keep it."""
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), accumulator)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(w, (k, j), (bk, bn)), acc)
    dl.store(y, (i, j), convert(epilogue(acc, extras, i, j), y.dtype))


@dure.kernel
def batched_matmul(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    transposed: dl.const = True,
    shared: dl.const = False,
):
    """``y[b] = x[b] @ w[b].T`` for x (B, M, K), y (B, M, N).

    w is (B, N, K), or (B, K, N) where not ``transposed``; ``shared`` says that w has one batch for
    all.
    """
    b, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[2], bk)):
        left = dl.load(x, (b, i, k), (1, bm, bk)).reshape((bm, bk))
        if transposed:
            right = dl.load(w, (0 if shared else b, j, k), (1, bn, bk)).reshape((bn, bk)).T
        else:
            right = dl.load(w, (0 if shared else b, k, j), (1, bk, bn)).reshape((bk, bn))
        acc = dl.dot(left, right, acc)
    dl.store(y, (b, i, j), convert(acc, y.dtype).reshape((1, bm, bn)))


@dure.kernel
def gated_linear(
    x: dl.Tensor,
    gate: dl.Tensor,
    up: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    activation: dl.const,
):
    """``y = activation(x @ gate.T) * (x @ up.T)`` for x (M, K), gate and up (N, K), y (M, N).

    The two loops are apart so that each is one run of dots into one accumulator.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    gated = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        gated = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(gate, (j, k), (bn, bk)).T, gated)
    linear = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        linear = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(up, (j, k), (bn, bk)).T, linear)
    dl.store(y, (i, j), convert(activation(gated) * linear, y.dtype))
