"""Which values share memory: donations, reshapes, what a repeat carries, rows of its tables."""

from __future__ import annotations

from collections.abc import Iterator

from dure.ir.core import Function, Op, Region, Value
from dure.ir.tensor.program import donated, repeat_tables


class Storage:
    """Union-find over a program's values; two values with one root lie in the same memory."""

    def __init__(self, function: Function, *, through_repeats: bool = True) -> None:
        self._parents: dict[Value, Value] = {}
        self._connect(function.body, through_repeats)

    def root(self, value: Value) -> Value:
        """The value that stands for everything in the same memory."""
        parent = self._parents.get(value, value)
        if parent is value:
            return value
        root = self.root(parent)
        self._parents[value] = root
        return root

    def _join(self, one: Value, other: Value) -> None:
        self._parents[self.root(one)] = self.root(other)

    def _connect(self, region: Region, through_repeats: bool) -> None:
        for op in region.ops:
            for result, operand in donated(op).items():
                self._join(op.results[result], op.operands[operand])
            if op.name == "reshape_tensor":
                self._join(op.results[0], op.operands[0])
            if op.name != "repeat":
                continue
            body, carried = op.regions[0], int(op.attr("carried"))
            for table, argument in zip(repeat_tables(op), body.args[carried:], strict=True):
                for value in table:
                    self._join(value, argument)
            self._connect(body, through_repeats)
            if through_repeats:
                for place in range(carried):
                    for value in (op.results[place], body.yields[place], op.operands[place]):
                        self._join(value, body.args[place])


def written(op: Op) -> Iterator[Value]:
    """The results that an op writes into memory of their own."""
    if op.name == "launch":
        given = donated(op)
        yield from (r for place, r in enumerate(op.results) if place not in given)
    elif op.name == "copy":
        yield op.results[0]


def donated_results(op: Op) -> Iterator[Value]:
    """The results of a launch that overwrite one of its operands."""
    if op.name == "launch":
        yield from (op.results[place] for place in donated(op))
