"""Expressions: each kind of node has a handler in a table."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

from dure.errors import KernelError
from dure.ir.core import Region
from dure.ir.expr import Expr, as_expr
from dure.lang import contraction, indices
from dure.lang.elementwise import binary, compare, unary
from dure.lang.frontend.frame import Frame, InnerFunction
from dure.lang.frontend.recorder import Block
from dure.lang.frontend.source import Source
from dure.lang.frontend.syntax import unsupported
from dure.lang.tile import Tile
from dure.lang.values import Index, TensorBase, TileBase, describe, is_index

N = TypeVar("N", bound=ast.expr)
_HANDLERS: dict[type[ast.expr], Callable[[Frame, Any], object]] = {}


def _handles(
    kind: type[N],
) -> Callable[[Callable[[Frame, N], object]], Callable[[Frame, N], object]]:
    def register(handler: Callable[[Frame, N], object]) -> Callable[[Frame, N], object]:
        _HANDLERS[kind] = handler
        return handler

    return register


def evaluate(frame: Frame, node: ast.expr) -> Any:
    """The value of an expression."""
    if isinstance(node, ast.Constant):
        return node.value
    with frame.located(node):
        handler = _HANDLERS.get(type(node))
        if handler is None:
            raise unsupported(node)
        return handler(frame, node)


@_handles(ast.Name)
def _name(frame: Frame, node: ast.Name) -> object:
    return frame.lookup(node.id)


@_handles(ast.Attribute)
def _attribute(frame: Frame, node: ast.Attribute) -> object:
    owner = evaluate(frame, node.value)
    if isinstance(owner, TileBase | TensorBase | Expr):
        known = _PUBLIC["tile" if isinstance(owner, TileBase) else "tensor"]
        if isinstance(owner, Expr) or node.attr not in known:
            names = "no attributes" if isinstance(owner, Expr) else ", ".join(known)
            raise KernelError(
                f"'.{node.attr}' of {describe(owner)}",
                rule=f"it has {names}",
                fix="use one of those, or a function of dure.lang",
            )
    elif owner is None:
        raise KernelError(
            f"'.{node.attr}' of {ast.unparse(node.value)}, which was passed as None",
            rule="an argument of None is absent",
            fix=f"guard it with `if {ast.unparse(node.value)} is not None:`",
        )
    elif not hasattr(owner, node.attr):
        raise KernelError(
            f"{describe(owner)} has no attribute '{node.attr}'",
            rule="an attribute exists when the kernel is compiled",
            fix=_closest(node.attr, dir(owner)),
        )
    return getattr(owner, node.attr)


#: What authors may ask of tiles and tensors.
_PUBLIC = {
    "tile": (
        *("shape", "dtype", "rank", "T", "to", "reshape", "permute", "broadcast_to"),
        *("sum", "max", "min"),
    ),
    "tensor": ("shape", "dtype", "rank"),
}


def _closest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 3)
    return f"did you mean {' or '.join(close)}?" if close else "correct the spelling"


@_handles(ast.BinOp)
def _binary(frame: Frame, node: ast.BinOp) -> object:
    if isinstance(node.op, ast.Add):
        for dot_node, other in ((node.right, node.left), (node.left, node.right)):
            pair = dot_operands(frame, dot_node)
            if pair is not None:
                first = None if dot_node is node.right else pair()
                start = evaluate(frame, other)
                return add_dot(start, *(first or pair()))
    return apply_binary(node.op, evaluate(frame, node.left), evaluate(frame, node.right))


def dot_operands(frame: Frame, node: ast.expr) -> Callable[[], tuple[Any, Any]] | None:
    """If ``node`` is ``a @ b`` or ``dl.dot(a, b)``: a function that evaluates both."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        pair = (node.left, node.right)
    elif isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
        if any(isinstance(a, ast.Starred) for a in node.args):
            return None
        if not isinstance(node.func, ast.Name | ast.Attribute):
            return None
        if getattr(node.func, "attr", getattr(node.func, "id", "")) != "dot":
            return None
        if evaluate(frame, node.func) is not contraction.dot:
            return None
        pair = (node.args[0], node.args[1])
    else:
        return None
    return lambda: (evaluate(frame, pair[0]), evaluate(frame, pair[1]))


def add_dot(start: object, a: Any, b: Any) -> object:
    """``start + a @ b``, as one dot where the types allow it."""
    if contraction.can_accumulate(a, b, start):
        return contraction.dot(a, b, cast("Any", start))
    return binary("add", start, apply_binary(ast.MatMult(), a, b))


_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.LShift: "shl",
    ast.RShift: "shr",
}


def apply_binary(op: ast.operator, left: Any, right: Any) -> object:
    """A binary operator on two values."""
    if isinstance(op, ast.MatMult):
        return contraction.dot(left, right)
    if isinstance(op, ast.BitAnd | ast.BitOr) and _conditions(left, right):
        return indices.logic("and" if isinstance(op, ast.BitAnd) else "or", left, right)
    return binary(_BINARY[type(op)], left, right)


