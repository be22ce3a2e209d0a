"""Products computed the other way round, where that is less work.

A matrix engine that holds its left operand and streams the right one past it takes as long for a
few rows as for many: ``x @ w`` of one row streams all of ``w``, while ``(w.T @ x.T).T`` holds the
blocks of ``w`` and streams a single column.  A product that a loop accumulates is turned where the
engine's own law says that the turned one, with the transpose of its result, takes less; what is
then computed of the result, element by element, is computed before it is turned back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dure.compiler.chip.legalise import dot_engine
from dure.errors import DureError
from dure.ir.core import Function, Op, Region, Value, declared_ops, infer, walk
from dure.ir.expr import as_expr, evaluate
from dure.ir.rewrite import Pattern, Rewritten, Scope, rewrite
from dure.ir.types import TileType
from dure.machine.chip import Chip
from dure.sim.cost import Costs

_SWAPPED = (1, 0)


def turn(function: Function, chip: Chip, costs: Costs | None = None) -> Function:
    """The same program, with such products turned."""
    if not any(e.dot is not None and e.dot.stationary_k_first for e in chip.engines.values()):
        return function
    work = _Turn(chip, costs or Costs(chip), _wanted(function))
    found = rewrite(function, [("for", work.loop)])
    if found is function:
        return function
    names = [n for n, d in declared_ops().items() if d.elementwise and n not in ("full", "iota")]
    patterns: list[Pattern] = [(name, _before_turning) for name in names]
    return rewrite(found, patterns)


class _Turn:
    def __init__(self, chip: Chip, costs: Costs, wanted: set[Value]) -> None:
        self.chip = chip
        self.wanted = wanted
        self.costs = costs

    def loop(self, op: Op, scope: Scope) -> Rewritten | None:
        """A loop with the products turned that it accumulates."""
        region = op.regions[0]
        found: dict[int, Op] = {}
        for place, last in enumerate(region.yields):
            dot = scope.maker(last)
            if dot is not None and self._accumulates(op, place, dot, scope):
                found[place] = dot
        if not found:
            return None
        ops: list[Op] = []
        operands, args, results = list(op.operands), list(region.args), list(op.results)
        dots: dict[Op, Value] = {}
        for place, dot in found.items():
            start = scope.maker(operands[place])
            assert start is not None
            args[place] = Value(_swapped(args[place].tile), args[place].name)
            results[place] = Value(_swapped(results[place].tile), results[place].name)
            shape = {**start.attrs, "shape": args[place].tile.shape}
            ops.append(infer("full", [], shape, span=start.span))
            operands[place] = ops[-1].result
            dots[dot] = args[place]
        made = Region(tuple(args), *_turned(region, dots), region.symbols)
        new = replace(op, operands=tuple(operands), results=tuple(results), regions=(made,))
        ops.append(new)
        values = list(new.results)
        for place in found:
            ops.append(infer("transpose", [values[place]], {"order": _SWAPPED}, span=op.span))
            values[place] = ops[-1].result
        return Rewritten(tuple(ops), tuple(values))

    def _accumulates(self, loop: Op, place: int, dot: Op, scope: Scope) -> bool:
        """Whether a loop does nothing with a value but add a product, better turned, to it."""
        region = loop.regions[0]
        argument = region.args[place]
        if dot.name != "dot" or dot not in region.ops or dot.operands[2] is not argument:
            return False
        start = scope.maker(loop.operands[place])
        if start is None or start.name != "full" or argument.tile.rank != 2:
            return False
        if scope.uses(argument) != 1 or scope.uses(dot.result) != 1:
            return False
        return self._gains(loop, dot, loop.results[place] in self.wanted)

    def _gains(self, loop: Op, dot: Op, wanted: bool) -> bool:
        """Whether the turned product takes less of its engine, with the transpose behind it, or
        with the one that it saves where the turned result is ``wanted``.
        """
        left, right = dot.operands[0].tile, dot.operands[1].tile
        name = dot_engine(self.chip, str(left.dtype))
        rules = self.chip.engines[name].dot if name is not None else None
        if rules is None or not rules.stationary_k_first or left.dtype is not right.dtype:
            return False
        assert name is not None
        ends = (as_expr(loop.attr(end)) for end in ("start", "stop"))
        try:
            start, stop = (evaluate(end, {}) for end in ends)
        except DureError:
            return False
        turns = len(range(start, stop, int(loop.attr("step"))))
        back = infer("transpose", [Value(_swapped(dot.result.tile))], {"order": _SWAPPED})
        both = _product(dot)[-1]
        saved = self.costs.cycles(name, "dot", dot) - self.costs.cycles(name, "dot", both)
        more = self.costs.cycles(name, "transpose", back)
        return turns * saved > (-more if wanted else more)


def _wanted(function: Function) -> set[Value]:
    """Values of which, or of what is computed of them element by element, a transpose is taken."""
    makers = {result: op for op in walk(function.body) for result in op.results}
    found: set[Value] = set()
    open_ = [op.operands[0] for op in walk(function.body) if _turns(op)]
    while open_:
        value = open_.pop()
        maker = makers.get(value)
        kind = value.type
        if value not in found and isinstance(kind, TileType) and kind.rank == 2:
            found.add(value)
            if maker is not None and maker.definition.elementwise:
                open_ += [v for v in maker.operands if v.type == value.type or maker.name == "cast"]
    return found


def _swapped(kind: TileType) -> TileType:
    return replace(kind, shape=kind.shape[::-1])


def _product(dot: Op, accumulator: Value | None = None) -> Sequence[Op]:
    """The turned product, behind the transposes of its operands."""
    right, left = (
        infer("transpose", [dot.operands[place]], {"order": _SWAPPED}, span=dot.span)
        for place in (1, 0)
    )
    accumulator = accumulator or Value(_swapped(dot.operands[2].tile))
    operands = [right.result, left.result, accumulator]
    return right, left, infer("dot", operands, dot.attrs, span=dot.span)


def _turned(region: Region, dots: dict[Op, Value]) -> tuple[tuple[Op, ...], tuple[Value, ...]]:
    """A region's ops and what it yields, with the products of ``dots`` turned."""
    values: dict[Value, Value] = {}

    def ops() -> Iterator[Op]:
        for op in region.ops:
            if op not in dots:
                yield op
                continue
            made = _product(op, dots[op])
            values[op.result] = made[-1].result
            yield from made

    return tuple(ops()), tuple(values.get(y, y) for y in region.yields)


def _before_turning(op: Op, scope: Scope) -> Rewritten | None:
    """An elementwise op on turned tiles is turned itself: it is computed as they lie."""
    makers = [scope.maker(v) for v in op.operands]
    turned = [m for m in makers if m is not None and _turns(m)]
    others = [m for m in makers if m is None or (not _turns(m) and m.name != "full")]
    if not turned or others:
        return None
    ops: list[Op] = []
    operands: list[Value] = []
    for maker in makers:
        assert maker is not None
        if maker.name == "full":
            shape = {"shape": maker.result.tile.shape[::-1]}
            ops.append(infer("full", [], {**maker.attrs, **shape}, span=maker.span))
            operands.append(ops[-1].result)
        else:
            operands.append(maker.operands[0])
    made = infer(op.name, operands, op.attrs, span=op.span)
    back = infer("transpose", [made.result], {"order": _SWAPPED}, span=op.span)
    return Rewritten((*ops, made, back), (back.result,))


def _turns(op: Op) -> bool:
    return op.name == "transpose" and tuple(op.attr("order")) == _SWAPPED
