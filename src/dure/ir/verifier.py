"""What every program obeys, checked: scoping, typing, structure, access and independence.

:func:`verify` raises :class:`~dure.errors.IRError` at the author's line for the first broken rule.
Rules that only the values at a launch can settle come back as :class:`Obligation`: the front end
turns them into checks at the launch, and the reference interpreter checks them on the values.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from dure.errors import IRError
from dure.ir.core import Function, Op, Region, Span, Value, op_definition
from dure.ir.dtypes import BlockFormat, DType
from dure.ir.expr import Const, Expr, Symbol, as_expr, proves, symbols
from dure.ir.layout import Layout, PlaneLayouts
from dure.ir.printer import IDENTIFIER
from dure.ir.types import TensorType, TileType, Type


@dataclass(frozen=True, slots=True)
class Obligation:
    """What must hold at a launch.  ``condition`` is None where no expression says it."""

    what: str
    condition: Expr | None
    span: Span | None


def verify(function: Function) -> tuple[Obligation, ...]:
    """Check a program and the functions in its attributes.

    Gives what remains to be checked on the values.  Raises :class:`IRError` for a broken rule.
    """
    _Scopes(function).check()
    obligations: list[Obligation] = []
    if function.level == "tile":
        # Imported here: the memory rules build on verified structure, and import this module.
        from dure.ir.verify_memory import memory_obligations

        with _wellformed(None):
            obligations.extend(memory_obligations(function))
    seen: set[int] = set()
    for inner in functions_in(function):
        if id(inner) not in seen:
            seen.add(id(inner))
            obligations.extend(verify(inner))
    return tuple(obligations)


def functions_in(function: Function) -> Iterator[Function]:
    """The functions that a program's attributes hold, not those inside them."""
    pending: list[Region] = [function.body]
    while pending:
        for op in pending.pop().ops:
            pending.extend(op.regions)
            yield from _functions(op.attrs)


def _functions(value: object) -> Iterator[Function]:
    for part in attribute_parts(value):
        if isinstance(part, Function):
            yield part


def attribute_parts(value: object) -> Iterator[object]:
    """The entries of an attribute, tuples and mappings opened."""
    if isinstance(value, Mapping):
        for entry in cast("Mapping[str, object]", value).values():
            yield from attribute_parts(entry)
    elif isinstance(value, tuple | list):
        for entry in cast("Sequence[object]", value):
            yield from attribute_parts(entry)
    else:
        yield value


def broken(what: str, rule: str, op: Op | None = None, fix: str = "") -> IRError:
    """The error for a broken rule, at the op's line."""
    where = op.span.render() if op is not None and op.span is not None else ""
    return IRError(what, where=where, rule=rule, fix=fix)


#: Attributes that no typing rule reads.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "for": ("start", "stop"),
    "if": ("condition",),
    "full": ("value",),
    "reduce_with": ("identity",),
    "view": ("start", "stop"),
}


