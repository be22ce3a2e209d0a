"""How many operations a second the workers do in matrix products that lie in their caches.

The yardstick of a profile's arithmetic: dure's own product of many rows, run beside what is
watched, because a machine's clock changes with what else it does.
"""

from __future__ import annotations

import time

import numpy as np

from dure.compiler.pipeline import compile_program
from dure.ir.builder import ProgramBuilder
from dure.targets.cpu.program import CompiledProgram

#: Rows, K and columns of a product.
_ROWS, _DEPTH, _COLUMNS = 64, 512, 512
#: What the weights are: of block formats, activations are quantized to int8.
_WEIGHTS = {"float32": "float32", "int8": "q8_0"}


class ProductProbe:
    """A product of each type, ready to be run in bursts."""

    def __init__(self, workers: int) -> None:
        """``workers`` of the shared pool multiply."""
        self._programs = {name: _product(kind, workers) for name, kind in _WEIGHTS.items()}
        self._x = {"x": np.ones((_ROWS, _DEPTH), np.float32)}
        self._best = dict.fromkeys(_WEIGHTS, float("inf"))
        self.burst()

    def burst(self) -> None:
        """Run each a few times; the fastest counts."""
        for name, program in self._programs.items():
            for _ in range(3):
                started = time.perf_counter()
                program.run(self._x)
                self._best[name] = min(self._best[name], time.perf_counter() - started)

    def peaks(self) -> dict[str, float]:
        """Operations a second by type."""
        return {name: 2 * _ROWS * _DEPTH * _COLUMNS / spent for name, spent in self._best.items()}


def _product(kind: str, workers: int) -> CompiledProgram:
    import dure.library

    assert dure.library
    builder = ProgramBuilder("product")
    x = builder.input("x", (_ROWS, _DEPTH))
    builder.output("y", builder.linear(x, builder.weight("w", (_COLUMNS, _DEPTH), kind)))
    program = compile_program(builder.build(), workers=workers)
    size = {"float32": 4 * _DEPTH, "q8_0": _DEPTH // 32 * 34}[kind] * _COLUMNS
    program.load({"w": np.zeros(size, np.uint8)})
    return program
