"""Which kernels compute the tensor ops of a mixture of experts (see :mod:`dure.ir.tensor.experts`).

Rows of the experts are as many as choices, at run time; which expert they are of is data.  So the
grouped product has no variants by rows: its instances walk the rows that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dure.ir.core import Op
from dure.ir.expr import Expr
from dure.ir.lowering import Launch, LoweringContext, lowers
from dure.ir.types import static_extent
from dure.library import elementwise
from dure.library.lowering import block_of, k_block, launch, mapped, power_of_two
from dure.library.moe import (
    expert_ends,
    expert_places,
    expert_rows,
    expert_sum,
    grouped_gated_linear,
    grouped_linear,
    moe_route,
)

#: Choices that are compared at a time.
_COMPARED = 64
#: Rows and columns of a tile of the grouped product.
_ROWS, _COLUMNS = 8, 32


@lowers("route")
def lower_route(op: Op, context: LoweringContext) -> list[Launch]:
    """A token an instance."""
    experts = static_extent(op.operands[0].tensor.shape[1])
    assert experts is not None
    return launch(
        moe_route,
        [op.operands[0], *op.results],
        bm=1,
        be=power_of_two(experts),
        bt=power_of_two(op.attr("k")),
        normalized=op.attr("normalized"),
    )


@lowers("dispatch")
def lower_dispatch(op: Op, context: LoweringContext) -> list[Launch]:
    """Places are counted, and so is where each expert's rows start and stop."""
    experts, (places, starts, stops) = op.operands[0], op.results
    chosen = _covering(experts.tensor.shape[1])
    tiles = {"bo": max(1, _COMPARED // chosen), "bk": chosen, "count": op.attr("experts")}
    return [
        *launch(expert_places, [experts, places], bt=1, **tiles),
        *launch(expert_ends, [experts, starts, stops], be=16, **tiles),
    ]


@lowers("expert_rows")
def lower_expert_rows(op: Op, context: LoweringContext) -> list[Launch]:
    """A token an instance, written once for each of its experts."""
    x, places = op.operands
    consts = {"bk": _covering(places.tensor.shape[1]), "bd": block_of(x.tensor.shape[1])}
    return launch(expert_rows, [x, places, op.result], **consts)


@lowers("grouped_linear")
def lower_grouped_linear(op: Op, context: LoweringContext) -> list[Launch]:
    """An instance for each expert and each block of columns."""
    x, w, starts, stops, *bias = op.operands
    values = [x, w, starts, stops, bias[0] if bias else None, op.result]
    bk = k_block(x.tensor, w.tensor)
    decoded = w.tensor.block is not None
    return launch(grouped_linear, values, bm=_ROWS, bn=_COLUMNS, bk=bk, decoded=decoded)


@lowers("grouped_gated")
def lower_grouped_gated(op: Op, context: LoweringContext) -> list[Launch]:
    """As the products of one weight."""
    x, gate, up, starts, stops, *biases = op.operands
    values = [x, gate, up, starts, stops, *(biases or (None, None)), op.result]
    consts: dict[str, object] = {
        "bk": max(k_block(x.tensor, gate.tensor), k_block(x.tensor, up.tensor)),
        "decoded": gate.tensor.block is not None,
        "gating": gating_of(op),
    }
    return launch(grouped_gated_linear, values, bm=_ROWS, bn=_COLUMNS, **consts)


def gating_of(op: Op) -> Callable[[Any, Any], Any]:
    """What grouped_gated makes of both products."""
    if op.attr("limit"):
        return elementwise.clamped_swiglu(op.attr("limit"), op.attr("alpha"))
    return elementwise.gated(op.attr("activation") or "identity")


@lowers("expert_sum")
def lower_expert_sum(op: Op, context: LoweringContext) -> list[Launch]:
    """A token an instance."""
    y, places, weights = op.operands
    consts = {"bk": _covering(places.tensor.shape[1]), "bd": block_of(y.tensor.shape[1])}
    return launch(expert_sum, [y, places, weights, op.result], **consts)


@lowers("clamped_swiglu")
def lower_clamped_swiglu(op: Op, context: LoweringContext) -> list[Launch]:
    """An elementwise kernel."""
    function = elementwise.clamped_swiglu(op.attr("limit"), op.attr("alpha"))
    return mapped(function, op.operands, op.result)


def _covering(extent: Expr) -> int:
    size = static_extent(extent)
    assert size is not None
    return power_of_two(size)
