"""Conversions to wider floats are made anew for each op that reads them.

An engine whose passes begin with a conversion widens what it reads at no cost.  A wide tile that
several ops share would be stored, which takes a pass and more bytes, for nothing.
"""

from __future__ import annotations

from dataclasses import replace

from dure.ir.core import Function, Op, Region, Value
from dure.ir.dtypes import DType
from dure.machine.chip import Chip


def widen_apart(function: Function, chip: Chip) -> Function:
    """The function with a conversion for each reader, where an engine of the chip widens freely."""
    if not any(e.passes and "convert" in e.passes[0] for e in chip.engines.values()):
        return function
    return replace(function, body=_region(function.body))


def _region(region: Region) -> Region:
    makers: dict[Value, Op] = {}
    read: set[Value] = set()
    ops: list[Op] = []
    for op in region.ops:
        operands: dict[Value, Value] = {}
        for value in dict.fromkeys(op.operands):
            maker = makers.get(value)
            if maker is not None and value in read:
                result = Value(value.type, value.name)
                ops.append(replace(maker, results=(result,)))
                operands[value] = result
            read.add(value)
        inner = tuple(_region(r) for r in op.regions)
        found = tuple(operands.get(v, v) for v in op.operands)
        ops.append(replace(op, operands=found, regions=inner))
        if op.name == "cast" and _widens(op):
            makers[op.result] = ops[-1]
    return replace(region, ops=tuple(ops))


def _widens(op: Op) -> bool:
    kinds = op.operands[0].tile.dtype, op.result.tile.dtype
    if not all(isinstance(k, DType) and k.is_float for k in kinds):
        return False
    return kinds[0].bits < kinds[1].bits
