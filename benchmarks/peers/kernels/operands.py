"""The operands of a case, the same in every process, and what a kernel makes of them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from peers.kernels.cases import BLOCK, BLOCK_BYTES, Case

Floats: TypeAlias = "npt.NDArray[np.float32]"
Bytes: TypeAlias = "npt.NDArray[np.uint8]"

EPSILON = 1e-5
_SQRT_2_OVER_PI = 0.7978845608028654


def operands(case: Case, seed: int) -> list[Floats]:
    """Random float32 numbers, for bf16 those that it can hold."""
    random = np.random.default_rng(seed)
    made = [random.standard_normal(shape, dtype=np.float32) for shape in case.shapes]
    return [_rounded(x) for x in made] if case.dtype == "bf16" else made


def weights(case: Case, seed: int) -> list[Bytes]:
    """The matrices of a ``gemv``: blocks of GGUF with random codes and scales."""
    copies, n, k = case.sizes
    random = np.random.default_rng(seed + 1)
    blocks = random.integers(0, 256, (copies, n * k // BLOCK, BLOCK_BYTES[case.dtype]), np.uint8)
    scales = random.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
    blocks[..., :2] = scales[..., None].view(np.uint8)
    return [matrix.reshape(-1) for matrix in blocks]


def _rounded(x: Floats) -> Floats:
    """To the nearest bfloat16, ties to even, kept in float32."""
    bits = x.view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def reference(case: Case, seed: int) -> npt.NDArray[Any]:
    """What the kernel is to give, by NumPy."""
    arrays = operands(case, seed)
    if case.op == "gemv":
        return np.stack([arrays[0] @ m.T for m in _dequantized(case, seed)])
    return _REFERENCES[case.op](*arrays)


def difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The largest difference as a part of the largest magnitude; infinite where it isn't one."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _dequantized(case: Case, seed: int) -> Any:
    """Each matrix in float32, by the format's published layout."""
    _, n, k = case.sizes
    for matrix in weights(case, seed):
        blocks = matrix.reshape(-1, BLOCK_BYTES[case.dtype])
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        packed = blocks[:, 2:]
        if case.dtype == "q8_0":
            codes = packed.view(np.int8).astype(np.float32)
        else:
            codes = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32) - 8
        yield (codes * scales).reshape(n, k)


def _attention(q: Floats, k: Floats, v: Floats) -> Floats:
    scores = q @ k.transpose(0, 2, 1) * np.float32(q.shape[2] ** -0.5)
    past = k.shape[1] - q.shape[1]
    later = np.triu(np.ones(scores.shape[1:], bool), past + 1)
    return _softmax(np.where(later, np.float32(-np.inf), scores)) @ v


def _softmax(x: Floats) -> Floats:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _rms_norm(x: Floats, weight: Floats) -> Floats:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def _layer_norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    apart = x - x.mean(-1, keepdims=True)
    variance = (apart * apart).mean(-1, keepdims=True)
    return apart / np.sqrt(variance + EPSILON) * weight + bias


def _gelu_chain(x: Floats, a: Floats, b: Floats, c: Floats) -> Floats:
    z = x * a + b
    return 0.5 * z * (1 + np.tanh(_SQRT_2_OVER_PI * (z + 0.044715 * z * z * z))) * c


def _conv2d(x: Floats, w: Floats) -> Floats:
    """Of odd taps, as large as its input; x (N, H, W, C), w (O, KH, KW, C)."""
    _, height, width, _ = x.shape
    out, taps = w.shape[:2]
    pad = taps // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    total = np.zeros((*x.shape[:3], out), np.float32)
    for i in range(taps):
        for j in range(taps):
            total += padded[:, i : i + height, j : j + width] @ w[:, i, j].T
    return total


_REFERENCES: dict[str, Any] = {
    "gemm": np.matmul,
    "attention": _attention,
    "softmax": _softmax,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "gelu_chain": _gelu_chain,
    "conv2d": _conv2d,
    "launch": np.add,
}
