"""Rewriting programs: patterns to a fixpoint, dead code, common subexpressions, cloning, inlining.

Programs are frozen, so that each of these builds a new one and shares what it didn't change.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from dure.errors import IRError
from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.expr import Expr, IntLike, Symbol, substitute, symbol, symbols
from dure.ir.layout import Digit, Layout, PlaneLayouts
from dure.ir.types import TensorType, Type

#: Ops that do something besides giving results.
EFFECTS = frozenset({"store", "barrier"})


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What takes an op's place: ops to insert, and a value for each of its results."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]


class Scope:
    """What a rewrite may ask about the program around its op."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self._makers: dict[Value, Op] = {}
        self._uses: dict[Value, int] = {}
        for op in walk(function.body):
            self.add(op)
        for value in (y for region in regions_of(function) for y in region.yields):
            self._uses[value] = self._uses.get(value, 0) + 1

    def add(self, op: Op) -> None:
        """Enter a new op."""
        for result in op.results:
            self._makers[result] = op
        for operand in op.operands:
            self._uses[operand] = self._uses.get(operand, 0) + 1

    def maker(self, value: Value) -> Op | None:
        """The op that gives a value; None for arguments."""
        return self._makers.get(value)

    def uses(self, value: Value) -> int:
        """How often a value is used."""
        return self._uses.get(value, 0)


#: A rewrite gives what takes the op's place, or None where the pattern doesn't match after all.
Rewrite: TypeAlias = Callable[[Op, Scope], Rewritten | None]
#: The name of the ops that a rewrite looks at, and the rewrite.
Pattern: TypeAlias = tuple[str, Rewrite]


def regions_of(function: Function) -> Iterable[Region]:
    """The body and every region inside it."""
    yield function.body
    for op in walk(function.body):
        yield from op.regions


# --- patterns -----------------------------------------------------------------------------------


def rewrite(function: Function, patterns: Sequence[Pattern], *, rounds: int = 64) -> Function:
    """Apply patterns everywhere until none matches.

    Raises :class:`IRError` naming the patterns that still match after ``rounds`` walks.
    """
    table: dict[str, list[Rewrite]] = {}
    for name, pattern in patterns:
        table.setdefault(name, []).append(pattern)
    applied: list[str] = []
    for _ in range(rounds):
        applied = []
        function = _Walk(function, table, applied).run()
        if not applied:
            return function
    raise IRError(
        f"patterns that never come to rest: {', '.join(sorted(set(applied)))}",
        rule=f"a set of patterns reaches a fixpoint within {rounds} walks",
        fix="make each rewrite simpler than what it replaces, so that none undoes another",
    )


class _Walk:
    """One walk over a function: each op is rewritten at most once."""

    def __init__(
        self, function: Function, table: Mapping[str, Sequence[Rewrite]], applied: list[str]
    ) -> None:
        self.function = function
        self.table = table
        self.applied = applied
        self.scope = Scope(function)
        self.values: dict[Value, Value] = {}

    def run(self) -> Function:
        body = self.region(self.function.body)
        return self.function if body is self.function.body else self.function.with_body(body)

    def region(self, region: Region) -> Region:
        ops: list[Op] = []
        for op in region.ops:
            ops.extend(self.op(op))
        yields = tuple(self.value(y) for y in region.yields)
        same = len(ops) == len(region.ops) and all(map(_same, ops, region.ops))
        if same and yields == region.yields:
            return region
        return Region(region.args, tuple(ops), yields, region.symbols)

    def value(self, value: Value) -> Value:
        while value in self.values:
            value = self.values[value]
        return value

    def op(self, op: Op) -> Sequence[Op]:
        op = self.renewed(op)
        for pattern in self.table.get(op.name, ()):
            found = pattern(op, self.scope)
            if found is not None:
                self.applied.append(getattr(pattern, "__name__", op.name))
                return self.replaced(op, found)
        return [op]

    def renewed(self, op: Op) -> Op:
        """The op with its operands and regions as they are by now."""
        operands = tuple(self.value(o) for o in op.operands)
        regions = tuple(self.region(r) for r in op.regions)
        if operands == op.operands and all(map(_same, regions, op.regions)):
            return op
        new = replace(op, operands=operands, regions=regions)
        self.scope.add(new)
        return new

    def replaced(self, op: Op, found: Rewritten) -> Sequence[Op]:
        if [v.type for v in found.values] != [r.type for r in op.results]:
            raise IRError(
                f"a rewrite of {op.name} that gives {[str(v.type) for v in found.values]} for "
                f"{[str(r.type) for r in op.results]}",
                where=op.span.render() if op.span is not None else "",
                rule="a rewrite keeps the types of the op's results",
                fix="cast or reshape in the rewrite",
            )
        for new in found.ops:
            self.scope.add(new)
        # A result that is given again must not stand for itself.
        pairs = zip(op.results, found.values, strict=True)
        self.values.update({r: v for r, v in pairs if r is not v})
        return found.ops


