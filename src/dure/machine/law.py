"""Cost formulas of a machine file: expressions with names, parsed and never executed as code.

A law may use numbers, ``+ - * / //``, comparisons are not needed, and the functions ``ceil``,
``floor``, ``min``, ``max``.  Names are the engine's own ``numbers`` and the variables that the
simulator gives (:data:`VARIABLES`).
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from dure.errors import TargetError

Evaluate: TypeAlias = Callable[[Mapping[str, float]], float]

VARIABLES: Mapping[str, str] = {
    "m": "rows of a dot's result",
    "n": "columns of a dot's result",
    "k": "products that one element of a dot's result sums",
    "batch": "dots in one instruction",
    "rate": "the operand type's entry in the engine's rates (a dot's faster operand decides)",
    "elements": "elements that an op writes (reads, for a reduction or a scan)",
    "rows": "the product of all extents but the last",
    "columns": "the last extent",
    "axis": "the extent along which a reduction or a scan goes",
    "bits": "bits of an element",
    "bytes": "bytes that a DMA moves",
    "run": "bytes that lie side by side at the far end of a DMA, on average",
    "runs": "runs of bytes that a DMA moves",
}

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
}
_FUNCTIONS: dict[str, tuple[Callable[..., float], range]] = {
    "ceil": (math.ceil, range(1, 2)),
    "floor": (math.floor, range(1, 2)),
    "min": (min, range(2, 10)),
    "max": (max, range(2, 10)),
}
"""Each with how many arguments it takes."""
_LONGEST = 500


@dataclass(frozen=True)
class Law:
    """A formula with its unit, status and source, like any number of a machine file."""

    text: str
    unit: str
    status: str
    source: str

    def __reduce__(self) -> tuple[type[Law], tuple[str, ...]]:
        """What is parsed once isn't sent to other processes."""
        return Law, (self.text, self.unit, self.status, self.source)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names that the formula uses."""
        tree = _parse(self.text, "")
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call)}  # type: ignore[attr-defined]
        return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)) - called

    @cached_property
    def _evaluate(self) -> Evaluate:
        return _build(_parse(self.text, "").body, self.text)

    def __call__(self, values: Mapping[str, float]) -> float:
        """The formula's value; :class:`TargetError` for a missing name or a division by 0."""
        try:
            return self._evaluate(values)
        except (ZeroDivisionError, KeyError, OverflowError, ValueError) as error:
            raise TargetError(
                f"the law '{self.text}' has no value: {type(error).__name__} {error}",
                where=self.source,
                rule="a law uses its engine's numbers and the simulator's variables",
                fix="mend the formula or its numbers",
            ) from error


def check_law(text: str, where: str) -> None:
    """Raise :class:`TargetError` unless ``text`` is a formula."""
    _build(_parse(text, where).body, where)


def _parse(text: str, where: str) -> ast.Expression:
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"longer than {_LONGEST} characters")
        return ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TargetError(
            f"the law '{text[:60]}' isn't a formula: {error}",
            where=where,
            rule="a law is made of numbers, names, + - * / //, ceil, floor, min and max",
            fix="mend the formula",
        ) from error


def _build(node: ast.expr, where: str) -> Evaluate:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return lambda _: number
        case ast.Name(id=name):
            return lambda values: values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _build(operand, where)
            return lambda values: -inner(values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            function, a, b = _OPERATORS[type(op)], _build(left, where), _build(right, where)
            return lambda values: function(a(values), b(values))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            called, counts = _FUNCTIONS[name]
            if len(args) in counts:
                parts = [_build(a, where) for a in args]
                return lambda values: called(*(part(values) for part in parts))
        case _:
            pass
    raise TargetError(
        f"'{ast.unparse(node)[:60]}' can't stand in a law",
        where=where,
        rule="a law is made of numbers, names, + - * / //, ceil, floor, min and max",
        fix="mend the formula",
    )
