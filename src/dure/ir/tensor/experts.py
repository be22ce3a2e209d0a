"""Mixture of experts: route tokens, sort them by expert, multiply, and put them together again.

    weights, experts = route(logits)            which experts, and how much of each
    places, starts, stops = dispatch(experts)   where choices go in an order by expert
    rows = expert_rows(x, places)
    y = grouped_linear(rows, w, starts, stops)  one weight an expert
    x = expert_sum(y, places, weights)

Token t's choice j is row ``places[t, j]`` of what is sorted, and expert e has the rows from
``starts[e]`` to ``stops[e]``.
There are as many rows as choices, tokens times k: none is dropped, none is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dure.ir import dtypes
from dure.ir.core import Cost, Op, OpDef, Region, declare
from dure.ir.dtypes import Array
from dure.ir.expr import as_expr, const
from dure.ir.rules import broken
from dure.ir.tensor.checks import (
    ACTIVATIONS,
    Doubles,
    Indices,
    Operand,
    activation_name,
    count,
    doubles,
    elements,
    equal,
    extent,
    finish,
    floating,
    index,
    moves,
    rank,
    static,
    stored,
    stored_bytes,
    take,
    traffic,
)
from dure.ir.tensor.elementwise import clamped_swiglu
from dure.ir.types import TensorType, Type


def _route_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (logits,) = count(operands, 1, "route")
    rank(floating(logits, "the logits of route"), 2, "the logits of route")
    experts = static(logits.shape[1], "the number of experts")
    if not 1 <= attrs["k"] <= experts:
        raise broken(f"{attrs['k']} of {experts} experts", "1 <= k <= the number of experts")
    shape = (logits.shape[0], const(attrs["k"]))
    return [TensorType(shape, dtypes.float32), TensorType(shape, dtypes.int32)]


def _route(attrs: Mapping[str, Any], logits: Array) -> tuple[Operand, Array]:
    values = doubles(logits)
    odds = np.exp(values - values.max(axis=-1, keepdims=True, initial=-np.inf))
    odds = odds / odds.sum(axis=-1, keepdims=True)
    # A stable sort of the negated values keeps the lowest index first among equals.
    order = np.argsort(-odds, axis=-1, kind="stable")[:, : attrs["k"]].astype(np.int32)
    chosen: Doubles = np.take_along_axis(odds, order, axis=-1)
    if attrs["normalized"]:
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    return finish(chosen, {}), order


declare(
    OpDef(
        "route",
        "tensor",
        _route_typing,
        _route,
        lambda op: Cost((5 + op.attr("k")) * elements(op.operands[0].tensor), traffic(op)),
        defaults={"normalized": True},
        exact=False,
        error_bound=8.0,
        doc="route(logits (T, E)) {k, normalized}: probabilities (T, k) float32 and experts (T, k)"
        " int32, by descending probability, ties by index; a softmax over all experts, divided by"
        " the sum of the chosen where normalized",
    )
)


def _dispatch_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    parts: int = attrs["parts"]
    experts, *part = count(operands, 1 + (parts > 1), "dispatch")
    rank(experts, 2, "the experts of dispatch")
    if experts.dtype is not dtypes.int32:
        raise broken(f"dispatch of {experts}", "experts are int32")
    if attrs["experts"] < 1:
        raise broken(f"dispatch to {attrs['experts']} experts", "there is at least one expert")
    if parts < 1 or attrs["experts"] % parts:
        raise broken(
            f"dispatch to {attrs['experts']} experts in {parts} parts",
            "each part has as many experts",
        )
    for which in part:
        index(which, "the part of dispatch")
    rows = experts.shape[0] * static(experts.shape[1], "the experts of a token")
    least, zero = as_expr(-1 if part else 0), as_expr(0)
    places = TensorType(experts.shape, dtypes.int32, index=(least, rows - 1), unique=True)
    ends = TensorType((const(attrs["experts"] // parts),), dtypes.int32, index=(zero, rows))
    return [places, ends, ends]


def _dispatch(
    attrs: Mapping[str, Any], experts: Indices, *part: Indices
) -> tuple[Array, Array, Array]:
    held = attrs["experts"] // attrs["parts"]
    owner = np.clip(experts.reshape(-1), 0, attrs["experts"] - 1)
    owner = owner - held * (int(part[0][0]) if part else 0)
    here = np.flatnonzero((owner >= 0) & (owner < held))
    places = np.full(owner.size, -1, np.int32)
    places[here[np.argsort(owner[here], kind="stable")]] = np.arange(here.size, dtype=np.int32)
    stops = np.cumsum(np.bincount(owner[here], minlength=held)).astype(np.int32)
    starts = np.concatenate([np.zeros(1, np.int32), stops[:-1]])
    return places.reshape(experts.shape), starts, stops


def _dispatch_cost(op: Op) -> Cost:
    """Every choice is compared with every other, and with every expert's number."""
    choices = elements(op.operands[0].tensor)
    return Cost(4 * choices * (choices + op.attr("experts")), traffic(op))


