"""Running sums of rows."""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import convert


@dure.kernel
def cumulative_sum(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    """``y[m, n] = x[m, 0] + ... + x[m, n]`` for x, y (M, N).

    A row is walked in blocks of ``bn`` columns with the total of those before.
    """
    i = dl.program_id(0)
    before = dl.zeros((bm, 1), dl.float32)
    for c in dl.range(dl.cdiv(x.shape[1], bn)):
        part = dl.load(x, (i, c), (bm, bn)).to(dl.float32)
        dl.store(y, (i, c), convert(dl.cumsum(part, 1) + before, y.dtype))
        before = before + dl.sum(part, 1, keepdims=True)
