"""Reference values of block-quantized tensors and tiles: their planes as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dure.ir.dtypes import ACTIVATION_FORMATS, Array, BlockFormat, int16_block32


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
