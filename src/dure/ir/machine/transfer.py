"""DMA between a tensor in a far memory and a buffer in a core's scratchpad.

The descriptor is that of the tile level's ``load`` and ``store``: indices in tiles, index lists,
strides.  A load moves only what exists; elements outside the tensor get ``fill`` where ``filling``
says that the engine writes it, else they keep what the buffer held.  ``share`` is the part
(numerator, denominator) of the bytes that the far memory itself must deliver: less than 1 where
several cores read the same bytes at once, or a shared memory keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from dure.ir.core import Cost, Op, OpDef, Region, declare, op_definition
from dure.ir.expr import Expr, as_expr
from dure.ir.rules import broken, free, tensor, tile
from dure.ir.tile import memory as tile_memory
from dure.ir.types import Type, static_extent


def _load_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    tensor(operands[0], "the source of dma_load")
    target = tile(operands[1], "the target of dma_load")
    descriptor = {**attrs, "shape": target.shape}
    found = op_definition("load").typing([operands[0], *operands[2:]], descriptor, ())
    if [target] != list(found):
        raise broken(f"dma_load of {found[0]} into a buffer of {target}", "a DMA converts nothing")
    return []


def _store_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    tensor(operands[0], "the target of dma_store")
    return op_definition("store").typing(operands, attrs, ())


def _bytes(op: Op) -> Cost:
    return Cost(bytes=op.operands[1].tile.bytes)


def _reshaped_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    source = tensor(operands[0], "the source of reshaped")
    shape = tuple(as_expr(extent) for extent in attrs["shape"])
    if source.layout is not None or source.block is not None:
        raise broken(f"{source} seen in another shape", "only plain tensors lie in row-major order")
    if _different(source.shape, shape):
        raise broken(f"{source} as {attrs['shape']}", "another shape has as many elements")
    return [replace(source, shape=shape)]


def _different(first: Sequence[Expr], second: Sequence[Expr]) -> bool:
    """Whether two shapes of known extents have other numbers of elements."""
    known = [[static_extent(e) for e in shape] for shape in (first, second)]
    sizes = [prod(e for e in shape if e is not None) for shape in known if None not in shape]
    return len(sizes) == 2 and sizes[0] != sizes[1]


declare(
    OpDef(
        "reshaped",
        "machine",
        _reshaped_typing,
        None,
        free,
        doc="reshaped(tensor) {shape}: the elements of an argument, row-major, in another shape",
    )
)

_COMMON = {**tile_memory.DESCRIPTOR, "share": (1, 1)}
declare(
    OpDef(
        "dma_load",
        "machine",
        _load_typing,
        None,
        _bytes,
        defaults={**_COMMON, "fill": 0.0, "filling": True},
        doc="dma_load(tensor, buffer, *lists) {queue, index, step, offset, stride, list_axes, fill,"
        " filling, share}",
    )
)
declare(
    OpDef(
        "dma_store",
        "machine",
        _store_typing,
        None,
        _bytes,
        defaults={**_COMMON, "combine": ""},
        doc="dma_store(tensor, buffer, *lists) {queue, index, step, offset, stride, list_axes, "
        "combine, share}",
    )
)
