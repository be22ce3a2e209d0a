"""A mixture of experts on chips: which kernels compute its tensor ops.

Where tokens go is data; a step that is only timed takes choices that are drawn at random, equally
likely and without a preference, as load balancing strives for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from dure.ir.core import Op, Value, op_definition
from dure.ir.dtypes import int32
from dure.ir.types import static_extent
from dure.library import elementwise
from dure.library.call import IndexArray, indices, tensor
from dure.library.chip_lowering import (
    ChipCall,
    ChipLowering,
    Launch,
    launch,
    lowers_on_chips,
    mapped,
    product_tiles,
)
from dure.library.chip_tensors import ABSENT, Argument, Operand, Stored
from dure.library.lowering_moe import gating_of
from dure.library.matmul_scaled import grouped_gated_scaled, grouped_matmul_scaled
from dure.library.moe import (
    expert_ends,
    expert_places,
    expert_rows,
    expert_sum,
    grouped_gated,
    grouped_matmul,
    moe_route,
)
from dure.library.moe_many import (
    choice_rows,
    choice_sum,
    counted_ends,
    counted_places,
    expert_counts,
)
from dure.library.moe_parts import part_ends, part_places, part_sum
from dure.library.operators_common import bytes_of, power_of_two, tile

#: Choices that are compared at a time.
_COMPARED = 64

#: Rows of an expert that are few.
_FEW = 8
#: The kernels of a product: for weights that are numbers, and for those that are codes.
_PRODUCTS = grouped_matmul, grouped_matmul_scaled

#: Index arguments of a launch, by position: values and declared range.
_Lists: TypeAlias = "Mapping[int, tuple[IndexArray, int, int]] | None"


@lowers_on_chips("route")
def _route(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    logits = lowering.type(op.operands[0])
    tokens, experts = (lowering.extent(e) for e in logits.shape)
    chosen = int(op.attr("k"))
    arguments = [lowering.given(v) for v in (op.operands[0], *op.results)]
    consts = {
        "be": power_of_two(experts),
        "bt": power_of_two(chosen),
        "normalized": op.attr("normalized"),
    }
    made = launch(moe_route, arguments, {"bm": tile(tokens, 32)}, consts)
    return [ChipCall.of("route", [made], (5 + chosen) * tokens * experts)]


@lowers_on_chips("dispatch")
def _dispatch(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    kind = lowering.type(op.operands[0])
    tokens, chosen = (lowering.extent(e) for e in kind.shape)
    count, parts = int(op.attr("experts")), int(op.attr("parts"))
    draw = np.random.default_rng(0)
    drawn = indices([draw.permutation(count)[:chosen] for _ in range(tokens)])
    given = [lowering.given(op.operands[0])]
    if parts == 1:
        found, lists = _dispatched(op, drawn), None
    else:
        # The device that has the most to do is the one that the others wait for.
        every = [_dispatched(op, drawn, indices([n])) for n in range(parts)]
        busy = max(range(parts), key=lambda n: (int(every[n][2][-1]), -n))
        found, lists = every[busy], {1: (indices([busy]), 0, parts - 1)}
        given.append(lowering.indices(op.operands[1]))
    lowering.made.update(zip(op.results, found, strict=True))
    many = tokens * chosen > 4 * (_COMPARED + count)
    return (_counted if many else _compared)(lowering, op, given, lists)


def _compared(
    lowering: ChipLowering, op: Op, given: Sequence[Argument], lists: _Lists
) -> Sequence[ChipCall]:
    """The order of few choices, each of which is compared with all others."""
    experts, held = given[0].type, int(op.attr("experts")) // int(op.attr("parts"))
    assert experts is not None
    places, *ends = (replace(lowering.given(v), type=tensor(int32, held)) for v in op.results)
    covering = power_of_two(static_extent(experts.shape[1]) or 1)
    consts = {"bo": max(1, _COMPARED // covering), "bk": covering, "count": op.attr("experts")}
    order, bounds = expert_places, expert_ends
    if lists is not None:
        order, bounds, consts["held"] = part_places, part_ends, held
    ordered = [*given, replace(places, type=experts)]
    found = launch(order, ordered, {"bt": 1}, consts, lists)
    stops = launch(bounds, [*given, *ends], {"be": tile(held, 16)}, consts, lists)
    return [ChipCall.of("expert places", [found], 0), ChipCall.of("expert ends", [stops], 0)]


def _counted(
    lowering: ChipLowering, op: Op, given: Sequence[Argument], lists: _Lists
) -> Sequence[ChipCall]:
    """The order of many choices, whose blocks are counted first; the places come by columns."""
    held = int(op.attr("experts")) // int(op.attr("parts"))
    tokens, chosen = (lowering.extent(e) for e in op.operands[0].tensor.shape)
    # Comparing a block's choices with one another takes about as long as adding up those before it;
    # wide tiles make the former cheaper.
    block = power_of_two(round((4 * tokens * held / chosen) ** (1 / 3)))
    blocks = -(-tokens // block)
    places, kind = op.results[0], tensor(int32, held, blocks)
    counts = Argument(kind, Operand(Stored((Value(kind),))))
    columns = Value(replace(places.tensor, shape=tensor(int32, chosen, tokens).shape))
    lowering.columns[places] = columns
    lowering.made[columns] = np.ascontiguousarray(lowering.made[places].T)
    ends = [replace(lowering.given(v), type=tensor(int32, held)) for v in op.results[1:]]
    covers, tiles = {"be": power_of_two(held)}, {"bb": tile(blocks)}
    consts = {"bt": block, **covers, "count": op.attr("experts"), "held": held}
    operands = given if len(given) > 1 else [*given, ABSENT]
    covering = {**consts, "bk": power_of_two(chosen)}
    counted = launch(expert_counts, [*operands, counts], {}, covering, lists)
    stops = launch(counted_ends, [counts, *ends], tiles, covers)
    ordered = [*operands, counts, ends[0], lowering.given(columns)]
    found = launch(counted_places, ordered, tiles, consts, lists)
    return [
        ChipCall.of("expert counts", [counted], 0),
        ChipCall.of("expert ends", [stops], 0),
        ChipCall.of("expert places", [found], 0),
    ]


def _dispatched(op: Op, *operands: IndexArray) -> tuple[IndexArray, IndexArray, IndexArray]:
    dispatch = op_definition("dispatch").semantics
    assert dispatch is not None
    places, starts, stops = dispatch(op.attrs, *operands)
    return places, starts, stops


@lowers_on_chips("expert_rows")
def _rows(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    x, places = ops[0].operands
    tokens, width = (lowering.extent(e) for e in x.tensor.shape)
    tiles, order = {"bd": tile(width, 256)}, lowering.columns.get(places, places)
    arguments = [lowering.given(x), lowering.indices(order), lowering.given(ops[0].result)]
    lists = {1: lowering.list(order)}
    if order is not places:
        tiles["bt"] = tile(tokens)
        made = launch(choice_rows, arguments, tiles, lists=lists, unique=(1,))
    else:
        consts = {"bk": power_of_two(lowering.extent(places.tensor.shape[1]))}
        made = launch(expert_rows, arguments, tiles, consts, lists, unique=(1,))
    return [ChipCall.of("expert rows", [made], 0)]


@lowers_on_chips("grouped_linear")
def _grouped(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    x, w, starts, stops, *bias = ops[0].operands
    rows = _Rows(x, starts, stops)
    made = _multiplied(lowering, rows, ([w], bias), lowering.given(ops[0].result), _PRODUCTS)
    return [_experts(lowering, rows, [w], made)]


@lowers_on_chips("grouped_gated")
def _gated(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    x, gate, up, starts, stops, *biases = op.operands
    rows, result = _Rows(x, starts, stops), lowering.given(op.result)
    kernels, gating = (grouped_gated, grouped_gated_scaled), gating_of(op)
    weights = [gate, up], biases
    made = _multiplied(lowering, rows, weights, result, kernels, {"gating": gating})
    found = _experts(lowering, rows, [gate, up], made)
    kind = lowering.type(op.result)
    count, columns = (static_extent(e) or 1 for e in kind.shape)
    if count < _FEW * lowering.extent(gate.tensor.shape[0]):
        return [found]
    # Of many rows the sums of both products take much of a scratchpad.
    parts = [Argument(kind, Operand(Stored((Value(kind),)))) for _ in range(2)]
    launches = [
        _multiplied(lowering, rows, ([w], biases[n : n + 1]), parts[n], _PRODUCTS)
        for n, w in enumerate((gate, up))
    ]
    consts = {"function": elementwise.apply(gating, ((False, False),) * 2, 2)}
    tiles = {"bn": tile(columns, 256), "bm": 1}
    launches.append(launch(elementwise.KERNELS[2], [result, *parts], tiles, consts))
    return [replace(found, chains=(tuple(launches),))]


@dataclass(frozen=True)
class _Rows:
    """Rows sorted by expert, and where those of each start and stop."""

    x: Value
    starts: Value
    stops: Value


def _experts(
    lowering: ChipLowering, rows: _Rows, weights: Sequence[Value], made: Launch
) -> ChipCall:
    """The launch that multiplies each expert's rows by these weights of it."""
    lengths = lowering.list(rows.stops)[0] - lowering.list(rows.starts)[0]
    _, columns, depth = (lowering.extent(e) for e in weights[0].tensor.shape)
    width = len(weights) * columns
    read = lowering.matrix(weights, int(np.count_nonzero(lengths)), depth, width)
    name = "+".join(w.name.rsplit(".", 1)[-1] for w in weights)
    flops = 2 * int(lengths.sum()) * depth * width
    return ChipCall.of(f"experts' {name}", [made], flops, bytes_of(a.type for a in read))


