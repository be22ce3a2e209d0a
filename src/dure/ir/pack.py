"""Reference packing: values to the bytes of any layout and back, by address arithmetic.

Bit ``b`` of a buffer is bit ``b % 8`` (counted from the least significant) of byte ``b // 8``; an
entry of several bytes is little-endian.  An address is a sum of one term per logical axis, so that
whole tensors are packed with a handful of NumPy operations.  Production packing and every packed
kernel are tested against this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dure.errors import IRError
from dure.ir.blocks import Blocks
from dure.ir.dtypes import Array, DType, ElementType
from dure.ir.expr import evaluate
from dure.ir.layout import AnyLayout, Digit, Layout, PlaneLayouts

Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Addresses: TypeAlias = "npt.NDArray[np.int64]"

_NO_SIZES: Mapping[str, int] = {}


def addresses(
    layout: Layout, shape: Sequence[int], sizes: Mapping[str, int] = _NO_SIZES
) -> Addresses:
    """The bit address of every element of a tensor of this shape, as an array of that shape.

    ``sizes`` gives the symbols in the layout's strides.  Raises IRError for a layout that leaves
    the dimension ``offset``: one buffer holds one place.
    """
    if layout.rank != len(shape):
        raise IRError(
            f"a layout of {layout.rank} axes for a tensor of rank {len(shape)}",
            rule="a layout has the digits of every logical axis",
            fix="choose a layout of the tensor's rank",
        )
    total = np.full(tuple(shape), evaluate(layout.offset, sizes), np.int64)
    for axis, (digits, extent) in enumerate(zip(layout.axes, shape, strict=True)):
        along = _axis_addresses(digits, extent, sizes)
        total += along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return total


def _axis_addresses(digits: Sequence[Digit], extent: int, sizes: Mapping[str, int]) -> Addresses:
    rest = np.arange(extent, dtype=np.int64)
    total = np.zeros(extent, np.int64)
    for digit in reversed(digits):
        if digit.dim != "offset":
            raise IRError(
                f"a digit that counts in '{digit.dim}'",
                rule="one buffer holds the addresses of one place",
                fix="pack the part of each place by itself",
            )
        value = rest if digit.extent is None else rest % digit.extent
        total += value * evaluate(digit.stride, sizes)
        rest = rest // digit.extent if digit.extent is not None else rest - value
    if np.any(rest != 0):
        raise IRError(
            f"an axis of {extent} elements is longer than its layout's digits",
            rule="the outermost digit's extent covers the axis, or is free",
            fix="leave the outermost digit's extent open",
        )
    return total


def packed_bytes(
    layout: AnyLayout,
    element: ElementType,
    shape: Sequence[int],
    axis: int = -1,
    sizes: Mapping[str, int] = _NO_SIZES,
) -> int:
    """Bytes from the buffer's start to the last bit of the tensor."""
    ends = [
        int(found.max()) + dtype.bits
        for found, dtype in _planes(layout, element, shape, axis, sizes)
        if found.size
    ]
    return (max(ends, default=0) + 7) // 8


def unpack(
    buffer: Bytes,
    layout: AnyLayout,
    element: ElementType,
    shape: Sequence[int],
    axis: int = -1,
    sizes: Mapping[str, int] = _NO_SIZES,
) -> Array | Blocks:
    """The values that ``buffer`` (uint8, one-dimensional) holds: an array, or Blocks for a format.

    Raises IRError if the layout reaches outside the buffer.
    """
    planes = [
        _read(buffer, found, dtype) for found, dtype in _planes(layout, element, shape, axis, sizes)
    ]
    if isinstance(element, DType):
        return planes[0]
    named = dict(zip((p.name for p in element.planes), planes, strict=True))
    return Blocks(element, axis % len(shape), tuple(shape), named)


def pack(
    values: Array | Blocks,
    layout: AnyLayout,
    element: ElementType,
    buffer: Bytes | None = None,
    sizes: Mapping[str, int] = _NO_SIZES,
) -> Bytes:
    """The bytes of ``values`` in this layout, written into ``buffer`` (None: new zeros)."""
    axis = values.axis if isinstance(values, Blocks) else -1
    if buffer is None:
        buffer = np.zeros(packed_bytes(layout, element, values.shape, axis, sizes), np.uint8)
    if isinstance(values, Blocks):
        planes = [values.planes[p.name] for p in values.format.planes]
    else:
        planes = [values]
    places = _planes(layout, element, values.shape, axis, sizes)
    for (found, dtype), entries in zip(places, planes, strict=True):
        _write(buffer, found, dtype, entries)
    return buffer


def _planes(
    layout: AnyLayout,
    element: ElementType,
    shape: Sequence[int],
    axis: int,
    sizes: Mapping[str, int],
) -> list[tuple[Addresses, DType]]:
    """The addresses and type of each plane; plain numbers are one plane."""
    if isinstance(element, DType) and isinstance(layout, Layout):
        return [(addresses(layout, shape, sizes), element)]
    if isinstance(element, DType) or isinstance(layout, Layout):
        raise IRError(
            f"a tensor of {element} with {layout}",
            rule="plain numbers have one layout, a block-quantized tensor one for each plane",
            fix="use PlaneLayouts for a block format, and Layout for plain numbers",
        )
    return [
        (addresses(_plane_layout(layout, p.name), plane_shape(shape, axis, p.per), sizes), p.dtype)
        for p in element.planes
    ]


