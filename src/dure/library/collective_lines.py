"""Products whose sums the devices of a square grid add up along one axis after the other.

Where a device gives its parts straight to all others, what goes to one that isn't in its row or
column of the grid crosses two links, and is one of several that cross the second of them for the
same sum.  Here a device adds up what its own line gives it before it passes anything on, and what
is gathered is passed on as well, so that a link carries each sum once.  One half of the matrix's
rows goes along the rows of the grid first, the other along its columns, so that all links are at
work at all times.

The axis that a half goes along first is its first; its columns are cut into as many parts as that
has devices, and each of these again along the second.  Axis 0 of every tensor is the device, as in
:mod:`dure.library.collective_kernels`, and axis 1 the half.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert


def along(me: Any, k: Any, axis: Any, side: Any) -> Any:
    """The device ``k`` further than one's own along an axis of a square grid, 0 its rows."""
    if axis == 0:
        return me // side * side + (me + k) % side
    return (me // side + k) % side * side + me % side


def place(device: Any, axis: Any, side: Any) -> Any:
    """A device's place along an axis."""
    return device % side if axis == 0 else device // side


@dure.kernel
def matmul_give_lines(
    x: dl.Tensor,
    w: dl.Tensor,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    side: dl.const,
):
    """``y[c, h, me'] = x[me, h] @ w[me, :, c'] + bias[me, c']`` for both halves h and the devices c
    of one's line along the first axis, where c' and me' are places along it: neighbours first.

    x is (N, 2, M, K), w (N, 1, K, S, P), bias (N, 1, S, P), y (N, 2, S, M, P), N = S * S.
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    for k in dl.range(1, side + 1):
        give_product(x, w, bias, y, (me, k, i, j), 0, (bm, bn, bk, side))
        give_product(x, w, bias, y, (me, k, i, j), 1, (bm, bn, bk, side))


def give_product(x: Any, w: Any, bias: Any, y: Any, at: Any, half: Any, sizes: Any) -> None:
    """Compute tile (i, j) of a half for the device k further along its first axis."""
    me, k, i, j = at
    bm, bn, bk, side = sizes
    to = along(me, k, half, side)
    part = place(to, half, side)
    acc = dl.zeros((bm, bn), dl.float32)
    for d in dl.range(dl.cdiv(x.shape[3], bk)):
        left = dl.load(x, (me, half, i, d), (1, 1, bm, bk)).reshape((bm, bk))
        right = dl.load(w, (me, 0, d, part, j), (1, 1, bk, 1, bn)).reshape((bk, bn))
        acc = dl.dot(left, right, acc)
    if bias is not None:
        row = dl.load(bias, (me, 0, part, j), (1, 1, 1, bn)).to(dl.float32)
        acc = acc + row.reshape((1, bn))
    tile = convert(acc, y.dtype).reshape((1, 1, 1, bm, bn))
    dl.store(y, (to, half, place(me, half, side), i, j), tile)


@dure.kernel
def add_and_give_across(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, side: dl.const):
    """``y[c, h, me'] = sum(x[me, h, :, :, c'])`` for the devices c of one's line along the second
    axis: what a line has in common goes on to those that add it up.

    x is (N, 2, S, M, S, Q), y (N, 2, S, M, Q).
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    for k in dl.range(1, side + 1):
        give_line_sum(x, y, (me, k, i, j), 0, (bm, bn, side))
        give_line_sum(x, y, (me, k, i, j), 1, (bm, bn, side))


def give_line_sum(x: Any, y: Any, at: Any, half: Any, sizes: Any) -> None:
    """Add up tile (i, j) of a half for the device k further along its second axis."""
    me, k, i, j = at
    bm, bn, side = sizes
    to = along(me, k, 1 - half, side)
    part, shape = place(to, 1 - half, side), (1, 1, 1, bm, 1, bn)
    result = dl.load(x, (me, half, 0, i, part, j), shape).to(dl.float32)
    for c in dl.range(1, side):
        result = result + dl.load(x, (me, half, c, i, part, j), shape).to(dl.float32)
    tile = convert(result, y.dtype).reshape((1, 1, 1, bm, bn))
    dl.store(y, (to, half, place(me, 1 - half, side), i, j), tile)


@dure.kernel
def add_and_give_line(
    x: dl.Tensor,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    side: dl.const,
):
    """``y[c, h, :, me'] = sum(x[me, h]) + residual[me, h, :, me]`` for the devices c of one's line
    along the second axis: one's own part of the sums.

    x is (N, 2, S, M, Q), residual (N, 2, M, S, S, Q), y (N, 2, M, S, Q).
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    give_own_sum(x, residual, y, (me, i, j), 0, (bm, bn, side))
    give_own_sum(x, residual, y, (me, i, j), 1, (bm, bn, side))


def give_own_sum(x: Any, residual: Any, y: Any, at: Any, half: Any, sizes: Any) -> None:
    """Add up tile (i, j) of a half, and store it along the second axis."""
    me, i, j = at
    bm, bn, side = sizes
    first, second = place(me, half, side), place(me, 1 - half, side)
    result = dl.load(x, (me, half, 0, i, j), (1, 1, 1, bm, bn)).to(dl.float32)
    for c in dl.range(1, side):
        result = result + dl.load(x, (me, half, c, i, j), (1, 1, 1, bm, bn)).to(dl.float32)
    result = result.reshape((1, 1, bm, 1, bn))
    if residual is not None:
        own = dl.load(residual, (me, half, i, first, second, j), (1, 1, bm, 1, 1, bn))
        result = result + own.to(dl.float32).reshape((1, 1, bm, 1, bn))
    tile = convert(result, y.dtype)
    for k in dl.range(1, side + 1):
        dl.store(y, (along(me, k, 1 - half, side), half, i, second, j), tile)


@dure.kernel
def give_lines(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, side: dl.const):
    """``y[c, h, :, me'] = x[me, h]`` for the devices c of one's line along the first axis.

    x is (N, 2, M, P), y (N, 2, M, S, P).
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    give_half(x, y, (me, i, j), 0, (bm, bn, side))
    give_half(x, y, (me, i, j), 1, (bm, bn, side))


def give_half(x: Any, y: Any, at: Any, half: Any, sizes: Any) -> None:
    """Store tile (i, j) of a half along the first axis."""
    me, i, j = at
    bm, bn, side = sizes
    tile = dl.load(x, (me, half, i, j), (1, 1, bm, bn)).reshape((1, 1, bm, 1, bn))
    for k in dl.range(1, side + 1):
        dl.store(y, (along(me, k, half, side), half, i, place(me, half, side), j), tile)
