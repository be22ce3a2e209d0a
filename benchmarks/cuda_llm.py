"""What a CUDA GPU reaches with a whole LLM's step: its own libraries' kernels, in one CUDA graph.

    python benchmarks/cuda_llm.py [--model NAME] [--json FILE]

Needs torch with CUDA; nothing of dure.  The model has the shapes of Llama 3.1 8B, or of Qwen3
30B-A3B, and random weights in bfloat16.  A decode step reads a KV cache of the context's length and
writes one position of it; a prefill step attends to its own tokens, and gives the last one's
logits.  Matrices side by side are one product (q, k and v; gate and up); a mixture's tokens are
sorted by expert and multiplied by torch's grouped product.  ``eager`` launches torch's own kernels,
``compiled`` what ``torch.compile`` makes of a layer; attention is the fastest of SDPA's backends.
Each time is the median of seven replays of the graph of the whole step, so that the host takes no
part in it; beside it stands how many kernels the step launches.  The rows are what ``dure sim MODEL
--target h100`` can be held against.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cuda_gpu import nanoseconds, written
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; ``experts`` of 0 are none, of which each token goes to ``chosen``."""

    name: str
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    size: int
    experts: int = 0
    chosen: int = 0


_MODELS = {
    "llama-3.1-8b": Shape("Llama 3.1 8B", 32, 4096, 14336, 128256, 32, 8, 128),
    "qwen3-30b-a3b": Shape("Qwen3 30B-A3B", 48, 2048, 768, 151936, 32, 4, 128, 128, 8),
}
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
#: Phase, sequences, positions of each.
_STEPS = (
    ("decode", 1, 1024), ("decode", 8, 1024), ("decode", 64, 1024), ("decode", 1, 16384),
    ("prefill", 1, 2048), ("prefill", 8, 2048),
)  # fmt: skip

Layer = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """The layers, the table of the embeddings and of the head, and the last norm's weights."""

    shape: Shape
    layers: list[Layer]
    table: torch.Tensor
    norm: torch.Tensor


def main() -> None:
    """Measure, print the rows, and write them."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=_MODELS, default="llama-3.1-8b")
    arguments.add_argument("--json", type=Path, help="where the result goes")
    chosen = arguments.parse_args()
    torch.manual_seed(0)
    shape = _MODELS[chosen.model]
    layers = [_layer(shape) for _ in range(shape.layers)]
    model = Model(shape, layers, _drawn(shape.vocabulary, shape.hidden), _drawn(shape.hidden))
    rows: list[dict[str, Any]] = []
    for phase, sequences, context in _STEPS:
        work = phase, sequences, context, model
        times = {backend: _timed(*work, "eager", backend) for backend in _BACKENDS}
        best = min(times, key=times.__getitem__)
        for how, ns in (("eager", times[best]), ("compiled", _timed(*work, "compiled", best))):
            if math.isinf(ns):
                continue
            row = {"phase": phase, "batch": sequences, "context": context, "how": how}
            with sdpa_kernel(best):
                launches = _launches(_step(phase, sequences, context, how, model))
            rows.append({**row, "attention": best.name, "ms": ns / 1e6, "launches": launches})
            print(rows[-1], flush=True)
        facts = f"the shapes of {shape.name}, random bfloat16 weights"
        written(chosen.json, rows, model=facts)


def _timed(
    phase: str, sequences: int, context: int, model: Model, how: str, backend: SDPBackend
) -> float:
    """Nanoseconds with a backend of attention; infinite where it can't."""
    try:
        with sdpa_kernel(backend):
            return nanoseconds(_step(phase, sequences, context, how, model), 1)
    except RuntimeError as error:
        print(f"{how}, {backend.name}: {str(error).splitlines()[0][:100]}", flush=True)
        return math.inf


