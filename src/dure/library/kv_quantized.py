"""Writes into a KV cache of int8 codes with a scale for each token and head.

A head's D numbers have one scale, as :mod:`dure.library.quantized` has it.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.indices import DistinctPlaces, Places
from dure.library.quantized import coded, magnitude, scale_of
from dure.library.rope import head_parts, normalized, placed, rotated, rows_of

_TOP = 127.0


@dure.kernel
def rope_kv_write_quantized(
    pool: dl.Tensor,
    scales: dl.Tensor,
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
):
    """:func:`dure.library.rope.rope_kv_write` into codes (H, S, D) and scales (H, S, 1)."""
    h, i = dl.program_id(0), dl.program_id(1)
    rows = rows_of(positions, i, bt)
    places = dl.load(slots, (i,), (bt,), fill=-1)
    turn = 2 * cosines.shape[1]
    parts = head_parts(x, i, h, turn, (bt, bh, half), rest, interleaved)
    parts = normalized(parts, x.shape[2], weight, turn, interleaved, epsilon)
    first, second = rotated(parts, cosines, sines, rows, bt, half)
    largest = dl.maximum(magnitude(first, 2), magnitude(second, 2))
    if rest:
        largest = dl.maximum(largest, magnitude(parts[2], 2))
    scale = scale_of(largest, _TOP)
    dl.store(scales, (h, places, 0), placed(scale, True))
    first, second = codes_of(first, scale), codes_of(second, scale)
    if interleaved:
        at = (h, places, 0)
        dl.store(pool[:, :, :turn], at, first, stride=(1, 1, 2))
        dl.store(pool[:, :, :turn], at, second, stride=(1, 1, 2), offset=(0, 0, 1))
    else:
        dl.store(pool[:, :, : turn // 2], (h, places, 0), first)
        dl.store(pool[:, :, turn // 2 : turn], (h, places, 0), second)
    if rest:
        dl.store(pool[:, :, turn:], (h, places, 0), codes_of(parts[2], scale))


@dure.kernel
def kv_write_quantized(
    pool: dl.Tensor,
    scales: dl.Tensor,
    x: dl.Tensor,
    slots: DistinctPlaces,
    bt: dl.const,
    bh: dl.const,
    bd: dl.const,
):
    """:func:`dure.library.rope.kv_write` into codes (H, S, D) and scales (H, S, 1); ``bd`` covers
    D.
    """
    h, i = dl.program_id(0), dl.program_id(1)
    places = dl.load(slots, (i,), (bt,), fill=-1)
    tile = dl.load(x, (i, h, 0), (bt, bh, bd)).to(dl.float32)
    scale = scale_of(magnitude(tile, 2), _TOP)
    dl.store(scales, (h, places, 0), placed(scale, True))
    dl.store(pool, (h, places, 0), codes_of(tile, scale))


def codes_of(tile: Any, scale: Any) -> Any:
    """Codes (heads, tokens, D) of numbers (tokens, heads, D)."""
    return placed(coded(tile, scale, dl.int8), True)
