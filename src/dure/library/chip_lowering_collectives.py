"""Where devices meet, on chips: the collectives that tensor ops are.

Which launches a collective is hangs on how the chip's links join the devices, which a lowering
doesn't know; so a :class:`CollectiveCall` says what is asked for.  What devices give one another
lies in a tensor of the collective's own, so that it is written again only when another collective
of the same layer, in which all devices have met, lies between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import cast

from dure.ir.core import Op, Value
from dure.ir.dtypes import DType
from dure.library.chip_lowering import ChipCall, ChipLowering, Launch, lowers_on_chips
from dure.library.chip_tensors import Operand, Stored
from dure.library.collectives import Collective, Kind, Way, buffers
from dure.machine.chip import Chip
from dure.machine.group import group_of


@dataclass(frozen=True)
class CollectiveCall(ChipCall):
    """A collective over ``devices``: several launches, of which there are several ways.
    ``arguments`` are the collective's own by name (:class:`~dure.library.collectives.Stage`).
    """

    collective: Collective | None = None
    devices: int = 1
    arguments: Mapping[str, Operand | None] = field(default_factory=dict[str, "Operand | None"])

    def ways(self, chip: Chip) -> tuple[tuple[Launch, ...], ...]:
        """The ways to do it on a chip's links."""
        assert self.collective is not None
        return tuple(map(self._launches, self.collective.ways(group_of(chip, self.devices))))

    def _launches(self, way: Way) -> tuple[Launch, ...]:
        between = {
            name: Operand(Stored((Value(replace(kind, shape=kind.shape[1:])),)))
            for name, kind in buffers(way).items()
            if name not in self.arguments
        }
        arguments = {**self.arguments, **between}
        return tuple((s.call, tuple(map(arguments.__getitem__, s.arguments))) for s in way)


@lowers_on_chips("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
def _collective(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op = ops[0]
    kind = lowering.type(op.operands[0])
    *rows, columns = (lowering.extent(e) for e in kind.shape)
    axis = int(op.attr("axis")) if "axis" in op.definition.defaults else 0
    dtype, devices = cast(DType, kind.dtype), int(op.attr("devices"))
    what = Collective(
        cast(Kind, op.name),
        prod(rows),
        columns,
        dtype,
        axis=int(axis == len(kind.shape) - 1),
        residual=bool(op.attr("residual")) if op.name == "all_reduce" else False,
    )
    x, *rest = (lowering.given(v).operand for v in op.operands)
    arguments = {
        "x": x,
        "residual": rest[0] if what.residual else None,
        "y": lowering.given(op.result).operand,
    }
    name = op.name.replace("_", "-")
    added = what.rows * what.columns if op.name in ("all_reduce", "reduce_scatter") else 0
    return [CollectiveCall(name, (), added, collective=what, devices=devices, arguments=arguments)]
