"""A model's step as one machine program: all kernels in phases, layers as a loop.

Weights and pools of equal layers lie behind one another in one tensor each; what a kernel leaves
for another is a tensor of its own.  In a step that moves more than it computes, kernels share the
scratchpad with the one before and after, and weights are on the way while that one computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import ceil

import numpy as np

from dure.compiler.chip.allocate import capacity
from dure.compiler.chip.compose import Binding, Item, Kernel, Repeat, View, compose
from dure.compiler.chip.pipeline import Compiled, Options, compile_for
from dure.ir.core import Function, Value
from dure.ir.devices import own_device
from dure.ir.expr import IntLike, Symbol, as_expr, const, evaluate, symbol
from dure.ir.types import TensorType, static_extent
from dure.library.answer import peak
from dure.library.build import Built, index_values, tile_function
from dure.library.call import IndexArray
from dure.library.chip_tensors import WEIGHTS, Operand, Stored
from dure.machine.chip import Chip
from dure.models.chip_rings import Ring, Streamed, Turn, demand, placed, streamed
from dure.models.chip_step import ChipStep, Layers, StepCall

#: Slots that a ring of weights has at most.
_SLOTS = 16
#: Turns of equal layers after which the far memory is as far ahead as it gets.
_TURNS = 4


@dataclass(frozen=True)
class Chosen:
    """A launch of the step, what its arguments take, and how it is compiled by itself."""

    step: StepCall
    operands: tuple[Operand | None, ...]
    built: Built
    #: Which of several launches of a collective it is.
    stage: str = ""

    @property
    def name(self) -> str:
        """What it computes."""
        return f"{self.step.part.name} {self.stage}".rstrip()


@dataclass(frozen=True)
class Allocation:
    """A tensor of the program: what lies there, ``layers`` times behind one another on each of
    ``devices``.
    """

    stored: Stored
    layers: Layers | None
    type: TensorType
    devices: int = 1


@dataclass(frozen=True)
class StepProgram:
    """The machine program, what its arguments are, and the index arguments' values by name."""

    function: Function
    tensors: Mapping[str, Allocation]
    indices: Mapping[str, IndexArray]


def options_for(step: ChipStep, chip: Chip, *, strict: bool, prefetch: bool) -> Options:
    """How a step's kernels are compiled: half of the scratchpad each, where loads run ahead."""
    budget = capacity(chip.memories[chip.scratchpad]) // 2 if streams(step, chip) else None
    return Options(strict=strict, budget=budget if prefetch else None, oriented=False)


def streams(step: ChipStep, chip: Chip) -> bool:
    """Whether a step moves longer than it computes, and the chip loads ahead.  Of experts only the
    run tells which weights are needed: those never arrive early.
    """
    if not any(dma.ahead for dma in chip.dma.values()):
        return False
    moved = [c.count * (c.part.weight_bytes + c.part.kv_bytes) for c in step.calls]
    late = sum(n for n, call in zip(moved, step.calls, strict=True) if _follows(call, step))
    early = step.bytes * (1 - late / max(1, sum(moved)))
    return early / chip.peaks.bandwidth.base > step.flops / peak(chip, step.multiplied(chip))


def _follows(entry: StepCall, step: ChipStep) -> bool:
    """Whether what an entry reads depends on what the step itself gives."""
    launches = zip(entry.part.calls, entry.part.operands, strict=True)
    return any(_is_made(operands[n], step) for call, operands in launches for n in call.indices)


def _is_made(operand: Operand | None, step: ChipStep) -> bool:
    """Whether an index argument is what the program itself gives."""
    return operand is not None and operand.stored.values[0] in step.made


def step_program(
    step: ChipStep, chip: Chip, chosen: Sequence[Chosen], *, prefetch: bool
) -> StepProgram:
    """The program of a step whose launches were chosen."""
    work = _Assembly(step, chip, prefetch and streams(step, chip))
    # On an engine that moves one after another, what waits for a small tile waits for all that is
    # on its way before: there the rings stay small.
    if work.ahead and not any(dma.ahead and dma.serial for dma in chip.dma.values()):
        work.plan(chosen)
    items: list[Item] = []
    place = 0
    while place < len(chosen):
        layers = chosen[place].step.layers
        stop = place + 1
        while layers is not None and stop < len(chosen) and chosen[stop].step.layers is layers:
            stop += 1
        items.append(work.item(layers, chosen[place:stop]))
        place = stop
    types = {name: found.type for name, found in work.tensors.items()}
    function = compose(step.name, types, items, chip, devices=step.chips, prefetch=work.ahead)
    return StepProgram(function, work.tensors, work.indices)


