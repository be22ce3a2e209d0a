"""Phases: the programs of a step, one after another over all cores.

``phase() {name, kernels, ahead, lag} (region)``: a program of its own, of so many ``kernels``, with
its buffers and semaphores at the top of the region.  It is complete when every queue of every core
has executed it and all that it issued has completed.  A queue begins a phase when all phases before
it are complete; a queue in ``ahead``, once all but the last ``lag`` of those are.  Every core
executes the same phases, so a phase stands in no branch, and in loops only whose trips are the same
on all cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dure.ir.core import Op, OpDef, Region, declare
from dure.ir.expr import as_expr, evaluate
from dure.ir.rules import broken, free
from dure.ir.types import Type


def _phase_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    if operands or regions[0].args or regions[0].yields:
        raise broken("a phase that takes or gives values", "phases hand over tensors in memory")
    if attrs["lag"] < 0:
        raise broken(f"a phase with a lag of {attrs['lag']}", "a lag counts phases")
    return []


declare(
    OpDef(
        "phase",
        "machine",
        _phase_typing,
        None,
        free,
        defaults={"name": "", "kernels": 1, "ahead": (), "lag": 0},
        doc="phase() {name, kernels, ahead, lag} (region): a program that begins when those before "
        "it are complete on all cores; queues in ahead may still run beside the last lag of them",
    )
)


def phases_of(region: Region) -> Iterator[Op]:
    """The phases of a program, in the order of its text."""
    for op in region.ops:
        if op.name == "phase":
            yield op
        elif op.name == "for":
            yield from phases_of(op.regions[0])


def executed(region: Region, most: int) -> Iterator[Op]:
    """The phases of a program in the order of their execution, loops for at most so many turns."""
    for op in region.ops:
        if op.name == "phase":
            yield op
        elif op.name == "for":
            start, stop = (evaluate(as_expr(op.attr(end)), {}) for end in ("start", "stop"))
            for _ in range(min(most, len(range(start, stop, op.attr("step"))))):
                yield from executed(op.regions[0], most)
