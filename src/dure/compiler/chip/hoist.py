"""Loop-invariant loads and computations move out of loops, so that what stays is loaded once.

A pure op whose operands and symbols don't change in a loop moves in front of it, unless it is a
constant, which costs nothing where it is used.  A load moves too where its tensor is only read, and
the loop is known to run: of a hundred experts most may have no tokens.  A load of an axis that an
index list rules stays with its list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dure.compiler.chip.usage import is_cheap
from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.expr import Range, Symbol, as_expr, proves, symbols
from dure.ir.rewrite import expressions_in, type_expressions


def hoist(function: Function) -> Function:
    """The same program with everything as far outside as it can be."""
    roots = {p.value: p.value for p in function.params}
    readonly = {p.value for p in function.params if p.access == "in"}
    body = _Hoist(readonly, roots).region(function.body)
    if not any(op.attrs.get("stored") for op in walk(body)):
        return replace(function, body=body)
    return replace(function, body=_turned_once(body, {}, {}))


def _turned_once(
    region: Region, known: Mapping[tuple[Value, object], Value], same: dict[Value, Value]
) -> Region:
    """A tile that several products read transposed is turned once."""
    known, ops = dict(known), list[Op]()
    for op in region.ops:
        operands = tuple(same.get(v, v) for v in op.operands)
        if op.name == "transpose" and op.attrs.get("stored"):
            key = operands[0], op.attr("order")
            if key in known:
                same[op.result] = known[key]
                continue
            known[key] = op.result
        inner = tuple(_turned_once(r, known, same) for r in op.regions)
        ops.append(replace(op, operands=operands, regions=inner))
    return replace(region, ops=tuple(ops), yields=tuple(same.get(v, v) for v in region.yields))


class _Hoist:
    def __init__(self, readonly: set[Value], roots: dict[Value, Value]) -> None:
        self.readonly = readonly
        self.roots = roots

    def region(self, region: Region) -> Region:
        ops: list[Op] = []
        for op in region.ops:
            if op.name == "view":
                self.roots[op.result] = self.roots[op.operands[0]]
            if not op.regions:
                ops.append(op)
                continue
            inner = [self.region(r) for r in op.regions]
            if op.name == "for":
                moved, kept = self._split(op, inner[0])
                ops.extend(moved)
                inner = [Region(inner[0].args, kept, inner[0].yields, inner[0].symbols)]
            ops.append(replace(op, regions=tuple(inner)))
        return replace(region, ops=tuple(ops))

    def _split(self, loop: Op, body: Region) -> tuple[list[Op], tuple[Op, ...]]:
        """The ops of a loop's body that don't change in it, and the rest."""
        changing: set[object] = {*body.args, *body.symbols}
        runs = _runs(loop)
        moved: list[Op] = []
        kept: list[Op] = []
        for op in body.ops:
            if self._stays(op, changing, runs):
                changing.update(op.results)
                changing.update(op.symbols)
                kept.append(op)
            else:
                moved.append(op)
        # A constant or a free op alone isn't worth a tile that lives across the loop.
        needed: set[Value] = set()
        worth: list[Op] = []
        for op in reversed(moved):
            if not is_cheap(op) or any(r in needed for r in op.results):
                needed.update(op.operands)
                worth.append(op)
        worth.reverse()
        chosen = set(map(id, worth))
        return worth, tuple(op for op in body.ops if id(op) not in chosen)

    def _stays(self, op: Op, changing: set[object], runs: bool) -> bool:
        if op.regions or op.name == "store":
            return True
        if op.name == "load" and self.roots.get(op.operands[0]) not in self.readonly:
            return True
        # What costs, or may fail on its values (a view, a scalar read), isn't run in vain.
        if op.name in ("load", "view", "index_load") and not runs:
            return True
        return any(use in changing for use in _uses(op))


def _uses(op: Op) -> Iterator[object]:
    yield from op.operands
    found: set[Symbol] = set()
    for value in op.attrs.values():
        for expr in expressions_in(value):
            found |= symbols(expr)
    for result in op.results:
        for expr in type_expressions(result.type):
            found |= symbols(expr)
    for entry in op.symbols:
        for end in (entry.low, entry.high):
            found |= symbols(end) if end is not None else set()
    yield from found


def _runs(loop: Op) -> bool:
    """Whether the loop is known to run at least once."""
    trips = Range(as_expr(loop.attr("start")), as_expr(loop.attr("stop")), loop.attr("step")).trips
    return proves(as_expr(1) <= trips)
