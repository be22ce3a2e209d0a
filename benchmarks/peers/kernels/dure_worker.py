"""dure's kernels, launched on NumPy arrays as its users do: tile sizes and grid are dure's choice.

A launch takes no block-quantized array, so that these go through a tensor program, as the LLM
engine's do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from peers.kernels.cases import Case
from peers.kernels.worker import KernelWorker, Ready
from peers.protocol import serve

if TYPE_CHECKING:
    from dure.targets.cpu.program import CompiledProgram


class DureWorker(KernelWorker):
    """``cache`` is a folder of this run's own: no tile size is remembered from elsewhere."""

    def load(self, threads: int, *, cache: str = "", **options: Any) -> dict[str, str]:
        os.environ["DURE_THREADS"] = str(threads)
        os.environ["DURE_CACHE_DIR"] = cache
        import ml_dtypes
        import numpy as np

        import dure
        from peers.kernels import dure_launches

        self.dtypes: dict[str, Any] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
        self.launches = dure_launches.LAUNCHES
        return {"dure": dure.__version__, "numpy": np.__version__}

    def ready(self, case: Case, seed: int) -> Ready:
        import numpy as np

        from peers.kernels.operands import operands

        arrays = operands(case, seed)
        if case.op == "gemv":
            return _streamed(case, seed, arrays[0])
        arrays = [x.astype(self.dtypes[case.dtype], copy=False) for x in arrays]
        run, y = self.launches[case.op](*arrays)
        return Ready(run, lambda: y.astype(np.float32))


def _streamed(case: Case, seed: int, x: Any) -> Ready:
    """One vector by as many matrices as no cache holds, in one program."""
    import numpy as np

    from peers.kernels.operands import weights

    program = _products(case)
    program.load({f"w{i}": matrix for i, matrix in enumerate(weights(case, seed))})
    run: Callable[[], Any] = partial(program.run, {"x": x})
    names = [f"y{i}" for i in range(case.sizes[0])]
    return Ready(run, lambda: _stacked(np, run(), names))


def _stacked(np: Any, outputs: Any, names: list[str]) -> Any:
    return np.stack([np.array(outputs[name]) for name in names])


def _products(case: Case) -> CompiledProgram:
    import dure.library
    from dure.compiler.pipeline import compile_program
    from dure.ir.builder import ProgramBuilder

    assert dure.library
    copies, n, k = case.sizes
    builder = ProgramBuilder("products")
    x = builder.input("x", (1, k))
    for i in range(copies):
        builder.output(f"y{i}", builder.linear(x, builder.weight(f"w{i}", (n, k), case.dtype)))
    return compile_program(builder.build())


if __name__ == "__main__":
    serve(DureWorker())
