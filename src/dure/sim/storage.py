"""Tiles as bytes in a memory: where each element lies, and reading and writing them.

A memory is an array of bytes, one row for each partition; one without partitions has one row.  A
tile in it is dense and row-major, types below a byte packed with the first element in the low bits.
In a memory of P partitions the tile is a matrix (all extents but the last make its rows), and row r
lies in partition r mod P, behind the rows of that partition before it.  A block-quantized tile is
its planes one after another; what is only a sum of others isn't stored.

Elements travel as *raw* arrays: unsigned integers of the element's bits, in the tile's shape, so
that a DMA moves any type, and NaN patterns, unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dure.ir.blocks import Blocks
from dure.ir.dtypes import DERIVED_ROLES, Array, BlockFormat, DType, Plane
from dure.ir.pack import plane_shape
from dure.ir.types import TileType
from dure.sim.arithmetic import Formats

#: (partitions, bytes of each)
Bytes: TypeAlias = "npt.NDArray[np.uint8]"
#: Elements' bits as unsigned integers, one array a plane.
Raw: TypeAlias = Array

#: A byte that nobody wrote: every float made of such bytes is NaN.
POISON = 0xFF


def new_memory(partitions: int, size: int) -> Bytes:
    """A memory of poison: ``size`` bytes in each of ``partitions`` (1 where it has none)."""
    return np.full((partitions, size), POISON, np.uint8)


def raw_type(dtype: DType) -> np.dtype[np.generic]:
    """The unsigned integer that holds an element's bits."""
    return np.dtype(f"uint{max(8, dtype.bits)}")


def stored_planes(format: BlockFormat) -> tuple[Plane, ...]:
    """The planes that take up storage."""
    return tuple(p for p in format.planes if p.role not in DERIVED_ROLES)