@dataclass
class _Assembly:
    step: ChipStep
    chip: Chip
    ahead: bool
    tensors: dict[str, Allocation] = field(default_factory=dict[str, Allocation])
    indices: dict[str, IndexArray] = field(default_factory=dict[str, "IndexArray"])
    names: dict[Value, str] = field(default_factory=dict[Value, str])
    compiled: dict[int, Compiled] = field(default_factory=dict[int, Compiled])
    #: Launches whose weights are loaded ahead, and the slots of their rings.
    rings: dict[int, Ring] = field(default_factory=dict[int, "Ring"])

    def item(self, layers: Layers | None, chosen: Sequence[Chosen]) -> Item:
        """A launch, or the launches of equal layers."""
        counter = symbol(f"layer{len(self.tensors)}", "loop", 0, layers.count - 1 if layers else 0)
        kernels = tuple(self.kernel(entry, counter) for entry in chosen)
        return kernels[0] if layers is None else Repeat(layers.count, counter, kernels)

    def kernel(self, chosen: Chosen, counter: Symbol) -> Kernel:
        """A launch with its arguments bound."""
        call = chosen.built.call
        operands = chosen.operands
        present = [n for n, kind in enumerate(call.types) if kind is not None]
        late = any(_is_made(operands[n], self.step) for n in call.indices)
        compiled = self.program(chosen, present, operands, late)
        arguments: list[Binding] = []
        for param, number in zip(compiled.function.params, present, strict=True):
            operand = operands[number]
            assert operand is not None
            if call.devices > 1:
                binding = self.across(operand, param.value.tensor, chosen.step.layers, counter)
            else:
                binding = self.bound(operand, param.value.tensor, chosen.step.layers, counter)
            if number in call.indices:
                every = [call.indices[number]] * self.step.chips
                self.indices[binding.tensor] = np.concatenate(every)
            arguments.append(binding)
        ring = self.rings.get(id(chosen.built))
        place = None if ring is None else ring.offset
        return Kernel(chosen.name, compiled.function, tuple(arguments), late, place)

    def program(
        self,
        chosen: Chosen,
        present: Sequence[int],
        operands: Sequence[Operand | None],
        late: bool,
    ) -> Compiled:
        """The launch's program; where loads run ahead, with its weights on a queue of their own and
        as many slots as there is room for.
        """
        found = chosen.built.compiled
        if not self.ahead or late:
            return found
        if id(chosen.built) not in self.compiled:
            weights = self.weights(chosen)
            if id(chosen.built) in self.rings:
                ring = self.rings[id(chosen.built)]
                found = ring.streamed.compiled(self.chip, ring.slots)
            elif weights:
                tile = tile_function(chosen.built.call, dict(chosen.built.consts))
                options = replace(found.options, ahead=weights, slots=_SLOTS)
                lists = index_values(chosen.built.call, tile)
                found = compile_for(tile, self.chip, options, lists)
            self.compiled[id(chosen.built)] = found
        return self.compiled[id(chosen.built)]

    # --- rings of weights ------------------------------------------------------------------------

    def weights(self, chosen: Chosen) -> frozenset[str]:
        """The names of a launch's parameters that are weights."""
        call, operands = chosen.built.call, chosen.operands
        present = [n for n, kind in enumerate(call.types) if kind is not None]
        names = [p.value.name for p in chosen.built.compiled.function.params]
        return frozenset(
            name
            for name, number in zip(names, present, strict=True)
            if (operand := operands[number]) is not None and operand.stored.form in WEIGHTS
        )

    def plan(self, chosen: Sequence[Chosen]) -> None:
        """Give the weights' rings tiles, slots and places, where there is room for all that arrives
        early.
        """
        turns: dict[int, Turn] = {}
        tiles: dict[Streamed, int] = {}
        memory = self.chip.memories[self.chip.scratchpad]
        parts = 1 if memory.partitions is None else int(memory.partitions.base)
        bottom = 0
        for entry in chosen:
            built, weights = entry.built, self.weights(entry)
            operands = entry.operands
            if id(built) in turns:
                continue
            if not weights or any(_is_made(operands[n], self.step) for n in built.call.indices):
                turns[id(built)] = Turn(built.timing.ps - built.timing.launch)
                bottom = max(bottom, built.compiled.used[self.chip.scratchpad])
                continue
            ring = streamed(built, self.chip, weights)
            moved = entry.step.part.weight_bytes
            load = int(moved / self.chip.peaks.bandwidth.base * 1e12)
            turns[id(built)] = Turn(ring.chain, load, ring)
            tiles[ring] = ceil(moved / (ring.cores * ring.slot * parts))
            bottom = max(bottom, ring.rest)
        outstanding = max(int(d.outstanding.base) for d in self.chip.dma.values() if d.ahead)
        needed = demand([turns[id(e.built)] for e in _executed(chosen)], tiles, outstanding)
        found = placed(needed, capacity(memory) - bottom)
        self.rings = {id(ring.streamed.built): ring for ring in found or ()}

    # --- tensors ---------------------------------------------------------------------------------

    def bound(
        self, operand: Operand, kind: TensorType, layers: Layers | None, counter: Symbol
    ) -> Binding:
        """What an argument of this type is."""
        stored, window = operand.stored, operand.window
        own = None
        if layers is not None and any(v in layers.tables for v in stored.values):
            own = layers
        name = self.allocated(stored, own, kind)
        shape = window.shape if window is not None else _shape(kind)
        views: list[View] = []
        turns, devices = 1 if own is None else own.count, self.step.chips
        if turns * devices > 1:
            first = shape[0]
            shape = (devices * turns * first, *shape[1:])
            turn: IntLike = 0 if own is None else counter
            device: IntLike = own_device(devices) if devices > 1 else 0
            start = as_expr((device * turns + turn) * first)
            views.append(View(0, start, start + first))
        if window is not None:
            views.append(View(window.axis, window.start, window.stop))
        return Binding(name, shape, tuple(views))

    def across(
        self, operand: Operand, kind: TensorType, layers: Layers | None, counter: Symbol
    ) -> Binding:
        """What an argument is of a kernel that all devices run together: all devices' tensors.  Of
        what lies in layers, axis 1 of the argument is the turn.
        """
        stored, window = operand.stored, operand.window
        shape, views = _shape(kind), ()
        own = None
        if layers is not None and any(v in layers.tables for v in stored.values):
            own = layers
            shape = (shape[0], own.count, *shape[2:])
            views = (View(1, counter, counter + 1),)
        elif window is not None:
            shape = window.shape
            views = (View(window.axis, window.start, window.stop),)
        return Binding(self.allocated(stored, own, kind), shape, views)

    def allocated(self, stored: Stored, layers: Layers | None, kind: TensorType) -> str:
        """The name of a stored tensor, which is there from now on."""
        name = "+".join(self.name(v, layers) for v in stored.values)
        if stored.form != "plain":
            name = f"{name}.{stored.form}"
        found = self.tensors.get(name)
        if found is None:
            first, *rest = self.shape(stored)
            first *= self.step.chips * (1 if layers is None else layers.count)
            own = replace(kind, shape=(const(first), *map(const, rest)))
            found = Allocation(stored, layers, own, self.step.chips)
        elif kind.index is not None:
            found = replace(found, type=_narrower(found.type, kind))
        self.tensors[name] = found
        return name

    def name(self, value: Value, layers: Layers | None) -> str:
        """A value's name in the program: what comes out of ops has a number."""
        if layers is not None and value in layers.tables:
            value = layers.tables[value][0]
        if value.name:
            return value.name
        return self.names.setdefault(value, f"value{len(self.names)}")

    def shape(self, stored: Stored) -> tuple[int, ...]:
        """The extents of what is stored."""
        turned = [[evaluate(e, self.step.sizes) for e in v.tensor.shape] for v in stored.values]
        for shape in turned:
            stored.turn(shape)
        return (*turned[0][:-1], sum(s[-1] for s in turned))


def _executed(chosen: Sequence[Chosen]) -> Iterator[Chosen]:
    """Launches in the order of execution, equal layers for as many turns as tell how far the far
    memory gets ahead.
    """
    for layers, group in groupby(chosen, key=lambda entry: entry.step.layers):
        entries = list(group)
        for _ in range(1 if layers is None else min(_TURNS, layers.count)):
            yield from entries


def _shape(kind: TensorType) -> tuple[int, ...]:
    found = tuple(static_extent(e) for e in kind.shape)
    return tuple(e for e in found if e is not None)


def _narrower(known: TensorType, kind: TensorType) -> TensorType:
    """The type with the range that both allow: what is passed lies in both."""
    if known.index is None:
        return replace(known, index=kind.index, unique=kind.unique)
    assert kind.index is not None
    low = max(evaluate(k[0], {}) for k in (known.index, kind.index))
    high = min(evaluate(k[1], {}) for k in (known.index, kind.index))
    return replace(known, index=(const(low), const(high)), unique=known.unique or kind.unique)
