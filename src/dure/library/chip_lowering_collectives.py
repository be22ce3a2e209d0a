"""Where devices meet, on chips: the collectives that tensor ops are.

Which launches a collective is hangs on how the chip's links join the devices, which a lowering
doesn't know; so a :class:`CollectiveCall` says what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

from dure.ir.core import Op
from dure.ir.dtypes import DType
from dure.library.chip_lowering import ChipCall, ChipLowering, lowers_on_chips
from dure.library.collectives import Collective, Kind


@dataclass(frozen=True)
class CollectiveCall(ChipCall):
    """A collective over ``devices``: several launches, of which there are several ways."""

    collective: Collective | None = None
    devices: int = 1


@lowers_on_chips("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
def _collective(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    kind = lowering.type(op.operands[0])
    *rows, columns = (lowering.extent(e) for e in kind.shape)
    axis = int(op.attr("axis")) if "axis" in op.definition.defaults else 0
    what = Collective(
        cast(Kind, op.name),
        prod(rows),
        columns,
        cast(DType, kind.dtype),
        axis=int(axis == len(kind.shape) - 1),
        residual=bool(op.attr("residual")) if op.name == "all_reduce" else False,
    )
    devices = int(op.attr("devices"))
    name = op.name.replace("_", "-")
    added = what.rows * what.columns if op.name in ("all_reduce", "reduce_scatter") else 0
    return [CollectiveCall(name, (), added, collective=what, devices=devices)]
