"""A mixture of experts on chips: which kernels compute its tensor ops.

Where tokens go is data; a step that is only timed takes choices that are drawn at random, equally
likely and without a preference, as load balancing strives for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dure.ir.core import Op, Value, op_definition
from dure.ir.dtypes import int32
from dure.ir.types import static_extent
from dure.library import elementwise
from dure.library.call import IndexArray, indices, tensor
from dure.library.chip_lowering import (
    ChipCall,
    ChipLowering,
    launch,
    lowers_on_chips,
    mapped,
    product_tiles,
)
from dure.library.chip_tensors import ABSENT, Argument, Operand, Stored
from dure.library.matmul_scaled import grouped_matmul_scaled
from dure.library.moe import (
    expert_ends,
    expert_places,
    expert_rows,
    expert_sum,
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

#: Choices that are compared at a time, and those of a block that is counted.
_COMPARED, _COUNTED = 64, 128
#: Tokens that are enough for kernels that work on a choice of many at a time.
_MANY = 32


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
    count = int(op.attr("experts"))
    draw = np.random.default_rng(0)
    drawn = indices([draw.permutation(count)[:chosen] for _ in range(tokens)])
    covering = power_of_two(chosen)
    consts = {"bo": max(1, _COMPARED // covering), "bk": covering, "count": count}
    held, parts = count // int(op.attr("parts")), int(op.attr("parts"))

    def made(value: Value, *shape: int) -> Argument:
        return replace(lowering.given(value), type=tensor(kind.dtype, *shape))

    first, second, lists = expert_places, expert_ends, None
    part: list[Argument] = []
    given = [_dispatched(op, drawn)] if parts == 1 else []
    if parts > 1:
        # The device that has the most to do is the one that the others wait for.
        given = [_dispatched(op, drawn, indices([n])) for n in range(parts)]
        consts["held"] = held
        first, second, part = part_places, part_ends, [lowering.indices(op.operands[1])]
        busy = max(range(parts), key=lambda n: (int(given[n][2][-1]), -n))
        lists = {1: (indices([busy]), 0, parts - 1)}
        given = [given[busy]]
    lowering.made.update(zip(op.results, given[0], strict=True))
    places = [lowering.given(op.operands[0]), *part, made(op.results[0], tokens, chosen)]
    ends = [made(v, held) for v in op.results[1:]]
    if tokens * chosen > 2 * (_COUNTED + count):
        return _counted(places, ends, consts, lists)
    ends = [lowering.given(op.operands[0]), *part, *ends]
    found = launch(first, places, {"bt": 1}, consts, lists)
    stops = launch(second, ends, {"be": tile(held, 16)}, consts, lists)
    return [
        ChipCall.of("expert places", [found], 0),
        ChipCall.of("expert ends", [stops], 0),
    ]


def _counted(
    given: Sequence[Argument],
    ends: Sequence[Argument],
    consts: Mapping[str, object],
    lists: Mapping[int, tuple[IndexArray, int, int]] | None,
) -> Sequence[ChipCall]:
    """The order of many choices: those of blocks are counted first.  ``given`` are the choices, the
    part of the experts where there is one, and the places.
    """
    experts, *part, places = given
    assert places.type is not None and ends[0].type is not None
    tokens, _ = (static_extent(e) or 1 for e in places.type.shape)
    (held,) = (static_extent(e) or 1 for e in ends[0].type.shape)
    bk = int(str(consts["bk"]))
    block = max(1, _COUNTED // bk)
    kind = tensor(int32, held, -(-tokens // block))
    counts = Argument(kind, Operand(Stored((Value(kind),))))
    be = power_of_two(held)
    sizes = {"bt": block, "bk": bk, "be": be, "count": consts["count"], "held": held}
    which = [experts, *(part or [ABSENT])]
    tiles = {"bb": tile(-(-tokens // block))}
    return [
        ChipCall.of(
            "expert counts", [launch(expert_counts, [*which, counts], {}, sizes, lists)], 0
        ),
        ChipCall.of("expert ends", [launch(counted_ends, [counts, *ends], tiles, {"be": be})], 0),
        ChipCall.of(
            "expert places",
            [launch(counted_places, [*which, counts, ends[0], places], tiles, sizes, lists)],
            0,
        ),
    ]


def _dispatched(op: Op, *operands: IndexArray) -> tuple[IndexArray, IndexArray, IndexArray]:
    dispatch = op_definition("dispatch").semantics
    assert dispatch is not None
    places, starts, stops = dispatch(op.attrs, *operands)
    return places, starts, stops


@lowers_on_chips("expert_rows")
def _rows(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    x, places = ops[0].operands
    width = lowering.extent(x.tensor.shape[1])
    consts = {"bk": power_of_two(lowering.extent(places.tensor.shape[1]))}
    lists = {1: lowering.list(places)}
    arguments = [lowering.given(x), lowering.indices(places), lowering.given(ops[0].result)]
    tiles = {"bd": tile(width, 256)}
    made = [launch(expert_rows, arguments, tiles, consts, lists, unique=(1,))]
    tokens = lowering.extent(x.tensor.shape[0])
    if tokens >= _MANY:
        tiles = {"bt": tile(tokens), **tiles}
        made.append(launch(choice_rows, arguments, tiles, {}, lists, unique=(1,)))
    return [ChipCall.of("expert rows", made, 0)]


@lowers_on_chips("grouped_linear")
def _grouped(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    x, w, starts, stops, *bias = op.operands
    kind = lowering.type(x)
    rows, depth = (lowering.extent(e) for e in kind.shape)
    experts, columns = (lowering.extent(e) for e in w.tensor.shape[:2])
    first, last = lowering.list(starts), lowering.list(stops)
    busy, filled = int(np.count_nonzero(last[0] - first[0])), int((last[0] - first[0]).sum())
    read = bytes_of(a.type for a in lowering.matrix([w], busy, depth, columns))
    scheme = lowering.scheme(w)
    tiles, consts = product_tiles(scheme, -(-rows // experts), depth, columns)
    weight = lowering.matrix([w], experts, depth, columns)
    added = lowering.given(bias[0]) if bias else ABSENT
    ends = [lowering.indices(starts), lowering.indices(stops)]
    arguments = [lowering.given(x), *weight, *ends, added, lowering.given(op.result)]
    # A scaled weight is two arguments.
    at = 1 + len(weight)
    kernel = grouped_matmul if scheme is None else grouped_matmul_scaled
    made = launch(kernel, arguments, tiles, consts, {at: first, at + 1: last})
    name = w.name.rsplit(".", 1)[-1]
    return [ChipCall.of(f"experts' {name}", [made], 2 * filled * depth * columns, read)]


@lowers_on_chips("expert_sum")
def _sum(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    y, places, weights = ops[0].operands
    result = lowering.type(ops[0].result)
    tokens, width = (lowering.extent(e) for e in result.shape)
    chosen = lowering.extent(places.tensor.shape[1])
    arguments = [lowering.given(y), lowering.indices(places)]
    arguments += [lowering.given(weights), lowering.given(ops[0].result)]
    tiles = {"bd": tile(width, 256)}
    lists = {1: lowering.list(places)}
    kernel = expert_sum if lists[1][1] == 0 else part_sum
    made = [launch(kernel, arguments, tiles, {"bk": power_of_two(chosen)}, lists)]
    if tokens >= _MANY:
        made.append(launch(choice_sum, arguments, {"bt": tile(tokens), **tiles}, {}, lists))
    return [ChipCall.of("expert sum", made, 2 * tokens * chosen * width)]


@lowers_on_chips("clamped_swiglu")
def _swiglu(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    function = elementwise.clamped_swiglu(op.attr("limit"), op.attr("alpha"))
    return [mapped(lowering, op, "clamped swiglu", function)]
