"""Statements: run-time loops and ifs become regions, everything else happens as they are walked."""

from __future__ import annotations

import ast
import builtins
import pdb
from collections.abc import Callable, Sequence
from typing import Any, cast

from dure.errors import KernelError
from dure.ir.core import Region, Value
from dure.ir.expr import Expr, Symbol, as_expr, symbol, symbols
from dure.lang import indices
from dure.lang.frontend.expressions import (
    add_dot,
    apply_binary,
    bind,
    dot_operands,
    evaluate,
    static_items,
    truth,
)
from dure.lang.frontend.frame import Frame, InnerFunction, Unbound
from dure.lang.frontend.liveness import assigned
from dure.lang.frontend.recorder import Block, flatten, rebuild
from dure.lang.frontend.source import Source
from dure.lang.frontend.syntax import unsupported
from dure.lang.programs import LoopRange
from dure.lang.tile import Tile
from dure.lang.values import Index, Origin, TileBase, describe, is_index, is_sequence

#: Calls that act under dl.interpret only.
_DEBUGGING: tuple[object, ...] = (builtins.print, builtins.breakpoint, pdb.set_trace)


class Returned(Exception):
    """Unwinds to the call of the function that returns."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value


def run(frame: Frame, statements: Sequence[ast.stmt]) -> None:
    """Run statements in order."""
    for statement in statements:
        _run(frame, statement)


def _run(frame: Frame, node: ast.stmt) -> None:
    handler = _HANDLERS.get(type(node))
    with frame.located(node):
        if handler is None:
            raise unsupported(node)
        handler(frame, node)


def _assign(frame: Frame, node: ast.Assign) -> None:
    value = evaluate(frame, node.value)
    for target in node.targets:
        bind(frame, target, value)


def _annotated(frame: Frame, node: ast.AnnAssign) -> None:
    if node.value is not None:
        bind(frame, node.target, evaluate(frame, node.value))


def _augmented(frame: Frame, node: ast.AugAssign) -> None:
    if not isinstance(node.target, ast.Name):
        raise unsupported(node.target)
    with frame.located(node.target):
        before = frame.lookup(node.target.id)
    pair = dot_operands(frame, node.value) if isinstance(node.op, ast.Add) else None
    if pair is not None:
        value = add_dot(before, *pair())
    else:
        value = apply_binary(node.op, before, evaluate(frame, node.value))
    frame.locals[node.target.id] = value


def _expression(frame: Frame, node: ast.Expr) -> None:
    value = node.value
    if isinstance(value, ast.Call):
        function = evaluate(frame, value.func)
        if any(function is debugging for debugging in _DEBUGGING):
            return
    evaluate(frame, value)


def _return(frame: Frame, node: ast.Return) -> None:
    if frame.conditional:
        raise KernelError(
            "a return inside of a run-time if or loop",
            rule="a function returns at one place, which is known when the kernel is compiled",
            fix="assign the result to a name in both branches, and return it at the end",
        )
    raise Returned(None if node.value is None else evaluate(frame, node.value))


def _raise(frame: Frame, node: ast.Raise) -> None:
    if frame.conditional:
        raise KernelError(
            "a raise inside of a run-time if or loop",
            rule="a kernel raises when it is compiled",
            fix="put the raise under a condition on constants, or use dl.static_assert",
        )
    text = ""
    if isinstance(node.exc, ast.Call) and node.exc.args:
        text = str(evaluate(frame, node.exc.args[0]))
    raise KernelError(
        f"the kernel refuses its arguments: {text}" if text else "the kernel refuses its arguments",
        rule="a raise statement of the kernel was reached when it was compiled",
        fix="pass arguments that it accepts",
    )


def _function(frame: Frame, node: ast.FunctionDef) -> None:
    if node.decorator_list:
        raise KernelError(
            "a decorated function inside of a kernel",
            rule="functions inside of a kernel are inlined as they stand",
            fix="remove the decorator, or define the function outside",
        )
    source = frame.source
    own = Source(node.name, source.file, source.lines, node, source.globals, source.cells)
    frame.locals[node.name] = InnerFunction(own, frame)


def _nothing(frame: Frame, node: ast.stmt) -> None:
    """pass; and assert, which is checked under dl.interpret, as python -O drops it."""


# --- if -----------------------------------------------------------------------------------------


def _if(frame: Frame, node: ast.If) -> None:
    decided = truth(evaluate(frame, node.test))
    if not isinstance(decided, Expr):
        run(frame, node.body if decided else node.orelse)
        return
    before = dict(frame.locals)
    then, then_names = _branch(frame, node.body, decided)
    frame.locals = dict(before)
    otherwise, else_names = _branch(frame, node.orelse, indices.invert(decided))
    frame.locals = before
    names = assigned([*node.body, *node.orelse])
    yields: list[tuple[str, object, list[TileBase], list[TileBase]]] = []
    for name in names:
        yes, no = then_names.get(name, _NOTHING), else_names.get(name, _NOTHING)
        needed = name in frame.needed.get(node, frozenset())
        if not needed or isinstance(yes, Unbound) or isinstance(no, Unbound):
            frame.locals[name] = Unbound(
                "has no value on every way that leads here",
                f"assign '{name}' before the if, or in both branches",
            )
        elif flatten(yes) or flatten(no):
            _check_branches(name, yes, no)
            yields.append((name, yes, flatten(yes), flatten(no)))
        else:
            frame.locals[name] = _merged(name, decided, yes, no)
    regions = [
        Region((), tuple(then.ops), tuple(t.value for _, _, ts, _ in yields for t in ts)),
        Region((), tuple(otherwise.ops), tuple(t.value for _, _, _, ts in yields for t in ts)),
    ]
    op = frame.recorder.add("if", (), {"condition": decided}, regions)
    results = [Tile(r.tile, r) for r in op.results]
    for name, template, _, _ in yields:
        frame.locals[name] = rebuild(template, results)


def _branch(
    frame: Frame, body: Sequence[ast.stmt], condition: Index | bool
) -> tuple[Block, dict[str, object]]:
    frame.recorder.blocks.append(Block())
    frame.recorder.assumptions.append(as_expr(condition))
    frame.conditional += 1
    run(frame, body)
    frame.conditional -= 1
    frame.recorder.assumptions.pop()
    return frame.recorder.blocks.pop(), frame.locals


_NOTHING = Unbound("", "")


def _check_branches(name: str, yes: object, no: object) -> None:
    if _types(yes) != _types(no):
        raise KernelError(
            f"'{name}' is {_describe(yes)} in one branch and {_describe(no)} in the other",
            rule="both branches of a run-time if give a name the same shape and dtype",
            fix=f"make '{name}' a tile of one shape and dtype in both, with .to(dtype) or dl.full",
        )


def _merged(name: str, condition: Index, yes: object, no: object) -> object:
    if _same(yes, no):
        return yes
    if is_index(yes) and is_index(no):
        return indices.select(condition, cast("Index", yes), cast("Index", no))
    return Unbound(
        f"is {_describe(yes)} in one branch of a run-time if and {_describe(no)} in the other",
        "use an if on constants, or make both of them index scalars or tiles",
    )


def _types(value: object) -> object:
    if isinstance(value, TileBase):
        return value.type
    if is_sequence(value):
        return tuple(_types(part) for part in value)
    return type(value)


def _describe(value: object) -> str:
    if is_sequence(value):
        return "(" + ", ".join(_describe(part) for part in value) + ")"
    return describe(value)


def _same(one: object, other: object) -> bool:
    if one is other:
        return True
    if is_sequence(one) and is_sequence(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, TileBase | Expr) or isinstance(other, TileBase | Expr):
        return False
    return type(one) is type(other) and one == other


# --- for ----------------------------------------------------------------------------------------


def _for(frame: Frame, node: ast.For) -> None:
    if node.orelse:
        raise KernelError(
            "an else after a for loop",
            rule="a kernel's loops run to their end",
            fix="write what follows after the loop",
        )
    items = evaluate(frame, node.iter)
    if isinstance(items, LoopRange):
        _loop(frame, node, items)
        return
    with frame.located(node.iter):
        found = tuple(static_items(items))
    for item in found:
        bind(frame, node.target, item)
        run(frame, node.body)


def _loop(frame: Frame, node: ast.For, limits: LoopRange) -> None:
    """A loop that runs when the kernel does; it carries the tiles that change and matter later."""
    if not isinstance(node.target, ast.Name):
        raise unsupported(node.target)
    needed = frame.needed.get(node, frozenset())
    names = [n for n in assigned(node.body) if n in needed and _is_bound(frame, n)]
    initial = {n: frame.locals[n] for n in names}
    carried = [n for n in names if flatten(initial[n])]
    tiles = [t for n in carried for t in flatten(initial[n])]
    arguments = [Value(t.type, n) for n in carried for t in flatten(initial[n])]
    inner = [Tile(v.tile, v) for v in arguments]
    for name in carried:
        frame.locals[name] = rebuild(initial[name], inner)
    variable = symbol(
        frame.recorder.unique(node.target.id), "loop", limits.start, as_expr(limits.stop) - 1
    )
    frame.locals[node.target.id] = variable
    frame.recorder.blocks.append(Block())
    frame.recorder.assumptions.append(as_expr(limits.start) < limits.stop)
    frame.conditional += 1
    run(frame, node.body)
    frame.conditional -= 1
    frame.recorder.assumptions.pop()
    block = frame.recorder.blocks.pop()
    for name in names:
        _check_carried(frame, node, name, initial[name], frame.locals[name])
    finals = [t for n in carried for t in flatten(frame.locals[n])]
    yields = [t.value for t in finals]
    region = Region(tuple(arguments), tuple(block.ops), tuple(yields), (variable,))
    attrs = {
        "start": as_expr(limits.start),
        "stop": as_expr(limits.stop),
        "step": limits.step,
    }
    op = frame.recorder.add("for", [t.value for t in tiles], attrs, [region])
    results = [
        Tile(r.tile, r, _outlasting(final, variable))
        for r, final in zip(op.results, finals, strict=True)
    ]
    for name in [node.target.id, *assigned(node.body)]:
        if name not in names:
            frame.locals[name] = Unbound(
                "is assigned in a loop that may run zero times",
                f"assign '{name}' before the loop with the shape and dtype that it has in it",
            )
    for name in carried:
        frame.locals[name] = rebuild(initial[name], results)


def _outlasting(tile: TileBase, variable: Symbol) -> tuple[Origin | None, ...]:
    """Where a carried tile's elements come from, but for places that the loop's variable moves."""
    return tuple(
        None
        if origin is None or any(variable in symbols(as_expr(p)) for p in origin.place)
        else origin
        for origin in tile.origins
    )


def _is_bound(frame: Frame, name: str) -> bool:
    return not isinstance(frame.locals.get(name, _NOTHING), Unbound)


def _check_carried(frame: Frame, node: ast.For, name: str, before: object, after: object) -> None:
    if flatten(before):
        if _types(before) == _types(after):
            return
        what = (
            f"'{name}' is {_describe(before)} before the loop and {_describe(after)} after a turn"
        )
        fix = "start with a tile of the final shape and dtype, or convert with .to(dtype)"
    else:
        if _same(before, after):
            return
        what = (
            f"'{name}' is {_describe(before)} before the loop and {_describe(after)} after a turn"
        )
        fix = "compute index scalars from the loop variable, or unroll with dl.static_range"
        if flatten(after):
            fix = f"start with a tile, as in {name} = dl.full(shape, {before!r}, dtype)"
    place = _last_assignment(node.body, name) or node
    raise KernelError(
        what,
        where=frame.span(place).render(),
        rule="a loop carries tiles, and each keeps its shape and dtype from turn to turn",
        fix=fix,
    )


def _last_assignment(body: Sequence[ast.stmt], name: str) -> ast.AST | None:
    found: ast.AST | None = None
    for statement in body:
        for inner in ast.walk(statement):
            if isinstance(inner, ast.Assign | ast.AugAssign) and name in assigned([inner]):
                found = inner
    return found


_HANDLERS: dict[type[ast.stmt], Callable[[Frame, Any], None]] = {
    ast.Assign: _assign,
    ast.AnnAssign: _annotated,
    ast.AugAssign: _augmented,
    ast.Expr: _expression,
    ast.Return: _return,
    ast.Raise: _raise,
    ast.FunctionDef: _function,
    ast.Pass: _nothing,
    ast.Assert: _nothing,
    ast.If: _if,
    ast.For: _for,
}