def _plane_layout(layouts: PlaneLayouts, name: str) -> Layout:
    found = dict(layouts.planes).get(name)
    if found is None:
        raise IRError(
            f"no layout for plane '{name}' in {layouts}",
            rule="a block-quantized tensor has a layout for each plane of its format",
            fix=f"add the layout of '{name}'",
        )
    return found


def plane_shape(shape: Sequence[int], axis: int, per: int) -> tuple[int, ...]:
    """The shape of a plane with one entry per ``per`` elements of ``axis``."""
    axis %= len(shape)
    if shape[axis] % per:
        raise IRError(
            f"{shape[axis]} elements along a quantized axis in blocks of {per}",
            rule="a quantized axis holds whole blocks",
            fix=f"pad it to a multiple of {per}",
        )
    return tuple(e // per if a == axis else e for a, e in enumerate(shape))


def _span(buffer: Bytes, places: Addresses, bits: int) -> int:
    """Bytes that an entry touches at most, after checking that all entries lie in the buffer."""
    if buffer.dtype != np.uint8 or buffer.ndim != 1:
        raise IRError(
            f"a buffer of {buffer.dtype} and rank {buffer.ndim}",
            rule="a buffer is a one-dimensional array of uint8",
            fix="view it as bytes",
        )
    low, high = int(places.min()), int(places.max()) + bits
    if low < 0 or high > 8 * len(buffer):
        raise IRError(
            f"a layout that touches bits {low} to {high} of a buffer of {8 * len(buffer)} bits",
            rule="a layout stays inside its buffer",
            fix="check the tensor's shape, the layout's strides and the buffer's size",
        )
    return (bits + int((places & 7).max()) + 7) // 8


def _read(buffer: Bytes, places: Addresses, dtype: DType) -> Array:
    if not places.size:
        return np.zeros(places.shape, dtype.numpy)
    first, shift = places >> 3, (places & 7).astype(np.uint64)
    touched = _span(buffer, places, dtype.bits)
    total = np.zeros(places.shape, np.uint64)
    for number in range(min(touched, 8)):
        # Past the end only where the entry's own bits are over: any byte will do.
        at = np.minimum(first + number, len(buffer) - 1)
        total |= buffer[at].astype(np.uint64) << np.uint64(8 * number)
    total >>= shift
    if touched > 8:
        # Only a 64-bit entry off a byte's boundary reaches a ninth byte.
        at = np.minimum(first + 8, len(buffer) - 1)
        ninth = buffer[at].astype(np.uint64) << (np.uint64(64) - np.maximum(shift, np.uint64(1)))
        total |= np.where(shift > 0, ninth, np.uint64(0))
    return _from_bits(total & np.uint64((1 << dtype.bits) - 1), dtype)


def _write(buffer: Bytes, places: Addresses, dtype: DType, entries: Array) -> None:
    if not places.size:
        return
    places = places.reshape(-1)
    touched = _span(buffer, places, dtype.bits)
    first, shift = places >> 3, (places & 7).astype(np.uint64)
    bits = _to_bits(entries, dtype).reshape(-1)
    mask = np.uint64((1 << dtype.bits) - 1)
    for number in range(touched):
        mine, keep = _byte(bits, shift, number), _byte(mask, shift, number)
        at = np.minimum(first + number, len(buffer) - 1)
        np.bitwise_and.at(buffer, at, ~keep)
        np.bitwise_or.at(buffer, at, mine)


def _byte(bits: npt.NDArray[np.uint64] | np.uint64, shift: npt.NDArray[np.uint64], n: int) -> Bytes:
    """Byte ``n`` of ``bits << shift``."""
    down = np.int64(8 * n) - shift.astype(np.int64)
    left = bits << np.maximum(-down, 0).astype(np.uint64)
    right = bits >> np.minimum(np.maximum(down, 0), 63).astype(np.uint64)
    found = np.where(down < 0, left, np.where(down > 63, np.uint64(0), right))
    return (found & np.uint64(255)).astype(np.uint8)


def _from_bits(bits: npt.NDArray[np.uint64], dtype: DType) -> Array:
    if dtype.bits < 8 and dtype.is_float:
        return bits.astype(np.uint8).view(dtype.numpy)
    if dtype.bits < 8:
        number = bits.astype(np.int64)
        if dtype.kind == "int":
            number -= (number >> (dtype.bits - 1)) << dtype.bits
        return number.astype(np.int8).astype(dtype.numpy)
    if dtype.kind == "bool":
        return bits != 0
    unsigned = bits.astype(np.dtype(f"uint{dtype.bits}"))
    return unsigned.view(dtype.numpy)


def _to_bits(entries: Array, dtype: DType) -> npt.NDArray[np.uint64]:
    if dtype.bits < 8 and dtype.is_float:
        exact = np.ascontiguousarray(entries.astype(dtype.numpy))
        return exact.view(np.uint8).astype(np.uint64)
    if dtype.bits < 8:
        number = entries.astype(np.int8).astype(np.int64)
        return (number & ((1 << dtype.bits) - 1)).astype(np.uint64)
    exact = np.ascontiguousarray(entries.astype(dtype.numpy))
    return exact.view(np.dtype(f"uint{dtype.bits}")).astype(np.uint64)
