"""What DMAs move, in terms of the tensors behind views: windows, starts, and parts that exist."""

from __future__ import annotations

from collections.abc import Iterator

from dure.ir.core import Op, Value
from dure.ir.expr import Const, Expr, as_expr, proves
from dure.sim.sanitizer.control import Environment, known, leaves, names
from dure.sim.sanitizer.findings import NotProved
from dure.sim.sanitizer.pieces import Control, Cut, Transfer


class Transfers:
    """A program's transfers, views and stored tensors, entered in program order; ``buffers`` are
    its buffers' declarations.
    """

    def __init__(self, buffers: dict[Value, Op]) -> None:
        self.buffers = buffers
        #: The transfer of a DMA's op.
        self.of: dict[Op, Transfer] = {}
        #: By buffer: the ops that write it.
        self.filled: dict[Value, list[Op]] = {}
        self.stored: set[Value] = set()
        #: Arguments behind what is seen in another shape.
        self.shaped: dict[Value, Value] = {}
        self.views: dict[Value, tuple[Value, tuple[Expr, ...], tuple[Expr, ...]]] = {}

    def view(self, op: Op) -> None:
        """Note a view."""
        root, starts, extents = self.window(op.operands[0])
        axis = int(op.attr("axis"))
        start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
        moved = tuple(s + start if a == axis else s for a, s in enumerate(starts))
        cut = tuple(stop - start if a == axis else e for a, e in enumerate(extents))
        self.views[op.result] = root, moved, cut
        if op.result in self.stored:
            self.stored.add(root)

    def window(self, value: Value) -> tuple[Value, tuple[Expr, ...], tuple[Expr, ...]]:
        """The tensor that a value is, or is a view of: it, where the view starts, its extents."""
        found = self.views.get(value)
        if found is None:
            shape = value.tensor.shape
            found = value, tuple(as_expr(0) for _ in shape), shape
        return found

    def starts(self, value: Value) -> set[str]:
        """The symbols that say where a view starts."""
        return {s for start in self.window(value)[1] for s in names(start)}

    def enter(self, op: Op, loops: tuple[Op, ...]) -> Transfer:
        """Note a transfer inside loops, outermost first."""
        root, views, extents = self.window(op.operands[0])
        shape = op.operands[1].tile.shape
        listed: tuple[int, ...] = tuple(op.attr("list_axes"))
        starts: list[Expr | None] = []
        spans: list[int] = []
        reach: list[int] = []
        strides: list[int] = []
        inside: list[bool] = []
        for axis, extent in enumerate(shape):
            stride = _number(op.attr("stride")[axis], op)
            spans.append(stride * (extent - 1) + 1)
            reach.append(spans[-1])
            strides.append(stride)
            if axis in listed:
                starts.append(None)
                entries = op.operands[2 + listed.index(axis)]
                inside.append(self._listed_inside(op, axis, entries, extents[axis]))
                continue
            local = (
                as_expr(op.attr("index")[axis]) * op.attr("step")[axis] + op.attr("offset")[axis]
            )
            starts.append(local + views[axis])
            below = proves(local + spans[-1] <= extents[axis])
            room = extents[axis] - local
            if isinstance(room, Const) and proves(as_expr(0) <= local):
                # What hangs over the edge isn't touched.
                reach[-1] = max(0, min(spans[-1], room.value))
            inside.append(below and proves(as_expr(0) <= local))
        found = Transfer(
            op,
            len(self.of),
            root,
            tuple(starts),
            tuple(spans),
            tuple(strides),
            tuple(e + v for e, v in zip(extents, views, strict=True)),
            op.name == "dma_store",
            loops,
            tuple(inside),
            views,
            tuple(reach),
        )
        if found.store:
            self.stored.add(root)
        self.of[op] = found
        return found

    def _listed_inside(self, op: Op, axis: int, entries: Value, extent: Expr) -> bool:
        """Whether every entry that an index list may hold lies in the tensor."""
        step, offset = (as_expr(op.attr(key)[axis]) for key in ("step", "offset"))
        ranges = [self._entries(writer) for writer in self.filled.get(self.root(entries), ())]
        return bool(ranges) and all(
            found is not None
            and proves(as_expr(0) <= found[0])
            and proves(found[1] * step + step + offset <= extent)
            for found in ranges
        )

    def _entries(self, writer: Op) -> tuple[Expr, Expr] | None:
        """The least and the largest value that an op writes into an index list."""
        if writer.name == "dma_load":
            return self.window(writer.operands[0])[0].tensor.index
        made = {r: inner for inner in writer.regions[0].ops for r in inner.results}
        fills = [made.get(value) for value in writer.regions[0].yields]
        constant = fills[0] if len(fills) == 1 else None
        if constant is None or constant.name != "full":
            return None
        value = as_expr(int(constant.attr("value")))
        return value, value

    def root(self, buffer: Value) -> Value:
        """The buffer whose bytes these are."""
        found = self.buffers.get(buffer)
        return self.root(found.operands[0]) if found is not None and found.operands else buffer

    def box(self, op: Op, environment: Environment, whole: frozenset[int] = frozenset()) -> Cut:
        """Which part of a transfer's tile exists; ``whole`` are axes along which all of it does."""
        transfer = self.of[op]
        found: list[tuple[int, int]] = []
        shape = op.operands[1].tile.shape
        for axis, extent in enumerate(shape):
            if transfer.inside[axis] or axis in whole:
                found.append((0, extent))
                continue
            start = transfer.starts[axis]
            if start is None:
                return None
            low = known(transfer.views[axis], environment)
            first = known(start, environment)
            stop = known(transfer.extents[axis], environment)
            if low is None or first is None or stop is None:
                return None
            stride = transfer.strides[axis]
            begin = max(0, -((first - low) // stride))
            found.append((begin, max(begin, min(extent, -((first - stop) // stride)))))
        if all(b == (0, e) for b, e in zip(found, shape, strict=True)):
            return ""
        if any(low >= high for low, high in found):
            return tuple((0, 0) for _ in found)
        return tuple(found)

    def store_box(self, op: Op, environment: Environment) -> Cut:
        """What a store reads of its buffer: all of it, where that isn't known."""
        found = self.box(op, environment)
        return "" if found is None else found


def cuts(transfer: Transfer) -> Iterator[Control]:
    if not transfer.store and not transfer.partial:
        return
    for axis, condition in transfer.edges():
        for leaf in leaves(condition):
            yield Control(leaf, "cut", transfer.spans[axis])


def _number(value: object, op: Op) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, Const):
        return value.value
    raise NotProved("a stride that isn't a number", op)