def _conditions(left: object, right: object) -> bool:
    both = all(isinstance(v, bool) or indices.is_condition(v) for v in (left, right))
    return both and (isinstance(left, Expr) or isinstance(right, Expr))


@_handles(ast.UnaryOp)
def _unary(frame: Frame, node: ast.UnaryOp) -> object:
    value = evaluate(frame, node.operand)
    match node.op:
        case ast.Not():
            decided = truth(value)
            return (not decided) if isinstance(decided, bool) else indices.invert(decided)
        case ast.USub():
            if isinstance(value, TileBase):
                return unary("neg", value)
            return indices.negate(value) if isinstance(value, Expr) else -value
        case ast.Invert():
            if isinstance(value, TileBase):
                return unary("not", value)
            return indices.invert(value) if indices.is_condition(value) else ~value
        case _:
            return value


_RELATIONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_STATIC_RELATIONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


@_handles(ast.Compare)
def _compare(frame: Frame, node: ast.Compare) -> object:
    left = evaluate(frame, node.left)
    total: Any = True
    for op, right_node in zip(node.ops, node.comparators, strict=True):
        right = evaluate(frame, right_node)
        relation = _RELATIONS.get(type(op))
        if relation is None:
            found: Any = _STATIC_RELATIONS[type(op)](left, right)
        else:
            found = compare(relation, left, right)
        if isinstance(found, TileBase):
            if len(node.ops) > 1:
                raise KernelError(
                    "a chain of comparisons of tiles",
                    rule="a comparison of tiles gives a tile, which has no truth of its own",
                    fix="join two comparisons with &, as in (a <= x) & (x < b)",
                )
            return found
        total = _join("and", total, found)
        left = right
    return total


def _join(function: Any, left: Any, right: Any) -> Any:
    if isinstance(left, Expr) or isinstance(right, Expr):
        return indices.logic(function, left, right)
    return (left and right) if function == "and" else (left or right)


def truth(value: object) -> bool | Index:
    """``value`` as a condition: a bool where it is known, else an expression."""
    if isinstance(value, TileBase):
        raise KernelError(
            f"the truth of {describe(value)}",
            rule="a condition is known when the kernel is compiled, or is one of index scalars",
            fix="choose element by element with dl.where(condition, a, b); join masks with & and |",
        )
    if isinstance(value, TensorBase):
        raise KernelError(
            f"the truth of {describe(value)}",
            rule="a tensor has no truth",
            fix=f"ask whether it was passed: `if {value.name} is not None:`",
        )
    if isinstance(value, Expr):
        decided = indices.condition(value)
        return decided if isinstance(decided, Expr) else bool(decided)
    return bool(value)


@_handles(ast.BoolOp)
def _logic(frame: Frame, node: ast.BoolOp) -> object:
    function = "and" if isinstance(node.op, ast.And) else "or"
    total: Any = evaluate(frame, node.values[0])
    for part in node.values[1:]:
        decided = truth(total)
        if isinstance(decided, bool):
            if decided is (function == "or"):
                return total
            total = evaluate(frame, part)
            continue
        other = truth(evaluate(frame, part))
        total = indices.logic(function, decided, other)
    return total


@_handles(ast.IfExp)
def _choice(frame: Frame, node: ast.IfExp) -> object:
    decided = truth(evaluate(frame, node.test))
    if isinstance(decided, bool):
        return evaluate(frame, node.body if decided else node.orelse)
    yes, then = _branch(frame, node.body, decided)
    no, otherwise = _branch(frame, node.orelse, indices.invert(decided))
    if isinstance(yes, TileBase) and isinstance(no, TileBase) and yes.type == no.type:
        regions = [
            Region((), tuple(block.ops), (value.value,))
            for value, block in ((yes, then), (no, otherwise))
        ]
        result = frame.recorder.add("if", (), {"condition": decided}, regions).result
        return Tile(result.tile, result)
    if is_index(yes) and is_index(no) and not then.ops and not otherwise.ops:
        return indices.select(decided, cast("Index", yes), cast("Index", no))
    raise KernelError(
        f"a run-time choice between {describe(yes)} and {describe(no)}",
        rule="`a if c else b` with a run-time condition chooses between index scalars that are "
        "known before it, or between tiles of one shape and dtype",
        fix="make both tiles alike, or read an index argument's element before the choice",
    )


def _branch(frame: Frame, node: ast.expr, condition: Index | bool) -> tuple[Any, Block]:
    """The value of an expression that is computed only if the condition holds, and its ops."""
    frame.recorder.blocks.append(Block())
    frame.recorder.assumptions.append(as_expr(condition))
    value = evaluate(frame, node)
    frame.recorder.assumptions.pop()
    return value, frame.recorder.blocks.pop()


