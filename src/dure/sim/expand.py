"""A machine program as the instructions that its queues execute.

:func:`expand` walks the text once, with the numbers of one core, and gives each executed op with
its slots and the values of its symbols.  In text order; a queue executes its own instructions in
this order, and nothing else orders them but semaphores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dure.errors import IRError
from dure.ir.core import Function, Op, Region, Value
from dure.ir.dtypes import Array
from dure.ir.expr import IntLike, evaluate
from dure.ir.expr_code import Evaluator, compile_expr, missing
from dure.ir.machine.phase import phases_of

#: Ops that belong to no queue: they declare, or every queue follows them by itself.
STRUCTURE = frozenset(
    {"buffer", "semaphore", "rotate", "view", "reshaped", "index_load", "for", "if", "phase"}
)


@dataclass(slots=True)
class Instruction:
    """An executed op: ``slots`` of its buffer operands in order (None for tensors and semaphores),
    and the symbols that its expressions need, by name.  A phase is there twice, where it begins
    and, with ``ends``, where it ends.
    """

    op: Op
    slots: tuple[int | None, ...]
    symbols: Mapping[str, int]
    ends: bool = False

    @property
    def queue(self) -> str:
        """The queue that executes it; "" for one that every queue executes by itself."""
        return str(self.op.attrs.get("queue", ""))


def core_ids(function: Function) -> Iterator[dict[str, int]]:
    """The coordinates of every core, as values of the program's ids."""
    grid = [evaluate(extent, {}) for extent in function.grid]
    for place in np.ndindex(*grid):
        yield {s.name: int(at) for s, at in zip(function.program_ids, place, strict=True)}


def expand(
    function: Function,
    core: Mapping[str, int],
    indices: Mapping[str, Array] | None = None,
) -> Iterator[Instruction]:
    """What one core executes, in text order.

    ``core`` gives the program ids (:func:`core_ids`); ``indices`` the values of index arguments by
    name, where the program reads scalars from them.  Raises :class:`IRError` for a missing one, and
    for a scalar outside its declared range.
    """
    yield from _Expansion(indices or {}).region(function.body, dict(core))


class _Expansion:
    def __init__(self, indices: Mapping[str, Array]) -> None:
        self.indices = indices
        self.turns: dict[Value, int] = {}
        self.stages: dict[Value, int] = {}
        self.views: dict[Value, tuple[Value, dict[int, int]]] = {}
        self._compiled: dict[IntLike, Evaluator] = {}

    def number(self, expr: IntLike, known: Mapping[str, int]) -> int:
        """The number that an expression is; it is compiled when it is first met."""
        code = self._compiled.get(expr)
        if code is None:
            code = self._compiled[expr] = compile_expr(expr)
        try:
            return code(known)
        except KeyError as error:
            raise missing(error, known) from None

    def region(self, region: Region, known: dict[str, int]) -> Iterator[Instruction]:
        for op in region.ops:
            match op.name:
                case "for":
                    start, stop = (self.number(op.attr(k), known) for k in ("start", "stop"))
                    body, name = op.regions[0], op.regions[0].symbols[0].name
                    for counter in range(start, stop, op.attr("step")):
                        yield from self.region(body, {**known, name: counter})
                case "if":
                    taken = op.regions[0 if self.number(op.attr("condition"), known) else 1]
                    yield from self.region(taken, dict(known))
                case "buffer":
                    self.stages[op.result] = op.attr("stages")
                    self.turns[op.result] = 0
                case "rotate":
                    for buffer in op.operands:
                        self.turns[buffer] = (self.turns[buffer] + 1) % self.stages[buffer]
                case "index_load":
                    known[op.symbols[0].name] = self._scalar(op, known)
                case "view":
                    self._view(op, known)
                case "semaphore" | "reshaped":
                    pass
                case "phase":
                    yield Instruction(op, (), known)
                    yield from self.region(op.regions[0], dict(known))
                    yield Instruction(op, (), known, ends=True)
                case _:
                    yield Instruction(op, tuple(map(self.turns.get, op.operands)), known)

    def _view(self, op: Op, known: Mapping[str, int]) -> None:
        root, offsets = self.views.get(op.operands[0], (op.operands[0], {}))
        start = self.number(op.attr("start"), known)
        axis: int = op.attr("axis")
        self.views[op.result] = root, {**offsets, axis: offsets.get(axis, 0) + start}

    def _scalar(self, op: Op, known: Mapping[str, int]) -> int:
        root, offsets = self.views.get(op.operands[0], (op.operands[0], {}))
        values = self.indices.get(root.name)
        if values is None:
            raise IRError(
                f"the program reads scalars from '{root.name}', whose values aren't given",
                where=op.span.render() if op.span is not None else "",
                rule="a program with run-time indices is run with their values",
                fix=f"pass indices={{'{root.name}': array}}",
            )
        place = tuple(
            self.number(e, known) + offsets.get(a, 0) for a, e in enumerate(op.attr("index"))
        )
        if any(not 0 <= p < n for p, n in zip(place, values.shape, strict=True)):
            raise IRError(
                f"element {place} of '{root.name}', which has the shape {values.shape}",
                where=op.span.render() if op.span is not None else "",
                rule="a scalar read of an index argument lies inside it",
                fix="bound the index by the argument's shape",
            )
        number = int(values[place])
        symbol = op.symbols[0]
        for bound, holds in ((symbol.low, int.__ge__), (symbol.high, int.__le__)):
            if bound is not None and not holds(number, self.number(bound, known)):
                raise IRError(
                    f"'{root.name}' holds {number} at {place}",
                    rule=f"its elements are declared to lie in [{symbol.low}, {symbol.high}]",
                    fix="pass indices inside the range",
                )
        return number


def declared(function: Function, name: str) -> Sequence[Op]:
    """The ops of a program that declare buffers or semaphores (``name``); they stand at the top of
    its body, or of its phases.
    """
    found = [op for op in function.body.ops if op.name == name]
    for phase in phases_of(function.body):
        found += [op for op in phase.regions[0].ops if op.name == name]
    return found
