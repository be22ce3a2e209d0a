"""Reference values of block-quantized tensors and tiles: their planes as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dure.ir.dtypes import (
    ACTIVATION_FORMATS,
    Array,
    BlockFormat,
    bfloat16,
    bfp9_block32,
    int16_block32,
)

#: Magnitudes that block floating point holds, as activations: smaller blocks are zero, larger ones
#: NaN.  And the smallest magnitude of weights' blocks that keeps all bits.  Products of both are
#: normal float32 numbers, or zero.
BFP_SMALLEST, BFP_LARGEST, BFP_SMALLEST_WEIGHT = 2.0**-80, 2.0**80, 2.0**-32
#: What the bits of a block's largest weight are raised by (a 64th of its power of two), so that
#: codes, which are off by less than two, stay below 256.
BFP_MARGIN = 1 << 17
#: Fractional bits of the steps from one code of a weight to the next.
BFP_STEP_BITS = 7


@dataclass(frozen=True, eq=False)
class Blocks:
    """A block-quantized array.

    ``shape`` is logical.  Each plane has the same rank, with the quantized ``axis`` divided by the
    plane's ``per``; entries are stored unpacked (a uint4 plane is an array of small integers).
    """

    format: BlockFormat
    axis: int
    shape: tuple[int, ...]
    planes: dict[str, Array]

    def decode(self) -> npt.NDArray[np.float32]:
        """The values in float32."""
        last = {n: np.moveaxis(p, self.axis, -1) for n, p in self.planes.items()}
        return np.moveaxis(self.format.decode(last), -1, self.axis)

    def codes(self) -> npt.NDArray[np.int32]:
        """The integer codes, without their zero subtracted."""
        total = np.zeros(self.shape, np.int32)
        for plane in self.format.groups["code"]:
            total += self.planes[plane.name].astype(np.int32) << plane.shift
        return total

    def transposed(self, order: tuple[int, ...]) -> Blocks:
        """The same values with axes permuted."""
        planes = {n: np.transpose(p, order) for n, p in self.planes.items()}
        shape = tuple(self.shape[a] for a in order)
        return Blocks(self.format, order.index(self.axis), shape, planes)


def quantize(values: Array, format: BlockFormat) -> Blocks:
    """Symmetric quantization along the last axis, ``format.block`` values a scale.

    ``scale = max|x| / top`` in float32, ``code = round_half_even(x * (top / max|x|))``; ``top`` is
    127, or 127 * 256 for 16-bit codes (with 127, the rule of GGML's ``quantize_row_q8_0``, with
    ties to even).  Codes are zero where ``top / max|x|`` isn't a finite number above 0: in blocks
    of zeros, or of numbers next to them, and in those with infinity or NaN, whose scale says so.
    """
    if format is bfp9_block32:
        return _block_floating_point(values)
    top = np.float32(ACTIVATION_FORMATS.get(format, 127))
    shape = values.shape
    blocks = values.astype(np.float32).reshape(*shape[:-1], shape[-1] // format.block, format.block)
    largest = np.abs(blocks).max(axis=-1, initial=0)
    scale = (largest / top).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = (top / largest).astype(np.float32)[..., None]
        usable = (inverse > 0) & (inverse < np.inf)
        code = np.where(usable, np.rint(blocks * inverse), 0).astype(np.int32).reshape(shape)
        kept = scale.astype(format.plane("d").dtype.numpy)
    low = code.astype(np.int8)
    planes: dict[str, Array] = {"d": kept, "code": low}
    if format is int16_block32:
        # The low byte is signed: what it lacks, the high byte has.
        planes["high"] = ((code - low) >> 8).astype(np.int8)
    for plane in format.planes:
        if plane.role == "sum":
            parts = code.reshape(*shape[:-1], shape[-1] // plane.per, plane.per)
            planes[plane.name] = parts.sum(axis=-1, dtype=np.int32)
    return Blocks(format, len(shape) - 1, shape, planes)


def _power_of_two(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The power of two of which ``largest`` is 128 to 256 times."""
    exponent = largest.view(np.int32) & np.int32(0x7F800000)
    return (exponent - np.int32(7 << 23)).view(np.float32)


def _block_floating_point(values: Array) -> Blocks:
    """``code = round_half_even(x / d)``, with the power of two that makes the largest 128 to 256.

    Blocks whose largest magnitude is below :data:`BFP_SMALLEST` are zeros; from
    :data:`BFP_LARGEST` on, as with infinity or NaN, the scale is NaN.
    """
    format, shape = bfp9_block32, values.shape
    blocks = values.astype(np.float32).reshape(*shape[:-1], shape[-1] // format.block, format.block)
    largest = np.abs(blocks).max(axis=-1, initial=0)
    some, usable = largest >= BFP_SMALLEST, largest < BFP_LARGEST
    power = _power_of_two(np.where(some & usable, largest, np.float32(128)))
    code = np.rint(np.where((some & usable)[..., None], blocks, 0) / power[..., None])
    scale = np.where(usable, np.where(some, power, 0), np.nan).astype(np.float32)
    value = code.astype(np.float32) * scale[..., None]
    planes: dict[str, Array] = {
        "d": scale,
        "code": code.astype(np.int16).reshape(shape),
        "sum": code.sum(axis=-1).astype(np.int32),
        "value": value.astype(bfloat16.numpy).reshape(shape),
    }
    return Blocks(format, len(shape) - 1, shape, planes)


def rounded(weights: Blocks) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Weights as block floating point: a code each, and one power of two for 32.

    With the quantized axis last; :func:`dure.ir.dtypes.takes_bfp` says of which formats.  From the
    code ``q`` of a weight ``low + q * scale`` follows ``round(q * step) + start``, where both are
    whole numbers: ``step`` of ``1 / 2**BFP_STEP_BITS``, and ties go up.
    """
    format, per = weights.format, bfp9_block32.block
    last = {n: np.moveaxis(p, weights.axis, -1) for n, p in weights.planes.items()}
    codes = np.moveaxis(weights.codes(), weights.axis, -1)
    scale = format.scale(last, codes.shape[-1])[..., ::per]
    offset = format.offset(last, codes.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):
        low = scale * np.float32(-format.zero)
        if offset is not None:
            low = low + offset[..., ::per] * np.float32(format.offset_sign)
        high = np.float32(15) * scale + low
        largest = np.maximum(np.abs(low), np.abs(high))
        finite = np.isfinite(largest)
        largest = (largest.view(np.int32) + np.int32(BFP_MARGIN)).view(np.float32)
        power = _power_of_two(
            np.where(finite, np.maximum(largest, np.float32(BFP_SMALLEST_WEIGHT)), np.float32(1))
        )
        step, start = (
            np.rint(np.where(finite, number / power, 0)).astype(np.int32)
            for number in (scale * np.float32(1 << BFP_STEP_BITS), low)
        )
    half = 1 << (BFP_STEP_BITS - 1)
    moved = (codes * np.repeat(step, per, -1) + half) >> BFP_STEP_BITS
    return moved + np.repeat(start, per, -1), np.where(finite, power, np.float32(np.nan))
