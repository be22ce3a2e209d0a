"""A matrix product with its epilogue passed in: bias, activation and residual, fused."""

from __future__ import annotations

from typing import Any

import numpy as np

import dure
import dure.lang as dl


@dure.kernel
def linear(
    x: dl.Tensor,
    w: dl.Tensor,
    y: dl.Tensor,
    *extras: dl.Tensor,
    epilogue: dl.const,
    bm: dl.const = 32,
    bn: dl.const = 32,
    bk: dl.const = 64,
):
    """``y = epilogue(x @ w.T)`` for x (M, K) and w (N, K)."""
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[1], bk)):
        acc += dl.load(x, (i, k), (bm, bk)) @ dl.load(w, (j, k), (bn, bk)).T
    dl.store(y, (i, j), epilogue(acc, extras, i, j).to(y.dtype))


def bias_silu_residual(acc: Any, extras: Any, i: Any, j: Any) -> Any:
    """Inlined into the kernel: no tile leaves the core between the steps."""
    bias, residual = extras
    z = acc + dl.load(bias, (j,), (acc.shape[1],))[None, :]
    return z * dl.sigmoid(z) + dl.load(residual, (i, j), acc.shape)


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((70, 100), dtype=np.float32)
    w = rng.standard_normal((50, 100), dtype=np.float32)
    bias = rng.standard_normal(50, dtype=np.float32)
    residual = rng.standard_normal((70, 50), dtype=np.float32)
    y = np.empty((70, 50), np.float32)

    linear(x, w, y, bias, residual, epilogue=bias_silu_residual)
    z = x @ w.T + bias
    expected = z / (1 + np.exp(-z)) + residual
    print("largest difference from NumPy:", np.abs(y - expected).max())
    assert np.allclose(y, expected, atol=1e-4)

    linear(x, w, y, epilogue=lambda acc, extras, i, j: dl.maximum(acc, 0.0))
    assert np.allclose(y, np.maximum(x @ w.T, 0), atol=1e-4)
    print("both epilogues agree with NumPy")


if __name__ == "__main__":
    main()
