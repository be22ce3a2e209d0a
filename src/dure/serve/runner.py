"""What runs a step: the program's inputs in, logits out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dure.compiler.pipeline import compile_program
from dure.models.decoder import StepLimits, step_program
from dure.models.stored import StoredModel
from dure.serve.kv import Int32s
from dure.targets.cpu.program import CompiledProgram


def _library() -> object:
    """Registers the library's lowerings; a program that the cache has needs none of them."""
    import dure.library

    return dure.library


class StepRunner(Protocol):
    """A step program that is loaded and ready."""

    @property
    def threads(self) -> int:
        """Workers of a step."""
        ...

    def run(self, inputs: Mapping[str, Int32s]) -> npt.NDArray[np.float32]:
        """One step; gives the logits (rows, vocabulary), a view that the next step overwrites."""
        ...

    def close(self) -> None:
        """Free weights, pools and code."""
        ...


class CompiledStep:
    """A step program compiled for the host CPU."""

    def __init__(self, program: CompiledProgram) -> None:
        self._program: CompiledProgram | None = program
        self.threads = program.workers

    @staticmethod
    def load(
        model: StoredModel,
        limits: StepLimits,
        threads: int | None,
        *,
        kv_dtype: str,
        recorded: bool = False,
    ) -> CompiledStep:
        """Compile the model's step, lay its weights out and make room for its KV pools."""
        program = compile_program(
            step_program(model.config, model.types, limits, kv_dtype),
            workers=threads,
            library=_library,
            recorded=recorded,
        )
        weights: dict[str, npt.NDArray[Any]] = {w.name: w.data for w in model.weights()}
        program.load({**weights, **model.tables(limits.positions)})
        program.allocate_states()
        return CompiledStep(program)

    @property
    def program(self) -> CompiledProgram:
        """The program that steps run."""
        assert self._program is not None, "a closed step was run"
        return self._program

    def run(self, inputs: Mapping[str, Int32s]) -> npt.NDArray[np.float32]:
        """See :class:`StepRunner`."""
        return self.program.run(inputs)["logits"]

    def close(self) -> None:
        """See :class:`StepRunner`."""
        self._program = None
