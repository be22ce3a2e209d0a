"""The second half of compiling: launches, barriers and memory.  A warm start never comes here."""

from __future__ import annotations

from dure.compiler.arena import Planned, plan_arena
from dure.compiler.barriers import count_barriers, count_launches, schedule_barriers
from dure.compiler.carried import separate_carried
from dure.compiler.lower import lower
from dure.compiler.sample import draw_step
from dure.ir.core import Function
from dure.ir.lowering import CompilerTarget
from dure.ir.passes import Pass, run_passes


def plan(step: Function, target: CompilerTarget) -> Planned:
    """Lowers a laid-out program to launches, and plans its barriers and its memory.

    Raises :class:`IRError` where an op has no kernel, or (under ``DURE_CHECK``) naming the pass
    that changed a result.
    """
    planned: list[Planned] = []

    def lowered(function: Function) -> Function:
        return lower(function, target)

    def with_offsets(function: Function) -> Function:
        planned.append(plan_arena(function))
        return planned[0].function

    passes = (
        Pass("lower", lowered),
        Pass("separate-carried", separate_carried),
        Pass("schedule-barriers", schedule_barriers),
        Pass("plan-arena", with_offsets),
    )
    run_passes(step, passes, sampler=draw_step)
    return planned[0]


def report(planned: Planned) -> dict[str, int]:
    """Counts for people: barriers and launches of a step, bytes and buffers of the arena."""
    return {
        "barriers": count_barriers(planned.function),
        "launches": count_launches(planned.function),
        "arena_bytes": planned.arena_bytes,
        "buffers": planned.buffers,
    }
