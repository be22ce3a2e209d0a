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
from dure.ir.expr import Expr, IntLike, as_expr, compare, const, evaluate, minimum, symbol
from dure.ir.machine.compute import ops_of
from dure.ir.machine.phase import phases_of
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
    may run ahead.
    """

    name: str
    function: Function
    arguments: tuple[Binding, ...]
    late: bool = False


@dataclass(frozen=True)
class Repeat:
    """Kernels that run ``count`` times in turn; ``counter`` is the turn in their views."""

    count: int
    counter: Expr
    body: tuple[Kernel, ...]


Item: TypeAlias = "Kernel | Repeat"


def compose(
    name: str,
    tensors: Mapping[str, TensorType],
    items: Sequence[Item],
    chip: Chip,
    *,
    prefetch: bool = True,
) -> Function:
    """The program of all kernels; ``tensors`` are the types of its arguments by name.

    Without ``prefetch`` no queue runs ahead.  Raises :class:`IRError` for an argument whose tensor
    has another type.
    """
    work = _Composer(tensors, items, chip)
    body = work.region()
    if prefetch:
        body = _Lags(chip, body).applied()
    stored = work.stored
    attrs: dict[str, Any] = {"target": chip.name}
    if work.near:
        attrs["near"] = tuple(name for name in tensors if name in work.near)
    params = [Param(v, "inout" if n in stored else "in") for n, v in work.values.items()]
    return Function(
        name,
        "machine",
        tuple(params),
        body,
        grid=(const(work.cores),) if work.cores > 1 else (),
        program_ids=(work.core,) if work.cores > 1 else (),
        attrs=attrs,
    )


class _Composer:
    def __init__(
        self, tensors: Mapping[str, TensorType], items: Sequence[Item], chip: Chip
    ) -> None:
        self.items = items
        self.chip = chip
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
        #: Where tiles that are loaded ahead begin, and where the next of them go.
        self.bottom = max((self.shared_end(k.function) for k in kernels), default=0)
        self.next = self.bottom

    def region(self) -> Region:
        """The body."""
        ops: list[Op] = []
        for item in self.items:
            inner = [self.phase(kernel) for kernel in _kernels(item)]
            if isinstance(item, Repeat):
                attrs = {"start": 0, "stop": item.count, "step": 1}
                body = Region((), tuple(inner), (), (item.counter,))  # type: ignore[arg-type]
                ops.append(Op("for", (), (), attrs, (body,)))
            else:
                ops += inner
        return Region((), tuple(ops))

    def phase(self, kernel: Kernel) -> Op:
        """A kernel as a phase."""
        self.number += 1
        function = kernel.function
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
        declared = self.placed(declared, self.loaded_ahead(region))
        count = _cores(function)
        if count < self.cores:
            condition = {"condition": compare("<", self.core, count)}
            rest = [Op("if", (), (), condition, (Region((), tuple(rest)), Region((), ())))]
        attrs = {
            "name": kernel.name,
            "ahead": () if kernel.late else self.ahead,
            "lag": 0,
        }
        return Op("phase", (), (), attrs, (Region((), (*views, *declared, *rest)),))

    def bound(self, param: Param, binding: Binding, ops: list[Op]) -> Value:
        """The value that an argument is; what it takes to see it so goes to ``ops``."""
        value, wanted = self.values[binding.tensor], param.value.tensor
        if value.tensor.shape != tuple(map(const, binding.shape)):
            made = infer("reshaped", [value], {"shape": binding.shape}, hint=param.value.name)
            ops.append(made)
            value = made.result
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
        """The kernel's core ids as expressions of the core id."""
        extents = [evaluate(e, {}) for e in function.grid]
        for place, program_id in enumerate(function.program_ids):
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

    def shared_end(self, function: Function) -> int:
        """The end of the tiles that a kernel doesn't load ahead."""
        ahead = self.loaded_ahead(function.body)
        ends = [
            _bytes(op, self.chip)[2]
            for op in function.body.ops
            if self.is_tile(op) and (op.attr("offset"), op.attr("pitch")) not in ahead
        ]
        return -(-max(ends, default=0) // self.alignment) * self.alignment

    def placed(self, declared: Sequence[Op], ahead: set[tuple[int, int]]) -> list[Op]:
        """The buffers with those that are loaded ahead behind the last ones that were."""
        if not ahead:
            return list(declared)
        found: list[Op] = []
        first = min(offset for offset, _ in ahead)
        moving = [o for o in declared if self.is_tile(o)]
        moving = [o for o in moving if (o.attr("offset"), o.attr("pitch")) in ahead]
        size = max(_bytes(op, self.chip)[2] for op in moving) - first
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


def _cores(function: Function) -> int:
    return prod(evaluate(e, {}) for e in function.grid)


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
        for phase in self.executed(self.body):
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

    def executed(self, region: Region) -> Iterator[Op]:
        """Phases in the order of execution, loops for as many turns as tell apart what comes
        before.
        """
        for op in region.ops:
            if op.name == "phase":
                yield op
            else:
                for _ in range(min(self.most + 1, int(op.attr("stop")))):
                    yield from self.executed(op.regions[0])

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
