"""Who uses which tile value, seen through ops that cost nothing and are made anew at each use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from dure.ir.core import Function, Op, Region, Value

#: Ops that are made anew wherever they are used.
CONSTANTS = frozenset({"full", "iota"})
#: Reindexings: cloned into whatever consumes them, but for a transpose that says ``stored``.
FREE = frozenset({"reshape", "broadcast", "transpose"})
#: Ops with effects, or that stand for control.
ANCHORS = frozenset({"load", "store", "dot", "for", "if", "view", "index_load"})

Consumer: TypeAlias = "Op | Region"


def is_free(op: Op) -> bool:
    """Whether an op only says how another tile is indexed."""
    return op.name in FREE and not op.attrs.get("stored")


def is_cheap(op: Op) -> bool:
    """Whether an op is made anew wherever its result is used."""
    return op.name in CONSTANTS or is_free(op)


@dataclass
class Usage:
    """Makers and consumers of every value of a tile function.

    ``consumers[v]`` are ops that aren't cheap and read ``v`` or what cheap ops make of it, and
    regions that yield it.
    """

    makers: dict[Value, Op] = field(default_factory=dict[Value, Op])
    consumers: dict[Value, set[Consumer]] = field(default_factory=dict[Value, "set[Consumer]"])
    lists: set[Value] = field(default_factory=set[Value])

    def base(self, value: Value) -> Value:
        """The value that a chain of free ops starts from."""
        maker = self.makers.get(value)
        while maker is not None and is_free(maker):
            value = maker.operands[0]
            maker = self.makers.get(value)
        return value

    def is_constant(self, value: Value) -> bool:
        """Whether the value is a constant, however reindexed."""
        maker = self.makers.get(self.base(value))
        return maker is not None and maker.name in CONSTANTS


def usage_of(function: Function) -> Usage:
    """The usage of a function's values."""
    usage = Usage()
    _collect(function.body, usage)
    return usage


def _collect(region: Region, usage: Usage) -> None:
    for op in region.ops:
        for result in op.results:
            usage.makers[result] = op
            usage.consumers.setdefault(result, set())
        if not is_cheap(op):
            for operand in op.operands:
                _consume(operand, op, usage)
            if op.name in ("load", "store"):
                first = 1 if op.name == "load" else 2
                usage.lists.update(usage.base(o) for o in op.operands[first:])
        for inner in op.regions:
            if op.name == "reduce_with":
                continue
            _collect(inner, usage)
    for value in region.yields:
        _consume(value, region, usage)


def _consume(value: Value, consumer: Consumer, usage: Usage) -> None:
    while True:
        usage.consumers.setdefault(value, set()).add(consumer)
        maker = usage.makers.get(value)
        if maker is None or not is_free(maker):
            return
        value = maker.operands[0]
