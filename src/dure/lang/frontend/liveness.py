"""Which names matter after a statement: what a loop carries and what an if gives.

A backward walk over the structured syntax tree.  It is conservative: a name that may be read later
counts as needed, whatever constants decide.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from functools import lru_cache

from dure.lang.frontend.source import FunctionNode

Names = frozenset[str]


def reads(nodes: Iterable[ast.AST | None]) -> Names:
    """Every name that is read inside of these nodes."""
    return frozenset(
        inner.id
        for node in nodes
        if node is not None
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)
    )


def assigned(statements: Sequence[ast.stmt]) -> list[str]:
    """Every name that is bound inside of these statements, in order; nested functions excluded."""
    return list(_assigned(tuple(statements)))


@lru_cache(maxsize=4096)
def _assigned(statements: tuple[ast.stmt, ...]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    pending: list[ast.AST] = list(reversed(statements))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef):
            found[node.name] = None
            continue
        if isinstance(node, ast.Lambda | ast.ListComp | ast.GeneratorExp | ast.DictComp):
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found[node.id] = None
        pending.extend(reversed(list(ast.iter_child_nodes(node))))
    return tuple(found)


@lru_cache(maxsize=1024)
def own_names(function: FunctionNode) -> Names:
    """Names that a function binds in its body."""
    return frozenset(assigned(function.body)) if isinstance(function.body, list) else frozenset()


@lru_cache(maxsize=1024)
def needed_names(function: FunctionNode) -> dict[ast.stmt, Names]:
    """For each ``if`` the names read after it; for each ``for`` those read after it or in its next
    turn.
    """
    found: dict[ast.stmt, Names] = {}
    if isinstance(function, ast.FunctionDef):
        _block(function.body, frozenset(), found)
    return found


def _block(statements: Sequence[ast.stmt], after: Names, found: dict[ast.stmt, Names]) -> Names:
    live = after
    for statement in reversed(statements):
        live = _statement(statement, live, found)
    return live


def _statement(node: ast.stmt, after: Names, found: dict[ast.stmt, Names]) -> Names:
    match node:
        case ast.Assign():
            return (after - _bound(node.targets)) | reads([node.value, *node.targets])
        case ast.AnnAssign():
            return (after - _bound([node.target])) | reads([node.value])
        case ast.AugAssign():
            return after | _bound([node.target]) | reads([node.value, node.target])
        case ast.If():
            found[node] = after
            inside = _block(node.body, after, found) | _block(node.orelse, after, found)
            return inside | reads([node.test])
        case ast.For():
            header = after
            for _ in range(2):
                header |= _block(node.body, header, found) - _bound([node.target])
            found[node] = header
            return header | reads([node.iter])
        case ast.Return():
            return reads([node.value])
        case ast.FunctionDef():
            return (after - {node.name}) | reads([node])
        case _:
            return after | reads([node])


def _bound(targets: Iterable[ast.expr]) -> Names:
    return frozenset(
        inner.id
        for target in targets
        for inner in ast.walk(target)
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load)
    )
