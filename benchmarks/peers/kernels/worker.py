"""A worker that runs kernels of one library with a fixed number of threads."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from peers.kernels.cases import Case, case_of
from peers.protocol import Service, Unsupported

if TYPE_CHECKING:
    from peers.kernels.operands import Floats

MOST_CALLS = 1_000_000


@dataclass(frozen=True)
class Ready:
    """A kernel with its arrays: ``run`` is what is timed, ``result`` what it made, in float32."""

    run: Callable[[], object]
    result: Callable[[], Floats]


class KernelWorker(Service):
    """Every measurement makes its arrays afresh, and runs the kernel once before it is timed."""

    @abstractmethod
    def load(self, threads: int, **options: Any) -> dict[str, str]:
        """Import the library for so many threads; its versions."""

    @abstractmethod
    def ready(self, case: Case, seed: int) -> Ready:
        """The kernel on its operands, converted to the case's dtype."""

    def answer(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if op == "load":
            return {"versions": self.load(**arguments)}
        if op == "check":
            return self.check(case_of(arguments["case"]), arguments["seed"], arguments["path"])
        if op == "burst":
            return self.burst(case_of(arguments["case"]), arguments["seed"], arguments["seconds"])
        raise Unsupported(f"no operation named {op!r}")

    def check(self, case: Case, seed: int, path: str) -> dict[str, Any]:
        """Run the kernel once and write what it made to ``path``."""
        import numpy as np

        ready = self.ready(case, seed)
        ready.run()
        np.save(path, ready.result())
        return {"path": path}

    def burst(self, case: Case, seed: int, seconds: float) -> dict[str, Any]:
        """Seconds a call, over as many calls as take about ``seconds``."""
        run = self.ready(case, seed).run
        run()
        started = time.perf_counter()
        run()
        once = time.perf_counter() - started
        calls = max(1, min(MOST_CALLS, round(seconds / once)))
        started = time.perf_counter()
        for _ in repeat(None, calls):
            run()
        return {"seconds": (time.perf_counter() - started) / calls, "calls": calls}