def _same(one: object, other: object) -> bool:
    return one is other


# --- dead code ----------------------------------------------------------------------------------


def has_effects(op: Op) -> bool:
    """Whether an op, or one in its regions, does something besides giving results."""
    return op.name in EFFECTS or any(has_effects(i) for r in op.regions for i in r.ops)


def eliminate_dead_code(function: Function) -> Function:
    """Without ops that have no effect and whose results and symbols nobody uses."""
    live_symbols = _mentioned([*function.grid, *_bounds_of(function.program_ids)])
    live: set[Value] = set()
    body = _live_region(function.body, live, live_symbols)
    return function if body is function.body else function.with_body(body)


def _live_region(region: Region, live: set[Value], names: set[Symbol]) -> Region:
    live.update(region.yields)
    names |= _mentioned(_bounds_of(region.symbols))
    kept: list[Op] = []
    changed = False
    for op in reversed(region.ops):
        needed = has_effects(op) or any(r in live for r in op.results)
        if not needed and not any(s in names for s in op.symbols):
            changed = True
            continue
        inner = tuple(_live_region(r, live, names) for r in op.regions)
        if not all(map(_same, inner, op.regions)):
            op = replace(op, regions=inner)
            changed = True
        live.update(op.operands)
        names |= _mentioned([*expressions_in(op.attrs), *_bounds_of(op.symbols)])
        for result in op.results:
            names |= _mentioned(type_expressions(result.type))
        kept.append(op)
    if not changed:
        return region
    return Region(region.args, tuple(reversed(kept)), region.yields, region.symbols)


def _bounds_of(entries: Iterable[Symbol]) -> list[Expr]:
    return [end for s in entries for end in (s.low, s.high) if end is not None]


def _mentioned(expressions: Iterable[Expr]) -> set[Symbol]:
    """The symbols in expressions and in the bounds of those symbols."""
    found: set[Symbol] = set()
    pending = list(expressions)
    while pending:
        for entry in symbols(pending.pop()) - found:
            found.add(entry)
            pending.extend(_bounds_of([entry]))
    return found


def expressions_in(value: object) -> list[Expr]:
    """Every index expression in an attribute or a mapping of attributes."""
    found: list[Expr] = []
    _collect(value, found)
    return found


def _collect(value: object, found: list[Expr]) -> None:
    held = _held(type(value))
    if held == "expression":
        found.append(cast("Expr", value))
    elif held == "entries":
        for entry in cast("Sequence[object]", value):
            _collect(entry, found)
    elif held == "named":
        for entry in cast("Mapping[str, object]", value).values():
            _collect(entry, found)
    elif held == "strides":
        found += _layout_expressions(cast("Layout | PlaneLayouts", value))


@functools.cache
def _held(kind: type) -> str:
    """What of an attribute of this type may be expressions; asked for each type once."""
    if issubclass(kind, int | str):
        return ""
    kinds = {
        "expression": (Expr,),
        "entries": (tuple, list),
        "named": (Mapping,),
        "strides": (Layout, PlaneLayouts),
    }
    return next((name for name, classes in kinds.items() if issubclass(kind, classes)), "")


def _layout_expressions(layout: Layout | PlaneLayouts) -> Iterable[Expr]:
    for part in [layout] if isinstance(layout, Layout) else [p for _, p in layout.planes]:
        for stride in (*(d.stride for digits in part.axes for d in digits), part.offset):
            if isinstance(stride, Expr):
                yield stride


def type_expressions(kind: Type) -> Iterable[Expr]:
    """Every index expression in a type."""
    if isinstance(kind, TensorType):
        yield from kind.shape
        yield from kind.index or ()
        yield from expressions_in(kind.layout)


