"""Element types: plain numbers, and block-quantized formats as named planes of bits.

A :class:`BlockFormat` says how a run of ``block`` elements along the quantized axis is stored: code
planes (low bits first), scale planes and offset planes, each with its bits and how many elements
one entry covers.  A value is ``scale * (code - zero) +- offset``; where ``scale`` is a product of
planes it is multiplied in the order in which the planes are declared.  Formats are GGML's (source:
the public GGUF specification and ggml-common.h) and the int8 format that activations are quantized
to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dure.errors import IRError

Kind: TypeAlias = Literal["float", "int", "uint", "bool"]
Array: TypeAlias = "npt.NDArray[np.generic]"


@dataclass(frozen=True, slots=True)
class DType:
    """A plain number type: its name, width in bits, and kind."""

    name: str
    bits: int
    kind: Kind
    numpy: np.dtype[np.generic]

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


def _dtype(name: str, bits: int, kind: Kind, numpy: npt.DTypeLike | None = None) -> DType:
    return DType(name, bits, kind, np.dtype(name if numpy is None else numpy))


float32 = _dtype("float32", 32, "float")
float16 = _dtype("float16", 16, "float")
bfloat16 = _dtype("bfloat16", 16, "float", ml_dtypes.bfloat16)
float8_e4m3fn = _dtype("float8_e4m3fn", 8, "float", ml_dtypes.float8_e4m3fn)
float8_e5m2 = _dtype("float8_e5m2", 8, "float", ml_dtypes.float8_e5m2)
#: The OCP microscaling formats: numbers of four bits, and powers of two.
float4_e2m1fn = _dtype("float4_e2m1fn", 4, "float", ml_dtypes.float4_e2m1fn)
float8_e8m0fnu = _dtype("float8_e8m0fnu", 8, "float", ml_dtypes.float8_e8m0fnu)
float64 = _dtype("float64", 64, "float")
int64 = _dtype("int64", 64, "int")
int32 = _dtype("int32", 32, "int")
int16 = _dtype("int16", 16, "int")
int8 = _dtype("int8", 8, "int")
int4 = _dtype("int4", 4, "int", ml_dtypes.int4)
uint8 = _dtype("uint8", 8, "uint")
uint16 = _dtype("uint16", 16, "uint")
uint32 = _dtype("uint32", 32, "uint")
uint4 = _dtype("uint4", 4, "uint", ml_dtypes.uint4)
uint2 = _dtype("uint2", 2, "uint", ml_dtypes.uint2)
uint1 = _dtype("uint1", 1, "uint", np.uint8)
bool_ = _dtype("bool", 8, "bool", np.bool_)

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        *(float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, float64),
        *(float4_e2m1fn, float8_e8m0fnu),
        *(int64, int32, int16, int8, int4, uint8, uint16, uint32, uint4, uint2, uint1, bool_),
    )
}

#: What entries are: parts of a value, or, for what computes with it, sums of codes and the value
#: itself in a type that holds it exactly.
PlaneRole: TypeAlias = Literal["code", "scale", "offset", "sum", "value"]
#: Roles of what follows from the others.
DERIVED_ROLES: tuple[PlaneRole, ...] = ("sum", "value")


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a block format.

    ``per`` elements of the quantized axis share one entry.  ``shift`` is where the entry's bits sit
    in the number that all planes of the same ``group`` make up together (a 6-bit code is 4 low and
    2 high bits).
    """

    name: str
    role: PlaneRole
    dtype: DType
    per: int = 1
    shift: int = 0
    group: str = ""


@dataclass(frozen=True)
class BlockFormat:
    """A block-quantized element type: ``block`` elements along one axis share their planes."""

    name: str
    block: int
    planes: tuple[Plane, ...]
    zero: int = 0
    offset_sign: Literal[1, -1] = 1

    @property
    def bits(self) -> float:
        """Stored bits an element, all planes together."""
        return sum(p.dtype.bits / p.per for p in self.planes if p.role not in DERIVED_ROLES)

    @cached_property
    def groups(self) -> dict[str, tuple[Plane, ...]]:
        """Planes by the number they make up: ``code``, then each scale and offset factor."""
        found: dict[str, list[Plane]] = {}
        for plane in self.planes:
            found.setdefault(plane.group or plane.name, []).append(plane)
        return {name: tuple(planes) for name, planes in found.items()}

    def factors(self, role: PlaneRole) -> tuple[tuple[Plane, ...], ...]:
        """The groups of this role; a scale is the product of its groups."""
        return tuple(planes for planes in self.groups.values() if planes[0].role == role)

    @property
    def scale_block(self) -> int:
        """Elements that share one scale: the smallest ``per`` of the scale and offset planes."""
        return min(p.per for p in self.planes if p.role in ("scale", "offset"))

    @property
    def is_float(self) -> bool:
        return True

    @property
    def is_integer(self) -> bool:
        return False

    def plane(self, name: str) -> Plane:
        """The plane of this name."""
        return next(p for p in self.planes if p.name == name)

    def decode(self, planes: dict[str, Array]) -> npt.NDArray[np.float32]:
        """Reference values of unpacked planes (entries along the last axis), in float32.

        Each plane array holds one entry per ``per`` elements.  The order of roundings is part of
        the format: scales multiply left to right, then code, then the offset is added or
        subtracted.
        """
        code = self._number("code", planes).astype(np.float32) - np.float32(self.zero)
        value = code * self.scale(planes, code.shape[-1])
        offset = self._product("offset", planes, code.shape[-1])
        if offset is None:
            return value
        return value + offset if self.offset_sign > 0 else value - offset

    def scale(self, planes: dict[str, Array], length: int) -> npt.NDArray[np.float32]:
        """The scale of each of ``length`` elements."""
        found = self._product("scale", planes, length)
        assert found is not None
        return found

    def offset(self, planes: dict[str, Array], length: int) -> npt.NDArray[np.float32] | None:
        """The offset of each of ``length`` elements (before its sign), or None."""
        return self._product("offset", planes, length)

    def _number(self, group: str, planes: dict[str, Array]) -> npt.NDArray[np.int32]:
        parts = self.groups[group]
        total = planes[parts[0].name].astype(np.int32)
        for part in parts[1:]:
            # Parts do not overlap; where the low part is signed, they add up.
            total = total + (planes[part.name].astype(np.int32) << part.shift)
        return total

    def _product(
        self, role: PlaneRole, planes: dict[str, Array], length: int
    ) -> npt.NDArray[np.float32] | None:
        product: npt.NDArray[np.float32] | None = None
        for group in self.factors(role):
            if group[0].dtype.is_float:
                entry = planes[group[0].name].astype(np.float32)
            else:
                entry = self._number(group[0].group or group[0].name, planes).astype(np.float32)
            spread = np.repeat(entry, group[0].per, axis=-1)[..., :length]
            product = spread if product is None else product * spread
        return product

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


