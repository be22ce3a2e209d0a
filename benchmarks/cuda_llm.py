"""What a CUDA GPU reaches with a whole LLM's step: its own libraries' kernels, in one CUDA graph.

    python benchmarks/cuda_llm.py [--json FILE]

Needs torch with CUDA; nothing of dure.  The model has the shapes of Llama 3.1 8B and random weights
in bfloat16.  A decode step reads a KV cache of the context's length and writes one position of it;
a prefill step attends to its own tokens, and gives the last one's logits.  Matrices side by side
are one product (q, k and v; gate and up).  ``eager`` launches torch's own kernels, ``compiled``
what ``torch.compile`` makes of a layer; attention is the fastest of SDPA's backends.  Each time is
the median of seven replays of the graph of the whole step, so that the host takes no part in it.
The rows are what ``dure sim llama-3.1-8b --target h100`` can be held against.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cuda_gpu import nanoseconds, written
from torch.nn.attention import SDPBackend, sdpa_kernel

_LAYERS, _HIDDEN, _INNER, _VOCABULARY = 32, 4096, 14336, 128256
_HEADS, _KV_HEADS, _SIZE = 32, 8, 128
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
#: Phase, sequences, positions of each.
_STEPS = (
    ("decode", 1, 1024), ("decode", 8, 1024), ("decode", 64, 1024), ("decode", 1, 16384),
    ("prefill", 1, 2048), ("prefill", 8, 2048),
)  # fmt: skip

Layer = dict[str, torch.Tensor]
#: The layers, the table of the embeddings and of the head, and the last norm's weights.
Model = tuple[list[Layer], torch.Tensor, torch.Tensor]


def main() -> None:
    """Measure, print the rows, and write them."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, help="where the result goes")
    chosen = arguments.parse_args()
    torch.manual_seed(0)
    layers = [_layer() for _ in range(_LAYERS)]
    table, norm = _drawn(_VOCABULARY, _HIDDEN), _drawn(_HIDDEN)
    rows: list[dict[str, Any]] = []
    for phase, sequences, context in _STEPS:
        work = phase, sequences, context, (layers, table, norm)
        times = {backend: _timed(*work, "eager", backend) for backend in _BACKENDS}
        best = min(times, key=times.__getitem__)
        for how, ns in (("eager", times[best]), ("compiled", _timed(*work, "compiled", best))):
            if math.isinf(ns):
                continue
            row = {"phase": phase, "batch": sequences, "context": context, "how": how}
            rows.append({**row, "attention": best.name, "ms": ns / 1e6})
            print(rows[-1], flush=True)
    written(chosen.json, rows, model="the shapes of Llama 3.1 8B, random bfloat16 weights")


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


def _step(phase: str, sequences: int, context: int, how: str, model: Model) -> Callable[[], object]:
    """A step of the whole model as a call without arguments."""
    layers, table, norm = model
    new = 1 if phase == "decode" else context
    tokens = torch.randint(0, _VOCABULARY, (sequences, new), device="cuda")
    cosines, sines = (_drawn(new, _SIZE // 2) for _ in range(2))
    shape = (sequences, _KV_HEADS, context, _SIZE)
    caches = [(_drawn(*shape), _drawn(*shape)) for _ in layers] if phase == "decode" else []
    run = torch.compile(_through, dynamic=False) if how == "compiled" else _through

    def step() -> object:
        x = F.embedding(tokens, table)
        for number, layer in enumerate(layers):
            cache = caches[number] if caches else None
            x = run(x, layer, cosines, sines, cache)
        return F.linear(F.rms_norm(x[:, -1], (_HIDDEN,), norm), table)

    return step


def _through(
    x: torch.Tensor,
    layer: Layer,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """One layer."""
    sequences, new, _ = x.shape
    found = F.linear(F.rms_norm(x, (_HIDDEN,), layer["attention_norm"]), layer["qkv"])
    heads = found.view(sequences, new, _HEADS + 2 * _KV_HEADS, _SIZE).transpose(1, 2)
    q, k, v = heads.split([_HEADS, _KV_HEADS, _KV_HEADS], 1)
    q, k = _turned(q, cosines, sines), _turned(k, cosines, sines)
    if cache is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        keys, values = cache
        keys[:, :, -1:].copy_(k)
        values[:, :, -1:].copy_(v)
        # All query heads of a KV head see the same keys: they are so many queries of one head.
        group = q.reshape(sequences, _KV_HEADS, _HEADS // _KV_HEADS, _SIZE)
        y = F.scaled_dot_product_attention(group, keys, values).reshape(q.shape)
    x = x + F.linear(y.transpose(1, 2).reshape(sequences, new, _HEADS * _SIZE), layer["o"])
    gate, up = F.linear(F.rms_norm(x, (_HIDDEN,), layer["mlp_norm"]), layer["gate_up"]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, layer["down"])


def _turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, -1)


def _layer() -> Layer:
    return {
        "attention_norm": _drawn(_HIDDEN),
        "qkv": _drawn((_HEADS + 2 * _KV_HEADS) * _SIZE, _HIDDEN),
        "o": _drawn(_HIDDEN, _HEADS * _SIZE),
        "mlp_norm": _drawn(_HIDDEN),
        "gate_up": _drawn(2 * _INNER, _HIDDEN),
        "down": _drawn(_HIDDEN, _INNER),
    }


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5


if __name__ == "__main__":
    main()
