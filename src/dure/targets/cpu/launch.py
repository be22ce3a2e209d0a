"""Compiled kernels: native code that is ready to run on the pool's workers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from dure.ir.core import Function
from dure.runtime.cache import compile_cached
from dure.runtime.host import HostFeatures, host_features
from dure.runtime.llvm import LoadedModule, OptLevel, load_object
from dure.runtime.memory import Buffer
from dure.runtime.pool import Pool, shared_pool
from dure.targets.cpu.codegen import KernelCode, emit_kernel, module_text

#: The step that runs one kernel: its context holds args, sizes, arena and the arena's bytes a
#: worker.
_STEP = """
define void @dure_step(ptr %context, i64 %worker, i64 %workers, ptr %pool) {{
  %args = load ptr, ptr %context
  %p1 = getelementptr i8, ptr %context, i64 8
  %sizes = load ptr, ptr %p1
  %p2 = getelementptr i8, ptr %context, i64 16
  %arena = load ptr, ptr %p2
  %shift = mul i64 %worker, {arena}
  %mine = getelementptr i8, ptr %arena, i64 %shift
  call void @{symbol}(ptr %args, ptr %sizes, i64 %worker, i64 %workers, ptr %mine)
  ret void
}}
"""


@dataclass
class CompiledKernel:
    """A kernel in executable memory.  Its scratch belongs to one launch at a time."""

    code: KernelCode
    module: LoadedModule
    pool: Pool
    arena: Buffer
    step: int

    def run(
        self, addresses: Sequence[int], sizes: Sequence[int], workers: int | None = None
    ) -> None:
        """Run the whole grid on the tensors at ``addresses``.

        ``sizes`` are the values of the kernel's symbols, in order.  Returns when all is written.
        """
        arguments = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        numbers = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
        context = (ctypes.c_void_p * 3)(
            ctypes.addressof(arguments), ctypes.addressof(numbers), self.arena.address
        )
        self.pool.run(self.step, ctypes.addressof(context), workers)


def compile_kernel(
    function: Function,
    host: HostFeatures | None = None,
    pool: Pool | None = None,
    *,
    opt: OptLevel = OptLevel.O1,
) -> CompiledKernel:
    """Compile a tile kernel for this host (or a lower level of it).

    Raises :class:`dure.errors.KernelError` where it cannot be compiled.
    """
    host = host or host_features()
    pool = pool or shared_pool()
    code = emit_kernel(function, host)
    stride = -(-max(64, code.arena_bytes) // 64) * 64
    text = module_text([code], _STEP.format(symbol=code.symbol, arena=stride))
    module = load_object(compile_cached(text, host, opt))
    arena = Buffer(stride * pool.workers)
    return CompiledKernel(code, module, pool, arena, module.address("dure_step"))
