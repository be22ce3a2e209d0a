"""Programs that are the same but for names, and for where in a memory their buffers lie together.

A model's step has one phase for each launch of a kernel: what is proved of one of two such phases
is proved of both.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import cast

from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.expr import Expr, Symbol, substitute, symbol
from dure.ir.rewrite import regions_of
from dure.ir.types import TensorType


def key_of(function: Function) -> Hashable:
    """A key that programs have in common which differ in names alone, and by one distance for all
    buffers of a memory.  Whether buffers fit into the memory is not in it.
    """
    return _Keys(function).function()


class _Keys:
    """Numbers values and symbols in the order in which they are met."""

    def __init__(self, program: Function) -> None:
        self.program = program
        self.values: dict[Value, int] = {}
        self.symbols: dict[Expr, Expr] = {}
        self.first: dict[object, int] = {}
        self.used = {v for op in walk(program.body) if op.name != "view" for v in op.operands}
        self.used.update(v for r in regions_of(program) for v in r.yields)
        for op in reversed(list(walk(program.body))):
            if op.name == "view" and op.result in self.used:
                self.used.add(op.operands[0])
        for op in walk(program.body):
            if op.name == "buffer":
                memory, offset = op.attr("memory"), int(op.attr("offset"))
                self.first[memory] = min(self.first.get(memory, offset), offset)

    def function(self) -> Hashable:
        """The program's key."""
        program = self.program
        self.define((*program.symbols, *program.program_ids))
        return (
            tuple(self.expr(extent) for extent in program.grid),
            tuple(self.expr(s) for s in (*program.symbols, *program.program_ids)),
            tuple((name, self.attribute(given)) for name, given in sorted(program.attrs.items())),
            self.region(program.body),
        )

    def define(self, defined: Iterable[Symbol]) -> None:
        """Number symbols that are defined here."""
        for entry in defined:
            low, high = self.expr(entry.low), None if entry.high is None else self.expr(entry.high)
            name = f"s{len(self.symbols)}"
            self.symbols[entry] = symbol(name, entry.kind, low, high)

    def expr(self, expr: Expr) -> Expr:
        """An expression in terms of the numbered symbols."""
        return substitute(expr, self.symbols)

    def value(self, value: Value) -> Hashable:
        """A value: its number, and its type where it is met for the first time."""
        number = self.values.get(value)
        if number is not None:
            return number
        self.values[value] = len(self.values)
        kind = value.type
        if not isinstance(kind, TensorType):
            return kind
        ends = None if kind.index is None else (self.expr(kind.index[0]), self.expr(kind.index[1]))
        return replace(kind, shape=tuple(self.expr(e) for e in kind.shape), index=ends)

    def attribute(self, given: object) -> object:
        """An attribute; one that is a function is equal to itself alone."""
        if isinstance(given, Expr):
            return self.expr(given)
        if isinstance(given, tuple):
            return tuple(self.attribute(part) for part in cast("tuple[object, ...]", given))
        return id(given) if isinstance(given, Function) else given

    def region(self, region: Region) -> Hashable:
        """A region's key."""
        self.define(region.symbols)
        return (
            tuple(self.expr(s) for s in region.symbols),
            tuple(self.value(v) for v in region.args),
            tuple(self.op(o) for o in region.ops if o.name != "view" or o.result in self.used),
            tuple(self.value(v) for v in region.yields),
        )

    def op(self, op: Op) -> Hashable:
        """An op's key."""
        attrs = dict(op.attrs)
        if op.name == "buffer":
            attrs["offset"] = int(op.attr("offset")) - self.first[op.attr("memory")]
        operands = tuple(self.value(v) for v in op.operands)
        given = tuple((name, self.attribute(value)) for name, value in sorted(attrs.items()))
        regions = tuple(self.region(r) for r in op.regions)
        self.define(op.symbols)
        defined = tuple(self.expr(s) for s in op.symbols)
        return op.name, operands, given, regions, defined, tuple(self.value(v) for v in op.results)
