"""A tiled matrix product, the hello world of tile kernels."""

from __future__ import annotations

import numpy as np

import dure
import dure.lang as dl


@dure.kernel
def matmul(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(a.shape[1], bk)):
        acc += dl.load(a, (i, k), (bm, bk)) @ dl.load(b, (k, j), (bk, bn))
    dl.store(c, (i, j), acc.to(c.dtype))


def main() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((300, 200), dtype=np.float32)
    b = rng.standard_normal((200, 130), dtype=np.float32)
    c = np.empty((300, 130), np.float32)

    matmul(a, b, c)  # grid and tile sizes are dure's choice
    print("largest difference from NumPy:", np.abs(c - a @ b).max())
    assert np.allclose(c, a @ b, atol=1e-3)

    c[:] = 0
    grid = (dl.cdiv(300, 64), dl.cdiv(130, 32))
    matmul[grid](a, b, c, bm=64, bn=32, bk=64)  # ... or yours
    assert np.allclose(c, a @ b, atol=1e-3)

    with dl.interpret():  # plain Python, with print, assert and a debugger
        matmul(a, b, c, bm=64, bn=32, bk=64)
    assert np.allclose(c, a @ b, atol=1e-3)
    print("matmul agrees with NumPy")


if __name__ == "__main__":
    main()