declare(
    OpDef(
        "dispatch",
        "tensor",
        _dispatch_typing,
        _dispatch,
        _dispatch_cost,
        defaults={"parts": 1},
        doc="dispatch(experts (T, k), [part (1)]) {experts, parts}: places (T, k), a permutation of"
        " 0 .. T * k - 1 that sorts choices by expert, stably; starts and stops (E) of each"
        " expert's rows; numbers outside 0 .. E - 1 count as the nearest expert.  Of several equal"
        " parts of the experts only one counts: choices of the others have the place -1",
    )
)


def _places(places: TensorType, name: str) -> TensorType:
    index(places, f"the places of {name}", 2)
    if not places.unique:
        raise broken(f"{name} to {places}", "places are a permutation", "take those of dispatch")
    return places


def _rows_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, places = count(operands, 2, "expert_rows")
    rank(floating(x, "the operand of expert_rows"), 2, "the operand of expert_rows")
    equal(_places(places, "expert_rows").shape[0], x.shape[0], "the number of tokens")
    rows = places.shape[0] * places.shape[1]
    return [replace(x, shape=(rows, x.shape[1]))]


def _rows(attrs: Mapping[str, Any], x: Array, places: Indices) -> Array:
    result = np.zeros((places.size, x.shape[1]), x.dtype)
    to = places.reshape(-1)
    result[to[to >= 0]] = np.repeat(x, places.shape[1], axis=0)[to >= 0]
    return result


declare(
    OpDef(
        "expert_rows",
        "tensor",
        _rows_typing,
        _rows,
        moves,
        doc="expert_rows(x (T, D), places (T, k)): (T * k, D) whose row places[t, j] is x[t];"
        " places of -1 are absent",
    )
)


def _check_products(
    name: str,
    x: TensorType,
    weights: Sequence[TensorType],
    ends: Sequence[TensorType],
    biases: Sequence[TensorType],
) -> Sequence[Type]:
    """The type of a result of products with the weights (E, N, K) of each expert's rows."""
    rank(floating(x, f"the operand of {name}"), 2, f"the operand of {name}")
    for w in weights:
        rank(w, 3, f"the weight of {name}")
        if not w.dtype.is_float:
            raise broken(f"a weight of {w.dtype}", "a weight holds floats or quantized blocks")
        if w.block is not None and w.quantized_axis % 3 != 2:
            raise broken(f"a weight of {w}", "a weight is quantized along K, its last axis")
        equal(w.shape[2], x.shape[1], f"K of the weight of {name}")
        for first, own, what in zip(weights[0].shape[:2], w.shape[:2], "EN", strict=True):
            equal(own, first, f"{what} of the weights of {name}")
    experts, columns, _ = weights[0].shape
    for what, found in zip(("starts", "stops"), ends, strict=True):
        equal(index(found, f"{what} of {name}").shape[0], experts, f"the {what}")
    for value in biases:
        floating(value, f"the bias of {name}")
        if value.shape != (experts, columns):
            raise broken(f"a bias of {value} for a weight of {weights[0]}", "a bias is (E, N)")
    return [stored((x.shape[0], columns), "")]


def _grouped_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, w, starts, stops, *bias = count(operands, 4 + bool(attrs["bias"]), "grouped_linear")
    return _check_products("grouped_linear", x, [w], [starts, stops], bias)


def _grouped(
    attrs: Mapping[str, Any],
    x: Operand,
    w: Operand,
    starts: Indices,
    stops: Indices,
    *bias: Operand,
) -> Operand:
    return finish(_products(x, w, starts, stops, *bias), attrs)


