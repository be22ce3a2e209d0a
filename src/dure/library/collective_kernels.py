"""The kernels that collectives consist of: what one of N devices does.

Axis 0 of every tensor, and of the grid, is the device (:mod:`dure.ir.devices`).  A device reads
what lies in its own memory and stores into the others'; it begins with itself and goes on to its
neighbours, so that at any time all devices send to different ones.  Sums are added in the order of
the devices, so that all of them get the same bits.  ``shape`` is the grid of devices, three extents
(:class:`dure.machine.group.Group`).
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert


def peer(me: Any, k: Any, shape: Any) -> Any:
    """The device whose place is ``k`` further than one's own along every axis of the grid."""
    _, rows, columns = shape
    plane = rows * columns
    x = (me // plane + k // plane) % shape[0]
    y = (me // columns + k // columns) % rows
    return x * plane + y * columns + (me + k) % columns


@dure.kernel
def give_all(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, shape: dl.const):
    """``y[c, me] = x[me]`` for all devices c; x is (N, R, C), y (N, N, R, C)."""
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    tile = dl.load(x, (me, i, j), (1, bm, bn)).reshape((1, 1, bm, bn))
    for k in dl.range(x.shape[0]):
        dl.store(y, (peer(me, k, shape), me, i, j), tile)


@dure.kernel
def give_columns(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, shape: dl.const):
    """``y[c, :, me] = x[me]`` for all devices c; x is (N, M, C), y (N, M, N, C)."""
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    tile = dl.load(x, (me, i, j), (1, bm, bn)).reshape((1, bm, 1, bn))
    for k in dl.range(x.shape[0]):
        dl.store(y, (peer(me, k, shape), i, me, j), tile)


@dure.kernel
def give_parts(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, shape: dl.const):
    """``y[c, me] = x[me, c]`` for all devices c; x and y are (N, N, R, C)."""
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    for k in dl.range(x.shape[0]):
        to = peer(me, k, shape)
        dl.store(y, (to, me, i, j), dl.load(x, (me, to, i, j), (1, 1, bm, bn)))


@dure.kernel
def give_column_parts(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, shape: dl.const):
    """``y[c, me] = x[me, :, c]`` for all devices c; x is (N, M, N, C), y (N, N, M, C)."""
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    for k in dl.range(x.shape[0]):
        to = peer(me, k, shape)
        tile = dl.load(x, (me, i, to, j), (1, bm, 1, bn))
        dl.store(y, (to, me, i, j), tile.reshape((1, 1, bm, bn)))


def total(x: Any, me: Any, i: Any, j: Any, bm: Any, bn: Any, accumulator: Any) -> Any:
    """The sum over c of tile (i, j) of ``x[me, c]``, in the order of c."""
    result = dl.load(x, (me, 0, i, j), (1, 1, bm, bn)).to(accumulator)
    for c in dl.range(1, x.shape[1]):
        result = result + dl.load(x, (me, c, i, j), (1, 1, bm, bn)).to(accumulator)
    return result


@dure.kernel
def add_parts(
    x: dl.Tensor,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    accumulator: dl.const = dl.float32,
):
    """``y[me]`` is the sum over c of ``x[me, c]``, and of ``residual[me]``.

    x is (N, N, R, C), y and residual (N, R, C).
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    result = total(x, me, i, j, bm, bn, accumulator).reshape((1, bm, bn))
    if residual is not None:
        result = result + dl.load(residual, (me, i, j), (1, bm, bn)).to(accumulator)
    dl.store(y, (me, i, j), convert(result, y.dtype))


@dure.kernel
def add_at_once(
    x: dl.Tensor,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    bd: dl.const,
    accumulator: dl.const = dl.float32,
):
    """As :func:`add_parts`, with the parts of all devices, which ``bd`` covers, in one tile."""
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    parts = dl.load(x, (me, 0, i, j), (1, bd, bm, bn)).to(accumulator)
    result = dl.sum(parts.reshape((bd, bm, bn)), 0).reshape((1, bm, bn))
    if residual is not None:
        result = result + dl.load(residual, (me, i, j), (1, bm, bn)).to(accumulator)
    dl.store(y, (me, i, j), convert(result, y.dtype))


@dure.kernel
def add_and_give(
    x: dl.Tensor,
    residual: dl.Tensor | None,
    y: dl.Tensor,
    bm: dl.const,
    bn: dl.const,
    shape: dl.const,
    accumulator: dl.const = dl.float32,
):
    """``y[d, me]`` on all devices d is the sum over c of ``x[me, c]``, and of ``residual[me, me]``.

    All are (N, N, R, C): me adds up its part of the sum.
    """
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    result = total(x, me, i, j, bm, bn, accumulator)
    if residual is not None:
        result = result + dl.load(residual, (me, me, i, j), (1, 1, bm, bn)).to(accumulator)
    tile = convert(result, y.dtype)
    for k in dl.range(x.shape[0]):
        dl.store(y, (peer(me, k, shape), me, i, j), tile)
