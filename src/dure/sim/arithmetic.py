"""A chip's arithmetic: what its engines compute where that differs from NumPy's.

A dot of floats multiplies exactly and sums in float32.  A type whose bits the chip reads otherwise
than IEEE 754 (a 16-bit float with more exponent and less mantissa) has a :class:`FloatFormat`: its
values are held as float32 while an instruction computes, every result is rounded to the format
once, and memories hold the format's own bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from dure.errors import TargetError
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.core import Op
from dure.ir.dtypes import Array, DType
from dure.ir.interpret import Results, RuntimeValue
from dure.machine.chip import Chip

Floats: TypeAlias = "npt.NDArray[np.float32]"


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary float of 1 + exponent + mantissa bits, with subnormals, infinities and NaN."""

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if not (2 <= self.exponent <= 8 and 1 <= self.mantissa <= 23):
            raise TargetError(
                f"a float format of {self.exponent} exponent and {self.mantissa} mantissa bits",
                rule="a format has 2 to 8 exponent and 1 to 23 mantissa bits, float32's at most",
                fix="mend the format",
            )

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 1 + self.exponent + self.mantissa

    @property
    def _bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def _dropped(self) -> int:
        """Mantissa bits of float32 that the format lacks."""
        return 23 - self.mantissa

    def _subnormal(self, size: Floats) -> tuple[npt.NDArray[np.bool_], float]:
        """Which sizes lie below the smallest normal number, and subnormals' unit."""
        return size < 2.0 ** (1 - self._bias), 2.0 ** (1 - self._bias - self.mantissa)

    def round(self, values: Array) -> Floats:
        """The nearest value of the format, ties to even, as float32."""
        with np.errstate(all="ignore"):
            given = np.array(values, np.float32, ndmin=1)
            bits, drop = given.view(np.uint32), np.uint32(self._dropped)
            if drop:
                # A carry out of the mantissa goes into the exponent, which is right.
                half = np.uint32((1 << (self._dropped - 1)) - 1)
                rounded = bits + half + ((bits >> drop) & np.uint32(1))
                rounded = (rounded >> drop) << drop
            else:
                rounded = bits.copy()
            found: Floats = rounded.view(np.float32)
            size = np.abs(given)
            low, unit = self._subnormal(size)
            if low.any():
                small = np.rint(given[low].astype(np.float64) / unit) * unit
                found[low] = np.copysign(small, given[low])
            over = np.abs(found) >= np.exp2(np.float32(self._bias + 1))
            if over.any():
                found[over] = np.copysign(np.float32(np.inf), given[over])
            lost = np.isnan(given)
            if lost.any():
                found[lost] = np.nan
        return found.reshape(np.shape(values))

    def encode(self, values: Array) -> Array:
        """The bits of the nearest values, as unsigned integers that hold them."""
        rounded = np.atleast_1d(self.round(values))
        bits, drop = rounded.view(np.uint32), np.uint32(self._dropped)
        size = np.abs(rounded)
        code = (bits & np.uint32(0x7FFFFFFF)) - np.uint32((127 - self._bias) << 23) >> drop
        low, unit = self._subnormal(size)
        if low.any():
            code[low] = (size[low].astype(np.float64) / unit).astype(np.uint32)
        top = ((1 << self.exponent) - 1) << self.mantissa
        special = ~np.isfinite(rounded)
        if special.any():
            code[special] = np.where(np.isnan(rounded[special]), top | 1, top)
        code |= (bits >> np.uint32(31)) << np.uint32(self.bits - 1)
        narrow = code.astype(np.dtype(f"uint{16 if self.bits <= 16 else 32}"))
        return narrow.reshape(np.shape(values))

    def decode(self, code: Array) -> Floats:
        """The values of these bits."""
        if self.bits > 16:
            return self._decoded(code)
        return _table(self)[cast("npt.NDArray[np.uint16]", code)]

    def _decoded(self, code: Array) -> Floats:
        number = code.astype(np.int64)
        mantissa = number & ((1 << self.mantissa) - 1)
        power = (number >> self.mantissa) & ((1 << self.exponent) - 1)
        fraction = np.where(power > 0, mantissa | (1 << self.mantissa), mantissa)
        scale = np.maximum(power, 1) - self._bias - self.mantissa
        size = np.ldexp(fraction.astype(np.float64), scale)
        special = np.where(mantissa == 0, np.inf, np.nan)
        size = np.where(power == (1 << self.exponent) - 1, special, size)
        sign = (number >> (self.bits - 1)) & 1
        return np.where(sign == 1, -size, size).astype(np.float32)


