"""Structured control: loops with carried values, and run-time conditions on scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dure.ir.core import OpDef, Region, declare
from dure.ir.rules import broken, free
from dure.ir.types import Type


def _for_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    body = regions[0]
    carried = [a.type for a in body.args]
    if list(operands) != carried or [y.type for y in body.yields] != carried:
        raise broken(
            "a loop whose carried values change type: "
            f"{[str(o) for o in operands]} -> {[str(y.type) for y in body.yields]}",
            "what a loop carries keeps its shape and dtype",
            "convert with .to(dtype) or start from a tile of the final type",
        )
    if len(body.symbols) != 1 or attrs["step"] <= 0:
        raise broken(
            "a loop without its variable or with a step <= 0", "for k in range(a, b, step)"
        )
    return carried


declare(
    OpDef(
        "for",
        "any",
        _for_typing,
        None,
        free,
        defaults={"step": 1},
        doc="for(*initial) {start, stop, step} (region with one symbol): yields the carried values",
    )
)


def _if_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    then, otherwise = regions
    types = [y.type for y in then.yields]
    if types != [y.type for y in otherwise.yields]:
        raise broken(
            f"branches of an if that give {[str(t) for t in types]} and "
            f"{[str(y.type) for y in otherwise.yields]}",
            "both branches of an if give values of the same types",
            "assign each name in both branches, with one shape and dtype",
        )
    return types


declare(
    OpDef(
        "if",
        "any",
        _if_typing,
        None,
        free,
        doc="if() {condition} (then, otherwise): a run-time condition on index expressions",
    )
)
