"""The syntax tree of a Python function, and spans in the author's file."""

from __future__ import annotations

import ast
import inspect
import linecache
import types
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from dure.errors import KernelError
from dure.ir.core import Span

FunctionNode: TypeAlias = "ast.FunctionDef | ast.Lambda"


@dataclass(frozen=True, eq=False)
class Source:
    """A function's tree, its file, and the names that it can see besides its own."""

    name: str
    file: str
    lines: list[str]
    node: FunctionNode
    globals: dict[str, Any]
    cells: dict[str, types.CellType] = field(default_factory=dict[str, types.CellType])
    #: By node and caller, which is kept alive by the span.
    _spans: dict[tuple[ast.AST, int], Span] = field(
        default_factory=dict[tuple[ast.AST, int], Span], repr=False
    )

    @cached_property
    def shown(self) -> str:
        """The file as errors name it."""
        return shown_path(self.file)

    def span(self, node: ast.AST, caller: Span | None) -> Span:
        """Where ``node`` stands."""
        found = self._spans.get((node, id(caller)))
        if found is None or found.caller is not caller:
            found = self._spans[node, id(caller)] = self._span(node, caller)
        return found

    def _span(self, node: ast.AST, caller: Span | None) -> Span:
        line = int(getattr(node, "lineno", 1))
        text = self.lines[line - 1].rstrip("\n") if line <= len(self.lines) else ""
        start = _characters(text, int(getattr(node, "col_offset", 0)))
        end = len(text)
        if getattr(node, "end_lineno", line) == line:
            end = _characters(text, int(getattr(node, "end_col_offset", 0)))
        return Span(self.shown, line, start, max(end, start + 1), text, caller)


def _characters(text: str, utf8_column: int) -> int:
    if text.isascii():
        return utf8_column
    return len(text.encode()[:utf8_column].decode(errors="ignore"))


def shown_path(file: str) -> str:
    """The file, relative to the working folder where it lies inside."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


@lru_cache(maxsize=128)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@lru_cache(maxsize=128)
def _functions(text: str) -> dict[int, list[FunctionNode]]:
    """Every function of a file by the line at which its code starts (its first decorator)."""
    found: dict[int, list[FunctionNode]] = {}
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found.setdefault(first, []).append(node)
        elif isinstance(node, ast.Lambda):
            found.setdefault(node.lineno, []).append(node)
    return found


_SOURCES: WeakKeyDictionary[types.FunctionType, Source] = WeakKeyDictionary()


def source_of(function: types.FunctionType) -> Source:
    """The source of a function; raises KernelError where Python doesn't have it."""
    found = _SOURCES.get(function)
    if found is None:
        found = _SOURCES[function] = _read(function)
    return found


def _read(function: types.FunctionType) -> Source:
    code = function.__code__
    file = inspect.getsourcefile(function) or code.co_filename
    lines = _lines(file, function)
    if not lines:
        raise KernelError(
            f"the source of '{function.__qualname__}' is not available",
            where=code.co_filename,
            rule="a kernel is compiled from its source text",
            fix="define it in a file or a notebook cell, not in exec() or a bare prompt",
        )
    candidates = _functions("".join(lines)).get(code.co_firstlineno, [])
    node = _pick(candidates, code)
    if node is None:
        raise KernelError(
            f"the source of '{function.__qualname__}' has changed since it was imported",
            where=f"{shown_path(file)}:{code.co_firstlineno}",
            rule="a kernel is compiled from the text that Python imported",
            fix="import the module again",
        )
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    return Source(function.__name__, file, lines, node, function.__globals__, cells)


def _lines(file: str, function: types.FunctionType) -> list[str]:
    linecache.checkcache(file)
    return linecache.getlines(file, function.__globals__)


@dataclass(frozen=True, eq=False, slots=True)
class Captured:
    """A name from outside that a kernel used: where it is, and what it was."""

    place: dict[str, Any] | types.CellType
    name: str
    value: object

    def is_same(self) -> bool:
        """Whether the name still stands for the same object."""
        if isinstance(self.place, dict):
            return self.place.get(self.name) is self.value
        return cell_value(self.place) is self.value


class Empty:
    """The value of a closure's cell before its name is assigned."""


def cell_value(cell: types.CellType) -> object:
    """What a closure's name stands for; :class:`Empty` if it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return Empty


def _pick(candidates: list[FunctionNode], code: types.CodeType) -> FunctionNode | None:
    """The node of this code object: by name, and for lambdas on one line by their column."""
    lambdas = code.co_name == "<lambda>"
    named = [
        node
        for node in candidates
        if (isinstance(node, ast.Lambda) if lambdas else getattr(node, "name", "") == code.co_name)
    ]
    if len(named) <= 1:
        return named[0] if named else None
    columns = {column for _, _, column, _ in code.co_positions() if column is not None}
    for node in named:
        body = node.body
        if isinstance(body, ast.expr) and body.col_offset in columns:
            return node
    return None
