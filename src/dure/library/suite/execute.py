"""Runs a case's tile function on the CPU: compiled, or by the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dure.ir.blocks import Blocks
from dure.ir.core import Function
from dure.ir.interpret import bind_sizes
from dure.ir.interpret import run as run_interpreter
from dure.ir.pack import pack, unpack
from dure.ir.types import default_layout
from dure.library.suite.case import Argument
from dure.targets.cpu.launch import compile_kernel

#: Bytes behind each argument that are no part of it: reading them must not matter.
_BEHIND = 64


def interpret(function: Function, arguments: Sequence[Argument], seed: int = 0) -> None:
    """Interpret a function on its arguments, which it writes in place; the order is random."""
    run_interpreter(function, [a for a in arguments if a is not None], seed=seed)


def compile_and_run(function: Function, arguments: Sequence[Argument]) -> None:
    """Compile a function for the CPU and run it on its arguments, which it writes in place."""
    present = [a for a in arguments if a is not None]
    kinds = [p.value.tensor for p in function.params]
    stored: list[np.ndarray[Any, Any]] = []
    for kind, array in zip(kinds, present, strict=True):
        packed = pack(array, default_layout(kind), kind.dtype)
        buffer = np.full(len(packed) + _BEHIND, 0xFF, np.uint8)
        buffer[: len(packed)] = packed
        stored.append(buffer)
    sizes = bind_sizes(function, present)
    code = compile_kernel(function)
    code.run([b.ctypes.data for b in stored], [sizes[s.name] for s in function.symbols])
    for param, kind, array, buffer in zip(function.params, kinds, present, stored, strict=True):
        if param.access == "in":
            continue
        found = unpack(buffer, default_layout(kind), kind.dtype, array.shape, -1)
        if isinstance(array, Blocks):
            assert isinstance(found, Blocks)
            for name, plane in found.planes.items():
                array.planes[name][...] = plane
        else:
            array[...] = found
