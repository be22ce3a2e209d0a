"""Reads the text form of programs that :mod:`dure.ir.printer` writes.

Parsing checks the form and that every name is in scope; what the program says is judged by
:mod:`dure.ir.verifier`.  Errors are :class:`~dure.errors.IRError` with the line and a caret.
"""

from __future__ import annotations

from typing import Literal

from dure.errors import IRError
from dure.ir.core import (
    Attribute,
    Function,
    Level,
    Op,
    Param,
    Region,
    Span,
    Value,
    op_definition,
)
from dure.ir.dtypes import DTYPES, FORMATS
from dure.ir.expr import Expr, Symbol
from dure.ir.type_parser import TypeParser
from dure.ir.types import Access, Type

_LEVELS: dict[str, Level] = {"tensor": "tensor", "tile": "tile", "machine": "machine", "any": "any"}
_ACCESS: dict[str, Access] = {"in": "in", "out": "out", "inout": "inout"}
_WORDS: dict[str, Literal[True, False] | float | None] = {
    "none": None,
    "true": True,
    "false": False,
    "inf": float("inf"),
    "nan": float("nan"),
}


def parse_function(text: str, file: str = "<text>") -> Function:
    """The function that ``text`` is.  Raises :class:`IRError` with a line and a caret."""
    parser = _Parser(text, file)
    found = parser.function()
    if parser.next.kind != "end":
        parser.fail(f"expected the end of the text, found {parser.shown()}")
    return found


