"""Three ways to run a kernel: plain Python, the interpreter of the IR, and native code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import dure.lang as dl
from dure.ir.core import Function
from dure.ir.interpret import run
from dure.lang.launch import Runner, array_of, cpu_executor, executing
from dure.runtime.arrays import ArrayView

MODES = ("interpret", "reference", "cpu")


def reference_executor(function: Function) -> Runner:
    """Run compiled kernels on the IR's reference interpreter, instances in a drawn order."""

    def runner(views: Sequence[ArrayView], sizes: Sequence[int]) -> None:
        bound = dict(zip((s.name for s in function.symbols), sizes, strict=True))
        run(function, [array_of(v) for v in views], bound, seed=1)

    return runner


def mode(name: str) -> AbstractContextManager[None]:
    """Launches inside of the ``with`` run this way."""
    if name == "interpret":
        return dl.interpret()
    return executing(reference_executor if name == "reference" else cpu_executor)
