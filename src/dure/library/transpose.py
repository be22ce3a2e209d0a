"""Transposition of a matrix."""

from __future__ import annotations

import dure
import dure.lang as dl


@dure.kernel
def transpose(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    """``y = x.T`` for x (M, N), y (N, M), tile by tile."""
    j, i = dl.program_id(0), dl.program_id(1)
    dl.store(y, (j, i), dl.load(x, (i, j), (bm, bn)).T)