class _Parser(TypeParser):
    """Values in scope by name; a function in an attribute starts with none."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text, file)
        self.values: dict[str, Value] = {}

    # --- functions ------------------------------------------------------------------------------

    def at_function(self) -> bool:
        """Whether a function comes next."""
        return self.next.text in _LEVELS and self.ahead(1).text == "function"

    def function(self) -> Function:
        """A function, with a scope of its own."""
        if not self.at_function():
            self.fail(f"expected a function, found {self.shown()}")
        values, symbols = self.values, self.symbols
        self.values, self.symbols = {}, {}
        self.deeper()
        found = self._function()
        self.shallower()
        self.values, self.symbols = values, symbols
        return found

    def _function(self) -> Function:
        level = _LEVELS[self.take().text]
        self.expect("function")
        name = self.name("a function's name")
        sizes: list[Symbol] = []
        ids: list[Symbol] = []
        grid: list[Expr] = []
        params: list[Param] = []
        while True:
            if self.at_symbol():
                found = self.declare_symbol()
                if self.accept("of"):
                    ids.append(found)
                    grid.append(self.expression())
                else:
                    sizes.append(found)
            elif self.next.text in _ACCESS:
                params.append(self._param())
            else:
                break
        attrs = self._attributes() if self.accept("attributes") else {}
        arguments = tuple(p.value for p in params)
        body = self._block(arguments if level == "tensor" else (), ())
        return Function(
            name, level, tuple(params), body, tuple(sizes), tuple(grid), tuple(ids), attrs
        )

    def _param(self) -> Param:
        access = _ACCESS[self.take().text]
        return Param(self._declared(), access)

    def _declared(self) -> Value:
        """``%name: type``."""
        at, name = self.next.start, self._value_name()
        self.expect(":")
        return self._define(name, self.type(), at)

    def _value_name(self) -> str:
        if self.next.kind != "value":
            self.fail(f"expected a value, found {self.shown()}")
        return self.take().text

    def _define(self, name: str, kind: Type, at: int) -> Value:
        if name in self.values:
            self.fail(f"value {name[:40]} is defined twice", at, fix="give it another name")
        plain = name[1:]
        found = self.values[name] = Value(kind, "" if plain[0].isdigit() else plain)
        return found

    def _use(self) -> Value:
        at, name = self.next.start, self._value_name()
        found = self.values.get(name)
        if found is None:
            self.fail(f"value {name[:40]} is not defined here", at)
        return found

    # --- bodies ---------------------------------------------------------------------------------

    def _block(self, args: tuple[Value, ...], symbols: tuple[Symbol, ...]) -> Region:
        """``{ ops, yield }``; symbols that its ops define end with it."""
        self.expect("{")
        ops: list[Op] = []
        yields: tuple[Value, ...] = ()
        with self.scope():
            while not self.sees("}"):
                if self.accept("yield"):
                    yields = self._uses("}")
                    break
                ops.append(self._op())
        self.expect("}")
        return Region(args, tuple(ops), yields, symbols)

    def _uses(self, end: str) -> tuple[Value, ...]:
        found: list[Value] = []
        while not self.sees(end):
            found.append(self._use())
            if not self.accept(","):
                break
        return tuple(found)

    def _op(self) -> Op:
        results: list[tuple[str, int]] = []
        while self.next.kind == "value":
            results.append((self.next.text, self.next.start))
            self.take()
            if not self.accept(","):
                break
        if results:
            self.expect("=")
        at, name = self.next.start, self.word("an op")
        try:
            definition = op_definition(name)
        except IRError as error:
            self.fail(error.what, at, fix=error.fix[:300])
        self.expect("(")
        operands = self._uses(")")
        self.expect(")")
        attrs: dict[str, Attribute] = dict(definition.defaults)
        if self.sees("{"):
            attrs |= self._attributes()
        types = self._types(len(results))
        symbols = self._defined()
        span = self._span() if self.accept("at") else None
        regions: list[Region] = []
        while self.sees("region"):
            regions.append(self._region())
        values = [
            self._define(result, kind, place)
            for (result, place), kind in zip(results, types, strict=True)
        ]
        return Op(name, operands, tuple(values), attrs, tuple(regions), symbols, span)

    def _types(self, count: int) -> list[Type]:
        types: list[Type] = []
        while len(types) < count:
            self.expect("," if types else ":")
            types.append(self.type())
        return types

    def _defined(self) -> tuple[Symbol, ...]:
        found: list[Symbol] = []
        if self.accept("defines"):
            found.append(self.declare_symbol())
            while self.accept(","):
                found.append(self.declare_symbol())
        return tuple(found)

    def _region(self) -> Region:
        self.expect("region")
        self.expect("(")
        with self.scope():
            args: list[Value] = []
            while not self.sees(")"):
                args.append(self._declared())
                if not self.accept(","):
                    break
            self.expect(")")
            symbols = self._defined()
            return self._block(tuple(args), symbols)

    def _span(self) -> Span:
        self.deeper()
        file, line = self.string(), self.integer("a line")
        self.expect(":")
        column = self.integer("a column")
        self.expect(":")
        end = self.integer("a column")
        text = self.string()
        caller = self._span() if self.accept("from") else None
        self.shallower()
        return Span(file, line, column, end, text, caller)

    # --- attributes -----------------------------------------------------------------------------

    def _attributes(self) -> dict[str, Attribute]:
        self.expect("{")
        found: dict[str, Attribute] = {}
        while not self.sees("}"):
            name = self.name("an attribute's name")
            self.expect("=")
            found[name] = self._attribute()
            if not self.accept(","):
                break
        self.expect("}")
        return found

    def _attribute(self) -> Attribute:
        token = self.next
        if token.kind == "string":
            return self.string()
        if token.kind in ("integer", "float") or self.sees("-"):
            return self._number()
        if self.accept("["):
            found = self.expression()
            self.expect("]")
            return found
        if self.sees("("):
            return self._tuple()
        if self.at_function():
            return self.function()
        return self._named()

    def _number(self) -> Attribute:
        negative = self.accept("-")
        if self.accept("inf"):
            return -float("inf") if negative else float("inf")
        if self.next.kind == "float":
            value = float(self.take().text)
            return -value if negative else value
        value = self.integer("a number")
        return -value if negative else value

    def _tuple(self) -> Attribute:
        self.expect("(")
        self.deeper()
        entries: list[Attribute] = []
        while not self.sees(")"):
            entries.append(self._attribute())
            if not self.accept(","):
                break
        self.shallower()
        self.expect(")")
        return tuple(entries)

    def _named(self) -> Attribute:
        """A word: none, true, false, inf, nan, a dtype, or the start of a layout."""
        if self.sees("layout", "planes") and self.ahead(1).text == "(":
            return self.any_layout()
        word = self.next.text
        if self.next.kind == "word" and word in _WORDS:
            self.take()
            return _WORDS[word]
        if self.next.kind == "word" and (word in DTYPES or word in FORMATS):
            return self.element_type()
        return self.fail(f"expected an attribute's value, found {self.shown()}")
