"""Ops that make tiles or move their elements about: full, iota, broadcast, reshape, transpose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir.blocks import Blocks
from dure.ir.core import Cost, OpDef, Region, declare
from dure.ir.dtypes import Array, BlockFormat, DType, ElementType
from dure.ir.rules import broken, free, moves_bytes, plain, tile
from dure.ir.types import TileType, Type


def _full_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    dtype: ElementType = attrs["dtype"]
    shape: tuple[int, ...] = tuple(attrs["shape"])
    if not isinstance(dtype, BlockFormat):
        return [TileType(shape, dtype)]
    axis: int = attrs["quantized_axis"]
    if attrs["value"] != 0:
        raise broken(
            f"full of {attrs['value']} in {dtype}",
            "the only block-quantized constant is 0",
            "quantize a tile of floats",
        )
    return [TileType(shape, dtype, axis)]


declare(
    OpDef(
        "full",
        "tile",
        _full_typing,
        None,
        free,
        elementwise=True,
        defaults={"quantized_axis": -1},
        doc="full {shape, dtype, value}: a number, or an index expression, everywhere",
    )
)


def _iota(attrs: Mapping[str, Any]) -> Array:
    dtype: DType = attrs["dtype"]
    size: int = attrs["size"]
    return np.arange(size, dtype=np.int64).astype(dtype.numpy)


declare(
    OpDef(
        "iota",
        "tile",
        lambda operands, attrs, regions: [TileType((attrs["size"],), attrs["dtype"])],
        _iota,
        free,
        doc="iota {size, dtype}: 0, 1, ..., size - 1",
    )
)


def _broadcast_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = plain(operands[0], "the operand of broadcast")
    shape: tuple[int, ...] = tuple(attrs["shape"])
    fits = len(shape) == source.rank and all(
        have in (1, want) for have, want in zip(source.shape, shape, strict=True)
    )
    if not fits:
        raise broken(
            f"broadcast of {source.shape} to {shape}",
            "ranks agree, and each extent is 1 or the same",
            "add axes of extent 1 with reshape or x[:, None]",
        )
    return [TileType(shape, source.dtype)]


def _broadcast(attrs: Mapping[str, Any], x: Array) -> Array:
    shape: tuple[int, ...] = tuple(attrs["shape"])
    return np.broadcast_to(x, shape)


declare(
    OpDef(
        "broadcast",
        "tile",
        _broadcast_typing,
        _broadcast,
        free,
        doc="broadcast(x) {shape}: repeat extents of 1",
    )
)


def _reshape_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = plain(operands[0], "the operand of reshape")
    shape: tuple[int, ...] = tuple(attrs["shape"])
    if math.prod(shape) != source.elements:
        raise broken(
            f"reshape of {source.shape} ({source.elements} elements) to {shape}",
            "reshape keeps the number of elements",
            "choose a shape whose product agrees",
        )
    return [TileType(shape, source.dtype)]


def _reshape(attrs: Mapping[str, Any], x: Array) -> Array:
    shape: tuple[int, ...] = tuple(attrs["shape"])
    return np.reshape(x, shape)


declare(
    OpDef(
        "reshape",
        "tile",
        _reshape_typing,
        _reshape,
        moves_bytes,
        doc="reshape(x) {shape}: the same elements in row-major order",
    )
)


def _transpose_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = tile(operands[0], "the operand of transpose")
    order: tuple[int, ...] = tuple(attrs["order"])
    if sorted(order) != list(range(source.rank)):
        raise broken(
            f"transpose by {order} of a tile of rank {source.rank}",
            "the order names every axis once",
        )
    axis = order.index(source.quantized_axis % source.rank) if source.block is not None else -1
    return [TileType(tuple(source.shape[a] for a in order), source.dtype, axis)]


def _transpose(attrs: Mapping[str, Any], x: Array | Blocks) -> Array | Blocks:
    order: tuple[int, ...] = tuple(attrs["order"])
    return x.transposed(order) if isinstance(x, Blocks) else np.transpose(x, order)


declare(
    OpDef(
        "transpose",
        "tile",
        _transpose_typing,
        _transpose,
        lambda op: Cost(bytes=moves_bytes(op).bytes),
        doc="transpose(x) {order}",
    )
)
