"""Tiny random models of every family as GGUF files, and what they compute, in float64.

The reference is written from the models' published descriptions and shares no code with dure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tiny:
    """A model's sizes; everything else follows from the family."""

    family: str
    hidden: int = 64
    intermediate: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocabulary: int = 80
    context: int = 256
    tied: bool = True
    window: int = 0
    weight_type: str = "F32"
    rope_base: float = 10000.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return self.family

    @property
    def interleaved(self) -> bool:
        return self.family == "llama"

    def layer_window(self, layer: int) -> int:
        if self.family == "gemma3":
            return 0 if layer % 6 == 5 else self.window
        return self.window


def write_model(model: Tiny, path: Path, seed: int = 0) -> dict[str, Floats]:
    """Write the GGUF; gives its weights as they are stored (dequantized), in float64."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_vocab_size(model.vocabulary)
    if model.window:
        writer.add_sliding_window(model.window)
    for key, value in model.extra.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    weights: dict[str, Floats] = {}
    for name, shape in shapes(model).items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            values *= np.float32(1.0 / np.sqrt(shape[1]))
            kind = gguf.GGMLQuantizationType[model.weight_type]
        else:
            values = 1 + values * np.float32(0.1) if "norm" in name else values * np.float32(0.1)
            kind = gguf.GGMLQuantizationType.F32
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if len(shape) == 2 and shape[1] % block:
            kind = gguf.GGMLQuantizationType.F32
        raw = gguf.quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        weights[name] = gguf.dequantize(raw, kind).reshape(shape).astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def shapes(model: Tiny) -> dict[str, tuple[int, ...]]:
    """The tensors of the file."""
    d, q, kv = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (model.vocabulary, d)}
    for i in range(model.layers):
        p = f"blk.{i}."
        found |= {p + "attn_norm.weight": (d,), p + "ffn_norm.weight": (d,)}
        found |= {p + "attn_q.weight": (q, d), p + "attn_k.weight": (kv, d)}
        found |= {p + "attn_v.weight": (kv, d), p + "attn_output.weight": (d, q)}
        found |= {p + "ffn_gate.weight": (model.intermediate, d)}
        found |= {p + "ffn_up.weight": (model.intermediate, d)}
        found |= {p + "ffn_down.weight": (d, model.intermediate)}
        if model.family == "qwen2":
            found |= {p + "attn_q.bias": (q,), p + "attn_k.bias": (kv,), p + "attn_v.bias": (kv,)}
        if model.family in ("qwen3", "gemma3"):
            found |= {p + "attn_q_norm.weight": (model.head_dim,)}
            found |= {p + "attn_k_norm.weight": (model.head_dim,)}
        if model.family == "gemma3":
            found |= {p + "post_attention_norm.weight": (d,), p + "post_ffw_norm.weight": (d,)}
    found["output_norm.weight"] = (d,)
    if not model.tied:
        found["output.weight"] = (model.vocabulary, d)
    return found


def reference_logits(model: Tiny, weights: dict[str, Floats], ids: list[int]) -> Floats:
    """Logits (n, vocabulary) of every position, in float64."""
    gemma = model.family == "gemma3"
    x = weights["token_embd.weight"][ids] * (np.sqrt(model.hidden) if gemma else 1.0)
    for i in range(model.layers):
        w = {
            name.removeprefix(f"blk.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"blk.{i}.")
        }
        mixed = _attention(model, w, _norm(x, w["attn_norm.weight"]), i)
        x = x + (_norm(mixed, w["post_attention_norm.weight"]) if gemma else mixed)
        y = _norm(x, w["ffn_norm.weight"])
        gate = y @ w["ffn_gate.weight"].T
        act = _gelu(gate) if gemma else gate / (1 + np.exp(-gate))
        mixed = (act * (y @ w["ffn_up.weight"].T)) @ w["ffn_down.weight"].T
        x = x + (_norm(mixed, w["post_ffw_norm.weight"]) if gemma else mixed)
    head = weights.get("output.weight", weights["token_embd.weight"])
    return _norm(x, weights["output_norm.weight"]) @ head.T


def _norm(x: Floats, weight: Floats) -> Floats:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def _gelu(x: Floats) -> Floats:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attention(model: Tiny, w: dict[str, Floats], x: Floats, layer: int) -> Floats:
    count = len(x)
    parts = {}
    for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads)):
        y = x @ w[f"attn_{name}.weight"].T + w.get(f"attn_{name}.bias", 0.0)
        parts[name] = y.reshape(count, heads, model.head_dim)
    if "attn_q_norm.weight" in w:
        parts["q"] = _norm(parts["q"], w["attn_q_norm.weight"])
        parts["k"] = _norm(parts["k"], w["attn_k_norm.weight"])
    window = model.layer_window(layer)
    base = 10000.0 if model.family == "gemma3" and window else model.rope_base
    q, k = (_rope(parts[n], base, model.interleaved) for n in "qk")
    group = model.heads // model.kv_heads
    k, v = np.repeat(k, group, 1), np.repeat(parts["v"], group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(model.head_dim)
    row, column = np.arange(count)[:, None], np.arange(count)[None, :]
    seen = (column <= row) & ((column > row - window) if window else True)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", p, v).reshape(count, -1)
    return mixed @ w["attn_output.weight"].T


def _rope(x: Floats, base: float, interleaved: bool) -> Floats:
    count, _, size = x.shape
    angle = np.arange(count)[:, None] * base ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    result = np.empty_like(x)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        result[..., 0::2], result[..., 1::2] = a * cos - b * sin, b * cos + a * sin
    else:
        half = size // 2
        a, b = x[..., :half], x[..., half:]
        result[..., :half], result[..., half:] = a * cos - b * sin, b * cos + a * sin
    return result
