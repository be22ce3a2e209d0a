"""Rotary position embedding of whole heads, the halves of which a product swaps.

:mod:`dure.library.rope` loads and stores the halves of a head apart: short runs of bytes, twice as
many transfers.  Here a head is one run, and a product with a matrix of 1, -1 and 0 puts the halves
in each other's place; it is exact.  For heads that turn as a whole, in the order of halves.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.indices import DistinctPlaces, Places
from dure.library.rope import kept, placed, rows_of


@dure.kernel
def rope_whole(
    x: dl.Tensor,
    cosines: dl.Tensor,
    sines: dl.Tensor,
    positions: Places,
    weight: dl.Tensor | None,
    y: dl.Tensor,
    bt: dl.const,
    bh: dl.const,
    half: dl.const,
    joined: dl.const = 1,
    epsilon: dl.const = 0.0,
):
    """:func:`~dure.library.rope.rope` of x (T, H, 2 ``half``), whose tables are (P, ``half``).

    So many ``joined`` heads are one row of the product, which divide ``bh``.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    rows = rows_of(positions, i, bt)
    tile = dl.load(x, (i, h, 0), (bt, bh, 2 * half))
    own, other = swapped(tile, weight, joined, epsilon)
    dl.store(y, (i, h, 0), convert(turned(own, other, cosines, sines, rows), y.dtype))


@dure.kernel
def rope_whole_kv_write(
    pool: dl.Tensor,
    x: dl.Tensor,
    slots: DistinctPlaces,
    cosines: dl.Tensor,
    sines: dl.Tensor,
    positions: Places,
    weight: dl.Tensor | None,
    bt: dl.const,
    bh: dl.const,
    half: dl.const,
    joined: dl.const = 1,
    epsilon: dl.const = 0.0,
    heads_first: dl.const = False,
):
    """:func:`~dure.library.rope.rope_kv_write` of the same."""
    h, i = dl.program_id(0), dl.program_id(1)
    rows = rows_of(positions, i, bt)
    places = dl.load(slots, (i,), (bt,), fill=-1)
    tile = dl.load(x, (i, h, 0), (bt, bh, 2 * half))
    own, other = swapped(tile, weight, joined, epsilon)
    tile = placed(kept(turned(own, other, cosines, sines, rows), pool.dtype), heads_first)
    dl.store(pool, (h, places, 0) if heads_first else (places, h, 0), tile)


def swapped(tile: Any, weight: Any, joined: Any, epsilon: Any) -> Any:
    """A tile (tokens, heads, D) of float numbers in float32, and what its halves meet, each in the
    other's place; both after the heads' norm, if there is one.
    """
    bt, bh, size = tile.shape
    half, width = size // 2, joined * size
    dl.static_assert(bh % joined == 0, "joined heads divide a tile's")
    row, column = dl.arange(width)[:, None], dl.arange(width)[None, :]
    low, own = column % size < half, row // size == column // size
    first = own & low & (row == column + half)
    second = own & (row + half == column)
    swap = dl.where(first, -1.0, dl.where(second, 1.0, 0.0)).to(tile.dtype)
    other = dl.dot(tile.reshape((bt * bh // joined, width)), swap).reshape((bt, bh, size))
    whole = tile.to(dl.float32)
    if weight is None:
        return whole, other
    squares = dl.sum(whole * whole, 2, keepdims=True)
    factor = dl.rsqrt(squares / dl.full(squares.shape, size, dl.float32) + epsilon)
    plain = dl.load(weight, (0,), (size,)).to(dl.float32).reshape((1, 1, size))
    above, below = twice(weight[:half], half), twice(weight[half:], half)
    turning = dl.where(dl.arange(size) < half, below, above).reshape((1, 1, size))
    return whole * factor * plain, other * factor * turning


def twice(part: Any, half: Any) -> Any:
    """Half of a norm's weight, for both halves of a head."""
    row = dl.load(part, (0,), (half,)).to(dl.float32).reshape((1, half))
    return dl.broadcast_to(row, (2, half)).reshape((2 * half,))


def turned(own: Any, other: Any, cosines: Any, sines: Any, rows: Any) -> Any:
    """A tile (tokens, heads, D) after the rotation."""
    bt, half = own.shape[0], own.shape[2] // 2
    return own * both(cosines, rows, bt, half) + other * both(sines, rows, bt, half)


def both(table: Any, rows: Any, bt: Any, half: Any) -> Any:
    """Rows of a table (tokens, 1, 2 ``half``), the same for both halves of a head."""
    found = dl.load(table, (rows, 0), (bt, half)).to(dl.float32).reshape((bt, 1, half))
    return dl.broadcast_to(found, (bt, 2, half)).reshape((bt, 1, 2 * half))
