"""DMA between a tensor in a far memory and a buffer in a core's scratchpad.

The descriptor is that of the tile level's ``load`` and ``store``: indices in tiles, index lists,
strides.  A load moves only what exists; elements outside the tensor get ``fill`` where ``filling``
says that the engine writes it, else they keep what the buffer held.  ``share`` is the part
(numerator, denominator) of the bytes that the far memory itself must deliver: less than 1 where
several cores read the same bytes at once, or a shared memory keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dure.ir.core import Cost, Op, OpDef, Region, declare, op_definition
from dure.ir.rules import broken, tensor, tile
from dure.ir.tile import memory as tile_memory
from dure.ir.types import Type


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
