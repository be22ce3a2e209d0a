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
    """``y = (activation(gate) * up) @ w`` for x (M, 2 K) of gate then up, w (K, N), y (M, N).

    ``bk`` divides K.
    """
    i, j = dl.program_id(0), dl.program_id(1)
    half = x.shape[1] // 2 // bk
    acc = dl.dot(gated(x, i, 0, half, bm, bk, activation), dl.load(w, (0, j), (bk, bn)))
    for k in dl.range(1, half):
        acc = dl.dot(gated(x, i, k, half, bm, bk, activation), dl.load(w, (k, j), (bk, bn)), acc)
    dl.store(y, (i, j), convert(acc, y.dtype))


def gated(x: Any, i: Any, k: Any, half: Any, bm: int, bk: int, activation: Any) -> Any:
    """A tile of ``activation(gate) * up``, in x's type."""
    gate = dl.load(x, (i, k), (bm, bk)).to(dl.float32)
    up = dl.load(x, (i, k + half), (bm, bk)).to(dl.float32)
    return (activation(gate) * up).to(x.dtype)


@dure.kernel
def ffn_staged(
    x: dl.Tensor,
    w: dl.Tensor,
    down: dl.Tensor,
    y: dl.Tensor,
    *biases: dl.Tensor,
    bm: dl.const,
    bf: dl.const,
    bd: dl.const,
    activation: dl.const,
    gate: dl.const,
):
    """``y = hidden @ down`` for x (M, D), down (F, D), y (M, D), where ``hidden`` (M, F) never
    leaves the scratchpad; ``bd`` is D, ``bf`` divides F.

    With ``gate``, w is (D, 2 F) of gate then up, and hidden is ``activation(x @ gate) * (x @ up)``;
    without, w is (D, F) and hidden is ``activation(x @ w + bias)``, and y has a bias too.
    """
    i = dl.program_id(0)
    half = down.shape[0] // bf
    rows = dl.load(x, (i, 0), (bm, bd))
    hidden = _hidden(rows, w, biases, 0, half, bf, bd, activation, gate)
    acc = dl.dot(hidden.to(x.dtype), dl.load(down, (0, 0), (bf, bd)))
    for f in dl.range(1, half):
        hidden = _hidden(rows, w, biases, f, half, bf, bd, activation, gate)
        acc = dl.dot(hidden.to(x.dtype), dl.load(down, (f, 0), (bf, bd)), acc)
    if not gate:
        acc = acc + dl.load(biases[1], (0,), (bd,)).to(dl.float32)[None, :]
    dl.store(y, (i, 0), convert(acc, y.dtype))


def _hidden(
    rows: Any,
    w: Any,
    biases: Any,
    f: Any,
    half: Any,
    bf: int,
    bd: int,
    activation: Any,
    gate: bool,
) -> Any:
    """A block of hidden columns, in float32."""
    first = dl.dot(rows, dl.load(w, (0, f), (bd, bf)))
    if gate:
        return activation(first) * dl.dot(rows, dl.load(w, (0, f + half), (bd, bf)))
    return activation(first + dl.load(biases[0], (f,), (bf,)).to(dl.float32)[None, :])
