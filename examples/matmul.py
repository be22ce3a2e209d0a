"""A matrix product in ten lines, with an activation that is passed in.

python examples/matmul.py
"""

from __future__ import annotations

import numpy as np

import dure
import dure.lang as dl


def silu(x):
    """A function as a constant: it is inlined where the kernel stores."""
    return x * dl.sigmoid(x)


@dure.kernel
def matmul(
    a: dl.Tensor,
    b: dl.Tensor,
    c: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    epilogue: dl.const,
):
    """c = epilogue(a @ b), for a (M, K), b (K, N), c (M, N)."""
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(a.shape[1], bk)):
        acc += dl.load(a, (i, k), (bm, bk)) @ dl.load(b, (k, j), (bk, bn))
    dl.store(c, (i, j), epilogue(acc).to(c.dtype))


def main() -> None:
    """Compile, launch, and compare with NumPy; then the same source under plain Python."""
    random = np.random.default_rng(0)
    a = random.normal(size=(250, 130)).astype(np.float32)
    b = random.normal(size=(130, 70)).astype(np.float32)
    c = np.zeros((250, 70), np.float32)
    # The grid follows from the stores; edge tiles are cut.
    matmul(a, b, c, bm=64, bn=64, bk=32, epilogue=silu)
    product = a.astype(np.float64) @ b
    expected = product / (1 + np.exp(-product))
    print(f"compiled:    largest difference from float64 {np.abs(c - expected).max():.2e}")
    assert np.allclose(c, expected, atol=1e-4)

    with dl.interpret():
        c[:] = 0
        matmul(a, b, c, bm=64, bn=64, bk=32, epilogue=silu)
    print(f"interpreted: largest difference from float64 {np.abs(c - expected).max():.2e}")
    assert np.allclose(c, expected, atol=1e-4)


if __name__ == "__main__":
    main()
