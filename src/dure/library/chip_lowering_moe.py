"""A mixture of experts on chips: which kernels compute its tensor ops.

Where tokens go is data; a step that is only timed takes choices that are drawn at random, equally
likely and without a preference, as load balancing strives for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dure.ir.core import Op, op_definition
from dure.library import elementwise
from dure.library.call import indices, stored_bytes, tensor
from dure.library.chip_lowering import (
    ChipCall,
    ChipLowering,
    lowers_on_chips,
    mapped,
    matrix,
    scaled_tiles,
)
from dure.library.matmul_scaled import grouped_matmul_scaled
from dure.library.moe import (
    expert_ends,
    expert_places,
    expert_rows,
    expert_sum,
    grouped_linear,
    grouped_matmul,
    moe_route,
)
from dure.library.operators_common import call, power_of_two, tile

#: Choices that are compared at a time.
_COMPARED = 64


@lowers_on_chips("route")
def _route(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    logits, shares = lowering.type(op.operands[0]), lowering.type(op.results[0])
    tokens, experts = (lowering.extent(e) for e in logits.shape)
    chosen = int(op.attr("k"))
    types = [logits, shares, lowering.type(op.results[1])]
    consts = {
        "be": power_of_two(experts),
        "bt": power_of_two(chosen),
        "normalized": op.attr("normalized"),
    }
    launch = call(moe_route, types, {"bm": tile(tokens, 32)}, consts)
    return [ChipCall("route", (launch,), (5 + chosen) * tokens * experts)]


@lowers_on_chips("dispatch")
def _dispatch(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    kind = lowering.type(op.operands[0])
    tokens, chosen = (lowering.extent(e) for e in kind.shape)
    count = int(op.attr("experts"))
    draw = np.random.default_rng(0)
    drawn = indices([draw.permutation(count)[:chosen] for _ in range(tokens)])
    dispatch = op_definition("dispatch").semantics
    assert dispatch is not None
    lowering.made.update(zip(op.results, dispatch(op.attrs, drawn), strict=True))
    covering = power_of_two(chosen)
    consts = {"bo": max(1, _COMPARED // covering), "bk": covering, "count": count}
    places = [kind, tensor(kind.dtype, tokens, chosen)]
    ends = [kind, tensor(kind.dtype, count), tensor(kind.dtype, count)]
    return [
        ChipCall("expert places", (call(expert_places, places, {"bt": 1}, consts),), 0),
        ChipCall("expert ends", (call(expert_ends, ends, {"be": tile(count, 16)}, consts),), 0),
    ]


@lowers_on_chips("expert_rows")
def _rows(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    x, places = ops[0].operands
    kind, result = lowering.type(x), lowering.type(ops[0].result)
    width = lowering.extent(kind.shape[1])
    consts = {"bk": power_of_two(lowering.extent(places.tensor.shape[1]))}
    lists = {1: lowering.list(places)}
    launch = call(
        expert_rows, [kind, None, result], {"bd": tile(width, 256)}, consts, lists, unique=(1,)
    )
    return [ChipCall("expert rows", (launch,), 0)]


@lowers_on_chips("grouped_linear")
def _grouped(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    x, w, starts, stops, *bias = op.operands
    kind, result = lowering.type(x), lowering.type(op.result)
    rows, depth = (lowering.extent(e) for e in kind.shape)
    experts, columns = (lowering.extent(e) for e in w.tensor.shape[:2])
    first, last = lowering.list(starts), lowering.list(stops)
    busy = int(np.count_nonzero(last[0] - first[0]))
    scheme = lowering.scheme(w)
    read = sum(map(stored_bytes, matrix(lowering, w, depth, columns, busy)))
    tiles, consts = scaled_tiles(scheme, -(-rows // experts), depth, columns)
    lists = {2: first, 3: last}
    if scheme is not None:
        weight = scheme.types(depth, columns, experts)
        added = lowering.type(bias[0]) if bias else None
        types = [kind, *weight, None, None, added, result]
        lists = {3: first, 4: last}
        launch = call(grouped_matmul_scaled, types, tiles, consts, lists)
    elif bias:
        types = [kind, lowering.type(w), None, None, lowering.type(bias[0]), result]
        launch = call(grouped_linear, types, tiles, {}, lists)
    else:
        # Without a bias the weights lie as other matrices do on chips.
        weight = tensor(w.tensor.dtype, experts, depth, columns)
        launch = call(grouped_matmul, [kind, weight, None, None, result], tiles, {}, lists)
    name = w.name.rsplit(".", 1)[-1]
    return [ChipCall(f"experts' {name}", (launch,), 2 * rows * depth * columns, read)]


@lowers_on_chips("expert_sum")
def _sum(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    y, places, weights = ops[0].operands
    result = lowering.type(ops[0].result)
    tokens, width = (lowering.extent(e) for e in result.shape)
    chosen = lowering.extent(places.tensor.shape[1])
    types = [lowering.type(y), None, lowering.type(weights), result]
    tiles = {"bd": tile(width, 256)}
    lists = {1: lowering.list(places)}
    launch = call(expert_sum, types, tiles, {"bk": power_of_two(chosen)}, lists)
    return [ChipCall("expert sum", (launch,), 2 * tokens * chosen * width)]


@lowers_on_chips("clamped_swiglu")
def _swiglu(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    function = elementwise.clamped_swiglu(op.attr("limit"), op.attr("alpha"))
    return [mapped(lowering, op, "clamped swiglu", function)]
