"""A mixture of experts on chips: which kernels compute its tensor ops.

Where tokens go is data; a step that is only timed takes choices that are drawn at random, equally
likely and without a preference, as load balancing strives for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dure.ir.core import Op, op_definition
from dure.library import elementwise
from dure.library.call import IndexArray, indices, stored_bytes, tensor
from dure.library.chip_lowering import ChipCall, ChipLowering, lowers_on_chips, mapped
from dure.library.moe import (
    expert_ends,
    expert_places,
    expert_rows,
    expert_sum,
    grouped_linear,
    grouped_matmul,
    moe_route,
)
from dure.library.moe_parts import part_ends, part_places, part_sum
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
    covering = power_of_two(chosen)
    consts = {"bo": max(1, _COMPARED // covering), "bk": covering, "count": count}
    held = count // int(op.attr("parts"))
    places = [kind, tensor(kind.dtype, tokens, chosen)]
    ends = [kind, tensor(kind.dtype, held), tensor(kind.dtype, held)]
    tiles = {"be": tile(held, 16)}
    if op.attr("parts") == 1:
        lowering.made.update(zip(op.results, _dispatched(op, drawn), strict=True))
        return [
            ChipCall("expert places", (call(expert_places, places, {"bt": 1}, consts),), 0),
            ChipCall("expert ends", (call(expert_ends, ends, tiles, consts),), 0),
        ]
    # The device that has the most to do is the one that the others wait for.
    given = (_dispatched(op, drawn, indices([part])) for part in range(op.attr("parts")))
    part, busiest = max(enumerate(given), key=lambda entry: (int(entry[1][2][-1]), -entry[0]))
    lowering.made.update(zip(op.results, busiest, strict=True))
    lists = {1: (indices([part]), 0, op.attr("parts") - 1)}
    consts["held"] = held
    first = call(part_places, [places[0], None, places[1]], {"bt": 1}, consts, lists)
    second = call(part_ends, [ends[0], None, *ends[1:]], tiles, consts, lists)
    return [ChipCall("expert places", (first,), 0), ChipCall("expert ends", (second,), 0)]


def _dispatched(op: Op, *operands: IndexArray) -> tuple[IndexArray, IndexArray, IndexArray]:
    dispatch = op_definition("dispatch").semantics
    assert dispatch is not None
    places, starts, stops = dispatch(op.attrs, *operands)
    return places, starts, stops


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
    busy, filled = int(np.count_nonzero(last[0] - first[0])), int((last[0] - first[0]).sum())
    read = stored_bytes(tensor(w.tensor.dtype, busy, columns, depth))
    tiles = {"bm": tile(-(-rows // experts)), "bn": tile(columns), "bk": tile(depth)}
    lists = {2: first, 3: last}
    if bias:
        types = [kind, lowering.type(w), None, None, lowering.type(bias[0]), result]
        launch = call(grouped_linear, types, tiles, {}, lists)
    else:
        # Without a bias the weights lie as other matrices do on chips.
        weight = tensor(w.tensor.dtype, experts, depth, columns)
        launch = call(grouped_matmul, [kind, weight, None, None, result], tiles, {}, lists)
    name = w.name.rsplit(".", 1)[-1]
    return [ChipCall(f"experts' {name}", (launch,), 2 * filled * depth * columns, read)]


@lowers_on_chips("expert_sum")
def _sum(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    y, places, weights = ops[0].operands
    result = lowering.type(ops[0].result)
    tokens, width = (lowering.extent(e) for e in result.shape)
    chosen = lowering.extent(places.tensor.shape[1])
    types = [lowering.type(y), None, lowering.type(weights), result]
    tiles = {"bd": tile(width, 256)}
    lists = {1: lowering.list(places)}
    kernel = expert_sum if lists[1][1] == 0 else part_sum
    launch = call(kernel, types, tiles, {"bk": power_of_two(chosen)}, lists)
    return [ChipCall("expert sum", (launch,), 2 * tokens * chosen * width)]


@lowers_on_chips("clamped_swiglu")
def _swiglu(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    function = elementwise.clamped_swiglu(op.attr("limit"), op.attr("alpha"))
    return [mapped(lowering, op, "clamped swiglu", function)]
