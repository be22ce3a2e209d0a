"""How passes make a new program from an old one: values are mapped, ops re-typed, regions rebuilt.

Programs are frozen, so that a pass walks the old ops in order and appends new ones.  A
:class:`Rebuilder` keeps the map from old values to new ones and re-infers every op that it copies:
a changed operand type (a layout, a block format) spreads through the program by the ops' own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from dure.ir.core import Function, Op, Param, Region, Value, infer
from dure.ir.types import Type

#: What a pass does with an op; True if it has dealt with it (else the op is copied).
Visitor: TypeAlias = "Callable[[Rebuilder, Op], bool]"


class Rebuilder:
    """Ops of one region under construction, and the map from old values to new ones."""

    def __init__(self, visitor: Visitor, values: dict[Value, Value] | None = None) -> None:
        self.visitor = visitor
        self.values: dict[Value, Value] = values if values is not None else {}
        self.ops: list[Op] = []

    def value(self, old: Value) -> Value:
        """The new value that stands for an old one."""
        return self.values.get(old, old)

    def operands(self, op: Op) -> tuple[Value, ...]:
        """The new operands of an old op."""
        return tuple(self.value(o) for o in op.operands)

    def append(self, op: Op) -> tuple[Value, ...]:
        """Adds a new op."""
        self.ops.append(op)
        return op.results

    def make(
        self, name: str, operands: Sequence[Value], attrs: Mapping[str, Any], like: Op
    ) -> tuple[Value, ...]:
        """Infers and adds a new op, at the place in the source of ``like``."""
        hint = like.results[0].name if like.results else ""
        return self.append(infer(name, operands, attrs, span=like.span, hint=hint))

    def replace(self, old: Op, new: Sequence[Value]) -> None:
        """``new`` stand for the results of ``old``."""
        self.values.update(zip(old.results, new, strict=True))

    def visit(self, ops: Sequence[Op]) -> None:
        """Rebuilds ops in order."""
        for op in ops:
            if not self.visitor(self, op):
                self.copy(op)

    def copy(self, op: Op) -> None:
        """Copies an op with its regions, re-inferring its types."""
        operands = self.operands(op)
        regions = tuple(self.region(op, r, operands) for r in op.regions)
        made = infer(op.name, operands, op.attrs, regions, span=op.span, symbols=op.symbols)
        named = tuple(Value(n.type, o.name) for n, o in zip(made.results, op.results, strict=True))
        made = Op(made.name, operands, named, made.attrs, regions, op.symbols, op.span)
        self.replace(op, self.append(made))

    def region(self, op: Op, region: Region, operands: Sequence[Value]) -> Region:
        """A region of ``op`` rebuilt; arguments take the types of the operands they stand for."""
        types = argument_types(op, region, operands)
        args = tuple(Value(t, a.name) for t, a in zip(types, region.args, strict=True))
        self.values.update(zip(region.args, args, strict=True))
        inner = Rebuilder(self.visitor, self.values)
        inner.visit(region.ops)
        yields = tuple(self.value(y) for y in region.yields)
        return Region(args, tuple(inner.ops), yields, region.symbols)


def argument_types(op: Op, region: Region, operands: Sequence[Value]) -> list[Type]:
    """The types of a region's arguments, given the op's (new) operands."""
    if op.name != "repeat":
        return [a.type for a in region.args]
    count: int = op.attr("count")
    carried: int = op.attr("carried")
    firsts = [operands[carried + t * count] for t in range(op.attr("tables"))]
    return [v.type for v in (*operands[:carried], *firsts)]


def rebuild(
    function: Function, visitor: Visitor, types: Mapping[Value, Type] | None = None
) -> Function:
    """``function`` with each op passed to ``visitor``; ``types`` gives parameters new types."""
    changed = types or {}
    params: list[Param] = []
    builder = Rebuilder(visitor)
    for param in function.params:
        value = param.value
        if value in changed:
            value = Value(changed[value], value.name)
            builder.values[param.value] = value
        params.append(Param(value, param.access))
    builder.visit(function.body.ops)
    yields = tuple(builder.value(y) for y in function.body.yields)
    body = Region(tuple(p.value for p in params), tuple(builder.ops), yields)
    return Function(
        function.name,
        function.level,
        tuple(params),
        body,
        function.symbols,
        function.grid,
        function.program_ids,
        function.attrs,
    )


def uses(region: Region) -> dict[Value, list[tuple[Op | Region, int]]]:
    """Every use of every value: (op, operand position), or (region, yield position)."""
    found: dict[Value, list[tuple[Op | Region, int]]] = {}
    for body, op in nested_ops(region):
        if op is None:
            for place, value in enumerate(body.yields):
                found.setdefault(value, []).append((body, place))
        else:
            for place, value in enumerate(op.operands):
                found.setdefault(value, []).append((op, place))
    return found


def nested_ops(region: Region) -> Iterator[tuple[Region, Op | None]]:
    """(region, op) for every op of a region and of those inside it; (region, None) at its end."""
    for op in region.ops:
        yield region, op
        for inner in op.regions:
            yield from nested_ops(inner)
    yield region, None


def without_dead_ops(function: Function) -> Function:
    """Without ops whose results nobody uses (everything at the tensor level is pure)."""
    while True:
        used = uses(function.body)

        def drop(builder: Rebuilder, op: Op, used: Mapping[Value, Any] = used) -> bool:
            return op.name != "barrier" and not any(r in used for r in op.results)

        dead = [
            op
            for _, op in nested_ops(function.body)
            if op is not None and op.name != "barrier" and not any(r in used for r in op.results)
        ]
        if not dead:
            return function
        function = rebuild(function, drop)