@_handles(ast.Call)
def _call(frame: Frame, node: ast.Call) -> object:
    function = evaluate(frame, node.func)
    args = list(_items(frame, node.args))
    keywords: dict[str, object] = {}
    for keyword in node.keywords:
        value = evaluate(frame, keyword.value)
        if keyword.arg is None:
            keywords.update(value)
        else:
            keywords[keyword.arg] = value
    return frame.call(frame, function, args, keywords, frame.span(node))


def _items(frame: Frame, nodes: Iterable[ast.expr]) -> Iterator[object]:
    for node in nodes:
        if isinstance(node, ast.Starred):
            yield from static_items(evaluate(frame, node.value))
        else:
            yield evaluate(frame, node)


def static_items(value: object) -> Iterable[object]:
    """The items of what is taken apart when the kernel is compiled."""
    if isinstance(value, TileBase | TensorBase | Expr):
        raise KernelError(
            f"{describe(value)} is taken apart",
            rule="tuples and constants are taken apart when a kernel is compiled, tiles are not",
            fix="load the parts one by one, or unpack its shape",
        )
    return cast("Iterable[object]", value)


@_handles(ast.Tuple)
def _tuple(frame: Frame, node: ast.Tuple) -> object:
    return tuple(_items(frame, node.elts))


@_handles(ast.List)
def _list(frame: Frame, node: ast.List) -> object:
    return tuple(_items(frame, node.elts))


@_handles(ast.Dict)
def _dict(frame: Frame, node: ast.Dict) -> object:
    found: dict[object, object] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            raise unsupported(node)
        found[evaluate(frame, key)] = evaluate(frame, value)
    return found


@_handles(ast.Subscript)
def _subscript(frame: Frame, node: ast.Subscript) -> object:
    owner, key = evaluate(frame, node.value), evaluate(frame, node.slice)
    if isinstance(key, Expr) and not isinstance(owner, TileBase | TensorBase):
        raise KernelError(
            f"{describe(owner)} is indexed with {describe(key)}",
            rule="tuples are indexed with numbers that are known when the kernel is compiled",
            fix="unroll the loop with dl.static_range",
        )
    return cast("Any", owner)[key]


@_handles(ast.Slice)
def _slice(frame: Frame, node: ast.Slice) -> object:
    parts = (node.lower, node.upper, node.step)
    return slice(*(None if p is None else evaluate(frame, p) for p in parts))


@_handles(ast.JoinedStr)
def _text(frame: Frame, node: ast.JoinedStr) -> object:
    parts: list[str] = []
    for part in node.values:
        inner = part.value if isinstance(part, ast.FormattedValue) else part
        parts.append(str(evaluate(frame, inner)))
    return "".join(parts)


@_handles(ast.Lambda)
def _lambda(frame: Frame, node: ast.Lambda) -> object:
    source = frame.source
    own = Source("<lambda>", source.file, source.lines, node, source.globals, source.cells)
    return InnerFunction(own, frame)


@_handles(ast.ListComp)
def _list_comprehension(frame: Frame, node: ast.ListComp) -> object:
    return _comprehension(frame, node.elt, node.generators)


@_handles(ast.GeneratorExp)
def _generator(frame: Frame, node: ast.GeneratorExp) -> object:
    return _comprehension(frame, node.elt, node.generators)


def _comprehension(
    frame: Frame, element: ast.expr, generators: list[ast.comprehension]
) -> tuple[object, ...]:
    """A comprehension over what is known when the kernel is compiled, as a tuple."""
    before = dict(frame.locals)
    found: list[object] = []

    def run(rest: list[ast.comprehension]) -> None:
        if not rest:
            found.append(evaluate(frame, element))
            return
        for item in static_items(evaluate(frame, rest[0].iter)):
            bind(frame, rest[0].target, item)
            conditions = [truth(evaluate(frame, test)) for test in rest[0].ifs]
            if any(isinstance(c, Expr) for c in conditions):
                raise KernelError(
                    "a comprehension with a run-time condition",
                    rule="comprehensions are taken apart when the kernel is compiled",
                    fix="use a condition on constants",
                )
            if all(conditions):
                run(rest[1:])

    run(generators)
    frame.locals.clear()
    frame.locals.update(before)
    return tuple(found)


def bind(frame: Frame, target: ast.expr, value: object) -> None:
    """Assign to a name or to names in a tuple."""
    if isinstance(target, ast.Name):
        frame.locals[target.id] = value
        return
    with frame.located(target):
        if not isinstance(target, ast.Tuple | ast.List):
            raise unsupported(target)
        items = tuple(static_items(value))
        if any(isinstance(t, ast.Starred) for t in target.elts):
            raise unsupported(target)
        if len(items) != len(target.elts):
            raise KernelError(
                f"{len(items)} values are assigned to {len(target.elts)} names",
                rule="there are as many names as values",
                fix="name every value, or use _ for those that you don't need",
            )
        for inner, item in zip(target.elts, items, strict=True):
            bind(frame, inner, item)
