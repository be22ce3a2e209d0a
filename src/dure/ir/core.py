"""Programs: values, ops, regions and functions, the same for the tensor, tile and machine levels.

Everything is frozen and compared by identity.  A pass builds new ops; it never changes one.  What
an op means is declared once, in an :class:`OpDef`: its typing rule, its reference semantics on
NumPy values and its cost.  Printer, parser, verifier, interpreter, simulator and emitters all read
that table.

Integers that address memory are not values but index expressions (:mod:`dure.ir.expr`) in
attributes; the symbols in them are sizes of arguments, program ids, loop variables, and elements
read from index arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from dure.errors import IRError
from dure.ir.dtypes import ElementType
from dure.ir.expr import Expr, Symbol
from dure.ir.layout import AnyLayout
from dure.ir.types import Access, TensorType, TileType, Type

Level: TypeAlias = Literal["tensor", "tile", "machine", "any"]
#: What an attribute may hold: these print and parse back.
Attribute: TypeAlias = "PlainAttribute | Function | tuple[Attribute, ...]"
PlainAttribute: TypeAlias = bool | int | float | str | Expr | ElementType | AnyLayout | None


@dataclass(frozen=True, slots=True)
class Span:
    """Where the author wrote it: a range of one line, and the call that brought it here, if any."""

    file: str
    line: int
    column: int
    end_column: int
    text: str = ""
    caller: Span | None = None

    def render(self) -> str:
        """The author's line with a caret under the expression, then the chain of callers."""
        width = max(1, self.end_column - self.column)
        stripped = self.text.lstrip()
        indent = len(self.text) - len(stripped)
        gutter = f"{self.line:>5} | "
        caret = " " * (len(gutter) + max(0, self.column - indent)) + "^" * width
        lines = [f"  {self.file}:{self.line}:{self.column + 1}", gutter + stripped, caret]
        if self.caller is not None:
            lines.append(f"  called from {self.caller.file}:{self.caller.line}: ")
            lines.append(self.caller.render())
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column + 1}"


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """The result of an op, or an argument of a region or function."""

    type: Type
    name: str = ""

    @property
    def tile(self) -> TileType:
        """The type, which must be a tile's."""
        assert isinstance(self.type, TileType), f"{self.name} is {self.type}, not a tile"
        return self.type

    @property
    def tensor(self) -> TensorType:
        """The type, which must be a tensor's."""
        assert isinstance(self.type, TensorType), f"{self.name} is {self.type}, not a tensor"
        return self.type


@dataclass(frozen=True, eq=False, slots=True)
class Region:
    """A body: values and symbols that it binds, ops in order, and what it yields."""

    args: tuple[Value, ...]
    ops: tuple[Op, ...]
    yields: tuple[Value, ...] = ()
    symbols: tuple[Symbol, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One operation.  ``symbols`` are index symbols that it defines for the ops after it."""

    name: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    attrs: Mapping[str, Attribute] = field(default_factory=dict[str, Attribute])
    regions: tuple[Region, ...] = ()
    symbols: tuple[Symbol, ...] = ()
    span: Span | None = None

    @property
    def definition(self) -> OpDef:
        return op_definition(self.name)

    @property
    def result(self) -> Value:
        """The only result."""
        assert len(self.results) == 1, f"{self.name} has {len(self.results)} results"
        return self.results[0]

    def attr(self, name: str) -> Any:
        """The attribute, or its declared default."""
        if name in self.attrs:
            return self.attrs[name]
        return self.definition.defaults[name]


@dataclass(frozen=True, eq=False, slots=True)
class Param:
    """A function's tensor argument and how it is used."""

    value: Value
    access: Access


@dataclass(frozen=True, eq=False, slots=True)
class Function:
    """A tile kernel (one grid instance of it) or a tensor program.

    ``symbols`` are its sizes (bound by the arguments' shapes or given by the caller); ``grid`` the
    extents of a kernel's grid and ``program_ids`` the symbols that count in it.  ``attrs`` hold
    hints such as a pinned order of the grid.
    """

    name: str
    level: Level
    params: tuple[Param, ...]
    body: Region
    symbols: tuple[Symbol, ...] = ()
    grid: tuple[Expr, ...] = ()
    program_ids: tuple[Symbol, ...] = ()
    attrs: Mapping[str, Attribute] = field(default_factory=dict[str, Attribute])

    def with_body(self, body: Region) -> Function:
        """The same function with another body."""
        return replace(self, body=body)


@dataclass(frozen=True, slots=True)
class Cost:
    """What an op costs whatever runs it: arithmetic (a multiply-add counts 2) and bytes moved."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


#: (operand types, attributes, regions) -> result types; raises IRError.
TypingRule: TypeAlias = Callable[
    [Sequence[Type], Mapping[str, Any], Sequence[Region]], Sequence[Type]
]
#: (attributes, operand values) -> result values, on NumPy arrays.
Semantics: TypeAlias = Callable[..., Any]
CostRule: TypeAlias = Callable[[Op], Cost]


@dataclass(frozen=True, slots=True)
class OpDef:
    """The one declaration of an op.

    ``typing`` gives the results' types or raises :class:`IRError`.  ``semantics`` is called as
    ``semantics(attrs, *operands)`` with NumPy values (a block-quantized one as
    :class:`dure.ir.blocks.Blocks`) and returns the result (a tuple if several); ops with regions or
    memory effects have None and are run by the interpreter itself.  ``cost`` counts work.
    ``exact`` says that any order of evaluation gives the same bits; otherwise ``error_bound``
    (relative, in units of the result type's epsilon, per accumulated element) is what
    ``DURE_CHECK`` allows.
    """

    name: str
    level: Level
    typing: TypingRule
    semantics: Semantics | None
    cost: CostRule
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    exact: bool = True
    error_bound: float = 0.0
    elementwise: bool = False
    doc: str = ""


_OPS: dict[str, OpDef] = {}


def declare(definition: OpDef) -> OpDef:
    """Enter an op into the table; its name must be new."""
    if definition.name in _OPS:
        raise IRError(
            f"op '{definition.name}' is declared twice",
            rule="an op is declared once",
            fix="give the new op another name",
        )
    _OPS[definition.name] = definition
    return definition


def op_definition(name: str) -> OpDef:
    """The declaration of an op."""
    found = _OPS.get(name)
    if found is None:
        raise IRError(
            f"unknown op '{name}'",
            rule="a program holds only declared ops",
            fix=f"one of {', '.join(sorted(_OPS))}",
        )
    return found


def declared_ops() -> Mapping[str, OpDef]:
    """Every declared op by name."""
    return _OPS


def infer(
    name: str,
    operands: Sequence[Value],
    attrs: Mapping[str, Any] | None = None,
    regions: Sequence[Region] = (),
    *,
    span: Span | None = None,
    symbols: tuple[Symbol, ...] = (),
    hint: str = "",
) -> Op:
    """An op with its results typed by its rule.

    Raises :class:`IRError` with the author's line where the rule is broken.
    """
    definition = op_definition(name)
    full = {**definition.defaults, **(attrs or {})}
    try:
        types = definition.typing([v.type for v in operands], full, regions)
    except IRError as error:
        if span is not None and not error.where:
            error.where = span.render()
        raise
    results = tuple(Value(t, hint) for t in types)
    return Op(name, tuple(operands), results, full, tuple(regions), symbols, span)


def walk(region: Region) -> Iterator[Op]:
    """Every op of a region and of the regions inside it, in program order."""
    for op in region.ops:
        yield op
        for inner in op.regions:
            yield from walk(inner)
