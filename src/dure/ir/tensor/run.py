"""How the reference interpreter runs the ops that hold a program together.

Values at the tensor level are immutable: a launch writes into new arrays and into copies of what it
donates, so that a program that uses a donated value again would see its old contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dure.ir.blocks import Blocks
from dure.ir.core import Op, Value
from dure.ir.dtypes import BlockFormat, DType
from dure.ir.interpret import Frame, RuntimeValue, execute, handles
from dure.ir.tensor.program import launch_arguments, repeat_tables
from dure.ir.types import TensorType


@handles("repeat")
def _repeat(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    body, count = op.regions[0], op.attr("count")
    tables, updated = repeat_tables(op), op.attr("updated")
    carried = [frame.value(v) for v in op.operands[: op.attr("carried")]]
    changed: list[list[RuntimeValue]] = [[] for _ in updated]
    for i in range(count):
        row = [frame.value(table[i]) for table in tables]
        yields = frame.run_region(body, [*carried, *row])
        carried = list(yields[: len(carried)])
        for values, value in zip(changed, yields[len(carried) :], strict=True):
            values.append(value)
    return [*carried, *(value for values in changed for value in values)]


def empty(kind: TensorType, frame: Frame) -> RuntimeValue:
    """A tensor of this type, filled with zeros."""
    shape = tuple(frame.integer(extent) for extent in kind.shape)
    if isinstance(kind.dtype, DType):
        return np.zeros(shape, kind.dtype.numpy)
    return empty_blocks(kind.dtype, kind.quantized_axis % kind.rank, shape)


def empty_blocks(format: BlockFormat, axis: int, shape: tuple[int, ...]) -> Blocks:
    """A block-quantized array of zero bits."""
    planes: dict[str, Any] = {}
    for plane in format.planes:
        entries = tuple(e // plane.per if a == axis else e for a, e in enumerate(shape))
        wide = plane.dtype.numpy if plane.dtype.bits >= 8 else np.dtype(np.uint8)
        planes[plane.name] = np.zeros(entries, wide)
    return Blocks(format, axis, shape, planes)


def _copy(value: RuntimeValue) -> RuntimeValue:
    if isinstance(value, Blocks):
        planes = {name: plane.copy() for name, plane in value.planes.items()}
        return Blocks(value.format, value.axis, value.shape, planes)
    assert isinstance(value, np.ndarray)
    return value.copy()


@handles("launch")
def _launch(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    results: dict[Value, RuntimeValue] = {}
    arguments: list[RuntimeValue] = []
    for operand, result in launch_arguments(op):
        value = empty(result.tensor, frame) if operand is None and result else None
        if operand is not None:
            value = frame.value(operand)
            value = _copy(value) if result is not None else value
        assert value is not None
        arguments.append(value)
        if result is not None:
            results[result] = value
    for (guard, kernel), sizes in zip(op.attr("variants"), op.attr("sizes"), strict=True):
        if frame.integer(guard):
            given = {s.name: frame.integer(e) for s, e in zip(kernel.symbols, sizes, strict=True)}
            execute(kernel, arguments, given)
            break
    return [results[r] for r in op.results]


@handles("barrier")
def _barrier(frame: Frame, op: Op) -> Sequence[RuntimeValue]:
    return []
