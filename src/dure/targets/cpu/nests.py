"""Loops around one dot: sums that begin with the first turn of all loops and end with the last one.

A convolution walks its taps, and batched products a K whose loads have more axes than a dot's
operands.  What the loops carry is one tile of sums: the first dot needn't read it, and the last one
goes on with what becomes of it, where that is one store (:mod:`dure.targets.cpu.endings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dure.ir.core import Op, Value, walk
from dure.ir.dtypes import DType
from dure.ir.expr import as_expr, symbols
from dure.ir.rewrite import has_effects
from dure.targets.cpu import contraction
from dure.targets.cpu.contraction import Sums
from dure.targets.cpu.dots import zero
from dure.targets.cpu.endings import ending_of
from dure.targets.cpu.values import Full
from dure.targets.cpu.writer import Reg, integer

if TYPE_CHECKING:
    from dure.targets.cpu.body import BodyEmitter

#: Fewer rows don't repay a second way to write their sums.
_ROWS = 16


def loop(body: BodyEmitter, op: Op) -> bool:
    """Write the loop as the outermost of a nest around one dot, if it is that and its sums end with
    the nest; say whether it is.
    """
    loops = _nest(op)
    if not loops or op.result.tile.rank != 2 or op.result.tile.shape[0] < _ROWS:
        return False
    if not contraction.is_zero(body.tile(op.operands[0])):
        return False
    reads = [each for each in walk(op.regions[0]) if each.name == "load"]
    ending = ending_of(body, op, reads)
    if ending is None:
        return False
    kind, w = op.result.tile, body.w
    assert isinstance(kind.dtype, DType)
    sums = Sums(body.e.buffer(kind.shape, kind.dtype, apart=True), ending)
    turns = integer(1)
    for each in loops:
        start, stop = (w.index(each.attr(edge)) for edge in ("start", "stop"))
        turns = w.mul(turns, w.maximum(w.sub(stop, start), integer(0)))
    zeros, extents = Full(kind, zero(kind.dtype, 1)), body.extents(op.result)
    w.when(
        w.compare("icmp eq", turns, integer(0)),
        lambda: ending.write_all(zeros, *extents),
        lambda: _turns(body, op, sums, (), ()),
    )
    return True


def _nest(op: Op) -> list[Op]:
    """The loops of a nest around one dot, the outermost first; none where there is something else.

    How often each one turns doesn't depend on the others.
    """
    loops: list[Op] = []
    own: set[object] = set()
    while op.name == "for":
        edges = [as_expr(op.attr(edge)) for edge in ("start", "stop")]
        if op.attr("step") != 1 or len(op.results) != 1 or any(own & {*symbols(e)} for e in edges):
            return []
        region = op.regions[0]
        own.update(region.symbols)
        inner = [each for each in region.ops if region.args[0] in each.operands]
        if len(inner) != 1 or list(region.yields) != list(inner[0].results):
            return []
        others = [each for each in region.ops if each is not inner[0]]
        if any(each.regions or has_effects(each) for each in others):
            return []
        loops.append(op)
        op = inner[0]
    return loops if op.name == "dot" and _adds(op, loops[-1].regions[0].args[0]) else []


def _adds(dot: Op, sums: Value) -> bool:
    """Whether a dot of plain numbers adds to these sums."""
    left, right, added = dot.operands
    return added is sums and left is not sums and right is not sums and _plain(left, right)


def _plain(*values: Value) -> bool:
    return all(value.tile.block is None for value in values)


def _turns(
    body: BodyEmitter, op: Op, sums: Sums, first: Sequence[Reg], last: Sequence[Reg]
) -> None:
    """The turns of a loop; ``first`` and ``last`` say whether those around are at their edges."""
    region, w = op.regions[0], body.w
    start, stop = (w.index(op.attr(edge)) for edge in ("start", "stop"))

    def turn(variable: Reg, _: list[Reg]) -> list[Reg]:
        w.symbols[region.symbols[0]] = variable
        begins = [*first, w.compare("icmp eq", variable, start)]
        ends = [*last, w.compare("icmp eq", w.add(variable, integer(1)), stop)]
        mark, outside, now = body.e.mark(), dict(body.tiles), body.now
        body.now = region
        for each in region.ops:
            with w.at(each.span):
                if each.name == "for":
                    _turns(body, each, sums, begins, ends)
                elif each.name == "dot":
                    contraction.nested(body, each, sums, begins, ends)
                else:
                    body.op(each)
        body.e.release(mark)
        body.tiles, body.now = outside, now
        return []

    w.loop(start, stop, 1, turn)