def _products(
    x: Operand, w: Operand, starts: Indices, stops: Indices, bias: Operand | None = None
) -> Doubles:
    rows, weights = doubles(x), doubles(w)
    result = np.zeros((len(rows), weights.shape[1]))
    for e, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        result[start:stop] = rows[start:stop] @ weights[e].T
        if bias is not None:
            result[start:stop] += doubles(bias)[e]
    return result


def _grouped_cost(op: Op) -> Cost:
    """Weights are read of no more experts than there are rows."""
    x, *others = (value.tensor for value in op.operands)
    weights = [kind for kind in others if kind.rank == 3]
    experts, rows = extent(weights[0].shape[0]), extent(x.shape[0])
    unread = sum(map(stored_bytes, weights)) // max(1, experts) * max(0, experts - rows)
    flops = 2 * len(weights) * elements(op.results[0].tensor) * extent(x.shape[1])
    return Cost(flops, traffic(op) - unread)


declare(
    OpDef(
        "grouped_linear",
        "tensor",
        _grouped_typing,
        _grouped,
        _grouped_cost,
        defaults={"bias": False},
        exact=False,
        error_bound=2.0,
        doc="grouped_linear(x (P, K), w (E, N, K), starts (E), stops (E), [bias (E, N)]) {bias}:"
        " (P, N); rows starts[e] .. stops[e] are x @ w[e].T + bias[e], rows of no expert are"
        " undefined",
    )
)


def _gated_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, gate, up, *rest = count(operands, 5 + 2 * bool(attrs["bias"]), "grouped_gated")
    activation_name(attrs["activation"])
    if attrs["limit"] < 0:
        raise broken(f"a limit of {attrs['limit']}", "the limit is positive, or 0: there is none")
    return _check_products("grouped_gated", x, [gate, up], rest[:2], rest[2:])


def _gated(
    attrs: Mapping[str, Any],
    x: Operand,
    gate: Operand,
    up: Operand,
    starts: Indices,
    stops: Indices,
    *biases: Operand,
) -> Operand:
    first, second = biases or (None, None)
    opened = _products(x, gate, starts, stops, first)
    let_in = _products(x, up, starts, stops, second)
    if not attrs["limit"]:
        return finish(ACTIVATIONS[attrs["activation"]](opened) * let_in, attrs)
    limit, alpha = (float(np.float32(attrs[name])) for name in ("limit", "alpha"))
    return finish(clamped_swiglu(opened, let_in, limit, alpha), attrs)


declare(
    OpDef(
        "grouped_gated",
        "tensor",
        _gated_typing,
        _gated,
        _grouped_cost,
        defaults={"activation": "silu", "limit": 0.0, "alpha": 0.0, "bias": False},
        exact=False,
        error_bound=8.0,
        doc="grouped_gated(x (P, K), gate (E, N, K), up (E, N, K), starts (E), stops (E),"
        " [gate_bias (E, N), up_bias (E, N)]) {activation, limit, alpha, bias}: (P, N); the"
        " products of grouped_linear with both weights, as activation(gate) * up, or with a limit"
        " as clamped_swiglu(gate, up) has them",
    )
)


def _sum_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    y, places, weights = count(operands, 3, "expert_sum")
    rank(floating(y, "the operand of expert_sum"), 2, "the operand of expert_sum")
    rank(floating(weights, "the weights of expert_sum"), 2, "the weights of expert_sum")
    index(places, "the places of expert_sum", 2)
    for axis in (0, 1):
        equal(weights.shape[axis], places.shape[axis], f"extent {axis} of the weights")
    return [stored((places.shape[0], y.shape[1]), "")]


def _sum(attrs: Mapping[str, Any], y: Operand, places: Indices, weights: Operand) -> Operand:
    chosen = take(doubles(y), places)
    chosen[places < 0] = 0
    return finish(np.einsum("tkn,tk->tn", chosen, doubles(weights)), attrs)


declare(
    OpDef(
        "expert_sum",
        "tensor",
        _sum_typing,
        _sum,
        lambda op: Cost(2 * elements(op.operands[0].tensor), traffic(op)),
        exact=False,
        error_bound=4.0,
        doc="expert_sum(y (P, N), places (T, k), weights (T, k)): (T, N), the sum over j of"
        " weights[t, j] * y[places[t, j]]; places of -1 are absent",
    )
)