# --- common subexpressions ----------------------------------------------------------------------


def eliminate_common_subexpressions(function: Function) -> Function:
    """Ops without effects that compute what an op in scope has computed already are dropped.

    Loads and reads count only from arguments that nothing stores into.
    """
    constant = {p.value for p in function.params if p.access == "in"}
    if function.level == "tensor":
        constant |= {p.value for p in function.params}
    walk_ = _Commoner(constant, function.level == "tensor")
    body = walk_.region(function.body, {})
    return function if body is function.body else function.with_body(body)


class _Commoner:
    def __init__(self, constant: set[Value], pure: bool) -> None:
        self.constant = constant
        self.pure = pure
        self.values: dict[Value, Value] = {}
        self.symbols: dict[Expr, IntLike] = {}

    def region(self, region: Region, outer: Mapping[object, Op]) -> Region:
        known = dict(outer)
        ops: list[Op] = []
        for old in region.ops:
            op = self.renewed(old, known)
            key = self.key(op)
            earlier = known.get(key) if key is not None else None
            if earlier is not None:
                self.values.update(zip(old.results, earlier.results, strict=True))
                self.symbols.update(zip(old.symbols, earlier.symbols, strict=True))
                continue
            if key is not None:
                known[key] = op
            if op.name == "view" and op.operands[0] in self.constant:
                self.constant.add(op.result)
            ops.append(op)
        yields = tuple(self.values.get(y, y) for y in region.yields)
        if len(ops) == len(region.ops) and all(map(_same, ops, region.ops)):
            return region if yields == region.yields else replace(region, yields=yields)
        return Region(region.args, tuple(ops), yields, region.symbols)

    def renewed(self, op: Op, known: Mapping[object, Op]) -> Op:
        operands = tuple(self.values.get(o, o) for o in op.operands)
        regions = tuple(self.region(r, known) for r in op.regions)
        dropped = self.symbols.keys()
        touched = bool(dropped) and not dropped.isdisjoint(
            s for e in _op_expressions(op) for s in symbols(e)
        )
        if operands == op.operands and not touched and all(map(_same, regions, op.regions)):
            return op
        if not touched:
            return replace(op, operands=operands, regions=regions)
        return self._renamed(replace(op, operands=operands, regions=regions))

    def _renamed(self, op: Op) -> Op:
        """The op over the symbols that stand for the dropped ones."""
        cloner = _Cloner(self.values, self.symbols)
        new = cloner.op(op)
        self.values.update(cloner.values)
        self.symbols.update(cloner.symbols)
        return new

    def key(self, op: Op) -> object | None:
        """What two ops share if they compute the same; None for ops that are never shared."""
        if op.regions or has_effects(op) or op.name == "launch":
            return None
        reads = op.name in ("load", "index_load")
        if reads and not self.pure and op.operands[0] not in self.constant:
            return None
        types = tuple(r.type for r in op.results)
        operands = tuple(id(o) for o in op.operands)
        attrs = tuple((name, attribute_key(op.attrs[name])) for name in sorted(op.attrs))
        return op.name, operands, attrs, types


def _op_expressions(op: Op) -> Iterable[Expr]:
    yield from expressions_in(op.attrs)
    for value in op.results:
        yield from type_expressions(value.type)
    for entry in op.symbols:
        yield from _bounds_of([entry])
    for region in op.regions:
        yield from _bounds_of(region.symbols)
        for inner in region.ops:
            yield from _op_expressions(inner)


def attribute_key(value: object) -> object:
    """A hashable key; attributes that print differently (1, 1.0, True, -0.0) differ in it."""
    if isinstance(value, tuple | list):
        return tuple(attribute_key(entry) for entry in cast("Sequence[object]", value))
    if isinstance(value, float):
        return "float", struct.pack("d", value)
    if isinstance(value, Expr | Function):
        return "node", id(value)
    return type(value).__name__, value


# --- cloning and inlining -----------------------------------------------------------------------


