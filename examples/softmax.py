"""Softmax of rows of any length, in one pass over memory for the maximum and the sum together."""

from __future__ import annotations

import numpy as np

import dure
import dure.lang as dl

LOWEST = -1.0e30


@dure.kernel
def softmax(x: dl.Tensor, y: dl.Tensor, bm: dl.const = 8, bn: dl.const = 64):
    """``y = exp(x - max(x)) / sum(exp(x - max(x)))`` along the rows of x (M, N)."""
    i = dl.program_id(0)
    top = dl.full((bm, 1), LOWEST, dl.float32)
    total = dl.zeros((bm, 1), dl.float32)
    for j in dl.range(dl.cdiv(x.shape[1], bn)):
        part = dl.load(x, (i, j), (bm, bn), fill=float("-inf")).to(dl.float32)
        higher = dl.maximum(top, dl.max(part, 1, keepdims=True))
        total = total * dl.exp(top - higher) + dl.sum(dl.exp(part - higher), 1, keepdims=True)
        top = higher
    for j in dl.range(dl.cdiv(x.shape[1], bn)):
        part = dl.load(x, (i, j), (bm, bn)).to(dl.float32)
        dl.store(y, (i, j), (dl.exp(part - top) / total).to(y.dtype))


def main() -> None:
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (100, 1000), (33, 77)):
        x = rng.standard_normal((rows, columns), dtype=np.float32) * 10
        y = np.empty_like(x)
        softmax(x, y)
        powers = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        expected = powers / powers.sum(1, keepdims=True)
        print(f"{rows} x {columns}: largest difference {np.abs(y - expected).max():.1e}")
        assert np.allclose(y, expected, atol=1e-6)
    print("softmax agrees with NumPy")


if __name__ == "__main__":
    main()
