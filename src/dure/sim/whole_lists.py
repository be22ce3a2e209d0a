"""Index lists of which nothing hangs on what they hold.

A transfer that an index list rules moves as many elements as its entries' rows have in the tensor.
Where all values that a list can ever hold name whole rows, that is always the same, and the list
needn't be followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dure.ir.core import Function, Op, Region, Value
from dure.ir.dtypes import Array, int32
from dure.ir.expr import Expr, as_expr, bounds
from dure.ir.machine.compute import ops_of
from dure.ir.machine.phase import phases_of


def whole_lists(function: Function, indices: Mapping[str, Array]) -> frozenset[Value]:
    """The buffers of lists whose entries are all there, whatever is loaded into them; ``indices``
    are the values of index arguments by name, where others count as there too.
    """
    roots = _roots(ops_of(function.body))
    scopes = [phase.regions[0] for phase in phases_of(function.body)] or [function.body]
    return frozenset[Value]().union(*(_whole_in(scope, roots, indices) for scope in scopes))


def all_there(start: Expr, stride: int, extent: int, size: Expr) -> bool:
    """Whether ``extent`` elements from ``start`` on, ``stride`` apart, lie inside an axis of
    ``size``, whatever the symbols are.
    """
    low, high = bounds(start)
    least = bounds(size)[0]
    if low is None or high is None or least is None or stride < 0:
        return False
    return low >= 0 and high + (extent - 1) * stride < least


def _roots(ops: Iterable[Op]) -> dict[Value, Value]:
    """The arguments that tensors are views of."""
    found: dict[Value, Value] = {}
    for op in ops:
        if op.name in ("view", "reshaped"):
            found[op.result] = found.get(op.operands[0], op.operands[0])
    return found


@dataclass
class _Place:
    """Buffers that share an address, the values that lists there can hold, and whether these name
    whole rows wherever they are used.
    """

    buffers: list[Value] = field(default_factory=list[Value])
    low: int = 0
    high: int = 0
    whole: bool = True

    def hold(self, *values: int) -> None:
        self.low, self.high = min(self.low, *values), max(self.high, *values)

    def use(self, step: int, offset: Expr, size: Expr) -> None:
        """The list rules an axis of ``size``: an entry is a row of ``step`` elements."""
        whole = self.low >= 0 and all_there(offset, step, 1, size)
        self.whole &= whole and all_there(offset + self.high * step, 1, step, size)


def _whole_in(
    scope: Region, roots: Mapping[Value, Value], indices: Mapping[str, Array]
) -> Iterable[Value]:
    """Those among the buffers of a phase, or of a program without any."""
    ops = list(ops_of(scope))
    places = _places([op for op in ops if op.name == "buffer" and op.result.tile.dtype is int32])
    for op in ops:
        if op.name != "dma_load" or op.operands[1] not in places:
            continue
        values = indices.get(roots.get(op.operands[0], op.operands[0]).name)
        if values is not None and values.size:
            places[op.operands[1]].hold(int(values.min()), int(values.max()), *_beyond(op))
    for op in ops:
        if op.name not in ("dma_load", "dma_store"):
            continue
        axes: tuple[int, ...] = tuple(op.attr("list_axes"))
        for axis, buffer in zip(axes, op.operands[2:], strict=True):
            if buffer in places:
                step, offset = int(op.attr("step")[axis]), as_expr(op.attr("offset")[axis])
                size = as_expr(op.operands[0].tensor.shape[axis])
                places[buffer].use(step, offset, size)
    return [buffer for buffer, place in places.items() if place.whole]


def _places(buffers: Sequence[Op]) -> dict[Value, _Place]:
    """The place of each buffer: buffers with an address in common have one."""
    found: dict[Value, _Place] = {}
    by_address: dict[tuple[str, int], _Place] = {}
    for op in buffers:
        own = _Place([op.result])
        for slot in range(int(op.attr("stages"))):
            address = str(op.attr("memory")), int(op.attr("offset")) + slot * int(op.attr("pitch"))
            other = by_address.setdefault(address, own)
            if other is not own:
                own.buffers += other.buffers
                by_address |= {a: own for a, place in by_address.items() if place is other}
        found |= dict.fromkeys(own.buffers, own)
    return found


def _beyond(op: Op) -> tuple[int, ...]:
    """What a load of a list has for entries beyond the tensor, where there may be any."""
    sizes, extents = op.operands[0].tensor.shape, op.operands[1].tile.shape
    inside = True
    for axis, (extent, size) in enumerate(zip(extents, sizes, strict=True)):
        index, step, offset = (op.attr(name)[axis] for name in ("index", "step", "offset"))
        first = as_expr(index) * int(step) + as_expr(offset)
        inside &= all_there(first, int(op.attr("stride")[axis]), extent, as_expr(size))
    if inside:
        return ()
    return (int(op.attr("fill")) if op.attr("filling") else -1,)
