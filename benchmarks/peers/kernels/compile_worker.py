"""How long a kernel of 30 lines takes to its first result, in a process that has run another one:
what a process spends once, on imports, LLVM and the pool's start, is not counted.
"""

from __future__ import annotations

import os
import time
from typing import Any

from peers.protocol import Service, Unsupported, serve


class CompileWorker(Service):
    """``cache`` is the folder of the object cache."""

    def answer(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if op == "load":
            return {"versions": self.load(**arguments)}
        if op == "compile":
            return {"seconds": self.compile(**arguments)}
        raise Unsupported(f"no operation named {op!r}")

    def load(self, threads: int, cache: str) -> dict[str, str]:
        """Import everything and launch a small kernel."""
        os.environ["DURE_THREADS"] = str(threads)
        os.environ["DURE_CACHE_DIR"] = cache
        import numpy as np

        import dure
        from peers.kernels.dure_launches import add

        one, two, three = (np.ones(64, np.float32) for _ in range(3))
        add(one, two, three)
        return {"dure": dure.__version__}

    def compile(self, open_tiles: bool) -> float:
        """Seconds of the first launch; ``open_tiles`` leaves the tile sizes to dure."""
        import numpy as np

        from peers.kernels.compile_kernel import gated_residual

        rows, depth, columns = 16, 64, 32
        x, weight = np.ones((rows, depth), np.float32), np.ones(depth, np.float32)
        gate = np.ones((columns, depth), np.float32)
        residual = np.ones((rows, columns), np.float32)
        y = np.empty_like(residual)
        tiles = {} if open_tiles else {"bm": 16, "bn": 32, "bk": 32}
        started = time.perf_counter()
        gated_residual(x, gate, gate.copy(), weight, residual, y, **tiles)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(CompileWorker())
