"""Tile ops computed in parts of at most so many partitions, as an NPU with such a scratchpad does.

The first axis of a tile lies across the partitions (the one before the last two of a batched dot is
a loop).  A dot is cut along M and along K, whose parts accumulate in order; reductions, scans and
transposes that cross partitions combine the parts.  What cannot be cut (a reshape) goes through
memory whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dure.ir.blocks import Blocks
from dure.ir.core import Op
from dure.ir.dtypes import Array
from dure.ir.interpret import Evaluator, Results, RuntimeValue

_Attrs = Mapping[str, Any]


def split_evaluator(partitions: int) -> Evaluator:
    """Evaluates ops in parts of at most ``partitions`` along each tile's first axis."""

    def evaluate(op: Op, attrs: _Attrs, operands: Sequence[RuntimeValue]) -> Results:
        semantics = cast("Callable[..., Any]", op.definition.semantics)

        def whole(*parts: RuntimeValue) -> Any:
            return semantics(attrs, *parts)

        if op.name == "dot":
            return _dot(operands, partitions, whole)
        arrays = [o for o in operands if isinstance(o, np.ndarray) and o.ndim]
        if len(arrays) != len(operands) or not arrays:
            return whole(*operands)
        if op.definition.elementwise or _keeps_rows(op, attrs, arrays):
            parts = [whole(*(a[cut] for a in arrays)) for cut in _cuts(len(arrays[0]), partitions)]
            return _joined(parts)
        if op.name == "reduce":
            return _reduce(attrs, arrays[0], partitions, whole)
        if op.name == "cumsum":
            return _cumsum(arrays[0], partitions, whole)
        if op.name == "transpose":
            return _transpose(attrs, arrays[0], partitions)
        return whole(*operands)

    return evaluate


def _cuts(length: int, partitions: int) -> Iterator[slice]:
    for start in range(0, max(length, 1), partitions):
        yield slice(start, min(start + partitions, length))


def _keeps_rows(op: Op, attrs: _Attrs, arrays: Sequence[Array]) -> bool:
    """Whether each row of the result needs the same row of the operand only."""
    rank = arrays[0].ndim
    if op.name in ("reduce", "cumsum"):
        return bool(attrs["axis"] % rank != 0)
    return op.name == "quantize" and rank > 1


def _joined(parts: Sequence[Array | Blocks]) -> Array | Blocks:
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate([p for p in parts if isinstance(p, np.ndarray)])
    blocks = [p for p in parts if isinstance(p, Blocks)]
    planes = {n: np.concatenate([b.planes[n] for b in blocks]) for n in first.planes}
    rows = sum(b.shape[0] for b in blocks)
    return Blocks(first.format, first.axis, (rows, *first.shape[1:]), planes)


# --- dot ----------------------------------------------------------------------------------------


def _dot(operands: Sequence[RuntimeValue], partitions: int, whole: Callable[..., Any]) -> Array:
    a, b, c = operands
    assert isinstance(c, np.ndarray)
    assert isinstance(a, np.ndarray | Blocks)
    assert isinstance(b, np.ndarray | Blocks)
    if c.ndim == 3:
        batches = [
            _dot([_along(a, 0, i), _along(b, 0, i), c[i]], partitions, whole) for i in range(len(c))
        ]
        return np.stack(batches) if batches else c
    # A format's block stays whole: its planes are unpacked before its codes are spread.
    formats = [o.format.block for o in (a, b) if isinstance(o, Blocks)]
    depth = max([partitions, *formats])
    total = np.array(c)
    for rows in _cuts(len(total), partitions):
        for part in _cuts(a.shape[1], depth):
            left, right = _along(_along(a, 0, rows), 1, part), _along(b, 0, part)
            total[rows] = whole(left, right, total[rows])
    return total


def _along(value: Array | Blocks, axis: int, chosen: slice | int) -> Array | Blocks:
    """A part of one axis; a single index drops the axis."""
    if isinstance(value, np.ndarray):
        return value[_index(axis, chosen)]
    planes: dict[str, Array] = {}
    for plane in value.format.planes:
        mine = chosen
        if axis == value.axis and isinstance(chosen, slice):
            mine = slice(chosen.start // plane.per, chosen.stop // plane.per)
        planes[plane.name] = value.planes[plane.name][_index(axis, mine)]
    if isinstance(chosen, int):
        return Blocks(value.format, value.axis - 1, value.shape[1:], planes)
    shape = list(value.shape)
    shape[axis] = chosen.stop - chosen.start
    return Blocks(value.format, value.axis, tuple(shape), planes)


def _index(axis: int, chosen: slice | int) -> tuple[slice | int, ...]:
    return (*(slice(None) for _ in range(axis)), chosen)


# --- across partitions --------------------------------------------------------------------------


def _reduce(attrs: _Attrs, x: Array, partitions: int, whole: Callable[..., Any]) -> Array:
    """Parts reduced by themselves, then combined; ties of argmax go to the lowest index."""
    cuts = list(_cuts(len(x), partitions))
    parts: list[Array] = [whole(x[cut]) for cut in cuts]
    combiner: str = attrs["combiner"]
    if combiner not in ("argmax", "argmin"):
        total = parts[0]
        for part in parts[1:]:
            total = np.asarray(whole(np.concatenate([total, part])))
        return total
    best, chosen = _picked(x[cuts[0]], parts[0]), parts[0].astype(np.int64)
    for cut, part in zip(cuts[1:], parts[1:], strict=True):
        values = _picked(x[cut], part)
        better = values > best if combiner == "argmax" else values < best
        best = np.where(better, values, best)
        chosen = np.where(better, part.astype(np.int64) + cut.start, chosen)
    return chosen.astype(parts[0].dtype)


def _picked(x: Array, index: Array) -> npt.NDArray[np.float64]:
    return np.take_along_axis(x, index.astype(np.int64), axis=0).astype(np.float64)


def _cumsum(x: Array, partitions: int, whole: Callable[..., Any]) -> Array:
    parts: list[Array] = []
    for cut in _cuts(len(x), partitions):
        rows = x[cut]
        if parts and len(rows):
            carry = np.concatenate([parts[-1][-1:], rows])
            parts.append(np.asarray(whole(carry))[1:])
        else:
            parts.append(np.asarray(whole(rows)))
    return np.concatenate(parts)


def _transpose(attrs: _Attrs, x: Array, partitions: int) -> Array:
    """Square blocks of at most ``partitions`` each way, transposed one by one."""
    order: tuple[int, ...] = tuple(attrs["order"])
    result = np.empty(tuple(x.shape[a] for a in order), x.dtype)
    if order[0] == 0:
        for cut in _cuts(len(x), partitions):
            result[cut] = np.transpose(x[cut], order)
        return result
    place = order.index(0)
    for source in _cuts(len(x), partitions):
        for target in _cuts(len(result), partitions):
            block = np.transpose(
                x[
                    tuple(
                        source if a == 0 else target if a == order[0] else slice(None)
                        for a in range(x.ndim)
                    )
                ],
                order,
            )
            result[
                tuple(
                    target if a == 0 else source if a == place else slice(None)
                    for a in range(x.ndim)
                )
            ] = block
    return result