@contextmanager
def _wellformed(op: Op | None) -> Generator[None]:
    """What rules trip over in an op that isn't made as it is declared is that op's error."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as bad:
        name = op.name if op is not None else "program"
        doc = op.definition.doc if op is not None else ""
        raise broken(
            f"malformed {name}: {type(bad).__name__}: {bad}",
            f"an op has the operands, attributes and regions of its declaration {doc}".rstrip(),
            op,
        ) from bad


class _Scopes:
    """Walks a function in program order with the values and symbols in scope."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.values: set[Value] = set()
        self.everywhere: set[Value] = set()
        self.symbols: dict[str, Symbol] = {}
        self.dead: set[Value] = set()
        self.inside_compute = False

    def check(self) -> None:
        function = self.function
        for entry in function.symbols:
            self._declare(entry, None, ("size", "stride"))
        if len(function.grid) != len(function.program_ids):
            raise broken(
                f"{function.name} has {len(function.grid)} grid extents and "
                f"{len(function.program_ids)} program ids",
                "each axis of the grid has its program id",
            )
        for entry, extent in zip(function.program_ids, function.grid, strict=True):
            self._expression(extent, None)
            self._declare(entry, None, ("grid",))
            self._bounds(entry, as_expr(0), extent - 1, None)
        for param in function.params:
            self._type(param.value.type, None)
            if not isinstance(param.value.type, TensorType):
                raise broken(
                    f"parameter '{param.value.name}' is {param.value.type}",
                    "a function's parameters are tensors",
                )
            self._define(param.value, None)
        allowed = [p.value for p in function.params]
        if function.body.args and list(function.body.args) != allowed:
            raise broken(
                f"the body of {function.name} takes other values than its parameters",
                "a function's body takes the parameters, or nothing",
            )
        self._attributes(function.attrs, None)
        self._body(function.body, None)
        if function.level != "tensor" and function.body.yields:
            raise broken("a kernel that yields values", "a kernel's results are its stores")

    # --- regions and ops -------------------------------------------------------------------------

    def _region(self, region: Region, owner: Op) -> None:
        values, scope = set(self.values), dict(self.symbols)
        for entry in region.symbols:
            self._declare(entry, owner, ("loop",))
        for argument in region.args:
            self._type(argument.type, owner)
            self._define(argument, owner)
        self._body(region, owner)
        self.values, self.symbols = values, scope

    def _body(self, region: Region, owner: Op | None) -> None:
        for op in region.ops:
            self._op(op)
        for value in region.yields:
            self._use(value, owner, "yields")

    def _op(self, op: Op) -> None:
        try:
            definition = op_definition(op.name)
        except IRError as error:
            raise broken(error.what, error.rule, op, error.fix[:300]) from None
        if not self._has_level(op, definition.level):
            raise broken(
                f"{definition.level} op '{op.name}' in a {self.function.level} function",
                "a function holds ops of its own level",
                op,
            )
        for operand in op.operands:
            self._use(operand, op, "uses")
        self._attributes(op.attrs, op)
        with _wellformed(op):
            self._structure(op)
        inside, self.inside_compute = self.inside_compute, op.name == "compute"
        for region in op.regions:
            self._region(region, op)
        self.inside_compute = inside
        with _wellformed(op):
            self._retype(op)
        for result in op.results:
            self._type(result.type, op)
            self._define(result, op)
        for entry in op.symbols:
            self._declare(entry, op, ("index",))
        with _wellformed(op):
            self._donate(op)

    def _has_level(self, op: Op, level: str) -> bool:
        """Whether ops of this level may stand here.  A machine's compute holds tile ops, and views
        and index reads are the same at both levels.
        """
        own = self.function.level
        if own == "machine" and level == "tile":
            addressing = op.name in ("view", "index_load")
            return addressing if not self.inside_compute else op.name not in ("load", "store")
        return "any" in (level, own) or level == own

    def _structure(self, op: Op) -> None:
        """Loops, branches and reads bind what they declare."""
        for name in _REQUIRED.get(op.name, ()):
            op.attr(name)
        shapes = {"for": (1, 0), "if": (2, 0), "index_load": (0, 1), "reduce_with": (1, 0)}
        regions, count = shapes.get(op.name, (len(op.regions), 0))
        if len(op.regions) != regions or len(op.symbols) != count:
            raise broken(
                f"{op.name} with {len(op.regions)} regions and {len(op.symbols)} symbols",
                f"{op.name} has {regions} regions and defines {count} symbols",
                op,
            )
        if op.name != "for" and any(r.symbols for r in op.regions):
            raise broken(f"a region of {op.name} that binds symbols", "only a loop counts", op)
        if op.name == "if" and any(r.args for r in op.regions):
            raise broken("a branch with arguments", "a branch uses the values around it", op)
        if op.name == "for" and len(op.regions[0].symbols) == 1:
            start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
            self._bounds(op.regions[0].symbols[0], start, stop - 1, op, op.attr("step"))
        if op.name == "index_load":
            limits = op.operands[0].tensor.index
            if limits is not None:
                self._bounds(op.symbols[0], limits[0], limits[1], op)

    def _retype(self, op: Op) -> None:
        attrs: dict[str, Any] = {**op.definition.defaults, **op.attrs}
        try:
            types = list(op.definition.typing([o.type for o in op.operands], attrs, op.regions))
        except IRError as error:
            raise broken(error.what, error.rule, op, error.fix) from None
        found = [r.type for r in op.results]
        if [_bare(t, self.function) for t in types] != [_bare(t, self.function) for t in found]:
            raise broken(
                f"{op.name} gives {', '.join(map(str, types)) or 'nothing'} and is declared to "
                f"give {', '.join(map(str, found)) or 'nothing'}",
                "results have the types of the op's typing rule",
                op,
            )

    # --- values ----------------------------------------------------------------------------------

    def _define(self, value: Value, op: Op | None) -> None:
        if value in self.everywhere:
            raise broken(
                f"value '%{value.name}' of {value.type} is defined twice",
                "a value is defined once",
                op,
                "build a new value",
            )
        self.everywhere.add(value)
        self.values.add(value)

    def _use(self, value: Value, op: Op | None, verb: str) -> None:
        name = op.name if op is not None else self.function.name
        if value not in self.values:
            elsewhere = value in self.everywhere
            raise broken(
                f"{name} {verb} value '%{value.name}' of {value.type}, which "
                + ("is defined in another region" if elsewhere else "isn't defined before"),
                "a value is used after its definition, in its region or one inside it",
                op,
                "yield it from its region, or move the use",
            )
        if value in self.dead:
            raise broken(
                f"{name} {verb} value '%{value.name}' of {value.type} after its update",
                "an updated value is used through the result of its update",
                op,
                "use the result, or update a copy",
            )

    def _donate(self, op: Op) -> None:
        if self.function.level != "tensor":
            return
        from dure.ir.tensor.program import donated

        for position in donated(op).values():
            self.dead.add(op.operands[position])

    # --- symbols, expressions, types -------------------------------------------------------------

    def _declare(self, entry: Symbol, op: Op | None, kinds: Sequence[str]) -> None:
        if entry.kind not in kinds:
            raise broken(
                f"symbol '{entry}' of kind {entry.kind}",
                f"symbols declared here are of kind {' or '.join(kinds)}",
                op,
            )
        if entry.name in self.symbols:
            raise broken(
                f"symbol '{entry}' is declared inside the scope of another '{entry}'",
                "a symbol's name means one thing wherever it is in scope",
                op,
                "give one of them another name",
            )
        if not IDENTIFIER.fullmatch(entry.name) or entry.name in ("min", "max", "and", "or"):
            raise broken(f"a symbol named '{entry.name}'", "a symbol's name is an identifier", op)
        for end in (entry.low, entry.high):
            if end is not None:
                self._expression(end, op)
        self.symbols[entry.name] = entry

    def _bounds(self, entry: Symbol, low: Expr, high: Expr, op: Op | None, step: int = 1) -> None:
        """What a symbol declares about itself must be true: proofs rest on it."""
        # The last value of a loop may lie below stop - 1; any declared bound between them is true.
        last = low + (high - low) // step * step if step > 1 else high
        upper = entry.high
        true_low = entry.low is low or proves(entry.low <= low)
        true_high = upper is None or upper is high or proves(high <= upper) or upper is last
        if not true_low or not true_high:
            raise broken(
                f"symbol '{entry}' is declared in [{entry.low}, {upper}] and takes values in "
                f"[{low}, {high}]",
                "a symbol's declared bounds hold",
                op,
                "declare the bounds that it has",
            )

    def _expression(self, expr: Expr, op: Op | None) -> None:
        for entry in symbols(expr):
            if self.symbols.get(entry.name) is not entry:
                other = entry.name in self.symbols
                raise broken(
                    f"symbol '{entry}' of [{entry.low}, {entry.high}] is not in scope in {expr}"
                    + (" (another of that name is)" if other else ""),
                    "an index expression uses sizes, program ids, loop variables and index reads "
                    "that are in scope",
                    op,
                )

    def _attributes(self, attrs: Mapping[str, Any], op: Op | None) -> None:
        plain = bool | int | float | str | DType | BlockFormat | Function | None
        for name, value in attrs.items():
            for part in attribute_parts(value):
                if isinstance(part, Expr):
                    self._expression(part, op)
                elif isinstance(part, Layout | PlaneLayouts):
                    self._layout(part, op)
                elif not isinstance(part, plain):
                    raise broken(
                        f"attribute '{name}' holds a {type(part).__name__}",
                        "an attribute holds what prints and parses back",
                        op,
                    )

    def _type(self, kind: Type, op: Op | None) -> None:
        if isinstance(kind, TileType):
            if any(extent < 1 for extent in kind.shape):
                raise broken(f"a tile of shape {kind.shape}", "a tile's extents are positive", op)
        else:
            for extent in (*kind.shape, *(kind.index or ())):
                self._expression(extent, op)
            if any(proves(extent < 0) for extent in kind.shape):
                raise broken(f"{kind} with a negative extent", "extents are not negative", op)
            if kind.layout is not None:
                self._layout(kind.layout, op)
        if kind.block is not None and not -kind.rank <= kind.quantized_axis < kind.rank:
            raise broken(f"{kind} without its quantized axis", "the quantized axis exists", op)
        if kind.block is not None:
            rest = as_expr(kind.shape[kind.quantized_axis]) % kind.block.block
            if isinstance(rest, Const) and rest.value:
                raise broken(
                    f"{kind} with a part of a block",
                    f"a quantized axis holds whole blocks of {kind.block.block}",
                    op,
                )

    def _layout(self, layout: Layout | PlaneLayouts, op: Op | None) -> None:
        each = [layout] if isinstance(layout, Layout) else [entry for _, entry in layout.planes]
        for part in each:
            strides = [digit.stride for digits in part.axes for digit in digits]
            for stride in (*strides, part.offset):
                self._expression(as_expr(stride), op)


def _bare(kind: Type, function: Function) -> Type:
    """A type as typing rules see it: at tensor level a later pass chooses layouts."""
    if isinstance(kind, TensorType) and function.level == "tensor":
        return replace(kind, layout=None, index=None, unique=False)
    return kind
