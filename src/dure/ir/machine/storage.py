"""Buffers, semaphores, and the ops that turn, wait and signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dure.ir import dtypes
from dure.ir.core import OpDef, Region, declare
from dure.ir.rules import broken, free, tile
from dure.ir.types import TileType, Type

#: A semaphore is one int32 counter.
COUNTER = TileType((1,), dtypes.int32)


def _buffer_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    dtype: Any = attrs["dtype"]
    for operand in operands:
        tile(operand, "the buffer that is seen otherwise")
    if len(operands) > 1:
        raise broken("a buffer of several others", "a buffer is new, or another one's bytes")
    if attrs["offset"] < 0 or attrs["pitch"] < 0 or attrs["stages"] < 1:
        raise broken(
            f"a buffer at {attrs['offset']} with {attrs['stages']} slots {attrs['pitch']} apart",
            "offset and pitch are not negative, and there is at least one slot",
        )
    return [TileType(tuple(attrs["shape"]), dtype, attrs["quantized_axis"])]


declare(
    OpDef(
        "buffer",
        "machine",
        _buffer_typing,
        None,
        free,
        defaults={"stages": 1, "pitch": 0, "quantized_axis": -1},
        doc="buffer(*same) {memory, offset, shape, dtype, stages, pitch}: storage of a tile; "
        "offset and pitch in bytes (of each partition, where the memory has partitions); with an "
        "operand, that buffer's bytes seen as another tile",
    )
)


def _semaphore_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    if not 0 <= attrs["initial"] <= attrs["maximum"]:
        raise broken(
            f"a semaphore that starts at {attrs['initial']} of at most {attrs['maximum']}",
            "a semaphore starts between 0 and its maximum",
        )
    return [COUNTER]


declare(
    OpDef(
        "semaphore",
        "machine",
        _semaphore_typing,
        None,
        free,
        defaults={"initial": 0},
        doc="semaphore() {initial, maximum}: a counter, which ends at its initial value",
    )
)


def _counts_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    if len(operands) != 1 or operands[0] != COUNTER or attrs["count"] < 1:
        raise broken("a wait or signal of other than one semaphore by at least 1", "count >= 1")
    return []


for _name, _doc in (
    ("wait", "blocks until the semaphore is at least count, then subtracts it"),
    ("signal", "adds count once all that the queue issued before has completed"),
):
    declare(
        OpDef(
            _name,
            "machine",
            _counts_typing,
            None,
            free,
            defaults={"count": 1},
            doc=f"{_name}(semaphore) {{queue, count}}: {_doc}",
        )
    )


def _rotate_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    for operand in operands:
        tile(operand, "what rotate turns")
    return []


declare(
    OpDef(
        "rotate",
        "machine",
        _rotate_typing,
        None,
        free,
        doc="rotate(*buffers): ops that follow in the text use the buffers' next slots",
    )
)
