"""Products whose sums devices add up: each tile goes to the devices that add it as soon as it is
made, so that the links are at work while the matrix engine is.

As in :mod:`dure.library.collective_kernels`, axis 0 of every tensor is the device; axis 1 is what
a device's own bytes are cut along: equal layers of weights, pieces of rows of the others, one of
which a kernel sees.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.collective_kernels import peer, total
from dure.library.convert import convert


@dure.kernel
def matmul_give_all(
    x: dl.Tensor,
    w: dl.Tensor,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    shape: dl.const,
):
    """``y[c, me] = x[me] @ w[me] + bias[me]`` for all devices c.

    x is (N, 1, M, K), w (N, 1, K, H), bias (N, 1, H), y (N, N, M, H).
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[3], bk)):
        right = dl.load(w, (me, 0, k, j), (1, 1, bk, bn)).reshape((bk, bn))
        acc = dl.dot(rows(x, (me, i, k), (bm, bk)), right, acc)
    if bias is not None:
        acc = acc + dl.load(bias, (me, 0, j), (1, 1, bn)).to(dl.float32).reshape((1, bn))
    tile = convert(acc, y.dtype).reshape((1, 1, bm, bn))
    for c in dl.range(y.shape[1]):
        dl.store(y, (peer(me, c, shape), me, i, j), tile)


@dure.kernel
def matmul_give_parts(
    x: dl.Tensor,
    w: dl.Tensor,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    shape: dl.const,
):
    """``y[c, me] = x[me] @ w[me, :, c] + bias[me, c]`` for all devices c: neighbours first, for
    what goes to them is on its way while a device's own part is computed.

    x is (N, 1, M, K), w (N, 1, K, N, C), bias (N, 1, N, C), y (N, N, M, C).
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    for c in dl.range(1, y.shape[1] + 1):
        give_part(x, w, bias, y, (me, peer(me, c, shape), i, j), (bm, bn, bk))


def give_part(x: Any, w: Any, bias: Any, y: Any, place: Any, sizes: Any) -> None:
    """Compute tile (i, j) of a device's part, and store it there."""
    me, to, i, j = place
    bm, bn, bk = sizes
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(x.shape[3], bk)):
        right = dl.load(w, (me, 0, k, to, j), (1, 1, bk, 1, bn)).reshape((bk, bn))
        acc = dl.dot(rows(x, (me, i, k), (bm, bk)), right, acc)
    if bias is not None:
        row = dl.load(bias, (me, 0, to, j), (1, 1, 1, bn)).to(dl.float32)
        acc = acc + row.reshape((1, bn))
    dl.store(y, (to, me, i, j), convert(acc, y.dtype).reshape((1, 1, bm, bn)))


def rows(x: Any, place: Any, shape: Any) -> Any:
    """A tile of a device's x."""
    me, i, k = place
    return dl.load(x, (me, 0, i, k), (1, 1, *shape)).reshape(shape)


@dure.kernel
def add_and_give_columns(
    x: dl.Tensor,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    shape: dl.const,
):
    """``y[d, :, me]`` on all devices d is the sum over c of ``x[me, c]``, and of ``residual[me, :,
    me]``: me adds up its part of the columns.

    x is (N, N, M, C), residual and y are (N, 1, M, N, C).
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    give_sum(x, residual, y, (me, i, j), (bm, bn), shape)


def give_sum(x: Any, residual: Any, y: Any, place: Any, sizes: Any, shape: Any) -> None:
    """Add up tile (i, j) of a device's part, and store it on all of them."""
    me, i, j = place
    bm, bn = sizes
    result = total(x, me, i, j, bm, bn, dl.float32).reshape((1, 1, bm, 1, bn))
    if residual is not None:
        result = result + dl.load(residual, (me, 0, i, me, j), (1, 1, bm, 1, bn)).to(dl.float32)
    tile = convert(result, y.dtype)
    for c in dl.range(1, x.shape[0] + 1):
        dl.store(y, (peer(me, c, shape), 0, i, me, j), tile)


@dure.kernel
def matmul_give_parts_and_sums(
    x: dl.Tensor,
    w: dl.Tensor,
    bias: dl.Tensor | None,
    y: dl.Tensor,
    parts: dl.Tensor,
    residual: dl.Tensor | None,
    sums: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bk: dl.const,
    shape: dl.const,
):
    """:func:`matmul_give_parts` of some rows, and beside it :func:`add_and_give_columns` of as
    many others: ``sums`` of ``parts`` and ``residual``.
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    give_sum(parts, residual, sums, (me, i, j), (bm, bn), shape)
    for c in dl.range(1, y.shape[1] + 1):
        give_part(x, w, bias, y, (me, peer(me, c, shape), i, j), (bm, bn, bk))
