"""The second half of compiling: launches, barriers and memory.  A warm start never comes here."""

from __future__ import annotations

from collections.abc import Callable

from dure.compiler.arena import Planned, plan_arena
from dure.compiler.barriers import count_barriers, count_launches, schedule_barriers
from dure.compiler.carried import separate_carried
from dure.compiler.lower import lower
from dure.ir.core import Function
from dure.ir.lowering import CompilerTarget

Pass = Callable[[Function], Function]
#: What is done to the program between two passes (checks, dumps): (pass's name, before, after).
Observer = Callable[[str, Function, Function], None]


def plan(step: Function, target: CompilerTarget, observe: Observer | None = None) -> Planned:
    """Lowers a laid-out program to launches, and plans its barriers and its memory."""

    def lowered(function: Function) -> Function:
        return lower(function, target)

    passes: tuple[tuple[str, Pass], ...] = (
        ("lower", lowered),
        ("separate-carried", separate_carried),
        ("schedule-barriers", schedule_barriers),
    )
    for name, apply in passes:
        before, step = step, apply(step)
        if observe is not None:
            observe(name, before, step)
    planned = plan_arena(step)
    if observe is not None:
        observe("plan-arena", step, planned.function)
    return planned


def report(planned: Planned) -> dict[str, int]:
    """Counts for people: barriers and launches of a step, bytes and buffers of the arena."""
    return {
        "barriers": count_barriers(planned.function),
        "launches": count_launches(planned.function),
        "arena_bytes": planned.arena_bytes,
        "buffers": planned.buffers,
    }
