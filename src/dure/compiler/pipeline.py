"""The compiler's ordered list of passes, and the one call that compiles a tensor program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dure.compiler.arena import Planned, plan_arena
from dure.compiler.barriers import count_barriers, count_launches, schedule_barriers
from dure.compiler.carried import separate_carried
from dure.compiler.fuse import fuse
from dure.compiler.layouts import LaidOut, choose_layouts
from dure.compiler.lower import lower
from dure.compiler.quantize import Policy, quantize_activations
from dure.ir.core import Function
from dure.ir.lowering import CompilerTarget
from dure.ir.printer import print_function
from dure.runtime import llvm
from dure.runtime.cache import object_cache
from dure.runtime.host import HostFeatures, host_features
from dure.targets.cpu.artifact import Artifact, program_key
from dure.targets.cpu.build import build
from dure.targets.cpu.load import LoadPlan, plan_load
from dure.targets.cpu.program import CompiledProgram
from dure.targets.cpu.target import CpuTarget

Pass: TypeAlias = Callable[[Function], Function]


@dataclass(frozen=True)
class Prepared:
    """A program with fused ops over laid-out parameters: the cheap half of compiling."""

    laid_out: LaidOut
    load: LoadPlan


def prepare(function: Function, target: CompilerTarget, policy: Policy = "int8") -> Prepared:
    """Quantizes activations by policy, fuses, and chooses layouts; target-independent but for
    these."""
    quantized = quantize_activations(function, policy)
    fused = fuse(quantized)
    laid_out = choose_layouts(fused, target)
    return Prepared(laid_out, plan_load(laid_out.load))


def plan(step: Function, target: CompilerTarget) -> Planned:
    """Lowers a laid-out program to launches, and plans its barriers and its memory."""
    passes: Sequence[Pass] = (
        lambda f: lower(f, target),
        separate_carried,
        schedule_barriers,
    )
    for apply in passes:
        step = apply(step)
    return plan_arena(step)


def compile_program(
    function: Function,
    host: HostFeatures | None = None,
    *,
    policy: Policy = "int8",
    workers: int | None = None,
    times: llvm.CompileTimes | None = None,
) -> CompiledProgram:
    """Compiles a tensor program for the CPU, through the object cache.

    ``policy`` says how activations meet quantized weights.  The library of kernels must have been
    imported (``import dure.library``), or nothing can be lowered.  ``times`` collects what LLVM
    took.
    """
    features = host_features() if host is None else host
    target = CpuTarget(features)
    prepared = prepare(function, target, policy)
    step = prepared.laid_out.step
    cache = object_cache()
    key = program_key(print_function(step), features) if cache is not None else ""
    found = cache.get(key) if cache is not None else None
    artifact = Artifact.from_bytes(found) if found is not None else None
    if artifact is None:
        planned = plan(step, target)
        report = {
            "barriers": count_barriers(planned.function),
            "launches": count_launches(planned.function),
            "arena_bytes": planned.arena_bytes,
            "buffers": planned.buffers,
        }
        artifact = build(
            planned.function, prepared.load, planned.arena_bytes, report, features, times
        )
        if cache is not None:
            cache.put(key, artifact.to_bytes())
    return CompiledProgram(function, step, prepared.load, artifact, workers)
