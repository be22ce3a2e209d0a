"""Numbers as codes of eight bits, made on the chip, with one float32 scale for some of them.

The scale is the largest magnitude over the largest code (the ``top`` of
:class:`~dure.library.weight_types.WeightType`); numbers that are all zero, or as good as that, have
the scale one.  A code is the one nearest to the number times the scale's reciprocal, ties to even.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl

#: The largest magnitude of numbers that count as zeros: scales above it have a finite reciprocal.
_ZERO = 1e-30


@dure.kernel
def quantize_rows(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    bm: dl.const,
    bd: dl.const,
    top: dl.const,
):
    """``x = codes * scales`` but for rounding, for x and codes (M, K), scales (M, 1) float32.

    ``top`` is the largest code.
    """
    i = dl.program_id(0)
    steps = dl.cdiv(x.shape[1], bd)
    largest = dl.zeros((bm, bd), x.dtype)
    for c in dl.range(steps):
        largest = dl.maximum(largest, dl.abs(dl.load(x, (i, c), (bm, bd))))
    scale = scale_of(dl.max(largest, 1, keepdims=True).to(dl.float32), top)
    dl.store(scales, (i, 0), scale)
    for c in dl.range(steps):
        part = dl.load(x, (i, c), (bm, bd)).to(dl.float32)
        dl.store(codes, (i, c), coded(part, scale, codes.dtype))


@dure.kernel
def quantize_whole_rows(
    x: dl.Tensor,
    codes: dl.Tensor,
    scales: dl.Tensor,
    bm: dl.const,
    bd: dl.const,
    top: dl.const,
):
    """Like :func:`quantize_rows`, with whole rows in a tile: ``bd`` covers K."""
    i = dl.program_id(0)
    rows = dl.load(x, (i, 0), (bm, bd))
    scale = scale_of(magnitude(rows, 1).to(dl.float32), top)
    dl.store(scales, (i, 0), scale)
    dl.store(codes, (i, 0), coded(rows.to(dl.float32), scale, codes.dtype))


def magnitude(tile: Any, axis: Any) -> Any:
    """The largest magnitude along an axis, which stays with an extent of one."""
    return dl.max(dl.abs(tile), axis, keepdims=True)


def scale_of(largest: Any, top: Any) -> Any:
    """The scale of numbers of which this is the largest magnitude, in float32."""
    return dl.where(largest > _ZERO, largest * (1.0 / top), 1.0)


def coded(tile: Any, scale: Any, dtype: Any) -> Any:
    """Codes of float32 numbers, of which this is the scale: whatever its reciprocal is rounded to,
    the code nearest to the largest of them is the largest code.
    """
    numbers = tile * (1.0 / scale)
    return dl.round(numbers).to(dtype) if dtype == dl.int8 else numbers.to(dtype)
