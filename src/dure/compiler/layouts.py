"""Choosing where weights and states lie: once each, over all of their uses.

Parameters that stand in one row of a repeat's table share a type, hence a layout; a weight that is
used twice (a tied head is also an embedding table) has one layout for both.  What connects through
tables and uses forms a class, for which the target is asked once.  The weights whose layout changes
become the *load program*: one relayout each, run once; the step program takes its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dure.compiler.rebuild import rebuild
from dure.errors import IRError
from dure.ir.core import Function, Op, Param, Region, Value, infer
from dure.ir.layout import AnyLayout
from dure.ir.lowering import CompilerTarget, Use
from dure.ir.tensor.program import donated, repeat_tables
from dure.ir.types import Type


@dataclass(frozen=True)
class LaidOut:
    """The step program over laid-out parameters, and the load program that lays weights out.

    ``load`` takes stored weights and yields them laid out; both under the names in its ``attrs``.
    """

    step: Function
    load: Function


class _Classes:
    """Union-find over values that must share a layout."""

    def __init__(self) -> None:
        self._parents: dict[Value, Value] = {}

    def find(self, value: Value) -> Value:
        parent = self._parents.get(value, value)
        if parent is value:
            return value
        root = self.find(parent)
        self._parents[value] = root
        return root

    def join(self, one: Value, other: Value) -> None:
        self._parents[self.find(one)] = self.find(other)


def choose_layouts(function: Function, target: CompilerTarget) -> LaidOut:
    """Asks ``target`` for a layout of each weight and state, and splits off the load program."""
    classes = _Classes()
    _connect(function.body, classes)
    params = {p.value for p in function.params}
    uses: dict[Value, list[Use]] = {}
    _collect(function.body, classes, uses)
    chosen: dict[Value, AnyLayout | None] = {}
    types: dict[Value, Type] = {}
    loads: list[tuple[str, Value, AnyLayout]] = []
    for param, role, name in zip(
        function.params, described(function, "roles"), described(function, "names"), strict=True
    ):
        if role == "input":
            continue
        value = param.value
        root = classes.find(value)
        if root not in chosen:
            ask = target.weight_layout if role == "weight" else target.state_layout
            chosen[root] = ask(value.tensor, uses.get(root, []))
        layout = chosen[root]
        if layout is not None and layout != value.tensor.layout:
            types[value] = value.tensor.with_layout(layout)
            if role == "weight":
                loads.append((name, value, layout))
    assert all(p in params for p in types)
    return LaidOut(rebuild(function, lambda _, __: False, types), _load_program(function, loads))


def described(function: Function, what: str) -> list[str]:
    """What a program's attrs say of each parameter: its ``names`` or ``roles``."""
    found = function.attrs.get(what)
    if not isinstance(found, tuple) or len(found) != len(function.params):
        raise IRError(
            f"program '{function.name}' does not give the {what} of its parameters",
            rule="a program's attrs hold names and roles, one for each parameter",
            fix="build it with ProgramBuilder",
        )
    return [str(entry) for entry in found]


def _connect(region: Region, classes: _Classes) -> None:
    for op in region.ops:
        if op.name == "repeat":
            body = op.regions[0]
            carried: int = op.attr("carried")
            for table, argument in zip(repeat_tables(op), body.args[carried:], strict=True):
                for value in table:
                    classes.join(value, argument)
            for result, operand in donated(op).items():
                classes.join(op.results[result], op.operands[operand])
            _connect(body, classes)
        elif op.name == "kv_write":
            classes.join(op.results[0], op.operands[0])


def _collect(region: Region, classes: _Classes, uses: dict[Value, list[Use]]) -> None:
    for op in region.ops:
        if op.name == "repeat":
            _collect(op.regions[0], classes, uses)
            continue
        for position, operand in enumerate(op.operands):
            uses.setdefault(classes.find(operand), []).append(Use(op, position))


def _load_program(function: Function, loads: Sequence[tuple[str, Value, AnyLayout]]) -> Function:
    params: list[Param] = []
    ops: list[Op] = []
    for name, value, layout in loads:
        argument = Value(value.type, name)
        params.append(Param(argument, "in"))
        ops.append(infer("relayout", [argument], {"layout": layout}, hint=name))
    names = tuple(name for name, _, _ in loads)
    attrs = {"roles": ("weight",) * len(names), "names": names, "outputs": names}
    body = Region(tuple(p.value for p in params), tuple(ops), tuple(o.results[0] for o in ops))
    return Function(f"{function.name}.load", "tensor", tuple(params), body, attrs=attrs)
