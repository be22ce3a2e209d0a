"""From planned programs to objects: kernels once each, then the step that calls them."""

from __future__ import annotations

from dure.ir.core import Function, walk
from dure.runtime import llvm
from dure.runtime.cache import compile_cached
from dure.runtime.host import HostFeatures
from dure.targets.cpu.artifact import Artifact
from dure.targets.cpu.codegen import KernelCode, emit_kernel
from dure.targets.cpu.context import CHECK, LOAD, STEP
from dure.targets.cpu.load import LoadPlan
from dure.targets.cpu.load_code import emit_load
from dure.targets.cpu.step import emit_step


def build(
    step: Function,
    load: LoadPlan,
    arena_bytes: int,
    report: dict[str, int],
    host: HostFeatures,
    times: llvm.CompileTimes | None = None,
    *,
    recorded: bool = False,
) -> Artifact:
    """Generates and compiles everything that a program needs on ``host``.

    ``step`` is planned (offsets, barriers).  Raises what the code generator raises, with the
    author's line.
    """
    codes = _kernels(step, host)
    distinct = list({code.symbol: code for code in codes.values()}.values())
    code = emit_step(step, codes, host, recorded=recorded)
    objects: list[bytes] = []
    symbols: list[tuple[str, ...]] = []
    for kernel in distinct:
        objects.append(compile_cached(kernel.llvm_ir, host, times=times))
        symbols.append((kernel.symbol,))
    if load.weights:
        objects.append(compile_cached(emit_load(load, host), host, times=times))
        symbols.append((LOAD,))
    objects.append(compile_cached(code.llvm_ir, host, times=times))
    symbols.append((STEP, CHECK))
    return Artifact(
        tuple(objects),
        tuple(symbols),
        code.layout,
        code.outputs,
        code.scratch_bytes,
        arena_bytes,
        {**report, "kernels": len(distinct), "load_bytes": load.total_bytes},
    )


def _kernels(step: Function, host: HostFeatures) -> dict[Function, KernelCode]:
    """The code of every kernel that a program may launch."""
    codes: dict[Function, KernelCode] = {}
    for op in walk(step.body):
        if op.name == "launch":
            for _, kernel in op.attr("variants"):
                if kernel not in codes:
                    codes[kernel] = emit_kernel(kernel, host)
    return codes
