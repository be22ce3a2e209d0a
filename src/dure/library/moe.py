"""Mixture of experts: which experts a token goes to, and the matmul of tokens sorted by expert."""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import NEGATIVE_INFINITY, convert
from dure.library.indices import Places

_LAST = 2**31 - 1


@dure.kernel
def moe_route(
    x: dl.Tensor,
    weights: dl.Tensor,
    experts: dl.Tensor,
    bm: dl.const,
    be: dl.const,
    bt: dl.const,
    normalized: dl.const = True,
):
    """The chosen experts of each token, by descending probability, ties by index.

    x is (T, E) logits, weights and experts (T, k).  The probabilities are the softmax over all
    experts; ``normalized`` divides the chosen ones by their sum.  ``be`` covers E and ``bt`` k.
    """
    i = dl.program_id(0)
    logits = dl.load(x, (i, 0), (bm, be), fill=NEGATIVE_INFINITY).to(dl.float32)
    odds = dl.exp(logits - dl.max(logits, 1, keepdims=True))
    left = odds / dl.sum(odds, 1, keepdims=True)
    expert = dl.broadcast_to(dl.arange(be)[None, :], (bm, be))
    # What is beyond the last expert comes after every expert, even one of probability zero.
    left = dl.where(expert < x.shape[1], left, -1.0)
    place = dl.broadcast_to(dl.arange(bt)[None, :], (bm, bt))
    values = dl.zeros((bm, bt), dl.float32)
    chosen = dl.zeros((bm, bt), dl.int32)
    for turn in dl.range(weights.shape[1]):
        best = dl.max(left, 1, keepdims=True)
        who = dl.min(dl.where(left == best, expert, _LAST), 1, keepdims=True)
        values = dl.where(place == turn, best, values)
        chosen = dl.where(place == turn, who, chosen)
        left = dl.where(expert == who, -2.0, left)
    if normalized:
        values = values / dl.sum(values, 1, keepdims=True)
    dl.store(weights, (i, 0), convert(values, weights.dtype))
    dl.store(experts, (i, 0), chosen)


@dure.kernel
def grouped_matmul(
    x: dl.Tensor,
    w: dl.Tensor,
    starts: Places,
    stops: Places,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
):
    """``y[t] = x[t] @ w[e]`` for the rows ``starts[e] .. stops[e]`` of each expert e.

    x is (T, K) sorted by expert, w (E, K, N), y (T, N); an expert may have no rows.  Rows of no
    expert are left as they are.
    """
    e, j = dl.program_id(0), dl.program_id(1)
    rows, result = x[starts[e] : stops[e]], y[starts[e] : stops[e]]
    for i in dl.range(dl.cdiv(rows.shape[0], bm)):
        acc = dl.zeros((bm, bn), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[1], bk)):
            weights = dl.load(w, (e, k, j), (1, bk, bn)).reshape((bk, bn))
            acc = dl.dot(dl.load(rows, (i, k), (bm, bk)), weights, acc)
        dl.store(result, (i, j), convert(acc, y.dtype))