class _Cloner:
    """Copies ops with new values, symbols of their own, and some values and symbols replaced."""

    def __init__(
        self, values: Mapping[Value, Value], symbols: Mapping[Expr, IntLike], prefix: str = ""
    ) -> None:
        self.values = dict(values)
        self.symbols = dict(symbols)
        self.prefix = prefix

    def expr(self, expr: Expr) -> Expr:
        return substitute(expr, self.symbols) if self.symbols else expr

    def declared(self, entry: Symbol) -> Symbol:
        low = self.expr(entry.low)
        high = None if entry.high is None else self.expr(entry.high)
        found = symbol(self.prefix + entry.name, entry.kind, low, high)
        self.symbols[entry] = found
        return found

    def attribute(self, value: Any) -> Any:
        if isinstance(value, Expr):
            return self.expr(value)
        if isinstance(value, tuple | list):
            return tuple(self.attribute(entry) for entry in cast("Sequence[Any]", value))
        if isinstance(value, Layout | PlaneLayouts):
            return self.layout(value)
        return value

    def layout(self, layout: Layout | PlaneLayouts) -> Layout | PlaneLayouts:
        if isinstance(layout, PlaneLayouts):
            return PlaneLayouts(tuple((n, self.plane(p)) for n, p in layout.planes))
        return self.plane(layout)

    def plane(self, layout: Layout) -> Layout:
        axes = tuple(
            tuple(Digit(d.extent, self.attribute(d.stride), d.dim) for d in digits)
            for digits in layout.axes
        )
        return Layout(axes, self.attribute(layout.offset))

    def type(self, kind: Type) -> Type:
        if not isinstance(kind, TensorType):
            return kind
        shape = tuple(self.expr(e) for e in kind.shape)
        index = None if kind.index is None else (self.expr(kind.index[0]), self.expr(kind.index[1]))
        layout = None if kind.layout is None else self.layout(kind.layout)
        return replace(kind, shape=shape, index=index, layout=layout)

    def new(self, value: Value) -> Value:
        found = self.values[value] = Value(self.type(value.type), value.name)
        return found

    def op(self, op: Op) -> Op:
        operands = tuple(self.values.get(o, o) for o in op.operands)
        attrs = {name: self.attribute(value) for name, value in op.attrs.items()}
        regions = tuple(self.region(r) for r in op.regions)
        results = tuple(self.new(r) for r in op.results)
        declared = tuple(self.declared(s) for s in op.symbols)
        return Op(op.name, operands, results, attrs, regions, declared, op.span)

    def region(self, region: Region) -> Region:
        declared = tuple(self.declared(s) for s in region.symbols)
        args = tuple(self.new(a) for a in region.args)
        ops = tuple(self.op(op) for op in region.ops)
        return Region(args, ops, tuple(self.values.get(y, y) for y in region.yields), declared)


def clone_region(
    region: Region,
    values: Mapping[Value, Value] | None = None,
    symbols: Mapping[Expr, IntLike] | None = None,
    *,
    prefix: str = "",
) -> Region:
    """A copy with values of its own, outer ``values`` and ``symbols`` replaced.

    ``prefix`` goes before the names of the symbols that the region binds, so that the copy can
    stand in the scope of the original.
    """
    return _Cloner(values or {}, symbols or {}, prefix).region(region)


def inline(
    function: Function,
    arguments: Sequence[Value],
    sizes: Mapping[Expr, IntLike] | None = None,
    *,
    prefix: str = "",
) -> Rewritten:
    """The body of ``function`` on these arguments: its ops, and the values that it yields.

    ``sizes`` gives its symbols (and program ids) in the caller's terms.  Raises :class:`IRError`
    for the wrong number of arguments.
    """
    if len(arguments) != len(function.params):
        raise IRError(
            f"{function.name} inlined on {len(arguments)} arguments",
            rule=f"it takes {len(function.params)}",
            fix="pass one value for each parameter",
        )
    values = dict(zip((p.value for p in function.params), arguments, strict=True))
    cloner = _Cloner(values, sizes or {}, prefix)
    ops = tuple(cloner.op(op) for op in function.body.ops)
    return Rewritten(ops, tuple(cloner.values.get(y, y) for y in function.body.yields))


def clone_function(function: Function) -> Function:
    """The same program with parameters, values and regions of its own; symbols are shared."""
    cloner = _Cloner({}, {})
    params = tuple(replace(p, value=cloner.new(p.value)) for p in function.params)
    args = tuple(cloner.values[a] for a in function.body.args)
    ops = tuple(cloner.op(op) for op in function.body.ops)
    yields = tuple(cloner.values[y] for y in function.body.yields)
    return replace(function, params=params, body=Region(args, ops, yields))