def _launches(step: Callable[[], object]) -> int:
    """The kernels that a step launches."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = (event.name for event in profile.events() or ())
    return sum(not name.startswith(("Memcpy", "Memset", "cuda")) for name in names)


def _step(phase: str, sequences: int, context: int, how: str, model: Model) -> Callable[[], object]:
    """A step of the whole model as a call without arguments."""
    shape = model.shape
    new = 1 if phase == "decode" else context
    tokens = torch.randint(0, shape.vocabulary, (sequences, new), device="cuda")
    tables = _drawn(new, shape.size // 2), _drawn(new, shape.size // 2)
    kept = (sequences, shape.kv_heads, context, shape.size)
    caches = [(_drawn(*kept), _drawn(*kept)) for _ in model.layers] if phase == "decode" else []
    run = torch.compile(_through, dynamic=False) if how == "compiled" else _through

    def step() -> object:
        x = F.embedding(tokens, model.table)
        for number, layer in enumerate(model.layers):
            x = run(x, shape, layer, tables, caches[number] if caches else None)
        return F.linear(F.rms_norm(x[:, -1], (shape.hidden,), model.norm), model.table)

    return step


def _through(
    x: torch.Tensor,
    shape: Shape,
    layer: Layer,
    tables: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """One layer."""
    sequences, new, _ = x.shape
    found = F.linear(F.rms_norm(x, (shape.hidden,), layer["attention_norm"]), layer["qkv"])
    parts = [shape.heads, shape.kv_heads, shape.kv_heads]
    heads = found.view(sequences, new, sum(parts), shape.size).transpose(1, 2)
    q, k, v = heads.split(parts, 1)
    if "q_norm" in layer:
        q = F.rms_norm(q, (shape.size,), layer["q_norm"])
        k = F.rms_norm(k, (shape.size,), layer["k_norm"])
    q, k = _turned(q, *tables), _turned(k, *tables)
    if cache is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        keys, values = cache
        keys[:, :, -1:].copy_(k)
        values[:, :, -1:].copy_(v)
        # All query heads of a KV head see the same keys: they are so many queries of one head.
        group = q.reshape(sequences, shape.kv_heads, shape.heads // shape.kv_heads, shape.size)
        y = F.scaled_dot_product_attention(group, keys, values).reshape(q.shape)
    y = y.transpose(1, 2).reshape(sequences, new, shape.heads * shape.size)
    x = x + F.linear(y, layer["o"])
    normed = F.rms_norm(x, (shape.hidden,), layer["mlp_norm"])
    if "router" in layer:
        return x + _mixed(normed.view(-1, shape.hidden), shape, layer).view(x.shape)
    gate, up = F.linear(normed, layer["gate_up"]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, layer["down"])


def _mixed(x: torch.Tensor, shape: Shape, layer: Layer) -> torch.Tensor:
    """A mixture of experts of tokens (T, hidden)."""
    odds = torch.softmax(F.linear(x, layer["router"]).float(), -1)
    shares, experts = torch.topk(odds, shape.chosen)
    shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
    order = torch.argsort(experts.view(-1), stable=True)
    counts = torch.zeros(shape.experts, dtype=order.dtype, device=x.device)
    counts.scatter_add_(0, experts.view(-1), torch.ones_like(order))
    ends = torch.cumsum(counts, 0).to(torch.int32)
    rows = x[order // shape.chosen]
    gate, up = torch._grouped_mm(rows, layer["gate_up"].transpose(1, 2), offs=ends).chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * up, layer["down"].transpose(1, 2), offs=ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return (y[back].view(*experts.shape, -1) * shares[..., None]).sum(1)


def _turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, -1)


def _layer(shape: Shape) -> Layer:
    hidden, inner = shape.hidden, shape.inner
    many = (shape.experts,) if shape.experts else ()
    found = {
        "attention_norm": _drawn(hidden),
        "qkv": _drawn((shape.heads + 2 * shape.kv_heads) * shape.size, hidden),
        "o": _drawn(hidden, shape.heads * shape.size),
        "mlp_norm": _drawn(hidden),
        "gate_up": _drawn(*many, 2 * inner, hidden),
        "down": _drawn(*many, hidden, inner),
    }
    if many:
        norms = {"q_norm": _drawn(shape.size), "k_norm": _drawn(shape.size)}
        found |= {"router": _drawn(shape.experts, hidden), **norms}
    return found


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5


if __name__ == "__main__":
    main()
