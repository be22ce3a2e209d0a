"""Rotary position embedding of whole heads, the halves of which a product swaps.

:mod:`dure.library.rope` loads and stores the halves of a head apart: short runs of bytes, twice as
many transfers.  Here a head is one run, and a product with a matrix of 1, -1 and 0 puts the halves
in each other's place; it is exact.  For heads that turn as a whole, in the order of halves, without
a norm.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.indices import DistinctPlaces, Places
from dure.library.rope import kept, placed


@dure.kernel
def rope_whole(
    x: dl.Tensor,
    cosines: dl.Tensor,
    sines: dl.Tensor,
    positions: Places,
    y: dl.Tensor,
    bt: dl.const,
    bh: dl.const,
    half: dl.const,
    joined: dl.const = 1,
):
    """:func:`~dure.library.rope.rope` of x (T, H, 2 ``half``), whose tables are (P, ``half``).

    So many ``joined`` heads are one row of the product, which divide ``bh``.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    rows = dl.load(positions, (i,), (bt,), fill=-1)
    tile = dl.load(x, (i, h, 0), (bt, bh, 2 * half))
    dl.store(y, (i, h, 0), convert(turned(tile, cosines, sines, rows, joined), y.dtype))


@dure.kernel
def rope_whole_kv_write(
    pool: dl.Tensor,
    x: dl.Tensor,
    slots: DistinctPlaces,
    cosines: dl.Tensor,
    sines: dl.Tensor,
    positions: Places,
    bt: dl.const,
    bh: dl.const,
    half: dl.const,
    joined: dl.const = 1,
    heads_first: dl.const = False,
):
    """:func:`~dure.library.rope.rope_kv_write` of the same."""
    h, i = dl.program_id(0), dl.program_id(1)
    rows = dl.load(positions, (i,), (bt,), fill=-1)
    places = dl.load(slots, (i,), (bt,), fill=-1)
    tile = dl.load(x, (i, h, 0), (bt, bh, 2 * half))
    tile = placed(kept(turned(tile, cosines, sines, rows, joined), pool.dtype), heads_first)
    dl.store(pool, (h, places, 0) if heads_first else (places, h, 0), tile)


def turned(tile: Any, cosines: Any, sines: Any, rows: Any, joined: Any) -> Any:
    """A tile (tokens, heads, D) of float numbers after the rotation, in float32."""
    bt, bh, size = tile.shape
    half, width = size // 2, joined * size
    dl.static_assert(bh % joined == 0, "joined heads divide a tile's")
    row, column = dl.arange(width)[:, None], dl.arange(width)[None, :]
    low, own = column % size < half, row // size == column // size
    first = own & low & (row == column + half)
    second = own & (row + half == column)
    swap = dl.where(first, -1.0, dl.where(second, 1.0, 0.0)).to(tile.dtype)
    other = dl.dot(tile.reshape((bt * bh // joined, width)), swap).reshape((bt, bh, size))
    return tile.to(dl.float32) * both(cosines, rows, half) + other * both(sines, rows, half)


def both(table: Any, rows: Any, half: Any) -> Any:
    """Rows of a table (tokens, 1, 2 ``half``), the same for both halves of a head."""
    bt = rows.shape[0]
    found = dl.load(table, (rows, 0), (bt, half)).to(dl.float32).reshape((bt, 1, half))
    return dl.broadcast_to(found, (bt, 2, half)).reshape((bt, 1, 2 * half))
