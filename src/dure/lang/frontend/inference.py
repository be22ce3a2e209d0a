"""What follows from the loads and stores of a kernel: its grid, and the ranges of its index
arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dure.ir.expr import Expr, Symbol, as_expr, cdiv, const, minimum, symbols
from dure.ir.types import TensorType
from dure.lang.frontend.recorder import Recorder, Touch


def infer_grid(recorder: Recorder) -> tuple[Expr, ...] | None:
    """The grid, where every axis of it is counted by an index: of a store, or of an index argument.

    An index that is exactly ``program_id(i)`` along an axis says that the grid has one instance for
    each tile of that axis.  Stores come first; then what chooses the place of a store through an
    index argument; then other loads.  None where an axis doesn't follow.
    """
    ids = recorder.program_ids
    stores = [t for t in recorder.touches if t.stores]
    loads = [t for t in recorder.touches if not t.stores]
    loads.sort(key=lambda t: t.tensor.type.index is None)
    extents: list[Expr] = []
    for axis, own in enumerate(ids):
        found = _extent([*stores, *loads], own, ids)
        if found is None and _unused(recorder, axis):
            found = const(1)
        if found is None:
            return None
        extents.append(found)
    return tuple(extents)


def _extent(touches: Sequence[Touch], own: Symbol, ids: Sequence[Symbol]) -> Expr | None:
    for touch in touches:
        for axis, index in enumerate(touch.index):
            if index is not own or touch.step[axis] == 0:
                continue
            extent = as_expr(touch.tensor.extents[axis])
            if all(s.kind == "size" for s in symbols(extent)) and not symbols(extent) & set(ids):
                return cdiv(extent, touch.step[axis])
    return None


def _unused(recorder: Recorder, axis: int) -> bool:
    return axis not in recorder.asked_axes


def infer_ranges(recorder: Recorder, types: Mapping[str, TensorType]) -> dict[str, Expr]:
    """The largest element that each index argument may hold, from everything that it addresses."""
    limits: dict[str, list[Expr]] = {}
    for touch in recorder.touches:
        for axis in range(touch.tensor.rank):
            name = _chooser(recorder, touch, axis)
            extent = as_expr(touch.tensor.extents[axis])
            if name is None or any(s.kind != "size" for s in symbols(extent)):
                continue
            step = touch.step[axis]
            last = extent if step == 0 else cdiv(extent, step) - 1
            limits.setdefault(name, []).append(last)
    return {name: minimum(*f) for name, f in limits.items() if types[name].index is not None}


def _chooser(recorder: Recorder, touch: Touch, axis: int) -> str | None:
    """The index argument whose elements, unchanged, choose this axis's place."""
    listed = touch.lists[axis]
    if listed is not None:
        return None if listed.indices_of is None else listed.indices_of.name
    index = touch.index[axis]
    if isinstance(index, Symbol) and index.kind == "index":
        source = recorder.sources.get(index)
        return None if source is None else source[0].name
    return None
