"""The text of a program: readable, and :mod:`dure.ir.parser` reads it back.

    tile function scale
      size n in [0, 4096]
      in %x: tensor<n x float32>
      out %y: tensor<n x float32>
      grid pid0 in [0, (n + 63)//64 - 1] of (n + 63)//64
    {
      %0 = load(%x) {index = ([pid0],), shape = (64,), step = (64,)} : tile<64 x float32>
      ...
    }

An expression in an attribute stands in brackets, so that ``[4]`` is an index and ``4`` a number.
Attributes that have their declared default are left out.  Values keep their names where they have
any, made distinct.  ``print(parse(print(f)))`` is ``print(f)``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from dure.ir.core import Function, Op, Region, Span, Value, declared_ops
from dure.ir.dtypes import BlockFormat, DType
from dure.ir.expr import Expr, Symbol
from dure.ir.layout import Layout, PlaneLayouts
from dure.ir.types import TensorType, TileType

#: Words that start lines or mean something in attributes: not names of functions, ops or
#: attributes.
IDENTIFIER = re.compile(r"[^\W\d][\w.]*")


def print_function(function: Function, *, spans: bool = False, defaults: bool = False) -> str:
    """The text of a function; with ``spans``, each op's place in the author's source as well, and
    with ``defaults``, attributes that have their declared default.
    """
    return "\n".join(_Printer(spans, defaults).function(function, "")) + "\n"


def print_op(op: Op) -> str:
    """The text of one op (values numbered from 0), for messages."""
    return "\n".join(_Printer(False).op(op, ""))


class _Printer:
    """Names values while it goes; a function in an attribute has a printer of its own."""

    def __init__(self, spans: bool, defaults: bool = False) -> None:
        self.spans = spans
        self.defaults = defaults
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.counter = 0

    def name(self, value: Value) -> str:
        """The value's name, chosen when it is first printed."""
        found = self.names.get(value)
        if found is None:
            found = self.names[value] = self._choose(value.name)
        return found

    def _choose(self, wanted: str) -> str:
        if not IDENTIFIER.fullmatch(wanted):
            self.counter += 1
            return f"%{self.counter - 1}"
        chosen, number = wanted, 0
        while chosen in self.taken:
            number += 1
            chosen = f"{wanted}_{number}"
        self.taken.add(chosen)
        return f"%{chosen}"

    def function(self, function: Function, indent: str) -> Iterator[str]:
        inner = indent + "  "
        yield f"{indent}{function.level} function {word(function.name)}"
        for entry in function.symbols:
            yield inner + symbol_text(entry)
        for param in function.params:
            yield f"{inner}{param.access} {self.name(param.value)}: {param.value.type}"
        for entry, extent in zip(function.program_ids, function.grid, strict=True):
            yield f"{inner}{symbol_text(entry)} of {extent}"
        if function.attrs:
            yield inner + "attributes " + self.attributes(function.attrs, {}, inner)
        yield indent + "{"
        yield from self.body(function.body, inner)
        yield indent + "}"

    def body(self, region: Region, indent: str) -> Iterator[str]:
        for op in region.ops:
            yield from self.op(op, indent)
        if region.yields:
            yield f"{indent}yield " + ", ".join(self.name(y) for y in region.yields)

    def op(self, op: Op, indent: str) -> Iterator[str]:
        # Operands come before results, so that names are numbered in the order of definition.
        operands = ", ".join(self.name(o) for o in op.operands)
        definition = declared_ops().get(op.name)
        left_out: Mapping[str, Any] = {}
        if definition is not None and not self.defaults:
            left_out = definition.defaults
        attributes = self.attributes(op.attrs, left_out, indent)
        results = ", ".join(self.name(r) for r in op.results)
        text = f"{indent}{results} = " if results else indent
        text += f"{op.name}({operands})" + (f" {attributes}" if attributes != "{}" else "")
        if op.results:
            text += " : " + ", ".join(str(r.type) for r in op.results)
        if op.symbols:
            text += " defines " + ", ".join(symbol_text(s) for s in op.symbols)
        if self.spans and op.span is not None:
            text += " at " + span_text(op.span)
        yield text
        for region in op.regions:
            yield from self.region(region, indent + "  ")

    def region(self, region: Region, indent: str) -> Iterator[str]:
        args = ", ".join(f"{self.name(a)}: {a.type}" for a in region.args)
        head = f"{indent}region ({args})"
        if region.symbols:
            head += " defines " + ", ".join(symbol_text(s) for s in region.symbols)
        yield head + " {"
        yield from self.body(region, indent + "  ")
        yield indent + "}"

    def attributes(self, attrs: Mapping[str, Any], defaults: Mapping[str, Any], indent: str) -> str:
        parts: list[str] = []
        for name in sorted(attrs):
            text = self.attribute(attrs[name], indent)
            if name not in defaults or self.attribute(defaults[name], indent) != text:
                parts.append(f"{word(name)} = {text}")
        return "{" + ", ".join(parts) + "}"

    def attribute(self, value: Any, indent: str) -> str:
        match value:
            case None:
                return "none"
            case bool():
                return "true" if value else "false"
            case int():
                return str(value)
            case float():
                return float_text(value)
            case str():
                return json.dumps(value, ensure_ascii=False)
            case Expr():
                return f"[{value}]"
            case tuple() | list():
                entries = cast("Sequence[Any]", value)
                parts = [self.attribute(entry, indent) for entry in entries]
                return "(" + ", ".join(parts) + ("," if len(parts) == 1 else "") + ")"
            case Function():
                lines = list(_Printer(self.spans, self.defaults).function(value, indent + "    "))
                return "\n" + "\n".join(lines)
            case DType() | BlockFormat() | TensorType() | TileType() | Layout() | PlaneLayouts():
                return str(value)
            case _:
                return json.dumps(f"{type(value).__name__}: {value}")


def word(name: str) -> str:
    """A name as it is, or quoted if it isn't an identifier."""
    return name if IDENTIFIER.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def float_text(value: float) -> str:
    """A float that reads back exactly and never looks like an integer."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(float(value))


def symbol_text(entry: Symbol) -> str:
    """The declaration of a symbol: kind, name and bounds."""
    high = "*" if entry.high is None else str(entry.high)
    return f"{entry.kind} {entry.name} in [{entry.low}, {high}]"


def span_text(span: Span) -> str:
    """A span and the calls that led to it."""
    place = f"{json.dumps(span.file)} {span.line}:{span.column}:{span.end_column}"
    text = f"{place} {json.dumps(span.text, ensure_ascii=False)}"
    return text if span.caller is None else f"{text} from {span_text(span.caller)}"
