"""Where devices meet, on chips: the collectives that tensor ops are.

Which launches a collective is hangs on how the chip's links join the devices, which a lowering
doesn't know; so a :class:`CollectiveCall` says what is asked for.  What devices give one another
lies in a tensor of the collective's own, so that it is written again only when another collective
of the same layer, in which all devices have met, lies between.  A linear layer whose results are
only added up over the devices is lowered with the sum (:class:`SummedCall`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from math import prod
from typing import cast

from dure.ir.core import Op, Value
from dure.ir.dtypes import DType
from dure.ir.types import static_extent
from dure.library.chip_lowering import ChipCall, ChipLowering, Launch, lowers_on_chips
from dure.library.chip_tensors import ABSENT, Operand, Stored, Window
from dure.library.collective_product_ways import SummedProduct
from dure.library.collectives import Collective, Kind, Stage, Way, buffers
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
        ways = self.collective.ways(group_of(chip, self.devices))
        return tuple(launches(way, self.arguments) for way in ways)


def launches(way: Way, arguments: Mapping[str, Operand | None]) -> tuple[Launch, ...]:
    """A way with what its launches take: the collective's arguments by name, and tensors of its own
    for what lies between launches.
    """
    between = {
        name: Operand(Stored((Value(replace(kind, shape=kind.shape[1:])),)))
        for name, kind in buffers(way).items()
        if name not in arguments
    }
    given = {**arguments, **between}
    return tuple((stage.call, tuple(_operands(stage, given))) for stage in way)


def _operands(stage: Stage, given: Mapping[str, Operand | None]) -> Iterator[Operand | None]:
    """What a launch takes; of an argument in pieces, its own."""
    for name, kind in zip(stage.arguments, stage.call.types, strict=True):
        operand, piece = given[name], stage.seen(name)
        if operand is None or kind is None or piece is None:
            yield operand
            continue
        place, pieces = piece
        first, _, *rest = (static_extent(e) or 0 for e in kind.shape)
        yield replace(operand, window=Window((first, pieces, *rest), 1, place, place + 1))


@dataclass(frozen=True)
class SummedCall(ChipCall):
    """A product and the sum of its results over the devices: with the links at work beside the
    product, or, where that can't be, as it is done ``apart``.
    """

    product: SummedProduct | None = None
    devices: int = 1
    arguments: Mapping[str, Operand | None] = field(default_factory=dict[str, "Operand | None"])
    apart: tuple[ChipCall, ...] = ()

    def ways(self, chip: Chip) -> tuple[tuple[Launch, ...], ...]:
        """The ways in which the product itself gives the devices what it makes."""
        assert self.product is not None
        ways = self.product.ways(group_of(chip, self.devices))
        return tuple(launches(way, self.arguments) for way in ways)

    def others(self, chip: Chip) -> tuple[tuple[Launch, ...], ...]:
        """One after another."""
        ways = product(*(call.ways(chip) for call in self.apart))
        return tuple(tuple(chain.from_iterable(way)) for way in ways)


@lowers_on_chips("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
def _collective(lowering: ChipLowering, ops: Sequence[Op]) -> Sequence[ChipCall]:
    op, *linear = ops
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
    made = CollectiveCall(name, (), added, collective=what, devices=devices, arguments=arguments)
    if not linear:
        return [made]
    before = lowering.lower(linear)
    together = _summed(lowering, linear[0], before, made)
    return [*before, made] if together is None else [together]


def _summed(
    lowering: ChipLowering, linear: Op, before: Sequence[ChipCall], sums: CollectiveCall
) -> SummedCall | None:
    """A linear layer and the sum of its results together; None where that has no kernel."""
    x, weight, *bias = linear.operands
    rows = lowering.given(x)
    if lowering.scheme(weight) is not None or rows.type is None or rows.operand is None:
        return None
    if rows.operand.window is not None or sums.collective is None:
        return None
    what = sums.collective
    (weights,) = lowering.matrix(
        [weight], *reversed([lowering.extent(e) for e in weight.tensor.shape])
    )
    assert weights.type is not None
    biases = lowering.given(bias[0]) if bias else ABSENT
    summed = SummedProduct(
        what.rows,
        lowering.extent(weight.tensor.shape[1]),
        what.columns,
        what.dtype,
        cast(DType, weights.type.dtype),
        None if biases.type is None else cast(DType, biases.type.dtype),
        what.residual,
    )
    own = {"x": rows.operand, "w": weights.operand, "bias": biases.operand}
    (call,) = before
    return SummedCall(
        f"{call.name}, {sums.name}",
        (),
        call.flops + sums.flops,
        call.weight_bytes,
        product=summed,
        devices=sums.devices,
        arguments={**sums.arguments, **own},
        apart=(call, sums),
    )