@dataclass(frozen=True, slots=True)
class PlanePlace:
    """Where a plane lies: ``rows`` of ``columns``, from byte ``start`` of the tile."""

    dtype: DType
    shape: tuple[int, ...]
    per: int
    start: int
    partitions: int
    rows: int
    columns: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return (self.columns * self.dtype.bits + 7) // 8

    @property
    def size(self) -> int:
        """Bytes of the plane in the fullest partition."""
        return -(-self.rows // self.partitions) * self.row_bytes

    def read(self, memory: Bytes, address: int) -> Raw:
        """The elements' bits; a view of the memory where their placement allows it."""
        rows = self._rows(memory, address)
        if self.dtype.bits < 8:
            return _unpacked(rows, self.dtype.bits)[:, : self.columns].reshape(self.shape)
        return rows.view(raw_type(self.dtype)).reshape(self.shape)

    def write(self, memory: Bytes, address: int, raw: Raw) -> None:
        """Write the elements' bits."""
        matrix = np.ascontiguousarray(raw).reshape(self.rows, self.columns)
        if self.dtype.bits < 8:
            used = self.columns * self.dtype.bits % 8
            found = _packed(matrix, self.dtype.bits)
            if used:
                # The bits of a row's last byte behind its last element keep what they held.
                last = self._rows(memory, address)[:, -1]
                found[:, -1] |= last & np.uint8(0x100 - (1 << used))
        else:
            found = matrix.view(np.uint8)
        self._put(memory, address, found)

    def _rows(self, memory: Bytes, address: int) -> Bytes:
        at, width = address + self.start, self.row_bytes
        if self.rows <= self.partitions:
            return memory[: self.rows, at : at + width]
        layers = self._layers(memory, at)
        return layers.transpose(1, 0, 2).reshape(-1, width)[: self.rows]

    def _layers(self, memory: Bytes, at: int) -> Bytes:
        """(partition, layer, byte): row r is layer r // partitions."""
        return memory[:, at : at + self.size].reshape(self.partitions, -1, self.row_bytes)

    def _put(self, memory: Bytes, address: int, rows: Bytes) -> None:
        at, width = address + self.start, self.row_bytes
        if self.rows <= self.partitions:
            memory[: self.rows, at : at + width] = rows
            return
        layers = self._layers(memory, at)
        full, rest = divmod(self.rows, self.partitions)
        whole = rows[: full * self.partitions].reshape(full, self.partitions, width)
        layers[:, :full] = whole.transpose(1, 0, 2)
        if rest:
            layers[:rest, full] = rows[full * self.partitions :]


def _unpacked(rows: Bytes, bits: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (rows[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(len(rows), -1)


def _packed(matrix: Raw, bits: int) -> Bytes:
    each = 8 // bits
    rows, columns = matrix.shape
    padded = np.zeros((rows, -(-columns // each) * each), np.uint8)
    padded[:, :columns] = matrix.astype(np.uint8) & np.uint8((1 << bits) - 1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = padded.reshape(rows, -1, each) << shifts
    return np.bitwise_or.reduce(parts, axis=2).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class TilePlace:
    """How a tile of ``type`` lies in a memory; its address is given with each access."""

    type: TileType
    planes: tuple[PlanePlace, ...]

    @property
    def size(self) -> int:
        """Bytes of the tile (in the fullest partition)."""
        return max((p.start + p.size for p in self.planes), default=0)

    def read(self, memory: Bytes, address: int) -> tuple[Raw, ...]:
        """The bits of each plane's elements; views of the memory where they can be."""
        return tuple(plane.read(memory, address) for plane in self.planes)

    def write(self, memory: Bytes, address: int, raws: Sequence[Raw]) -> None:
        """Write the bits of each plane's elements."""
        for plane, raw in zip(self.planes, raws, strict=True):
            plane.write(memory, address, raw)


@cache
def place_tile(kind: TileType, partitions: int | None) -> TilePlace:
    """How a tile lies in a memory of ``partitions`` (None: it has none)."""
    planes: list[PlanePlace] = []
    start = 0
    for dtype, shape, per in _plane_shapes(kind):
        columns = shape[-1] if shape else 1
        rows = math.prod(shape[:-1])
        if partitions is None:
            rows, columns = 1, rows * columns
        planes.append(PlanePlace(dtype, shape, per, start, partitions or 1, rows, columns))
        start += planes[-1].size
    return TilePlace(kind, tuple(planes))


def _plane_shapes(kind: TileType) -> list[tuple[DType, tuple[int, ...], int]]:
    if isinstance(kind.dtype, DType):
        return [(kind.dtype, kind.shape, 1)]
    return [
        (p.dtype, plane_shape(kind.shape, kind.quantized_axis, p.per), p.per)
        for p in stored_planes(kind.dtype)
    ]


def raw_view(values: Array) -> Raw:
    """An array as its elements' bits, on the same storage."""
    return values.view(np.dtype(f"uint{8 * values.dtype.itemsize}"))


def to_values(kind: TileType, raws: Sequence[Raw], formats: Formats) -> Array | Blocks:
    """The numbers that bits stand for: a type with a format of the chip's own as float32."""
    if isinstance(kind.dtype, DType):
        return number_values(kind.dtype, raws[0], formats)
    axis = kind.quantized_axis % kind.rank
    named = {
        plane.name: number_values(plane.dtype, raw, {})
        for plane, raw in zip(stored_planes(kind.dtype), raws, strict=True)
    }
    return with_sums(Blocks(kind.dtype, axis, kind.shape, named))


def number_values(dtype: DType, raw: Raw, formats: Formats) -> Array:
    """Plain numbers from their bits."""
    format = formats.get(dtype)
    if format is not None:
        return format.decode(raw)
    if dtype.kind == "bool":
        return raw != 0
    return raw.view(dtype.numpy)


def to_raws(kind: TileType, values: Array | Blocks, formats: Formats) -> tuple[Raw, ...]:
    """The bits of numbers, in storage of their own."""
    if isinstance(values, Blocks):
        planes = stored_planes(values.format)
        return tuple(number_raw(p.dtype, values.planes[p.name], {}) for p in planes)
    assert isinstance(kind.dtype, DType)
    return (number_raw(kind.dtype, values, formats),)


def number_raw(dtype: DType, values: Array, formats: Formats) -> Raw:
    """The bits of plain numbers."""
    format = formats.get(dtype)
    if format is not None:
        return format.encode(values)
    return raw_view(np.array(values, dtype.numpy, order="C"))


def with_sums(blocks: Blocks) -> Blocks:
    """The same blocks with the planes that follow from the others."""
    sums = [p for p in blocks.format.planes if p.role == "sum"]
    if not sums:
        return blocks
    values = [p for p in blocks.format.planes if p.role == "value"]
    codes = np.moveaxis(blocks.codes(), blocks.axis, -1)
    planes = dict(blocks.planes)
    for plane in sums:
        parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // plane.per, plane.per)
        total = parts.sum(axis=-1).astype(plane.dtype.numpy)
        planes[plane.name] = np.moveaxis(total, -1, blocks.axis)
    for plane in values:
        planes[plane.name] = blocks.decode().astype(plane.dtype.numpy)
    return Blocks(blocks.format, blocks.axis, blocks.shape, planes)