def _codes(low: int, high: int = 0) -> tuple[Plane, ...]:
    planes = (Plane("low", "code", DTYPES[f"uint{low}"], group="code"),)
    if high:
        planes += (Plane("high", "code", DTYPES[f"uint{high}"], shift=low, group="code"),)
    return planes


def _six_bits(name: str, role: PlaneRole) -> tuple[Plane, ...]:
    low = Plane(f"{name}_low", role, uint4, per=32, group=name)
    return low, Plane(f"{name}_high", role, uint2, per=32, shift=4, group=name)


def _k_quant(name: str, high_bits: int) -> BlockFormat:
    scales = (Plane("d", "scale", float16, per=256), *_six_bits("s", "scale"))
    offsets = (Plane("dmin", "offset", float16, per=256), *_six_bits("m", "offset"))
    return BlockFormat(name, 256, (*scales, *offsets, *_codes(4, high_bits)), offset_sign=-1)


def _simple(name: str, high_bits: int, zero: int) -> BlockFormat:
    offset = () if zero else (Plane("m", "offset", float16, per=32),)
    planes = (Plane("d", "scale", float16, per=32), *offset, *_codes(4, high_bits))
    return BlockFormat(name, 32, planes, zero)


_INT8_CODES = Plane("code", "code", int8)

q8_0 = BlockFormat("q8_0", 32, (Plane("d", "scale", float16, per=32), _INT8_CODES))
q4_0 = _simple("q4_0", 0, 8)
q4_1 = _simple("q4_1", 0, 0)
q5_0 = _simple("q5_0", 1, 16)
q5_1 = _simple("q5_1", 1, 0)
q4_k = _k_quant("q4_k", 0)
q5_k = _k_quant("q5_k", 1)
q6_k = BlockFormat(
    "q6_k",
    256,
    (
        Plane("d", "scale", float16, per=256),
        Plane("s", "scale", int8, per=16),
        *_codes(4, 2),
    ),
    zero=32,
)
#: Activations: int8 codes in blocks of 32 with a float32 scale, and the sum of each 16 codes.
int8_block32 = BlockFormat(
    "int8_block32",
    32,
    (
        Plane("d", "scale", float32, per=32),
        _INT8_CODES,
        Plane("sum", "sum", int32, per=16),
    ),
)
#: Activations with twice the bits, for products whose error is seen at once (the logits): a 16-bit
#: code is ``256 * high + low`` of two int8 planes, so that bytewise dot products still do.
int16_block32 = BlockFormat(
    "int16_block32",
    32,
    (
        Plane("d", "scale", float32, per=32),
        Plane("code", "code", int8, group="code"),
        Plane("high", "code", int8, shift=8, group="code"),
        Plane("sum", "sum", int32, per=16),
    ),
)

#: Activations as block floating point: whole numbers from -256 to 256, times one power of two for
#: 32.  Weights that they meet are rounded to the same (see
#: :func:`dure.ir.blocks.rounded`), so that every value is a bfloat16 number, and the sum of a
#: block's products exact in float32 as well as in int32.
bfp9_block32 = BlockFormat(
    "bfp9_block32",
    32,
    (
        Plane("d", "scale", float32, per=32),
        Plane("code", "code", int16),
        Plane("sum", "sum", int32, per=32),
        Plane("value", "value", bfloat16),
    ),
)

FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        *(q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k),
        *(int8_block32, int16_block32, bfp9_block32),
    )
}

#: What activations are quantized to while a program runs, and their largest code.
ACTIVATION_FORMATS: dict[BlockFormat, int] = {
    int8_block32: 127,
    int16_block32: 127 * 256,
    bfp9_block32: 256,
}


def takes_bfp(weights: BlockFormat) -> bool:
    """Whether such weights may meet ``bfp9_block32``: codes of four bits, a scale for 32 k."""
    codes = weights.groups["code"]
    return len(codes) == 1 and codes[0].dtype is uint4 and weights.scale_block >= bfp9_block32.block


ElementType: TypeAlias = DType | BlockFormat


def element_type(name: str) -> ElementType:
    """The element type of this name."""
    found = DTYPES.get(name) or FORMATS.get(name)
    if found is None:
        raise IRError(
            f"unknown element type '{name}'",
            rule="an element type is one that dure declares",
            fix=f"one of {', '.join([*DTYPES, *FORMATS])}",
        )
    return found
