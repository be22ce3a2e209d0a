"""What follows from the loads and stores of a kernel: its grid, and the ranges of its index
arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dure.ir.expr import Expr, Symbol, as_expr, cdiv, const, minimum, symbols
from dure.ir.types import TensorType
from dure.lang.frontend.recorder import Recorder, Touch

#: An extent and the step in which the instances along a grid axis count it.
Counted: TypeAlias = "tuple[Expr, int]"


@dataclass(frozen=True)
class Facts:
    """What follows for a kernel: what each axis of its grid counts, None where that doesn't follow;
    and the largest element that each index argument may hold.
    """

    counted: tuple[Counted, ...] | None
    ranges: Mapping[str, Expr]

    @property
    def grid(self) -> tuple[Expr, ...]:
        """The grid's extents, none where they don't follow."""
        return tuple(cdiv(extent, step) for extent, step in self.counted or ())

    def same(self, other: Facts) -> bool:
        """Whether both say the same."""
        if (self.counted is None) != (other.counted is None):
            return False
        mine, others = self.grid, other.grid
        if len(mine) != len(others) or self.ranges.keys() != other.ranges.keys():
            return False
        same = all(a is b for a, b in zip(mine, others, strict=True))
        return same and all(self.ranges[name] is other.ranges[name] for name in self.ranges)


def infer_grid(recorder: Recorder) -> tuple[Counted, ...] | None:
    """What each grid axis counts, where every one is counted by an index: of a store, or of an
    index argument.

    An index that is exactly ``program_id(i)`` along an axis says that the grid has one instance for
    each tile of that axis.  Stores come first; then what chooses the place of a store through an
    index argument; then other loads.  None where an axis doesn't follow.
    """
    ids = recorder.program_ids
    stores = [t for t in recorder.touches if t.stores]
    loads = [t for t in recorder.touches if not t.stores]
    loads.sort(key=lambda t: t.tensor.type.index is None)
    found: list[Counted] = []
    for axis, own in enumerate(ids):
        counted = _counted([*stores, *loads], own, ids)
        if counted is None and _unused(recorder, axis):
            counted = const(1), 1
        if counted is None:
            return None
        found.append(counted)
    return tuple(found)


def _counted(touches: Sequence[Touch], own: Symbol, ids: Sequence[Symbol]) -> Counted | None:
    for touch in touches:
        for axis, index in enumerate(touch.index):
            if index is not own or touch.step[axis] == 0:
                continue
            extent = as_expr(touch.tensor.extents[axis])
            if all(s.kind == "size" for s in symbols(extent)) and not symbols(extent) & set(ids):
                return extent, touch.step[axis]
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