@cache
def _table(format: FloatFormat) -> Floats:
    """The value of every code of a format of 16 bits at most."""
    # Reached through its format only, of which it is a part.
    return format._decoded(np.arange(1 << 16))  # pyright: ignore[reportPrivateUsage]


Formats: TypeAlias = "Mapping[DType, FloatFormat]"


def formats_of(chip: Chip) -> Formats:
    """The types that the chip has a format of its own for."""
    found: dict[DType, FloatFormat] = {}
    for name, entry in chip.formats.items():
        dtype = dtypes.DTYPES.get(name)
        format = FloatFormat(int(entry.exponent.base), int(entry.mantissa.base))
        if dtype is None or not dtype.is_float or dtype.bits != format.bits:
            raise TargetError(
                f"{chip.name} gives '{name}' a format of {format.bits} bits",
                rule="a format is of a float type with as many bits",
                fix="name a float type of that width",
            )
        found[dtype] = format
    return found


class Arithmetic:
    """Evaluates the tile ops of an instruction as the chip does (:class:`Frame`'s evaluator)."""

    def __init__(self, formats: Formats) -> None:
        self.formats = formats

    def __call__(
        self, op: Op, attrs: Mapping[str, Any], operands: Sequence[RuntimeValue]
    ) -> Results:
        """The results of an op."""
        if self.formats:
            attrs, operands = self._widened(op, attrs, operands)
        if op.name == "dot":
            found: Results = _dot(op, attrs, *cast("Sequence[Array | Blocks]", operands))
        else:
            found = cast("Callable[..., Results]", op.definition.semantics)(attrs, *operands)
        if self.formats and isinstance(found, np.ndarray):
            format = self.formats.get(cast(DType, op.result.type.dtype))
            return found if format is None else format.round(found)
        return found

    def _widened(
        self, op: Op, attrs: Mapping[str, Any], operands: Sequence[RuntimeValue]
    ) -> tuple[Mapping[str, Any], Sequence[RuntimeValue]]:
        """Float32 in place of each type that has a format; constants arrive in NumPy's type."""
        if attrs.get("dtype") in self.formats:
            attrs = {**attrs, "dtype": dtypes.float32}
        wide = [
            found.astype(np.float32)
            if isinstance(found, np.ndarray) and value.type.dtype in self.formats
            else found
            for value, found in zip(op.operands, operands, strict=True)
        ]
        return attrs, wide


def _dot(
    op: Op, attrs: Mapping[str, Any], a: Array | Blocks, b: Array | Blocks, c: Array | Blocks
) -> Array:
    """Products are exact; a float's sum is in float32, an integer's wraps around in int32."""
    if isinstance(a, Blocks) and a.format in dtypes.ACTIVATION_FORMATS and isinstance(b, Blocks):
        # The declared order of sums, block by block, is part of the op.
        return cast("Callable[..., Array]", op.definition.semantics)(attrs, a, b, c)
    assert isinstance(c, np.ndarray)
    left = a.decode() if isinstance(a, Blocks) else a
    right = b.decode() if isinstance(b, Blocks) else b
    if c.dtype != np.int32:
        total = np.matmul(left.astype(np.float32), right.astype(np.float32))
        total += c
        return total
    if max(left.dtype.itemsize, right.dtype.itemsize) > 2:
        return c + np.matmul(left.astype(np.int32), right.astype(np.int32))
    # Sums of 16-bit products are exact in float64, which BLAS multiplies fast.
    exact = np.matmul(_float64(left), _float64(right))
    return c + exact.astype(np.int64).astype(np.int32)


def _float64(values: Array) -> npt.NDArray[np.float64]:
    if values.dtype.kind == "V":
        values = values.astype(np.int8)
    return values.astype(np.float64)
