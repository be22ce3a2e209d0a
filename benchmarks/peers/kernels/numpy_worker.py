"""NumPy's products, by the OpenBLAS that its wheel brings."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from peers.kernels.cases import Case
from peers.kernels.worker import KernelWorker, Ready
from peers.protocol import Unsupported, serve


class NumpyWorker(KernelWorker):
    """OpenBLAS finds out the processor itself: nothing forces its choice."""

    def load(self, threads: int, **options: Any) -> dict[str, str]:
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
        os.environ.pop("OPENBLAS_CORETYPE", None)
        import numpy as np

        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {
            "numpy": np.__version__,
            "blas": f"{blas['name']} {blas['version']}",
            "blas_core": _core(Path(np.__file__).parent),
        }

    def ready(self, case: Case, seed: int) -> Ready:
        import numpy as np

        from peers.kernels.operands import operands

        if case.op != "gemm" or case.dtype != "f32":
            raise Unsupported(f"NumPy is no peer of {case.name}")
        a, b = operands(case, seed)
        c = np.empty((a.shape[0], b.shape[1]), np.float32)
        return Ready(partial(np.matmul, a, b, out=c), lambda: c)


def _core(numpy: Path) -> str:
    """The processor that OpenBLAS took this one for, where the wheel's library tells it."""
    import ctypes

    for library in numpy.parent.glob("numpy.libs/libscipy_openblas64*"):
        name = ctypes.CDLL(str(library)).scipy_openblas_get_corename64_
        name.restype = ctypes.c_char_p
        return name().decode()
    return "unknown"


if __name__ == "__main__":
    serve(NumpyWorker())
