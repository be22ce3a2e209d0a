"""PyTorch's kernels, one by one or compiled by ``torch.compile``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from peers.kernels.cases import Case
from peers.kernels.worker import KernelWorker, Ready
from peers.protocol import serve

_COMPILERS = ("g++", "clang++", "c++")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""glibc's numbers for ``mallopt``."""


class TorchWorker(KernelWorker):
    """Operands are tensors of the case's dtype; convolutions are channels-last, as dure's are."""

    def load(
        self, threads: int, *, cache: str = "", compiled: bool = False, **options: Any
    ) -> dict[str, str]:
        # Compiled in this process: no others are left behind that nobody stops.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        if compiled and not any(map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))):
            raise ImportError("torch.compile needs a C++ compiler")
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        _keep_memory()
        self.torch, self.compiled = torch, compiled
        self.functions = _functions()
        if compiled:
            compile = partial(torch.compile, dynamic=False)
            self.functions = {name: compile(f) for name, f in self.functions.items()}
        return {"torch": torch.__version__}

    def ready(self, case: Case, seed: int) -> Ready:
        from peers.kernels.operands import operands

        torch = self.torch
        kind = {"f32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
        tensors = [torch.from_numpy(x).to(kind) for x in operands(case, seed)]
        if case.op == "conv2d":
            tensors = [x.permute(0, 3, 1, 2) for x in tensors]
        elif case.op == "attention":
            tensors = [x[None] for x in tensors]
        run = partial(self.functions[case.op], *tensors)
        return Ready(run, lambda: _result(case, run()))


def _result(case: Case, y: Any) -> Any:
    if case.op == "conv2d":
        y = y.permute(0, 2, 3, 1)
    elif case.op == "attention":
        y = y[0]
    return y.float().contiguous().numpy()


def _functions() -> dict[str, Callable[..., Any]]:
    import torch
    import torch.nn.functional as F

    from peers.kernels.operands import EPSILON

    def attention(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)

    def softmax(x: Any) -> Any:
        return torch.softmax(x, -1)

    def rms_norm(x: Any, weight: Any) -> Any:
        return F.rms_norm(x, (x.shape[-1],), weight, EPSILON)

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, EPSILON)

    def gelu_chain(x: Any, a: Any, b: Any, c: Any) -> Any:
        return F.gelu(x * a + b, approximate="tanh") * c

    def conv2d(x: Any, w: Any) -> Any:
        return F.conv2d(x, w, padding=w.shape[2] // 2)

    functions = (attention, softmax, rms_norm, layer_norm, gelu_chain, conv2d)
    return {"gemm": torch.mm, **{f.__name__: f for f in functions}}


def _keep_memory() -> None:
    """Have the C library keep freed memory, so that no result is charged for its pages' faults.

    dure writes into an array that is there.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


if __name__ == "__main__":
    serve(TorchWorker())
