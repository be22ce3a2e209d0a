"""Compiled kernels: native code that is ready to run on the pool's workers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.ir.core import Function
from dure.ir.printer import print_function
from dure.runtime.cache import object_cache
from dure.runtime.host import HostFeatures, host_features
from dure.runtime.llvm import LoadedModule, OptLevel, compile_module, load_object
from dure.runtime.memory import Buffer
from dure.runtime.pool import Pool, shared_pool
from dure.targets.cpu.artifact import program_key
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

#: The same step between two stamps of the processor's counter, on a line pair of the worker's own;
#: the context's fourth word is where they lie.
_RECORDED = """
declare i64 @llvm.readcyclecounter()

define void @dure_recorded(ptr %context, i64 %worker, i64 %workers, ptr %pool) {
  %p3 = getelementptr i8, ptr %context, i64 24
  %stamps = load ptr, ptr %p3
  %shift = mul i64 %worker, 128
  %mine = getelementptr i8, ptr %stamps, i64 %shift
  %after = getelementptr i8, ptr %mine, i64 8
  %begin = call i64 @llvm.readcyclecounter()
  store i64 %begin, ptr %mine
  call void @dure_step(ptr %context, i64 %worker, i64 %workers, ptr %pool)
  %end = call i64 @llvm.readcyclecounter()
  store i64 %end, ptr %after
  ret void
}
"""
#: Words of a pair of cache lines.
_LINE = 16


@dataclass
class CompiledKernel:
    """A kernel in executable memory.  Its scratch belongs to one launch at a time.

    ``recorded`` is the step that also keeps its times in ``lines``; 0 unless compiled with it.
    """

    symbol: str
    module: LoadedModule
    pool: Pool
    arena: Buffer
    step: int
    recorded: int
    lines: Buffer

    def run(
        self, addresses: Sequence[int], sizes: Sequence[int], workers: int | None = None
    ) -> None:
        """Run the whole grid on the tensors at ``addresses``.

        ``sizes`` are the values of the kernel's symbols, in order.  Returns when all is written.
        """
        self._launch(self.step, addresses, sizes, workers)

    def record(self, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        """Like :meth:`run` on all workers, which stamp when they begin their share and end it.

        Raises :class:`UsageError` unless the kernel was compiled with ``recorded=True``.
        """
        if not self.recorded:
            raise UsageError(
                f"the kernel '{self.symbol}' keeps no times",
                rule="a kernel that records is compiled so",
                fix="compile it with recorded=True",
            )
        self._launch(self.recorded, addresses, sizes, None)

    def stamps(self) -> npt.NDArray[np.int64]:
        """Cycles of the processor's counter, (workers, 2): each worker's begin and end in the last
        launch that recorded.
        """
        return self.lines.view((self.pool.workers, _LINE), np.int64)[:, :2].copy()

    def _launch(
        self, step: int, addresses: Sequence[int], sizes: Sequence[int], workers: int | None
    ) -> None:
        arguments = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        numbers = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
        context = (ctypes.c_void_p * 4)(
            ctypes.addressof(arguments),
            ctypes.addressof(numbers),
            self.arena.address,
            self.lines.address,
        )
        self.pool.run(step, ctypes.addressof(context), workers)


def compile_kernel(
    function: Function,
    host: HostFeatures | None = None,
    pool: Pool | None = None,
    *,
    opt: OptLevel = OptLevel.O1,
    recorded: bool = False,
) -> CompiledKernel:
    """Compile a tile kernel for this host (or a lower level of it), through the object cache.

    ``recorded`` adds a second step to it, whose workers keep their times (:meth:`record`).
    Raises :class:`dure.errors.KernelError` where it cannot be compiled.
    """
    host = host or host_features()
    pool = pool or shared_pool()
    cache = object_cache()
    text = f"recorded={recorded} {opt}\n{print_function(function)}" if cache is not None else ""
    key = program_key(text, host) if cache is not None else ""
    found = cache.get(key) if cache is not None else None
    binary = _Binary.from_bytes(found) if found is not None else None
    if binary is None:
        code = emit_kernel(function, host)
        text, stride = kernel_module(code, recorded=recorded)
        binary = _Binary(code.symbol, stride, compile_module(text, host, opt))
        if cache is not None:
            cache.put(key, binary.to_bytes())
    module = load_object(binary.object_code)
    arena = Buffer(binary.stride * pool.workers)
    lines = Buffer(8 * _LINE * pool.workers, alignment=128)
    step = module.address("dure_step")
    watched = module.address("dure_recorded") if recorded else 0
    return CompiledKernel(binary.symbol, module, pool, arena, step, watched, lines)


@dataclass(frozen=True)
class _Binary:
    """What is kept of a compiled kernel: its name, a worker's bytes of scratch, and its object."""

    symbol: str
    stride: int
    object_code: bytes

    def to_bytes(self) -> bytes:
        """One block: the name and the scratch in a line, then the object."""
        return f"{self.symbol} {self.stride}\n".encode() + self.object_code

    @staticmethod
    def from_bytes(data: bytes) -> _Binary:
        head, _, object_code = data.partition(b"\n")
        symbol, stride = head.decode().split()
        return _Binary(symbol, int(stride), object_code)


def kernel_module(code: KernelCode, *, recorded: bool = False) -> tuple[str, int]:
    """LLVM IR of a kernel and the step that runs it, and the bytes of a worker's scratch.

    The step's context is addresses: of the tensors' addresses, of the sizes, of the scratch and,
    where it is ``recorded``, of the times' lines.
    """
    stride = -(-max(64, code.arena_bytes) // 64) * 64
    steps = _STEP.format(symbol=code.symbol, arena=stride) + (_RECORDED if recorded else "")
    return module_text([code], steps), stride
