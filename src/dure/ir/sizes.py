"""How many bytes a tensor takes as it is laid out, at given or at largest sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dure.errors import IRError
from dure.ir.core import Op, Value
from dure.ir.dtypes import BlockFormat
from dure.ir.expr import IntLike, as_expr, bounds, const, evaluate
from dure.ir.layout import Layout, PlaneLayouts
from dure.ir.types import TensorType


def tensor_bytes(value: TensorType, sizes: Mapping[str, int] | None = None) -> int:
    """Bytes from the buffer's start to the end of the last element.

    ``sizes`` gives the symbols; without it, their upper bounds hold.  Raises :class:`IRError` for a
    symbol without either, and for a block format without a layout.
    """
    shape = [_number(extent, sizes, value) for extent in value.shape]
    if isinstance(value.layout, PlaneLayouts):
        assert isinstance(value.dtype, BlockFormat)
        axis = value.quantized_axis % value.rank
        ends: list[int] = []
        for name, layout in value.layout.planes:
            plane = value.dtype.plane(name)
            entries = [e // plane.per if a == axis else e for a, e in enumerate(shape)]
            ends.append(_end(layout, entries, plane.dtype.bits, sizes, value))
        return -(-max(ends, default=0) // 8)
    if isinstance(value.dtype, BlockFormat):
        raise IRError(
            f"how many bytes {value} takes depends on its layout",
            rule="a block-quantized tensor in memory has a layout",
            fix="choose one with the target",
        )
    if value.layout is not None:
        return -(-_end(value.layout, shape, value.dtype.bits, sizes, value) // 8)
    total = value.dtype.bits
    for extent in shape:
        total *= extent
    return -(-total // 8)


def at_sizes(op: Op, sizes: Mapping[str, int]) -> Op:
    """``op`` over tensors of these sizes: its cost is what it costs then."""

    def fixed(value: Value) -> Value:
        kind = value.type
        if not isinstance(kind, TensorType):
            return value
        shape = tuple(const(evaluate(extent, sizes)) for extent in kind.shape)
        return Value(replace(kind, shape=shape), value.name)

    return replace(
        op,
        operands=tuple(fixed(operand) for operand in op.operands),
        results=tuple(fixed(result) for result in op.results),
    )


def _number(value: IntLike, sizes: Mapping[str, int] | None, where: TensorType) -> int:
    expr = as_expr(value)
    if sizes is not None:
        return evaluate(expr, sizes)
    high = bounds(expr)[1]
    if high is None:
        raise IRError(
            f"the size {expr} has no upper bound",
            where=str(where),
            rule="memory is planned at the upper bounds of a program's sizes",
            fix="declare the symbol with an upper bound",
        )
    return high


def _end(
    layout: Layout,
    shape: list[int],
    bits: int,
    sizes: Mapping[str, int] | None,
    where: TensorType,
) -> int:
    """The bit after the last element (0 for an empty tensor)."""
    if 0 in shape:
        return 0
    last = _number(layout.offset, sizes, where) + bits
    for digits, extent in zip(layout.axes, shape, strict=True):
        inner = 1
        for digit in digits[1:]:
            inner *= digit.extent or 1
        for place, digit in enumerate(digits):
            # Whole panels: a row that only pads still has its place.
            most = -(-extent // inner) if place == 0 else digit.extent or 1
            last += (most - 1) * _number(digit.stride, sizes, where)
    return last
