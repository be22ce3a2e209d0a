"""The one call that compiles a tensor program.

A program is prepared (activations quantized by policy, ops fused, layouts chosen), which is cheap
and always done.  The rest (kernels, barriers, memory, code) is looked up in the object cache under
the prepared program's text, so that a warm start imports neither the language nor the code
generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dure import settings
from dure.compiler.fuse import fuse
from dure.compiler.layouts import LaidOut, choose_layouts
from dure.compiler.quantize import quantize_activations
from dure.compiler.sample import draw_step
from dure.ir.core import Function
from dure.ir.lowering import ActivationPolicy, CompilerTarget
from dure.ir.passes import Pass, run_passes
from dure.ir.printer import print_function
from dure.runtime import llvm
from dure.runtime.cache import object_cache
from dure.runtime.host import HostFeatures, host_features
from dure.targets.cpu.artifact import Artifact, program_key
from dure.targets.cpu.load import LoadPlan, plan_load
from dure.targets.cpu.program import CompiledProgram
from dure.targets.cpu.target import CpuTarget


@dataclass(frozen=True)
class Prepared:
    """A program with fused ops over laid-out parameters: the cheap half of compiling."""

    laid_out: LaidOut
    load: LoadPlan


def prepare(
    function: Function, target: CompilerTarget, policy: ActivationPolicy | None = None
) -> Prepared:
    """Quantizes activations by policy (else the target's), fuses, and chooses layouts.

    The policy alone changes numbers on purpose: ``DURE_CHECK`` compares from there on.
    """
    chosen: list[LaidOut] = []

    def with_layouts(fused: Function) -> Function:
        chosen.append(choose_layouts(fused, target))
        return chosen[0].step

    passes = (Pass("fuse", fuse), Pass("choose-layouts", with_layouts))
    quantized = quantize_activations(function, policy or target.activations)
    run_passes(quantized, passes, sampler=draw_step)
    return Prepared(chosen[0], plan_load(chosen[0].load))


def compile_program(
    function: Function,
    host: HostFeatures | None = None,
    *,
    policy: ActivationPolicy | None = None,
    workers: int | None = None,
    library: Callable[[], object] | None = None,
    times: llvm.CompileTimes | None = None,
    recorded: bool = False,
) -> CompiledProgram:
    """Compiles a tensor program for the CPU, through the object cache.

    ``policy`` says how activations meet quantized weights; None leaves it to the host.
    ``library`` is called before ops are lowered to kernels (not where the cache has the program)
    and registers their lowerings, as importing ``dure.library`` does.  ``times`` collects what
    LLVM took.  ``recorded`` stamps when each worker ended what (:meth:`CompiledProgram.stamps`).
    """
    features = host_features() if host is None else host
    prepared, artifact = compile_objects(
        function, features, policy=policy, library=library, times=times, recorded=recorded
    )
    return CompiledProgram(function, prepared.laid_out.step, prepared.load, artifact, workers)


def compile_objects(
    function: Function,
    features: HostFeatures,
    *,
    policy: ActivationPolicy | None = None,
    library: Callable[[], object] | None = None,
    times: llvm.CompileTimes | None = None,
    recorded: bool = False,
) -> tuple[Prepared, Artifact]:
    """What :func:`compile_program` runs, as object code for a machine that may be another."""
    target = CpuTarget(features)
    prepared = prepare(function, target, policy)
    step = prepared.laid_out.step
    # Passes that are to be watched have to run.
    watched = settings.check() or settings.dump_dir() is not None
    cache = None if watched else object_cache()
    text = f"recorded={recorded}\n{print_function(step)}" if cache is not None else ""
    key = program_key(text, features) if cache is not None else ""
    found = cache.get(key) if cache is not None else None
    artifact = Artifact.from_bytes(found) if found is not None else None
    if artifact is None:
        if library is not None:
            library()
        artifact = _compile(step, prepared.load, target, features, times, recorded)
        if cache is not None:
            cache.put(key, artifact.to_bytes())
    return prepared, artifact


def _compile(
    step: Function,
    load: LoadPlan,
    target: CompilerTarget,
    features: HostFeatures,
    times: llvm.CompileTimes | None,
    recorded: bool,
) -> Artifact:
    # Imported here: a warm start needs none of it.
    from dure.compiler.plan import plan, report
    from dure.targets.cpu.build import build

    planned = plan(step, target)
    counts = report(planned)
    size = planned.arena_bytes
    return build(planned.function, load, size, counts, features, times, recorded=recorded)
