"""Collectives: where the devices of a sharded program meet.

A sharded program is one text that each of ``devices`` devices runs on its own shards.  What a
collective gives a device hangs on the values of all: its semantics take the shards stacked, one
entry a device, and give the results stacked (:data:`COLLECTIVES`);
:func:`dure.ir.tensor.shards.run_shards` interprets a program on all devices together.

    y = all_reduce(x, [residual])    the sum over the devices, added in their order; plus a residual
    y = all_gather(x)                all shards side by side along ``axis``
    y = reduce_scatter(x)            the device's part, along ``axis``, of the sum
    y = all_to_all(x)                part d of axis 0 goes to device d, in the order of the devices
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.ir.core import Cost, Op, OpDef, Region, declare
from dure.ir.expr import Expr, const
from dure.ir.rules import broken, tensor
from dure.ir.tensor.checks import elements, finish, floating, static, stored, traffic
from dure.ir.types import TensorType, Type

_Stacked: TypeAlias = "npt.NDArray[np.float64]"


def _operands(operands: Sequence[Type], attrs: Mapping[str, Any], name: str) -> TensorType:
    count = 1 + bool(attrs.get("residual"))
    if len(operands) != count:
        raise broken(f"{name} of {len(operands)} operands", f"it takes {count}")
    if attrs["devices"] < 2:
        raise broken(f"{name} over {attrs['devices']} devices", "two devices or more meet")
    found = floating(tensor(operands[0], f"the operand of {name}"), f"the operand of {name}")
    if count == 2 and tensor(operands[1], "the residual").shape != found.shape:
        raise broken(f"a residual {operands[1]} for {found}", "a residual has the sum's shape")
    return found


def _part(extent: Expr, devices: int, name: str) -> Expr:
    whole = static(extent, f"what {name} cuts")
    if whole % devices:
        raise broken(f"{name} of {whole} over {devices} devices", "each device gets as much")
    return const(whole // devices)


def _all_reduce_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    return [stored(_operands(operands, attrs, "all_reduce").shape, "")]


def _all_gather_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, axis = _operands(operands, attrs, "all_gather"), int(attrs["axis"])
    return [_along(x, axis, x.shape[axis] * int(attrs["devices"]))]


def _reduce_scatter_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, axis = _operands(operands, attrs, "reduce_scatter"), int(attrs["axis"])
    return [_along(x, axis, _part(x.shape[axis], attrs["devices"], "reduce_scatter"))]


def _all_to_all_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x = _operands(operands, attrs, "all_to_all")
    _part(x.shape[0], attrs["devices"], "all_to_all")
    return [stored(x.shape, "")]


def _along(x: TensorType, axis: int, extent: Expr) -> TensorType:
    shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
    return replace(stored(x.shape, ""), shape=shape)


def _added(x: _Stacked) -> _Stacked:
    total = np.zeros_like(x[0])
    for shard in x:
        total = total + shard
    return total


def _all_reduce(attrs: Mapping[str, Any], x: _Stacked, *residual: _Stacked) -> _Stacked:
    total = _added(x)
    return np.stack([total + (residual[0][d] if residual else 0) for d in range(len(x))])


def _all_gather(attrs: Mapping[str, Any], x: _Stacked) -> _Stacked:
    return np.stack([np.concatenate(list(x), attrs["axis"])] * len(x))


def _reduce_scatter(attrs: Mapping[str, Any], x: _Stacked) -> _Stacked:
    return np.stack(np.split(_added(x), len(x), attrs["axis"]))


def _all_to_all(attrs: Mapping[str, Any], x: _Stacked) -> _Stacked:
    parts = np.stack([np.stack(np.split(shard, len(x))) for shard in x])
    return np.swapaxes(parts, 0, 1).reshape(x.shape)


#: ``(attributes, *stacked operands) -> stacked results``, on doubles.
COLLECTIVES: dict[str, Callable[..., _Stacked]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


def results(op: Op, stacked: Sequence[_Stacked]) -> list[Any]:
    """What each device gets, given the operands of all, stacked."""
    return [finish(shard, {}) for shard in COLLECTIVES[op.name](op.attrs, *stacked)]


def _added_cost(op: Op) -> Cost:
    """A device adds up its part of the sum."""
    return Cost(elements(op.operands[0].tensor), traffic(op))


def _moved_cost(op: Op) -> Cost:
    return Cost(0, traffic(op))


declare(
    OpDef(
        "all_reduce",
        "tensor",
        _all_reduce_typing,
        None,
        _added_cost,
        defaults={"residual": False},
        exact=False,
        error_bound=1.0,
        doc="all_reduce(x, [residual]) {devices, residual}: the sum over devices, plus residual",
    )
)
declare(
    OpDef(
        "all_gather",
        "tensor",
        _all_gather_typing,
        None,
        _moved_cost,
        defaults={"axis": 1},
        doc="all_gather(x) {devices, axis}: the devices' shards side by side",
    )
)
declare(
    OpDef(
        "reduce_scatter",
        "tensor",
        _reduce_scatter_typing,
        None,
        _added_cost,
        defaults={"axis": 1},
        exact=False,
        error_bound=1.0,
        doc="reduce_scatter(x) {devices, axis}: the device's part of the sum over all devices",
    )
)
declare(
    OpDef(
        "all_to_all",
        "tensor",
        _all_to_all_typing,
        None,
        _moved_cost,
        doc="all_to_all(x) {devices}: part d along axis 0 goes to device d",
    )
)
