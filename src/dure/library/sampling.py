"""Choosing from logits: argmax and top-k.

Neither sorts: top-k is k passes, each for the largest element that comes after the one before it
in the order (value descending, index ascending).  NaN is never chosen.
"""

from __future__ import annotations

import dure
import dure.lang as dl
from dure.library.convert import INFINITY, NEGATIVE_INFINITY

_LAST = 2**31 - 1


@dure.kernel
def argmax(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const):
    """``y[m]`` is the lowest index of the largest element of row m; x (M, N), y (M,) of int32.

    A row without an element above -inf gives 0.
    """
    i = dl.program_id(0)
    best = dl.full((bm, bn), NEGATIVE_INFINITY, dl.float32)
    where = dl.broadcast_to(dl.arange(bn)[None, :], (bm, bn))
    for c in dl.range(dl.cdiv(x.shape[1], bn)):
        part = dl.load(x, (i, c), (bm, bn), fill=NEGATIVE_INFINITY).to(dl.float32)
        index = dl.broadcast_to((c * bn + dl.arange(bn))[None, :], (bm, bn))
        larger = part > best
        best = dl.where(larger, part, best)
        where = dl.where(larger, index, where)
    top = dl.max(best, 1, keepdims=True)
    chosen = dl.min(dl.where(best == top, where, _LAST), 1)
    dl.store(y, (i,), chosen)


@dure.kernel
def top_k(
    x: dl.Tensor,
    values: dl.Tensor,
    indices: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
):
    """The k largest of each row in descending order, ties by index.

    x is (M, N), values and indices (M, k).
    Where a row has fewer than k elements that are not NaN the rest is -inf at index -1.
    """
    i = dl.program_id(0)
    last_value = dl.full((bm, 1), INFINITY, dl.float32)
    last_index = dl.full((bm, 1), -1, dl.int32)
    for turn in dl.range(values.shape[1]):
        best = dl.full((bm, bn), NEGATIVE_INFINITY, dl.float32)
        where = dl.full((bm, bn), _LAST, dl.int32)
        for c in dl.range(dl.cdiv(x.shape[1], bn)):
            index = dl.broadcast_to((c * bn + dl.arange(bn))[None, :], (bm, bn))
            part = dl.load(x, (i, c), (bm, bn), fill=NEGATIVE_INFINITY).to(dl.float32)
            after = (part < last_value) | ((part == last_value) & (index > last_index))
            first = (part > best) | ((part == best) & (where == _LAST))
            chosen = after & first & (index < x.shape[1])
            best = dl.where(chosen, part, best)
            where = dl.where(chosen, index, where)
        last_value = dl.max(best, 1, keepdims=True)
        last_index = dl.min(dl.where(best == last_value, where, _LAST), 1, keepdims=True)
        found = dl.where(last_index == _LAST, -1, last_index)
        dl.store(values, (i, turn), last_value)
        dl.store(indices, (i, turn), found)
