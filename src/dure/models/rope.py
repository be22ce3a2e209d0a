"""Tables of cosines and sines for rope, with every variant of frequency scaling.

Computed in float64 and rounded once.  Sources: RoFormer (arXiv:2104.09864); Llama 3.1's frequency
blend (``apply_scaling`` in the published reference code, and ``rope_freqs.weight`` in GGUF files);
YaRN (arXiv:2309.00071).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dure.models.config import RopeConfig, RopeScaling

_Floats = npt.NDArray[np.float64]


def frequencies(rope: RopeConfig, dimension: int) -> tuple[_Floats, float]:
    """Angles a position for each pair (``dimension / 2``), and the factor on cosines and sines."""
    exponent = np.arange(0, dimension, 2, dtype=np.float64) / dimension
    plain = rope.base**-exponent
    scaling = rope.scaling
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(plain, rope, dimension)
    return plain, 1.0


def _llama3(plain: _Floats, scaling: RopeScaling) -> _Floats:
    wavelength = 2 * math.pi / plain
    low = scaling.original_context / scaling.low_frequency_factor
    high = scaling.original_context / scaling.high_frequency_factor
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    smooth = (scaling.original_context / wavelength - scaling.low_frequency_factor) / span
    blended = (1 - smooth) * plain / scaling.factor + smooth * plain
    slow = np.where(wavelength > low, plain / scaling.factor, blended)
    return np.where(wavelength < high, plain, slow)


def _yarn(plain: _Floats, rope: RopeConfig, dimension: int) -> tuple[_Floats, float]:
    scaling = rope.scaling

    def pair_of(rotations: float) -> float:
        length = scaling.original_context / (rotations * 2 * math.pi)
        return dimension * math.log(length) / (2 * math.log(rope.base))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimension - 1)
    pairs = np.arange(dimension // 2, dtype=np.float64)
    ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return plain / scaling.factor * ramp + plain * (1 - ramp), factor


def rope_tables(
    rope: RopeConfig,
    dimension: int,
    positions: int,
    divisors: npt.NDArray[np.floating] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, each (positions, dimension / 2) in float32.

    ``divisors`` (dimension / 2,), where a file brings its own, divide the frequencies and replace
    the scaling.
    """
    if divisors is None:
        rate, factor = frequencies(rope, dimension)
    else:
        rate, factor = frequencies(RopeConfig(rope.base), dimension)
        rate = rate / divisors.astype(np.float64)
    angle = np.arange(positions, dtype=np.float64)[:, None] * rate
    return (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32)
