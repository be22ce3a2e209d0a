"""Loops that carry tiles element by element, turned inside out: what they carry stays in registers.

``for c: total = total + load(x, (i, c))`` would read and write ``total`` in every turn.  Where no
element of a turn depends on another one of the turn before, the loop over elements goes outside and
the author's loop inside.  Each element goes through the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from dure.ir.core import Op, Region, Value
from dure.ir.dtypes import DType
from dure.ir.expr import Expr, Symbol, as_expr, linear, symbols
from dure.targets.cpu.bounds import Access, Bounds
from dure.targets.cpu.copies import lies_along
from dure.targets.cpu.demand import unit_axes
from dure.targets.cpu.elementwise import COSTLY
from dure.targets.cpu.memory import Extent
from dure.targets.cpu.values import TOGETHER, Buffer, Held, Tile, lane_axis
from dure.targets.cpu.writer import Reg, integer, lanes_of

if TYPE_CHECKING:
    from dure.targets.cpu.body import BodyEmitter


def loop(body: BodyEmitter, op: Op) -> bool:
    """Write the loop inside out if it carries tiles element by element; say whether it did."""
    if not _fits(body, op):
        return False
    _Loop(body, op).write()
    return True


def _fits(body: BodyEmitter, op: Op) -> bool:
    region = op.regions[0]
    if not region.args or op.attr("step") != 1:
        return False
    shape = region.args[0].tile.shape
    if any(a.tile.shape != shape or not isinstance(a.tile.dtype, DType) for a in region.args):
        return False
    return bool(shape) and all(_elementwise(body, region, o) for o in region.ops)


def _elementwise(body: BodyEmitter, region: Region, op: Op) -> bool:
    """Whether an op of the loop needs nothing but the same element of what is carried."""
    match op.name:
        case "load":
            stored = body.roots.get(op.operands[0], op.operands[0]) in body.stored
            if stored or len(op.operands) > 1:
                return False
            places = [*op.attr("index"), *op.attr("offset")]
            return all(_steady(as_expr(place), region.symbols[0]) for place in places)
        case "full" | "iota":
            return True
        case "broadcast" | "reshape":
            made = _made(region, op.operands[0])
            if region.args and any(o in region.args for m in made for o in m.operands):
                return False
            kept = unit_axes(op.operands[0].tile.shape, op.result.tile.shape)
            cheap = not any(m.name in COSTLY for m in made)
            return (
                op.operands[0] not in region.args
                and cheap
                and (op.name == "broadcast" or kept is not None)
            )
        case _:
            return op.definition.elementwise


def _steady(place: Expr, variable: Symbol) -> bool:
    """Whether an index grows by the same in every turn."""
    for product, _ in linear(place)[0]:
        moving = [factor for factor in product if variable in symbols(factor)]
        if moving and moving != [variable]:
            return False
    return True


def _made(region: Region, value: Value) -> list[Op]:
    """The ops of the loop that a value is made by."""
    maker = next((o for o in region.ops if value in o.results), None)
    if maker is None:
        return []
    return [maker, *(m for operand in maker.operands for m in _made(region, operand))]


class _Loop:
    """One loop: its turns, and what it carries."""

    def __init__(self, body: BodyEmitter, op: Op) -> None:
        self.body, self.op, self.region = body, op, op.regions[0]
        self.w, self.e = body.w, body.e
        self.start, self.stop = self.w.index(op.attr("start")), self.w.index(op.attr("stop"))
        self.shape = self.region.args[0].tile.shape
        self.axis = lane_axis(self.shape)

    def write(self) -> None:
        body, e, outside = self.body, self.e, dict(self.body.tiles)
        initial = [body.tile(value) for value in self.op.operands]
        results: list[Buffer] = []
        for argument in self.region.args:
            assert isinstance(argument.tile.dtype, DType)
            results.append(e.buffer(self.shape, argument.tile.dtype))
        extents = body.extents(self.region.args[0])
        if any(body.extents(a) != extents for a in self.region.args):
            extents = [Extent(x) for x in self.shape]
        with body.inlining():
            inside = self._inside(extents)

            def each(index: list[Reg], lanes: int) -> None:
                totals = [tile.vector(e, index, self.axis, lanes) for tile in initial]
                totals = self._turns(self.start, inside, index, totals, True)
                if inside is not self.stop:
                    totals = self._turns(inside, self.stop, index, totals, False)
                for total, target in zip(totals, results, strict=True):
                    target.put(e, total, index, self.axis)

            several = TOGETHER if self._lies_along(initial, TOGETHER * e.lanes) else 1
            e.for_each(extents, self.axis, each, (), several)
        body.tiles = outside
        for result, target in zip(self.op.results, results, strict=True):
            body.tiles[result] = target
            body.owned.add(result)

    def _turns(
        self, start: Reg, stop: Reg, index: list[Reg], totals: list[Reg], inside: bool
    ) -> list[Reg]:
        lanes = lanes_of(totals[0].type)

        def turn(variable: Reg, held: list[Reg]) -> list[Reg]:
            tiles = self._turn(variable, held)
            bounds = Bounds(self.w, _accesses(tiles, len(self.shape)), self.axis, lanes)
            with bounds.kept() if inside else nullcontext():
                return [tile.vector(self.e, index, self.axis, lanes) for tile in tiles]

        return self.w.loop(start, stop, 1, turn, totals)

    def _turn(self, variable: Reg, held: Sequence[Reg]) -> list[Tile]:
        """What a turn yields, from what it is given."""
        body = self.body
        self.w.symbols[self.region.symbols[0]] = variable
        for argument, value in zip(self.region.args, held, strict=True):
            body.tiles[argument] = Held(argument.tile, value)
        body.region(self.region)
        return [body.tile(value) for value in self.region.yields]

    def _lies_along(self, initial: Sequence[Tile], width: int) -> bool:
        tiles = [*initial, *self._turn(self.start, [integer(0)] * len(initial))]
        return all(lies_along(tile, self.axis, width) for tile in tiles)

    def _inside(self, extents: Sequence[Extent]) -> Reg:
        """The turn up to which all of them read nothing but what lies inside of the tensors.

        What grows by the same in every turn lies inside in all between two that do.
        """
        w = self.w
        used = [w.index(x.bound) for x in extents]
        used[self.axis] = integer(self.shape[self.axis])

        def fits(turn: Reg) -> Reg | None:
            tiles = self._turn(turn, [integer(0)] * len(self.region.args))
            bounds = Bounds(w, _accesses(tiles, len(used)), self.axis, self.e.lanes)
            if not bounds.open:
                return None
            return w.compare("icmp sge", bounds.limit(used), used[self.axis])

        first = fits(self.start)
        if first is None:
            return self.stop
        last, before = w.sub(self.stop, integer(1)), w.sub(self.stop, integer(2))
        whole, most = fits(last), fits(before)
        assert whole is not None and most is not None
        found = w.select(whole, self.stop, w.select(most, last, self.start))
        return w.maximum(self.start, w.select(first, found, self.start))


def _accesses(tiles: Sequence[Tile], rank: int) -> list[Access]:
    return [access for tile in tiles for access in tile.accesses(range(rank))]
