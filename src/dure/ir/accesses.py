"""Where a tile kernel touches its arguments: loads, stores and reads, resolved through views.

The verifier, the proof that stores are disjoint and ``ir.portable`` read this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dure.ir.core import Function, Op, Param, Region, Value
from dure.ir.expr import Expr, Symbol, as_expr
from dure.ir.types import TileType

AccessKind: TypeAlias = Literal["load", "store", "index_load"]


@dataclass(frozen=True, slots=True)
class AxisAccess:
    """Along one axis of the argument: ``extent`` elements, ``stride`` apart, from ``start``.

    ``view`` is the part of the start that views add.  Where an index list rules the axis,
    ``entries`` is the access that loaded the list, each entry standing for ``step`` elements, and
    ``start`` is what is added to them.
    """

    start: Expr
    view: Expr
    extent: int
    stride: Expr
    step: Expr
    entries: TensorAccess | None = None

    @property
    def span(self) -> Expr:
        """Elements from the first to the last that is touched, both counted (no list)."""
        return self.stride * (self.extent - 1) + 1


@dataclass(frozen=True, slots=True)
class TensorAccess:
    """One op that touches an argument.  ``conditions`` are those of the ifs around it."""

    kind: AccessKind
    op: Op
    param: Param
    tensor: Value
    axes: tuple[AxisAccess, ...]
    conditions: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Accesses:
    """Every access of a kernel in program order, and the reads that define index symbols."""

    all: tuple[TensorAccess, ...]
    symbols: dict[Symbol, TensorAccess]


def accesses_of(function: Function) -> Accesses:
    """The accesses of a verified tile kernel."""
    collector = _Collector(function)
    found = tuple(collector.region(function.body, ()))
    return Accesses(found, collector.symbols)


class _Collector:
    def __init__(self, function: Function) -> None:
        self.roots: dict[Value, tuple[Param, tuple[Expr, ...]]] = {
            p.value: (p, (as_expr(0),) * p.value.type.rank) for p in function.params
        }
        self.lists: dict[Value, TensorAccess] = {}
        self.symbols: dict[Symbol, TensorAccess] = {}

    def region(self, region: Region, conditions: tuple[Expr, ...]) -> Iterator[TensorAccess]:
        for op in region.ops:
            if op.name == "view":
                self._view(op)
            elif op.name in ("load", "store", "index_load"):
                yield self._access(op, conditions)
            elif op.name in ("reshape", "transpose") and op.operands[0] in self.lists:
                self.lists[op.result] = self.lists[op.operands[0]]
            for number, inner in enumerate(op.regions):
                held = conditions
                if op.name == "if" and number == 0:
                    held = (*conditions, as_expr(op.attr("condition")))
                yield from self.region(inner, held)

    def _view(self, op: Op) -> None:
        param, offsets = self.roots[op.operands[0]]
        axis: int = op.attr("axis")
        moved = list(offsets)
        moved[axis] = moved[axis] + as_expr(op.attr("start"))
        self.roots[op.result] = (param, tuple(moved))

    def _access(self, op: Op, conditions: tuple[Expr, ...]) -> TensorAccess:
        tensor = op.operands[0]
        param, offsets = self.roots[tensor]
        if op.name == "index_load":
            axes = tuple(
                AxisAccess(as_expr(at) + offset, offset, 1, as_expr(1), as_expr(1))
                for at, offset in zip(op.attr("index"), offsets, strict=True)
            )
            found = TensorAccess("index_load", op, param, tensor, axes, conditions)
            self.symbols[op.symbols[0]] = found
            return found
        is_load = op.name == "load"
        shape = op.result.type.shape if is_load else op.operands[1].type.shape
        lists = op.operands[1:] if is_load else op.operands[2:]
        by_axis = dict(zip(op.attr("list_axes"), lists, strict=True))
        axes = tuple(
            self._axis(op, axis, extent, offsets[axis], by_axis.get(axis))
            for axis, extent in enumerate(shape)
        )
        kind: AccessKind = "load" if is_load else "store"
        found = TensorAccess(kind, op, param, tensor, axes, conditions)
        if is_load and isinstance(op.result.type, TileType) and tensor.tensor.index is not None:
            self.lists[op.result] = found
        return found

    def _axis(
        self, op: Op, axis: int, extent: int | Expr, view: Expr, entries: Value | None
    ) -> AxisAccess:
        assert isinstance(extent, int)
        step, offset, stride = (as_expr(op.attr(k)[axis]) for k in ("step", "offset", "stride"))
        if entries is not None:
            source = self.lists.get(entries)
            return AxisAccess(offset + view, view, extent, as_expr(1), step, source)
        start = as_expr(op.attr("index")[axis]) * step + offset
        return AxisAccess(start + view, view, extent, stride, step)