def _multiplied(
    lowering: ChipLowering,
    rows: _Rows,
    given: tuple[Sequence[Value], Sequence[Value]],
    result: Argument,
    kernels: tuple[Any, Any],
    more: Mapping[str, object] | None = None,
) -> Launch:
    """Each expert's rows times its weights, which lie side by side as their biases do; ``kernels``
    are for weights that are numbers, and for those that are codes.
    """
    weights, biases = given
    experts, columns, depth = (lowering.extent(e) for e in weights[0].tensor.shape)
    width, scheme = len(weights) * columns, lowering.scheme(weights[0])
    count = lowering.extent(rows.x.tensor.shape[0])
    tiles, consts = product_tiles(scheme, -(-count // experts), depth, columns)
    weight = lowering.matrix(weights, experts, depth, width)
    added = ABSENT
    if biases:
        side = Stored(tuple(map(lowering.root, biases)))
        added = Argument(tensor(biases[0].tensor.dtype, experts, width), Operand(side))
    ends = rows.starts, rows.stops
    arguments = [lowering.given(rows.x), *weight, *map(lowering.indices, ends), added, result]
    # A scaled weight is two arguments.
    lists = {1 + len(weight) + n: lowering.list(end) for n, end in enumerate(ends)}
    return launch(kernels[scheme is not None], arguments, tiles, {**consts, **(more or {})}, lists)


@lowers_on_chips("expert_sum")
def _sum(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    y, places, weights = ops[0].operands
    tokens, width = (lowering.extent(e) for e in lowering.type(ops[0].result).shape)
    chosen, order = lowering.extent(places.tensor.shape[1]), lowering.columns.get(places, places)
    tiles, lists = {"bd": tile(width, 256)}, {1: lowering.list(order)}
    arguments = [lowering.given(y), lowering.indices(order)]
    arguments += [lowering.given(weights), lowering.given(ops[0].result)]
    if order is not places:
        tiles["bt"] = tile(tokens)
        made = launch(choice_sum, arguments, tiles, lists=lists)
    else:
        kernel = expert_sum if lists[1][1] == 0 else part_sum
        made = launch(kernel, arguments, tiles, {"bk": power_of_two(chosen)}, lists)
    return [ChipCall.of("expert sum", [made], 2 * tokens * chosen * width)]


@lowers_on_chips("clamped_swiglu")
def _swiglu(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    function = elementwise.clamped_swiglu(op.attr("limit"), op.attr("alpha"))
    return [mapped(lowering, op, "clamped swiglu", function)]
