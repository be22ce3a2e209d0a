"""Rotary position embedding in both orders, and the KV-cache write that it ends in.

The tables of cosines and sines are inputs, so that every variant of frequency scaling is data
(:mod:`dure.models.rope`).  A token's row of the tables is chosen by its position, through an index
list; without one (None), token t's row is row t.  Before the rotation there may be an RMS norm of
each head (Qwen3, Gemma 3).
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.indices import DistinctPlaces, Places

#: The largest number of float8_e4m3fn.
_E4M3 = 448.0


@dure.kernel
def rope(
    x: dl.Tensor,
    cosines: dl.Tensor,
    sines: dl.Tensor,
    positions: Places,
    weight: dl.Tensor | None,
    y: dl.Tensor,
    bt: dl.const,
    bh: dl.const,
    half: dl.const,
    rest: dl.const,
    interleaved: dl.const,
    epsilon: dl.const = 0.0,
):
    """Rotate x (T, H, D) by the angles of ``positions`` (T,) into y.

    The tables are (P, R / 2), with R <= D.
    Element p of the first half pairs with element p of the second (GPT-NeoX order), or 2 p with 2
    p + 1 where ``interleaved`` (the order of Llama's own weights and of its GGUF).  Elements from
    R on pass. ``half`` and ``rest`` are powers of two that cover R / 2 and D - R (``rest`` is 0
    where R is D); ``bt`` tokens and ``bh`` heads make a tile.  ``weight`` (D,), or None, asks for
    the heads' norm first.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    rows = rows_of(positions, i, bt)
    turn = 2 * cosines.shape[1]
    parts = head_parts(x, i, h, turn, (bt, bh, half), rest, interleaved)
    parts = normalized(parts, x.shape[2], weight, turn, interleaved, epsilon)
    first, second = rotated(parts, cosines, sines, rows, bt, half)
    if interleaved:
        dl.store(y[:, :, :turn], (i, h, 0), convert(first, y.dtype), stride=(1, 1, 2))
        dl.store(
            y[:, :, :turn], (i, h, 0), convert(second, y.dtype), stride=(1, 1, 2), offset=(0, 0, 1)
        )
    else:
        dl.store(y[:, :, : turn // 2], (i, h, 0), convert(first, y.dtype))
        dl.store(y[:, :, turn // 2 : turn], (i, h, 0), convert(second, y.dtype))
    if rest:
        dl.store(y[:, :, turn:], (i, h, 0), convert(parts[2], y.dtype))


@dure.kernel
def rope_kv_write(
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
    rest: dl.const,
    interleaved: dl.const,
    epsilon: dl.const = 0.0,
    heads_first: dl.const = False,
):
    """Like :func:`rope`, into ``pool[slots[t]]`` of a pool (S, H, D), or ``pool[:, slots[t]]`` of
    (H, S, D) where ``heads_first``; -1 writes nothing.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    rows = rows_of(positions, i, bt)
    places = dl.load(slots, (i,), (bt,), fill=-1)
    turn = 2 * cosines.shape[1]
    parts = head_parts(x, i, h, turn, (bt, bh, half), rest, interleaved)
    parts = normalized(parts, x.shape[2], weight, turn, interleaved, epsilon)
    first, second = rotated(parts, cosines, sines, rows, bt, half)
    first, second = kept(first, pool.dtype), kept(second, pool.dtype)
    at = (h, places, 0) if heads_first else (places, h, 0)
    first, second = placed(first, heads_first), placed(second, heads_first)
    if interleaved:
        dl.store(pool[:, :, :turn], at, first, stride=(1, 1, 2))
        dl.store(pool[:, :, :turn], at, second, stride=(1, 1, 2), offset=(0, 0, 1))
    else:
        dl.store(pool[:, :, : turn // 2], at, first)
        dl.store(pool[:, :, turn // 2 : turn], at, second)
    if rest:
        passing = placed(kept(parts[2], pool.dtype), heads_first)
        dl.store(pool[:, :, turn:], at, passing)


@dure.kernel
def kv_write(
    pool: dl.Tensor,
    x: dl.Tensor,
    slots: DistinctPlaces,
    bt: dl.const,
    bh: dl.const,
    bd: dl.const,
    heads_first: dl.const = False,
):
    """``pool[slots[t]] = x[t]`` for x (T, H, D) and pool (S, H, D); a slot of -1 writes nothing.

    The pool is (H, S, D) where ``heads_first``.
    """
    c, h, i = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    places = dl.load(slots, (i,), (bt,), fill=-1)
    tile = dl.load(x, (i, h, c), (bt, bh, bd)).to(dl.float32)
    tile = placed(kept(tile, pool.dtype), heads_first)
    dl.store(pool, (h, places, c) if heads_first else (places, h, c), tile)


def rows_of(positions: Any, i: Any, bt: Any) -> Any:
    """Where tile i of the tokens finds its rows of the tables."""
    return i if positions is None else dl.load(positions, (i,), (bt,), fill=-1)


def kept(tile: Any, dtype: Any) -> Any:
    """A float32 tile as a cache keeps it; what an 8-bit float doesn't reach is its largest."""
    if dtype == dl.float8_e4m3fn:
        tile = dl.minimum(dl.maximum(tile, -_E4M3), _E4M3)
    return convert(tile, dtype)


def placed(tile: Any, heads_first: Any) -> Any:
    """A tile (tokens, heads, D), its heads first where the pool's are."""
    tokens, heads, size = tile.shape
    if not heads_first:
        return tile
    if tokens == 1 or heads == 1:
        return tile.reshape((heads, tokens, size))
    return dl.transpose(tile, (1, 0, 2))


def head_parts(x: Any, i: Any, h: Any, turn: Any, shape: Any, rest: Any, interleaved: Any) -> Any:
    """The two parts of each head that turn, and what passes (the second part again where there is
    none).
    """
    if interleaved:
        turning = x[:, :, :turn]
        first = dl.load(turning, (i, h, 0), shape, stride=(1, 1, 2)).to(dl.float32)
        second = dl.load(turning, (i, h, 0), shape, stride=(1, 1, 2), offset=(0, 0, 1))
        second = second.to(dl.float32)
    else:
        first = dl.load(x[:, :, : turn // 2], (i, h, 0), shape).to(dl.float32)
        second = dl.load(x[:, :, turn // 2 : turn], (i, h, 0), shape).to(dl.float32)
    if rest:
        passing = dl.load(x[:, :, turn:], (i, h, 0), (shape[0], shape[1], rest)).to(dl.float32)
        return first, second, passing
    return first, second, second


def normalized(
    parts: Any, size: Any, weight: Any, turn: Any, interleaved: Any, epsilon: Any
) -> Any:
    """The parts after the RMS norm of the whole head, if there is one."""
    if weight is None:
        return parts
    first, second, passing = parts
    squares = dl.sum(first * first, 2, keepdims=True) + dl.sum(second * second, 2, keepdims=True)
    if size != turn:
        squares = squares + dl.sum(passing * passing, 2, keepdims=True)
    factor = dl.rsqrt(squares / dl.full(squares.shape, size, dl.float32) + epsilon)
    half = first.shape[2]
    if interleaved:
        turning = weight[:turn]
        one = dl.load(turning, (0,), (half,), stride=(2,)).to(dl.float32)
        two = dl.load(turning, (0,), (half,), stride=(2,), offset=(1,)).to(dl.float32)
    else:
        one = dl.load(weight[: turn // 2], (0,), (half,)).to(dl.float32)
        two = dl.load(weight[turn // 2 : turn], (0,), (half,)).to(dl.float32)
    first = first * factor * one[None, None, :]
    second = second * factor * two[None, None, :]
    if size != turn:
        last = dl.load(weight[turn:], (0,), (passing.shape[2],)).to(dl.float32)
        return first, second, passing * factor * last[None, None, :]
    return first, second, second


def rotated(parts: Any, cosines: Any, sines: Any, rows: Any, bt: Any, half: Any) -> Any:
    """Both turning parts after the rotation."""
    first, second, _ = parts
    cosine = dl.load(cosines, (rows, 0), (bt, half)).to(dl.float32)[:, None, :]
    sine = dl.load(sines, (rows, 0), (bt, half)).to(dl.float32)[:, None, :]
    return first * cosine - second * sine, second * cosine + first * sine
