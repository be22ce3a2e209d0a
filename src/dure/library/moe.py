"""Mixture of experts: which experts a token goes to, and the matmul of tokens sorted by expert.

Tokens are sorted by counting: the place of a choice is the number of choices that come before it,
which every instance counts for its own.  Nothing depends on the order of instances.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import NEGATIVE_INFINITY, convert
from dure.library.indices import DistinctPlaces, Places

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
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
):
    """``y[t] = x[t] @ w[e] + bias[e]`` for the rows ``starts[e] .. stops[e]`` of each expert e.

    x is (T, K) sorted by expert, w (E, K, N), y (T, N); an expert may have no rows.  Rows of no
    expert are left as they are.  ``bias`` (E, N) may be None.
    """
    e, j = dl.program_id(0), dl.program_id(1)
    rows, result = of_expert(e, (starts, stops), x, y)
    for i in dl.range(dl.cdiv(rows.shape[0], bm)):
        acc = dl.zeros((bm, bn), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[1], bk)):
            weights = dl.load(w, (e, k, j), (1, bk, bn)).reshape((bk, bn))
            acc = dl.dot(dl.load(rows, (i, k), (bm, bk)), weights, acc)
        dl.store(result, (i, j), convert(biased(acc, bias, e, j), y.dtype))


@dure.kernel
def grouped_gated(
    x: dl.Tensor,
    w: dl.Tensor,
    starts: Places,
    stops: Places,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    gating: dl.const,
):
    """``y[t] = gating(x[t] @ gate[e] + bias, x[t] @ up[e] + bias)`` as :func:`grouped_matmul` has
    it, for w (E, K, 2 N) and ``bias`` (E, 2 N) of gate, then up; y is (T, N).
    """
    e, j = dl.program_id(0), dl.program_id(1)
    rows, result = of_expert(e, (starts, stops), x, y)
    n = y.shape[1]
    gate, up = w[:, :, :n], w[:, :, n:]
    for i in dl.range(dl.cdiv(rows.shape[0], bm)):
        opened = dl.zeros((bm, bn), dl.float32)
        linear = dl.zeros((bm, bn), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[1], bk)):
            tile = dl.load(rows, (i, k), (bm, bk))
            opened = dl.dot(tile, dl.load(gate, (e, k, j), (1, bk, bn)).reshape((bk, bn)), opened)
            linear = dl.dot(tile, dl.load(up, (e, k, j), (1, bk, bn)).reshape((bk, bn)), linear)
        opened, linear = both_biased(opened, linear, bias, e, j, n)
        dl.store(result, (i, j), convert(gating(opened, linear), y.dtype))


def of_expert(e: Any, ends: Any, x: Any, y: Any) -> Any:
    """The rows of an expert in x, and in y."""
    start, stop = ends[0][e], ends[1][e]
    return x[start:stop], y[start:stop]


def biased(acc: Any, bias: Any, e: Any, j: Any) -> Any:
    """A tile of a product, plus an expert's bias where there is one."""
    if bias is None:
        return acc
    return acc + dl.load(bias, (e, j), (1, acc.shape[1])).to(dl.float32)


def both_biased(opened: Any, linear: Any, bias: Any, e: Any, j: Any, n: Any) -> Any:
    """Tiles of the gate's product and of the other one, whose biases (E, 2 n) lie side by side."""
    if bias is None:
        return opened, linear
    return biased(opened, bias[:, :n], e, j), biased(linear, bias[:, n:], e, j)


def owners(experts: Any, at: Any, shape: Any, count: Any) -> Any:
    """The experts of the tile of choices at these tile coordinates, in a row, and the choices'
    numbers.

    A number outside of the ``count`` experts counts as the nearest (a logit that is NaN has no
    expert); what lies beyond the last choice comes after every expert.
    """
    (i, j), (rows, columns) = at, shape
    tile = dl.load(experts, (i, j), (rows, columns))
    token = i * rows + dl.arange(rows)[:, None]
    choice = j * columns + dl.arange(columns)[None, :]
    inside = (token < experts.shape[0]) & (choice < experts.shape[1])
    found = dl.where(inside, dl.minimum(dl.maximum(tile, 0), count - 1), _LAST)
    number = token * experts.shape[1] + choice
    return found.reshape((rows * columns,)), number.reshape((rows * columns,))


@dure.kernel
def expert_places(
    experts: dl.Tensor,
    places: dl.Tensor,
    bt: dl.const,
    bo: dl.const,
    bk: dl.const,
    count: dl.const,
):
    """For each of a token's choices (T, k), its place in an order of all choices by expert.

    The order keeps that of the choices where experts are equal.  ``bk`` covers k; ``bt`` tokens are
    compared with ``bo`` at a time.
    """
    i = dl.program_id(0)
    own, at = owners(experts, (i, 0), (bt, bk), count)
    total = dl.zeros((bt * bk,), dl.int32)
    for c in dl.range(dl.cdiv(experts.shape[0], bo)):
        other, number = owners(experts, (c, 0), (bo, bk), count)
        same = (other[None, :] == own[:, None]) & (number[None, :] < at[:, None])
        total = total + dl.sum(dl.where((other[None, :] < own[:, None]) | same, 1, 0), 1)
    dl.store(places, (i, 0), total.reshape((bt, bk)))


