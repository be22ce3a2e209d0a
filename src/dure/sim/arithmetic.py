"""A chip's arithmetic: what its engines compute where that differs from NumPy's.

A dot of floats multiplies exactly and sums in float32.  A type whose bits the chip reads otherwise
than IEEE 754 (a 16-bit float with more exponent and less mantissa) has a :class:`FloatFormat`: its
values are held as float32 while an instruction computes, every result is rounded to the format
once, and memories hold the format's own bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

    def round(self, values: Array) -> Floats:
        """The nearest value of the format, ties to even, as float32."""
        with np.errstate(all="ignore"):
            wide = np.asarray(values, np.float64)
            _, power = np.frexp(wide)
        # The unit in the last place; subnormals share that of the smallest normal number.
        power = np.maximum(power - 1, 1 - self._bias) - self.mantissa
        with np.errstate(all="ignore"):
            rounded = np.ldexp(np.rint(np.ldexp(wide, -power)), power)
            limit = np.ldexp(2.0 - np.ldexp(1.0, -self.mantissa), self._bias)
            rounded = np.where(np.abs(rounded) > limit, np.copysign(np.inf, rounded), rounded)
            return np.where(np.isfinite(wide), rounded, wide).astype(np.float32)

    def encode(self, values: Array) -> Array:
        """The bits of the nearest values, as unsigned integers that hold them."""
        rounded = self.round(values).astype(np.float64)
        size = np.abs(rounded)
        top = ((1 << self.exponent) - 1) << self.mantissa
        with np.errstate(all="ignore"):
            _, power = np.frexp(size)
            power = np.maximum(power - 1, 1 - self._bias)
            scaled = np.where(np.isfinite(size), np.ldexp(size, self.mantissa - power), 0)
            # A normal number's leading one adds 1 to the exponent field by itself.
            field = (power + self._bias - 1).astype(np.int64) << self.mantissa
            code = np.where(size == 0, 0, field + scaled.astype(np.int64))
        code = np.where(np.isinf(size), top, np.where(np.isnan(size), top | 1, code))
        code |= np.signbit(rounded).astype(np.int64) << (self.bits - 1)
        return code.astype(np.dtype(f"uint{16 if self.bits <= 16 else 32}"))

    def decode(self, code: Array) -> Floats:
        """The values of these bits."""
        number = code.astype(np.int64)
        mantissa = number & ((1 << self.mantissa) - 1)
        power = (number >> self.mantissa) & ((1 << self.exponent) - 1)
        normal = power > 0
        fraction = np.where(normal, mantissa | (1 << self.mantissa), mantissa).astype(np.float64)
        size = np.ldexp(fraction, np.maximum(power, 1) - self._bias - self.mantissa)
        special = np.where(mantissa == 0, np.inf, np.nan)
        size = np.where(power == (1 << self.exponent) - 1, special, size)
        sign = (number >> (self.bits - 1)) & 1
        return np.where(sign == 1, -size, size).astype(np.float32)


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
