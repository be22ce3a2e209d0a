"""Machine programs of kernels as one: phases over all cores, with the next one's weights on the way
while one computes.

Each kernel keeps its program; its arguments become views of the tensors of the whole, its core ids
expressions of the one core id.  Tiles that are loaded ahead go round the upper part of the
scratchpad, each kernel's behind those of the one before; all others share the lower part, as
kernels do one after another.  How many phases the queue for loads ahead may run beside (the
phase's ``lag``) is what the addresses and the chip's semaphores allow; the sanitizer has the last
word.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias, cast

from dure.compiler.chip.allocate import bytes_of, capacity
from dure.errors import IRError
from dure.ir.core import Function, Op, Param, Region, Value, infer
from dure.ir.devices import devices_of, over_devices, own_device
from dure.ir.expr import (
    Expr,
    IntLike,
    Symbol,
    as_expr,
    compare,
    const,
    evaluate,
    minimum,
    symbol,
)
from dure.ir.machine.compute import ops_of
from dure.ir.machine.phase import executed, phases_of
from dure.ir.rewrite import clone_region
from dure.ir.types import TensorType
from dure.machine.chip import Chip


@dataclass(frozen=True)
class View:
    """Elements ``start`` to ``stop`` along an axis."""

    axis: int
    start: IntLike
    stop: IntLike


@dataclass(frozen=True)
class Binding:
    """What a kernel's argument is: a tensor of the whole, seen in a shape, through views."""

    tensor: str
    shape: tuple[int, ...]
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine program in the whole, and its arguments in the order of its parameters.

    ``late`` says that its control hangs on what an earlier one has computed, so that nothing of it
    may run ahead.  ``place`` is where its tiles that are loaded ahead lie in the bytes that all of
    them go round; None: behind those of the kernel before.
    """

    name: str
    function: Function
    arguments: tuple[Binding, ...]
    late: bool = False
    place: int | None = None


@dataclass(frozen=True)
class Repeat:
    """Kernels that run ``count`` times in turn; ``counter`` is the turn in their views."""

    count: int
    counter: Symbol
    body: tuple[Kernel, ...]


Item: TypeAlias = "Kernel | Repeat"


def compose(
    name: str,
    tensors: Mapping[str, TensorType],
    items: Sequence[Item],
    chip: Chip,
    *,
    devices: int = 1,
    prefetch: bool = True,
) -> Function:
    """The program of all kernels, which so many devices run together; ``tensors`` are the types of
    its arguments by name.  In views, the number of a device is :func:`~dure.ir.devices.own_device`.

    Without ``prefetch`` no queue runs ahead.  Raises :class:`IRError` for an argument whose tensor
    has another type.
    """
    work = _Composer(tensors, items, chip, devices)
    body = work.region()
    if prefetch:
        body = _Lags(chip, body).applied()
    stored = work.stored
    attrs: dict[str, Any] = {"target": chip.name}
    if work.near:
        attrs["near"] = tuple(name for name in tensors if name in work.near)
    params = [Param(v, "inout" if n in stored else "in") for n, v in work.values.items()]
    ids = {work.device: devices, work.core: work.cores}
    ids = {program_id: count for program_id, count in ids.items() if count > 1}
    function = Function(
        name,
        "machine",
        tuple(params),
        body,
        grid=tuple(map(const, ids.values())),
        program_ids=tuple(ids),
        attrs=attrs,
    )
    return over_devices(function, devices)


@dataclass(frozen=True)
class _Member:
    """A kernel of a phase; its buffers lie ``below`` so many bytes of each memory that others of
    the phase have.
    """

    kernel: Kernel
    below: Mapping[str, int]


class _Composer:
    def __init__(
        self,
        tensors: Mapping[str, TensorType],
        items: Sequence[Item],
        chip: Chip,
        devices: int,
    ) -> None:
        #: The kernels that run before, in and after each loop, in their order.
        self.items = _joined(items)
        self.chip = chip
        self.device = own_device(devices)
        #: What a phase has seen in another shape.
        self.seen: dict[tuple[str, tuple[int, ...]], Value] = {}
        self.values = {name: Value(kind, name) for name, kind in tensors.items()}
        kernels = [k for item in items for k in _kernels(item)]
        self.cores = max((_cores(k.function) for k in kernels), default=1)
        self.core = symbol("core", "grid", 0, self.cores - 1)
        self.ahead = tuple(sorted({d.ahead for d in chip.dma.values() if d.ahead}))
        self.stored: set[str] = set()
        #: Tensors that lie in the memory in front of home.
        self.near: set[str] = set()
        self.number = 0
        memory = chip.memories[chip.scratchpad]
        self.alignment = int(memory.alignment.base)
        self.top = capacity(memory)
        #: What tiles that are loaded ahead take of the scratchpad.
        self.rings = max((self.ring_end(k) for k in kernels), default=0)
        #: Where tiles that are loaded ahead begin, and where the next of them go.
        self.bottom = max(
            (self.shared_end(m) for _, own in self.items for run in self.runs(own) for m in run),
            default=0,
        )
        self.next = self.bottom

    def region(self) -> Region:
        """The body."""
        ops: list[Op] = []
        for repeat, kernels in self.items:
            inner = [self.phase(run) for run in self.runs(kernels)]
            if repeat is not None:
                attrs = {"start": 0, "stop": repeat.count, "step": 1}
                body = Region((), tuple(inner), (), (repeat.counter,))
                ops.append(Op("for", (), (), attrs, (body,)))
            else:
                ops += inner
        return Region((), tuple(ops))

    def phase(self, run: Sequence[_Member]) -> Op:
        """Kernels that don't depend on one another as a phase."""
        ops: list[Op] = []
        body: list[Op] = []
        for member in run:
            declared, rest = self.inside(member)
            ops += declared
            body += rest
        late = any(member.kernel.late for member in run)
        attrs = {
            "name": " | ".join(member.kernel.name for member in run),
            "kernels": len(run),
            "ahead": () if late else self.ahead,
            "lag": 0,
        }
        return Op("phase", (), (), attrs, (Region((), (*ops, *body)),))

    def inside(self, member: _Member) -> tuple[list[Op], list[Op]]:
        """A kernel's views, buffers and semaphores, and what it does."""
        kernel, function = member.kernel, member.kernel.function
        self.number += 1
        self.seen.clear()
        views: list[Op] = []
        values: dict[Value, Value] = {}
        for param, binding in zip(function.params, kernel.arguments, strict=True):
            values[param.value] = self.bound(param, binding, views)
            if param.access != "in":
                self.stored.add(binding.tensor)
            if param.value.name in cast("tuple[str, ...]", function.attrs.get("near", ())):
                self.near.add(binding.tensor)
        ids: dict[Expr, IntLike] = dict(self.ids(function))
        region = clone_region(function.body, values, ids, prefix=f"k{self.number}_")
        declared = [op for op in region.ops if op.name in ("buffer", "semaphore")]
        rest = [op for op in region.ops if op.name not in ("buffer", "semaphore")]
        declared = self.placed(declared, self.loaded_ahead(region), kernel.place)
        declared = [_moved(op, member.below) for op in declared]
        count = _cores(function)
        if count < self.cores:
            condition = {"condition": compare("<", self.core, count)}
            rest = [Op("if", (), (), condition, (Region((), tuple(rest)), Region((), ())))]
        return [*views, *declared], rest

    def runs(self, kernels: Sequence[Kernel]) -> list[list[_Member]]:
        """The kernels in order, those together that touch nothing which another of them stores and
        have room side by side.
        """
        found: list[list[_Member]] = []
        for kernel in kernels:
            run = found[-1] if found else []
            below = self.below(run)
            if run and self.joins(kernel, run, below):
                run.append(_Member(kernel, below))
            else:
                found.append([_Member(kernel, {})])
        return found

    def joins(self, kernel: Kernel, run: Sequence[_Member], below: Mapping[str, int]) -> bool:
        """Whether a kernel may be of one phase with these."""
        kernels = [*(member.kernel for member in run), kernel]
        if any(self.loaded_ahead(k.function.body) or k.late for k in kernels):
            return False
        if any(
            _stored(k) & _touched(kernel) or _stored(kernel) & _touched(k) for k in kernels[:-1]
        ):
            return False
        for name, end in self.below([*run, _Member(kernel, below)]).items():
            taken = self.rings if name == self.chip.scratchpad else 0
            if end > capacity(self.chip.memories[name]) - taken:
                return False
        count = sum(op.name == "semaphore" for k in kernels for op in k.function.body.ops)
        return count <= int(self.chip.sync.semaphores.base)

    def below(self, run: Sequence[_Member]) -> dict[str, int]:
        """Where the buffers of these kernels end, by memory."""
        found: dict[str, int] = {}
        for member in run:
            for op in member.kernel.function.body.ops:
                if op.name != "buffer":
                    continue
                name, _, end = _bytes(op, self.chip)
                alignment = int(self.chip.memories[name].alignment.base)
                end = -(-(end + member.below.get(name, 0)) // alignment) * alignment
                found[name] = max(found.get(name, 0), end)
        return found

    def bound(self, param: Param, binding: Binding, ops: list[Op]) -> Value:
        """The value that an argument is; what it takes to see it so goes to ``ops``."""
        value, wanted = self.values[binding.tensor], param.value.tensor
        if value.tensor.shape != tuple(map(const, binding.shape)):
            key = binding.tensor, binding.shape
            if key not in self.seen:
                made = infer("reshaped", [value], {"shape": binding.shape}, hint=param.value.name)
                ops.append(made)
                self.seen[key] = made.result
            value = self.seen[key]
        for view in binding.views:
            attrs = {"axis": view.axis, "start": as_expr(view.start), "stop": as_expr(view.stop)}
            made = infer("view", [value], attrs, hint=param.value.name)
            ops.append(made)
            value = made.result
        found = value.tensor
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise IRError(
                f"argument '{param.value.name}' is {wanted}, and '{binding.tensor}' is {found}",
                rule="kernels of one program hand tensors over in one type and shape",
                fix="take a type that the chip stores as it is",
            )
        return value

    def ids(self, function: Function) -> Iterator[tuple[Expr, IntLike]]:
        """The kernel's ids as expressions of the device's and the core's."""
        extents = [evaluate(e, {}) for e in function.grid]
        ids = list(function.program_ids)
        if devices_of(function) > 1:
            yield ids.pop(0), self.device
            extents.pop(0)
        for place, program_id in enumerate(ids):
            inner = prod(extents[place + 1 :])
            found = as_expr(self.core) // inner if inner > 1 else as_expr(self.core)
            if place:
                found = found % extents[place]
            elif _cores(function) < self.cores:
                found = minimum(found, extents[0] - 1)
            yield program_id, found

    def loaded_ahead(self, region: Region) -> set[tuple[int, int]]:
        """Where the tiles that are loaded ahead lie: offset and pitch."""
        buffers = {op.result: op for op in region.ops if op.name == "buffer"}
        loads = [op for op in ops_of(region) if op.attrs.get("queue") in self.ahead]
        loaded = [buffers[op.operands[1]] for op in loads if op.name == "dma_load"]
        return {(op.attr("offset"), op.attr("pitch")) for op in loaded if self.is_tile(op)}

    def is_tile(self, op: Op) -> bool:
        """Whether an op is a buffer in the scratchpad."""
        return op.name == "buffer" and op.attr("memory") == self.chip.scratchpad

    def shared_end(self, member: _Member) -> int:
        """The end of the tiles that a kernel doesn't load ahead."""
        function, below = member.kernel.function, member.below.get(self.chip.scratchpad, 0)
        ahead = self.loaded_ahead(function.body)
        moving = self.moving(function.body.ops, ahead)
        ends = [
            _bytes(op, self.chip)[2]
            for op in function.body.ops
            if self.is_tile(op) and op not in moving
        ]
        return below - (-max(ends, default=0) // self.alignment) * self.alignment

    def ring_end(self, kernel: Kernel) -> int:
        """Where a kernel's tiles that are loaded ahead end, from where such tiles begin."""
        body = kernel.function.body
        moving = self.moving(body.ops, self.loaded_ahead(body))
        return (self.size(moving) if moving else 0) + (kernel.place or 0)

    def moving(self, ops: Sequence[Op], ahead: set[tuple[int, int]]) -> list[Op]:
        """The buffers that lie where tiles are loaded ahead."""
        tiles = [op for op in ops if self.is_tile(op)]
        return [op for op in tiles if (op.attr("offset"), op.attr("pitch")) in ahead]

    def size(self, moving: Sequence[Op]) -> int:
        """The bytes from the first of some buffers to the end of the last."""
        first = min(int(op.attr("offset")) for op in moving)
        return max(_bytes(op, self.chip)[2] for op in moving) - first

    def placed(
        self, declared: Sequence[Op], ahead: set[tuple[int, int]], place: int | None
    ) -> list[Op]:
        """The buffers with those that are loaded ahead in their place, or behind the last ones that
        were.
        """
        if not ahead:
            return list(declared)
        found: list[Op] = []
        first = min(offset for offset, _ in ahead)
        moving = self.moving(declared, ahead)
        size = self.size(moving)
        if place is not None:
            self.next = self.bottom + place
        if self.next + size > self.top:
            self.next = self.bottom
        for op in declared:
            if op in moving:
                offset = op.attr("offset") - first + self.next
                op = replace(op, attrs={**op.attrs, "offset": offset})
            found.append(op)
        self.next += -(-size // self.alignment) * self.alignment
        return found


def _kernels(item: Item) -> tuple[Kernel, ...]:
    return item.body if isinstance(item, Repeat) else (item,)


def _joined(items: Sequence[Item]) -> list[tuple[Repeat | None, tuple[Kernel, ...]]]:
    """Each loop with its kernels, and those that follow one another outside of loops together."""
    found: list[tuple[Repeat | None, tuple[Kernel, ...]]] = []
    for item in items:
        repeat = item if isinstance(item, Repeat) else None
        if repeat is None and found and found[-1][0] is None:
            found[-1] = None, (*found[-1][1], *_kernels(item))
        else:
            found.append((repeat, _kernels(item)))
    return found


def _stored(kernel: Kernel) -> set[str]:
    """The tensors that a kernel stores to."""
    pairs = zip(kernel.function.params, kernel.arguments, strict=True)
    return {binding.tensor for param, binding in pairs if param.access != "in"}


def _touched(kernel: Kernel) -> set[str]:
    """The tensors that a kernel loads or stores."""
    return {binding.tensor for binding in kernel.arguments}


def _moved(op: Op, below: Mapping[str, int]) -> Op:
    """A buffer behind the bytes that others of its phase have."""
    by = below.get(str(op.attrs.get("memory")), 0)
    if op.name != "buffer" or not by:
        return op
    return replace(op, attrs={**op.attrs, "offset": op.attr("offset") + by})


def _cores(function: Function) -> int:
    """The cores of a device that run a kernel."""
    return prod(evaluate(e, {}) for e in function.grid) // devices_of(function)


def _bytes(op: Op, chip: Chip) -> tuple[str, int, int]:
    """A buffer's memory, its first byte and the one behind its last (of each partition)."""
    name, first = str(op.attr("memory")), int(op.attr("offset"))
    last = first + (int(op.attr("stages")) - 1) * int(op.attr("pitch"))
    return name, first, last + bytes_of(op.result.tile, chip.memories[name])


@dataclass(frozen=True)
class _Use:
    """What a phase has: bytes of its buffers, of those that are loaded ahead, semaphores."""

    buffers: tuple[tuple[str, int, int], ...]
    ahead: tuple[tuple[str, int, int], ...]
    semaphores: int


class _Lags:
    """Beside how many phases before it each may begin to load."""

    def __init__(self, chip: Chip, body: Region) -> None:
        self.chip = chip
        self.body = body
        self.uses = {phase: self.use(phase) for phase in phases_of(body)}
        self.most = len(self.uses)

    def use(self, phase: Op) -> _Use:
        """What a phase has."""
        inside = list(ops_of(phase.regions[0]))
        buffers = {o.result: _bytes(o, self.chip) for o in inside if o.name == "buffer"}
        ahead = [
            buffers[o.operands[1]]
            for o in inside
            if o.name == "dma_load" and o.attr("queue") in phase.attr("ahead")
        ]
        count = sum(o.name == "semaphore" for o in inside)
        return _Use(tuple(buffers.values()), tuple(ahead), count)

    def applied(self) -> Region:
        """The body with lags."""
        lags = dict.fromkeys(self.uses, self.most)
        before: deque[Op] = deque(maxlen=self.most)
        # Loops for as many turns as tell apart what comes before.
        for phase in executed(self.body, self.most + 1):
            if not phase.attr("ahead"):
                lags[phase] = 0
            elif self.uses[phase].ahead:
                lags[phase] = min(lags[phase], self.lag(phase, before))
            before.append(phase)
        return self.rebuilt(self.body, lags)

    def lag(self, phase: Op, before: Sequence[Op]) -> int:
        """The longest run of phases just before that one may run beside."""
        own = self.uses[phase]
        semaphores, most = own.semaphores, int(self.chip.sync.semaphores.base)
        for count, other in enumerate(reversed(before)):
            use = self.uses[other]
            semaphores += use.semaphores
            if other is phase or semaphores > most or _meet(own.ahead, use.buffers):
                return count
        return self.most

    def rebuilt(self, region: Region, lags: Mapping[Op, int]) -> Region:
        """A region with the phases' lags."""
        ops = [
            replace(op, attrs={**op.attrs, "lag": lags[op]})
            if op.name == "phase"
            else replace(op, regions=(self.rebuilt(op.regions[0], lags),))
            for op in region.ops
        ]
        return replace(region, ops=tuple(ops))


def _meet(first: Sequence[tuple[str, int, int]], second: Sequence[tuple[str, int, int]]) -> bool:
    return any(
        memory == other and low < stop and start < high
        for memory, low, high in first
        for other, start, stop in second
    )