@dure.kernel
def expert_ends(
    experts: dl.Tensor,
    starts: dl.Tensor,
    stops: dl.Tensor,
    be: dl.const,
    bo: dl.const,
    bk: dl.const,
    count: dl.const,
):
    """Where the choices of each expert start and stop in the order of :func:`expert_places`."""
    i = dl.program_id(0)
    expert = (i * be + dl.arange(be))[:, None]
    below, through = dl.zeros((be,), dl.int32), dl.zeros((be,), dl.int32)
    for c in dl.range(dl.cdiv(experts.shape[0], bo)):
        other, _ = owners(experts, (c, 0), (bo, bk), count)
        below = below + dl.sum(dl.where(other[None, :] < expert, 1, 0), 1)
        through = through + dl.sum(dl.where(other[None, :] <= expert, 1, 0), 1)
    dl.store(starts, (i,), below)
    dl.store(stops, (i,), through)


@dure.kernel
def expert_rows(x: dl.Tensor, places: DistinctPlaces, y: dl.Tensor, bk: dl.const, bd: dl.const):
    """``y[places[t, j]] = x[t]`` for x (T, D), places (T, k), y (T * k, D); ``bk`` covers k."""
    t, c = dl.program_id(0), dl.program_id(1)
    rows = dl.load(places, (t, 0), (1, bk), fill=-1).reshape((bk,))
    tile = dl.load(x, (t, c), (1, bd))
    dl.store(y, (rows, c), dl.broadcast_to(convert(tile, y.dtype), (bk, bd)))


@dure.kernel
def expert_sum(
    y: dl.Tensor, places: Places, weights: dl.Tensor, z: dl.Tensor, bk: dl.const, bd: dl.const
):
    """``z[t]`` is the sum over j of ``weights[t, j] * y[places[t, j]]``; ``bk`` covers k."""
    t, c = dl.program_id(0), dl.program_id(1)
    rows = dl.load(places, (t, 0), (1, bk), fill=-1).reshape((bk,))
    tile = dl.load(y, (rows, c), (bk, bd)).to(dl.float32)
    shares = dl.load(weights, (t, 0), (1, bk)).to(dl.float32).reshape((bk, 1))
    dl.store(z, (t, c), convert(dl.sum(tile * shares, 0, keepdims=True), z.dtype))


@dure.kernel
def grouped_linear(
    x: dl.Tensor,
    w: dl.Tensor,
    starts: Places,
    stops: Places,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    decoded: dl.const = False,
):
    """Like :func:`grouped_matmul` for w (E, N, K).

    ``decoded`` multiplies by the numbers that a weight's blocks stand for.
    """
    e, j = dl.program_id(0), dl.program_id(1)
    rows, result = of_expert(e, (starts, stops), x, y)
    for i in dl.range(dl.cdiv(rows.shape[0], bm)):
        acc = dl.zeros((bm, bn), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[1], bk)):
            right = _turned(w, (e, j, k), (bn, bk), decoded)
            acc = dl.dot(dl.load(rows, (i, k), (bm, bk)), right, acc)
        dl.store(result, (i, j), convert(biased(acc, bias, e, j), y.dtype))


@dure.kernel
def grouped_gated_linear(
    x: dl.Tensor,
    gate: dl.Tensor,
    up: dl.Tensor,
    starts: Places,
    stops: Places,
    gate_bias: dl.Tensor | None,
    up_bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    gating: dl.const,
    decoded: dl.const = False,
):
    """Like :func:`grouped_gated` for gate and up (E, N, K), and like :func:`grouped_linear`."""
    e, j = dl.program_id(0), dl.program_id(1)
    rows, result = of_expert(e, (starts, stops), x, y)
    for i in dl.range(dl.cdiv(rows.shape[0], bm)):
        opened = dl.zeros((bm, bn), dl.float32)
        linear = dl.zeros((bm, bn), dl.float32)
        for k in dl.range(dl.cdiv(x.shape[1], bk)):
            tile = dl.load(rows, (i, k), (bm, bk))
            opened = dl.dot(tile, _turned(gate, (e, j, k), (bn, bk), decoded), opened)
            linear = dl.dot(tile, _turned(up, (e, j, k), (bn, bk), decoded), linear)
        opened, linear = biased(opened, gate_bias, e, j), biased(linear, up_bias, e, j)
        dl.store(result, (i, j), convert(gating(opened, linear), y.dtype))


def _turned(w: Any, place: Any, shape: Any, decoded: Any) -> Any:
    """A tile (bn, bk) of an expert's weight as (bk, bn)."""
    weights = dl.load(w, place, (1, *shape))
    if decoded:
        weights = weights.to(dl.float32)
    return weights.reshape(shape).T
