"""Matmul and gated feed-forward network as XLA runs them on a TPU: what is used again is copied to
the scratchpad whole before the first product, the rest streams by in tiles.

The first block of K writes a result and the others add to it, so nothing is cleared.  Which operand
stays, the tile sizes and the order are not the kernels': see :mod:`dure.library.toolchain`.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.epilogue import identity


@dure.kernel
def matmul_staged(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    *extras: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    whole: dl.const,
    epilogue: dl.const = identity,
):
    """``y = epilogue(x @ w)`` for x (M, K), w (K, N), y (M, N).

    ``whole`` says that ``bk`` covers K; ``extras`` are the epilogue's tensors.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.dot(dl.load(x, (i, 0), (bm, bk)), dl.load(w, (0, j), (bk, bn)))
    if not whole:
        for k in dl.range(1, dl.cdiv(x.shape[1], bk)):
            acc = dl.dot(dl.load(x, (i, k), (bm, bk)), dl.load(w, (k, j), (bk, bn)), acc)
    dl.store(y, (i, j), convert(epilogue(acc, extras, i, j), y.dtype))


@dure.kernel
def gated_matmul_staged(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    activation: dl.const,
):
    """``y = (activation(gate) * up) @ w`` for x (M, 2 K) of gate then up, w (K, N), y (M, N)."""
    i, j = dl.program_id(0), dl.program_id(1)
    gate, up = x[:, : w.shape[0]], x[:, w.shape[0] :]
    acc = dl.dot(
        gated(dl.load(gate, (i, 0), (bm, bk)), dl.load(up, (i, 0), (bm, bk)), activation),
        dl.load(w, (0, j), (bk, bn)),
    )
    for k in dl.range(1, dl.cdiv(w.shape[0], bk)):
        acc = dl.dot(
            gated(dl.load(gate, (i, k), (bm, bk)), dl.load(up, (i, k), (bm, bk)), activation),
            dl.load(w, (k, j), (bk, bn)),
            acc,
        )
    dl.store(y, (i, j), convert(acc, y.dtype))


def gated(gate: Any, up: Any, activation: Any) -> Any:
    """``activation(gate) * up``, in their type."""
    return (activation(gate.to(dl.float32)) * up.to(dl.float32)).to(gate.dtype)


@dure.kernel
def gated_ffn_staged(
    x: dl.Tensor,
    w: dl.Tensor,
    down: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bf: dl.const,
    bd: dl.const,
    activation: dl.const,
):
    """``y = (activation(x @ gate) * (x @ up)) @ down``, whose hidden tensor never leaves the
    scratchpad: a block of ``bf`` columns of it at a time.

    x is (M, D), w (D, 2 F) of gate then up, down (F, D), y (M, D); ``bd`` is D.
    """
    i = dl.program_id(0)
    gate, up = w[:, : down.shape[0]], w[:, down.shape[0] :]
    rows = dl.load(x, (i, 0), (bm, bd))
    hidden = activation(dl.dot(rows, dl.load(gate, (0, 0), (bd, bf))))
    hidden = hidden * dl.dot(rows, dl.load(up, (0, 0), (bd, bf)))
    acc = dl.dot(hidden.to(x.dtype), dl.load(down, (0, 0), (bf, bd)))
    for f in dl.range(1, dl.cdiv(down.shape[0], bf)):
        hidden = activation(dl.dot(rows, dl.load(gate, (0, f), (bd, bf))))
        hidden = hidden * dl.dot(rows, dl.load(up, (0, f), (bd, bf)))
        acc = dl.dot(hidden.to(x.dtype), dl.load(down, (f, 0), (bf, bd)), acc)
    dl.store(y, (i, 0), convert(acc, y.dtype))


@dure.kernel
def ffn_staged(
    x: dl.Tensor,
    w: dl.Tensor,
    down: dl.Tensor,
    y: dl.Tensor,
    first_bias: dl.Tensor,
    last_bias: dl.Tensor,
    bm: dl.const,
    bf: dl.const,
    bd: dl.const,
    activation: dl.const,
):
    """``y = activation(x @ w + first_bias) @ down + last_bias``, with the hidden tensor as in
    :func:`gated_ffn_staged`.

    x is (M, D), w (D, F), down (F, D), y (M, D); ``bd`` is D.
    """
    i = dl.program_id(0)
    rows = dl.load(x, (i, 0), (bm, bd))
    added = dl.load(first_bias, (0,), (bf,)).to(dl.float32)[None, :]
    hidden = activation(dl.dot(rows, dl.load(w, (0, 0), (bd, bf))) + added)
    acc = dl.dot(hidden.to(x.dtype), dl.load(down, (0, 0), (bf, bd)))
    for f in dl.range(1, dl.cdiv(down.shape[0], bf)):
        added = dl.load(first_bias, (f,), (bf,)).to(dl.float32)[None, :]
        hidden = activation(dl.dot(rows, dl.load(w, (0, f), (bd, bf))) + added)
        acc = dl.dot(hidden.to(x.dtype), dl.load(down, (f, 0), (bf, bd)), acc)
    acc = acc + dl.load(last_bias, (0,), (bd,)).to(dl.float32)[None, :]
    dl.store(y, (i, 0), convert(acc, y.dtype))


@dure.kernel
def gated_ffn_weights_first(
    x: dl.Tensor,
    w: dl.Tensor,
    down: dl.Tensor,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bf: dl.const,
    bd: dl.const,
    activation: dl.const,
):
    """:func:`gated_ffn_staged` with all of w in the scratchpad before the first product.

    ``bd`` is D and ``bf`` is F; y is made ``bn`` columns at a time.
    """
    i = dl.program_id(0)
    gate, up = w[:, : down.shape[0]], w[:, down.shape[0] :]
    left, right = dl.load(gate, (0, 0), (bd, bf)), dl.load(up, (0, 0), (bd, bf))
    rows = dl.load(x, (i, 0), (bm, bd))
    hidden = (activation(dl.dot(rows, left)) * dl.dot(rows, right)).to(x.dtype)
    for j in dl.range(dl.cdiv(y.shape[1], bn)):
        result = dl.dot(hidden, dl.load(down, (0, j), (bf, bn)))
        dl.store(y, (i, j), convert(result, y.dtype))


@dure.kernel
def ffn_weights_first(
    x: dl.Tensor,
    w: dl.Tensor,
    down: dl.Tensor,
    y: dl.Tensor,
    first_bias: dl.Tensor,
    last_bias: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bf: dl.const,
    bd: dl.const,
    activation: dl.const,
):
    """:func:`ffn_staged` with all of w in the scratchpad before the first product."""
    i = dl.program_id(0)
    weight = dl.load(w, (0, 0), (bd, bf))
    added = dl.load(first_bias, (0,), (bf,)).to(dl.float32)[None, :]
    rows = dl.load(x, (i, 0), (bm, bd))
    hidden = activation(dl.dot(rows, weight) + added).to(x.dtype)
    for j in dl.range(dl.cdiv(y.shape[1], bn)):
        result = dl.dot(hidden, dl.load(down, (0, j), (bf, bn)))
        result = result + dl.load(last_bias, (j,), (bn,)).to(dl.float32)[None, :]
        dl.store(y, (i, j), convert(result, y.dtype))
