"""What a CUDA GPU reaches with its own libraries: products, streams of weights, attention, products
of a mixture of experts.

    python benchmarks/cuda_gpu.py [--json FILE]

Needs torch with CUDA; nothing of dure.  Each time is the median of seven replays of a CUDA graph
that holds some launches, so that the host takes no part in it; streams go round weights of 1.5 GB,
which no cache holds.  The rows are what `dure sim` of the same dims on `h100` can be held against:
products that are bound by arithmetic on an H100 or H200 (one die, one clock), streams as a part of
each one's published bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_PRODUCTS = (
    *((n, n, n) for n in (512, 1024, 2048, 4096, 8192)),
    (2048, 6144, 4096), (2048, 4096, 4096), (2048, 28672, 4096), (2048, 4096, 14336),
    (4096, 4096, 28672), (128, 4096, 4096), (64, 8192, 8192),
)  # fmt: skip
_STREAMS = ((4096, 4096), (8192, 8192), (28672, 8192), (16384, 16384))
_ATTENTION = ((1, 32, 8, 2048, 128), (8, 32, 8, 2048, 128), (1, 32, 32, 4096, 128))
#: Rows, experts, K, N: rows are dealt out to experts at random, each as likely.
_GROUPED = (
    (16384, 128, 2048, 768), (16384, 128, 768, 2048), (4096, 8, 4096, 14336),
    (8192, 128, 2880, 2880), (512, 128, 2048, 768),
)  # fmt: skip
_STREAMED = 1.5e9


def main() -> None:
    """Measure, print the rows, and write them."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, help="where the result goes")
    chosen = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for row in (*_products(), *_grouped(), *_streams(), *_attention(), *_others()):
        rows.append(row)
        print(row, flush=True)
    written(chosen.json, rows)


def written(path: Path | None, rows: list[dict[str, Any]], **facts: str) -> None:
    """Write rows, with the device and the versions, where there is a path."""
    if path is None:
        return
    device = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__}
    result = {**device, "cuda": torch.version.cuda, **facts, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def nanoseconds(run: Callable[[], object], times: int = 20) -> float:
    """Nanoseconds of one run of some in a CUDA graph, the median of seven replays."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    found: list[float] = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e6 / times)
    return statistics.median(found[1:])


def _drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _products() -> Iterator[dict[str, Any]]:
    for m, n, k in _PRODUCTS:
        yield _product((m, n, k), "bf16", nanoseconds(_multiplied(_drawn(m, k), [_drawn(n, k)])))
    for size in (4096, 8192):
        x, w = (_drawn(size, size, dtype=torch.float8_e4m3fn) for _ in range(2))
        yield _product((size, size, size), "fp8", nanoseconds(_multiplied_scaled(x, w)))


def _multiplied(x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], object]:
    y = torch.empty(x.shape[0], weights[0].shape[0], device="cuda", dtype=x.dtype)

    def run() -> None:
        for w in weights:
            torch.mm(x, w.t(), out=y)

    return run


def _multiplied_scaled(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)


def _product(sizes: tuple[int, int, int], dtype: str, ns: float) -> dict[str, Any]:
    m, n, k = sizes
    row = {"op": "gemm", "dims": f"{m}x{n}x{k}", "dtype": dtype, "ns": ns}
    return {**row, "tflops": 2 * m * n * k / ns / 1e3}


def _grouped() -> Iterator[dict[str, Any]]:
    for rows, experts, k, n in _GROUPED:
        owners = torch.randint(0, experts, (rows,), device="cuda")
        ends = torch.cumsum(torch.bincount(owners, minlength=experts), 0).to(torch.int32)
        # As many layers' weights as no cache holds.
        layers = max(2, int(_STREAMED / (experts * n * k * 2)))
        weights = [_drawn(experts, n, k).transpose(1, 2) for _ in range(layers)]
        ns = nanoseconds(_multiplied_by_group(_drawn(rows, k), weights, ends), 2) / layers
        row = {"op": "grouped product", "dims": f"{rows}x{experts}x{k}x{n}", "dtype": "bf16"}
        yield {**row, "ns": ns, "tflops": 2 * rows * n * k / ns / 1e3}
        weights.clear()


def _multiplied_by_group(
    x: torch.Tensor, weights: list[torch.Tensor], ends: torch.Tensor
) -> Callable[[], object]:
    def run() -> None:
        for w in weights:
            torch._grouped_mm(x, w, offs=ends)

    return run


def _streams() -> Iterator[dict[str, Any]]:
    for n, k in _STREAMS:
        weights = [_drawn(n, k) for _ in range(max(2, int(_STREAMED / (n * k * 2))))]
        ns = nanoseconds(_multiplied(_drawn(1, k), weights), 2) / len(weights)
        row = {"op": "gemm", "dims": f"1x{n}x{k}", "dtype": "bf16", "ns": ns}
        yield {**row, "gb_s": n * k * 2 / ns}
        weights.clear()


def _attention() -> Iterator[dict[str, Any]]:
    for batch, heads, groups, length, size in _ATTENTION:
        q = _drawn(batch, heads, length, size)
        k, v = (_drawn(batch, groups, length, size) for _ in range(2))
        ns = nanoseconds(_attended(q, k, v), 5)
        row = {"op": "causal attention", "dims": f"{batch}x{heads}x{groups}x{length}x{size}"}
        flops = 2 * batch * heads * length * length * size
        yield {**row, "dtype": "bf16", "ns": ns, "tflops": flops / ns / 1e3}


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    wide = q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=wide)


def _others() -> Iterator[dict[str, Any]]:
    large = torch.empty(2**30, device="cuda")
    ns = nanoseconds(lambda: torch.sum(large), 2)
    yield {"op": "read", "dims": "4 GiB", "dtype": "f32", "ns": ns, "gb_s": 4 * 2**30 / ns}
    x, w = _drawn(2048, 4096), _drawn(4096)
    ns = nanoseconds(lambda: F.rms_norm(x, (4096,), w))
    yield {"op": "rmsnorm", "dims": "2048x4096", "dtype": "bf16", "ns": ns}
    one = torch.zeros(1, device="cuda")
    yield {
        "op": "a launch in a graph",
        "dims": "1",
        "dtype": "f32",
        "ns": nanoseconds(lambda: one.add_(1)),
    }


if __name__ == "__main__":
    main()
