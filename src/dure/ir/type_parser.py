"""Parses index expressions, types and layouts from the text form of programs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal

from dure.errors import IRError
from dure.ir.dtypes import DTYPES, FORMATS, BlockFormat, ElementType
from dure.ir.expr import (
    Const,
    Expr,
    IntLike,
    Relation,
    Sum,
    Symbol,
    SymbolKind,
    compare,
    const,
    logic,
    maximum,
    minimum,
    symbol,
)
from dure.ir.layout import AddressDim, Digit, Layout, PlaneLayouts
from dure.ir.scanner import Scanner
from dure.ir.types import TensorType, TileType, Type

_SYMBOL_KINDS: dict[str, SymbolKind] = {
    "size": "size",
    "grid": "grid",
    "loop": "loop",
    "index": "index",
    "stride": "stride",
}
_RELATIONS: dict[str, Relation] = {"<": "<", "<=": "<=", "==": "==", "!=": "!="}
_DIMS: dict[str, AddressDim] = {
    "offset": "offset",
    "chip": "chip",
    "core": "core",
    "partition": "partition",
    "bank": "bank",
}
#: Terms of a sum; a longer one is a mistake, and products of such would never end.
_MOST_TERMS = 1000


class TypeParser(Scanner):
    """Symbols in scope by name, and what is written with them."""

    def __init__(self, text: str, file: str = "<text>") -> None:
        super().__init__(text, file)
        self.symbols: dict[str, Symbol] = {}

    def at_symbol(self) -> bool:
        """Whether a symbol's declaration comes next."""
        return self.next.kind == "word" and self.next.text in _SYMBOL_KINDS

    def declare_symbol(self) -> Symbol:
        """``kind name in [low, high]``: enters the symbol into the scope."""
        kind = _SYMBOL_KINDS.get(self.next.text)
        if kind is None:
            self.fail(f"expected a symbol's kind, found {self.shown()}")
        self.take()
        name = self.word("a symbol's name")
        self.expect("in")
        self.expect("[")
        low = self.expression()
        self.expect(",")
        high = None if self.accept("*") else self.expression()
        self.expect("]")
        found = self.symbols[name] = symbol(name, kind, low, high)
        return found

    # --- expressions, with Python's precedence ---------------------------------------------------

    def expression(self) -> Expr:
        """A sum of products."""
        self.deeper()
        total = self._product()
        while self.sees("+", "-"):
            at, sign = self.next.start, self.take().text
            term = self._product()
            total = self._built(at, _added if sign == "+" else _subtracted, total, term)
        self.shallower()
        return total

    def _product(self) -> Expr:
        total = self._factor()
        while self.sees("*", "//"):
            at, sign = self.next.start, self.take().text
            factor = self._factor()
            total = self._built(at, _multiplied if sign == "*" else _divided, total, factor)
        return total

    def _built(self, at: int, build: Callable[[Expr, Expr], Expr], left: Expr, right: Expr) -> Expr:
        if _terms(left) * _terms(right) > _MOST_TERMS:
            self.fail("an expression of too many terms", at, fix="simplify it")
        try:
            found = build(left, right)
        except IRError as error:
            self.fail(error.what, at, fix=error.fix)
        if isinstance(found, Const) and abs(found.value) >= 1 << 200:
            self.fail("a number too large for an index", at)
        return found

    def _factor(self) -> Expr:
        if self.accept("-"):
            self.deeper()
            found = -self._factor()
            self.shallower()
            return found
        if self.next.kind == "integer":
            return const(self.integer())
        if self.sees("("):
            return self._parenthesised()
        at, name = self.next.start, self.word("an index expression")
        if name in ("min", "max") and self.sees("("):
            return self._minmax("min" if name == "min" else "max")
        found = self.symbols.get(name)
        if found is None:
            known = ", ".join(sorted(self.symbols)) or "none"
            self.fail(f"unknown symbol '{name[:40]}'", at, fix=f"one in scope: {known[:200]}")
        return found

    def _minmax(self, function: Literal["min", "max"]) -> Expr:
        self.expect("(")
        arguments = [self.expression()]
        while self.accept(","):
            arguments.append(self.expression())
        self.expect(")")
        return minimum(*arguments) if function == "min" else maximum(*arguments)

    def _parenthesised(self) -> Expr:
        self.expect("(")
        self.deeper()
        found = self.expression()
        if self.next.text in _RELATIONS:
            relation = _RELATIONS[self.take().text]
            found = compare(relation, found, self.expression())
        elif self.sees("and", "or"):
            function: Literal["and", "or"] = "and" if self.next.text == "and" else "or"
            arguments = [found]
            while self.accept(function):
                arguments.append(self.expression())
            found = logic(function, *arguments)
        self.shallower()
        self.expect(")")
        return found

    # --- types ----------------------------------------------------------------------------------

    def at_type(self) -> bool:
        """Whether a type comes next."""
        return self.sees("tensor", "tile") and self.ahead(1).text == "<"

    def type(self) -> Type:
        """``tensor<...>`` or ``tile<...>``."""
        if not self.at_type():
            self.fail(f"expected a type, found {self.shown()}")
        is_tensor = self.take().text == "tensor"
        self.expect("<")
        shape: list[Expr] = []
        while not self._at_element_type():
            shape.append(self.expression())
            self.expect("x")
        dtype = self.element_type()
        axis = -1
        if isinstance(dtype, BlockFormat):
            self.expect(",")
            self.expect("axis")
            self.expect("=")
            axis = self._axis(len(shape))
        found = self._tensor(shape, dtype, axis) if is_tensor else self._tile(shape, dtype, axis)
        self.expect(">")
        return found

    def _axis(self, rank: int) -> int:
        at = self.next.start
        axis = self.integer("an axis")
        if not -rank <= axis < rank:
            self.fail(f"axis {axis} of a type of rank {rank}", at)
        return axis

    def _at_element_type(self) -> bool:
        last = self.next.kind == "word" and self.ahead(1).text in (",", ">")
        return last and self.next.text not in self.symbols

    def element_type(self) -> ElementType:
        """The name of a dtype or block format."""
        at, name = self.next.start, self.word("an element type")
        found = DTYPES.get(name) or FORMATS.get(name)
        if found is None:
            names = ", ".join([*DTYPES, *FORMATS])
            self.fail(f"unknown element type '{name[:40]}'", at, fix=f"one of {names}")
        return found

    def _tile(self, shape: list[Expr], dtype: ElementType, axis: int) -> TileType:
        extents: list[int] = []
        for extent in shape:
            if not isinstance(extent, Const):
                self.fail(f"a tile with a symbolic extent {extent}", fix="tile shapes are static")
            extents.append(extent.value)
        return TileType(tuple(extents), dtype, axis)

    def _tensor(self, shape: list[Expr], dtype: ElementType, axis: int) -> TensorType:
        layout: Layout | PlaneLayouts | None = None
        index: tuple[Expr, Expr] | None = None
        unique = False
        while self.accept(","):
            if self.sees("layout", "planes"):
                layout = self.any_layout()
            elif self.accept("index"):
                self.expect("=")
                self.expect("[")
                low = self.expression()
                self.expect(",")
                index = (low, self.expression())
                self.expect("]")
            else:
                self.expect("unique")
                unique = True
        return TensorType(tuple(shape), dtype, layout, axis, index, unique)

    # --- layouts --------------------------------------------------------------------------------

    def any_layout(self) -> Layout | PlaneLayouts:
        """``layout(...)`` or ``planes(name=layout(...), ...)``."""
        if not self.accept("planes"):
            return self._layout()
        self.expect("(")
        planes: list[tuple[str, Layout]] = []
        while not self.sees(")"):
            name = self.word("a plane's name")
            self.expect("=")
            planes.append((name, self._layout()))
            if not self.accept(","):
                break
        self.expect(")")
        return PlaneLayouts(tuple(planes))

    def _layout(self) -> Layout:
        self.expect("layout")
        self.expect("(")
        axes: list[tuple[Digit, ...]] = []
        while self.accept("["):
            digits: list[Digit] = []
            while not self.sees("]"):
                digits.append(self._digit())
            self.expect("]")
            axes.append(tuple(digits))
            if not self.accept(","):
                break
        self.expect(";")
        offset = self._plain()
        self.expect(")")
        return Layout(tuple(axes), offset)

    def _digit(self) -> Digit:
        at = self.next.start
        extent = None if self.accept("*") else self.integer("a digit's extent")
        if extent is not None and extent < 1:
            self.fail(f"a digit of extent {extent}", at)
        self.expect(":")
        stride = self._plain()
        dim: AddressDim = "offset"
        if self.accept("@"):
            found = _DIMS.get(self.next.text)
            if found is None:
                self.fail(f"unknown address dimension {self.shown()}")
            self.take()
            dim = found
        return Digit(extent, stride, dim)

    def _plain(self) -> IntLike:
        found = self.expression()
        return found.value if isinstance(found, Const) else found

    @contextmanager
    def scope(self) -> Generator[None]:
        """Symbols declared inside end with it."""
        outer = self.symbols
        self.symbols = dict(outer)
        self.deeper()
        yield
        self.shallower()
        self.symbols = outer


def _terms(expr: Expr) -> int:
    return len(expr.terms) + 1 if isinstance(expr, Sum) else 1


def _added(left: Expr, right: Expr) -> Expr:
    return left + right


def _subtracted(left: Expr, right: Expr) -> Expr:
    return left - right


def _multiplied(left: Expr, right: Expr) -> Expr:
    return left * right


def _divided(left: Expr, right: Expr) -> Expr:
    return left // right
