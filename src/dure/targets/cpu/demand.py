"""How much of each tile is ever used.

A store cuts its tile at the tensor's edge, so the rows beyond the edge need not be computed: of a
tile of 64 rows that covers the last 3, only 3 are.  The analysis walks the body backwards from the
stores and gives, for each value and axis, the used extent as an index expression (None: all of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from dure.ir.core import Function, Op, Region, Value
from dure.ir.expr import Expr, as_expr, const, minimum
from dure.ir.types import TileType

#: One entry per axis: the used extent, or None for all of it.
Demand: TypeAlias = tuple[Expr | None, ...]


class Demands:
    """Used extents of every tile of a function."""

    def __init__(self, function: Function) -> None:
        self._found: dict[Value, Demand] = {}
        self._region(function.body)

    def alive(self, op: Op) -> bool:
        """Whether an op is worth running: it has effects, or something that is stored needs it.

        What isn't, must not run: its operands are computed only as far as others use them.
        """
        if not op.results or op.name in ("for", "if"):
            return True
        tiles = [isinstance(result.type, TileType) for result in op.results]
        return not all(tiles) or any(result in self._found for result in op.results)

    def of(self, value: Value) -> Demand:
        """The used extents of ``value``; all zero if nothing uses it."""
        assert isinstance(value.type, TileType)
        return self._found.get(value, (const(0),) * value.type.rank)

    def _need(self, value: Value, demand: Sequence[Expr | None]) -> None:
        if not isinstance(value.type, TileType):
            return
        before = self._found.get(value)
        wanted = tuple(
            None if d is None or d is as_expr(extent) else d
            for d, extent in zip(demand, value.type.shape, strict=True)
        )
        if before is None:
            self._found[value] = wanted
        else:
            # Two different bounds: rather all than a maximum that grows with every use.
            self._found[value] = tuple(
                a if a is b else None for a, b in zip(before, wanted, strict=True)
            )

    def _all(self, value: Value) -> None:
        if isinstance(value.type, TileType):
            self._need(value, (None,) * value.type.rank)

    def _region(self, region: Region) -> None:
        for op in reversed(region.ops):
            self._op(op)

    def _op(self, op: Op) -> None:
        match op.name:
            case "store":
                self._store(op)
            case "for":
                self._loop(op)
            case "if":
                for result, *yields in zip(
                    op.results, *(r.yields for r in op.regions), strict=True
                ):
                    for value in yields:
                        self._need(value, self.of(result))
                for region in op.regions:
                    self._region(region)
            case _:
                if op.results and op.results[0] in self._found:
                    self._pure(op)

    def _store(self, op: Op) -> None:
        tensor, tile = op.operands[0].tensor, op.operands[1]
        demand: list[Expr | None] = []
        for axis, extent in enumerate(tile.tile.shape):
            if axis in op.attr("list_axes") or op.attr("stride")[axis] != 1:
                demand.append(None)
                continue
            start = (
                as_expr(op.attr("index")[axis]) * op.attr("step")[axis] + op.attr("offset")[axis]
            )
            demand.append(minimum(extent, tensor.shape[axis] - start))
        self._need(tile, demand)
        for entries in op.operands[2:]:
            self._all(entries)

    def _loop(self, op: Op) -> None:
        body = op.regions[0]
        for argument, result, end in zip(body.args, op.results, body.yields, strict=True):
            demand = self.of(result) if result in self._found else (const(0),) * result.tile.rank
            self._need(argument, demand)
            self._need(end, demand)
        while True:
            self._region(body)
            changed = False
            for argument, end in zip(body.args, body.yields, strict=True):
                # What the next turn uses, this turn must yield.
                before = self.of(end)
                self._need(end, self.of(argument))
                changed |= self.of(end) != before
            if not changed:
                break
        for initial, argument in zip(op.operands, body.args, strict=True):
            self._need(initial, self.of(argument))

    def _pure(self, op: Op) -> None:
        demand = self.of(op.results[0])
        match op.name:
            case "transpose":
                order: Sequence[int] = op.attr("order")
                inner: list[Expr | None] = [None] * len(order)
                for result_axis, source_axis in enumerate(order):
                    inner[source_axis] = demand[result_axis]
                self._need(op.operands[0], inner)
            case "broadcast":
                shape = op.operands[0].tile.shape
                kept = [None if e == 1 else d for e, d in zip(shape, demand, strict=True)]
                self._need(op.operands[0], kept)
            case "reshape":
                self._reshape(op, demand)
            case "dot":
                a, b, c = op.operands
                self._need(a, (*demand[:-1], None))
                self._need(b, (*demand[:-2], None, demand[-1]))
                self._need(c, demand)
            case "reduce" | "reduce_with" | "cumsum":
                axis: int = op.attr("axis") % op.operands[0].tile.rank
                cut = [None if a == axis else d for a, d in enumerate(demand)]
                self._need(op.operands[0], cut)
                self._functions(op)
            case "quantize" | "dequantize":
                self._need(op.operands[0], (*demand[:-1], None))
            case "load" | "index_load" | "view":
                for entries in op.operands[1:]:
                    self._all(entries)
            case _:
                for operand in op.operands:
                    if op.definition.elementwise:
                        self._need(operand, demand)
                    else:
                        self._all(operand)
                self._functions(op)

    def _functions(self, op: Op) -> None:
        """What an op does with elements is written wherever the op is."""
        for region in op.regions:
            for value in region.yields:
                self._all(value)
            self._region(region)

    def _reshape(self, op: Op, demand: Demand) -> None:
        source = op.operands[0]
        before, after = source.tile.shape, op.results[0].tile.shape
        kept = unit_axes(before, after)
        if kept is None:
            self._all(source)
            return
        self._need(source, [None if to is None else demand[to] for to in kept])


def unit_axes(before: Sequence[int], after: Sequence[int]) -> list[int | None] | None:
    """For a reshape that only adds or drops axes of extent 1: where each source axis goes.

    None where the reshape does more than that.
    """
    if [e for e in before if e != 1] != [e for e in after if e != 1]:
        return None
    places = [axis for axis, extent in enumerate(after) if extent != 1]
    return [None if extent == 1 else places.pop(0) for extent in before]
