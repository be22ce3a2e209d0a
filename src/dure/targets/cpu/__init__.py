"""The host CPU: tile kernels to native code through LLVM."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dure.targets.cpu.codegen import KernelCode, emit_kernel
    from dure.targets.cpu.launch import CompiledKernel, compile_kernel

__all__ = ["CompiledKernel", "KernelCode", "compile_kernel", "emit_kernel"]


def __getattr__(name: str) -> object:
    from importlib import import_module

    home = {"KernelCode": "codegen", "emit_kernel": "codegen"}.get(name, "launch")
    if name not in __all__:
        raise AttributeError(f"module 'dure.targets.cpu' has no attribute '{name}'")
    return getattr(import_module(f"dure.targets.cpu.{home}"), name)
