"""The last step of every kernel: a float32 tile becomes what the result tensor holds."""

from __future__ import annotations

from typing import Any

import dure.lang as dl

INFINITY = float("inf")
NEGATIVE_INFINITY = float("-inf")


def convert(tile: Any, dtype: Any) -> Any:
    """``tile`` in another element type: a cast, or a quantization to blocks of 32."""
    if dtype == dl.int8_block32 or dtype == dl.int16_block32 or dtype == dl.bfp9_block32:
        return dl.quantize(tile, dtype)
    return tile.to(dtype)
