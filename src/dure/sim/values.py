"""The machine program on real bytes: what it computes on a chip, engine by engine.

Every memory of every core is an array of bytes at the program's addresses, poisoned with NaN
patterns; memories of the whole chip exist once.  DMA moves bits by its descriptors, and its bytes
move at random times between issue and completion; instructions compute in the chip's arithmetic
(:mod:`dure.sim.arithmetic`); queues and cores interleave at random (:mod:`dure.sim.interleave`).
A correct program gives the same results for every seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dure.errors import IRError, TargetError
from dure.ir.blocks import Blocks
from dure.ir.core import Function, Op, Value, walk
from dure.ir.devices import device_id, devices_of
from dure.ir.dtypes import Array
from dure.ir.interpret import Frame, RuntimeValue, bind_sizes, check_index_values
from dure.machine.chip import Chip
from dure.sim.arithmetic import Arithmetic, formats_of
from dure.sim.expand import Instruction, core_ids, declared, expand
from dure.sim.home import Home, Window, boxes, selection_of, window_of
from dure.sim.interleave import Interleaving, queues_of
from dure.sim.storage import (
    Bytes,
    Raw,
    TilePlace,
    new_memory,
    place_tile,
    to_raws,
    to_values,
)


def run_values(
    function: Function, chip: Chip, arrays: Sequence[Array | Blocks], *, seed: int = 0
) -> None:
    """Run a machine program on all of its cores, writing out and inout ``arrays`` in place.

    ``arrays`` are the arguments in the order of the parameters.  ``seed`` draws every order that
    the program leaves open.  Raises :class:`IRError` for arguments of another type, a deadlock, a
    semaphore that overflows or leaks, and storage that the chip doesn't have.
    """
    sizes = bind_sizes(function, arrays)
    indices = _indices(function, arrays, sizes)
    draw = random.Random(seed)
    machine = _Machine(function, chip, arrays, draw)
    dma = _dma_queues(function, chip)
    interleaving = Interleaving(function, dma, machine.effect, draw)
    cores = list(enumerate(core_ids(function)))
    draw.shuffle(cores)
    # Cores that share no scratchpad can't see each other but in the home memory, where one after
    # another in any order shows what any interleaving would, with less held at a time.
    together = machine.shares_scratchpad or interleaving.phased
    groups = [cores] if together else [[core] for core in cores]
    with np.errstate(all="ignore"):
        for group in groups:
            machine.power_up({number: _device(function, ids) for number, ids in group})
            interleaving.run(
                {number: expand(function, {**sizes, **ids}, indices) for number, ids in group}
            )
        for home in machine.homes.values():
            home.finish()


def _device(function: Function, core: Mapping[str, int]) -> int:
    device = device_id(function)
    return 0 if device is None else core[device.name]


def _indices(
    function: Function, arrays: Sequence[Array | Blocks], sizes: Mapping[str, int]
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for param, array in zip(function.params, arrays, strict=True):
        kind = param.value.tensor
        if kind.index is not None:
            assert isinstance(array, np.ndarray)
            # What the program itself makes is checked where it is read.
            if param.access == "in":
                # Elements that are unique are so on each device.
                for own in np.split(array, devices_of(function)):
                    check_index_values(param.value.name, kind, own, sizes)
            found[param.value.name] = array
    return found


def _dma_queues(function: Function, chip: Chip) -> dict[str, int]:
    """The DMA queues with the transfers each may have under way.

    Raises :class:`TargetError` for a queue that the chip doesn't have.
    """
    found: dict[str, int] = {}
    for engine in chip.dma.values():
        for queue in engine.queues:
            found[queue] = max(int(engine.outstanding.base), found.get(queue, 1))
    known = {*found, *(engine.queue for engine in chip.engines.values())}
    for queue in queues_of(function):
        if queue not in known:
            raise TargetError(
                f"the program uses the queue '{queue}', which {chip.name} doesn't have",
                rule="a program's queues are those of its chip's engines and DMA engines",
                fix=f"one of {', '.join(sorted(known))}",
            )
    return found


@dataclass(frozen=True, slots=True)
class _Storage:
    """A buffer: the memory it is in, how its tile lies there, and where its slots are."""

    memory: str
    place: TilePlace
    offset: int
    pitch: int
    stages: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + (self.stages - 1) * self.pitch + self.place.size


class _Machine:
    """Memories and tensors, and what each instruction does to them."""

    def __init__(
        self,
        function: Function,
        chip: Chip,
        arrays: Sequence[Array | Blocks],
        draw: random.Random,
    ) -> None:
        self.chip = chip
        self.random = draw
        self.formats = formats_of(chip)
        self.arithmetic = Arithmetic(self.formats)
        self.homes = {
            param.value: Home(param, array, self.formats)
            for param, array in zip(function.params, arrays, strict=True)
        }
        for op in walk(function.body):
            if op.name == "reshaped":
                home = self.homes[op.operands[0]]
                self.homes[op.result] = home.reshaped(op.result.tensor)
        self.views = {op.result: op for op in walk(function.body) if op.name == "view"}
        self.buffers = {op.result: self._storage(op) for op in declared(function, "buffer")}
        self.sizes = self._sizes()
        self.own: dict[int, dict[str, Bytes]] = {}
        #: The memories that a device's cores share, by device, and the device of each core.
        self.shared = [self._memories("chip") for _ in range(devices_of(function))]
        self.devices: Mapping[int, int] = {}
        self._windows: dict[Op, Window] = {}

    @property
    def shares_scratchpad(self) -> bool:
        """Whether a buffer is in a memory that the cores share."""
        return any(self.shared)

    def _storage(self, op: Op) -> _Storage:
        name: str = op.attr("memory")
        if name not in self.chip.memories:
            raise TargetError(
                f"a buffer in '{name}', a memory that {self.chip.name} doesn't have",
                where=_where(op),
                rule="a buffer is in one of the chip's memories",
                fix=f"one of {', '.join(self.chip.memories)}",
            )
        place = place_tile(op.result.tile, self._partitions(name))
        return _Storage(name, place, op.attr("offset"), op.attr("pitch"), op.attr("stages"))

    def _partitions(self, memory: str) -> int | None:
        found = self.chip.memories[memory].partitions
        return None if found is None else int(found.base)

    def _sizes(self) -> dict[str, int]:
        """Bytes of each memory (each partition) that the buffers reach."""
        ends: dict[str, int] = {}
        for value, buffer in self.buffers.items():
            ends[buffer.memory] = max(ends.get(buffer.memory, 0), buffer.end)
            limit = self.chip.memories[buffer.memory].size.base
            limit //= self._partitions(buffer.memory) or 1
            if buffer.end > limit:
                raise IRError(
                    f"buffer '{value.name}' ends at byte {buffer.end} of {buffer.memory}",
                    rule=f"{buffer.memory} has {int(limit)} bytes (in each partition)",
                    fix="allocate it at a lower offset, or make it smaller",
                )
        return ends

    def _memories(self, scope: str) -> dict[str, Bytes]:
        return {
            name: new_memory(self._partitions(name) or 1, size)
            for name, size in self.sizes.items()
            if self.chip.memories[name].scope == scope
        }

    def power_up(self, cores: Mapping[int, int]) -> None:
        """Fresh memories for these cores, which take the place of those before, given the device of
        each.
        """
        self.devices = cores
        self.own = {core: self._memories("core") for core in cores}

    # Instructions ---------------------------------------------------------------------------------

    def effect(self, core: int, instruction: Instruction, position: int) -> Iterator[None]:
        """What an instruction does, step by step."""
        match instruction.op.name:
            case "compute":
                return self._compute(core, instruction)
            case "dma_load":
                return self._load(core, instruction)
            case "dma_store":
                return self._store(core, instruction, position)
            case name:
                raise IRError(
                    f"'{name}' on a queue",
                    where=_where(instruction.op),
                    rule="a queue executes compute, dma_load, dma_store, wait and signal",
                    fix="lower it to one of them",
                )

    def _at(self, core: int, value: Value, slot: int | None) -> tuple[_Storage, Bytes, int]:
        """A buffer, its memory and its address now."""
        buffer = self.buffers[value]
        memory = self.own[core].get(buffer.memory)
        if memory is None:
            memory = self.shared[self.devices[core]][buffer.memory]
        return buffer, memory, buffer.offset + (slot or 0) * buffer.pitch

    def _values(self, core: int, value: Value, slot: int | None) -> Array | Blocks:
        buffer, memory, address = self._at(core, value, slot)
        raws = buffer.place.read(memory, address)
        return to_values(buffer.place.type, raws, self.formats)

    def _compute(self, core: int, instruction: Instruction) -> Iterator[None]:
        op, slots = instruction.op, instruction.slots
        count: int = op.attr("reads")
        read = [
            self._values(core, value, slot)
            for value, slot in zip(op.operands[:count], slots[:count], strict=True)
        ]
        frame = Frame(dict[Value, RuntimeValue](), instruction.symbols, checked=False)
        frame.evaluator = self.arithmetic
        written: list[tuple[Value, int | None, tuple[Raw, ...]]] = []
        for value, slot, found in zip(
            op.operands[count:],
            slots[count:],
            frame.run_region(op.regions[0], read),
            strict=True,
        ):
            assert isinstance(found, np.ndarray | Blocks)
            written.append((value, slot, to_raws(value.tile, found, self.formats)))
        yield
        for value, slot, raws in written:
            buffer, memory, address = self._at(core, value, slot)
            buffer.place.write(memory, address, raws)

    def _lists(self, core: int, instruction: Instruction) -> list[Array]:
        """The values of a transfer's index lists now."""
        found: list[Array] = []
        for value, slot in zip(instruction.op.operands[2:], instruction.slots[2:], strict=True):
            entries = self._values(core, value, slot)
            assert isinstance(entries, np.ndarray)
            found.append(entries.astype(np.int64))
        return found

    def _window(self, op: Op) -> Window:
        found = self._windows.get(op)
        if found is None:
            found = self._windows[op] = window_of(op.operands[0], self.homes, self.views)
        return found

    def _spoils(self) -> bool:
        """Whether a transfer leaves garbage in its target before it writes the right bytes."""
        return self.random.random() < 0.5

    def _load(self, core: int, instruction: Instruction) -> Iterator[None]:
        op = instruction.op
        yield
        home = self._window(op).home
        buffer, memory, address = self._at(core, op.operands[1], instruction.slots[1])
        planes, shape = buffer.place.planes, buffer.place.type.shape
        lists = self._lists(core, instruction)
        pers = [plane.per for plane in planes]
        found = boxes(op, self._window(op), shape, pers, instruction.symbols, lists)
        moved: list[Raw] = []
        for plane, box, raw in zip(planes, found, home.raws, strict=True):
            part = np.array(raw[box.memory])
            if op.attr("filling") and not box.whole:
                self._check_fills(op)
                tile = home.filled(raw, plane.dtype, box.shape, op.attr("fill"))
                tile[box.tile] = part
                part = tile
            moved.append(part)
        partial = [not box.whole and not op.attr("filling") for box in found]
        for spoil in (True, False) if self._spoils() else (False,):
            yield
            for plane, box, part, some in zip(planes, found, moved, partial, strict=True):
                bits = np.full_like(part, _ones(part)) if spoil else part
                if some:
                    tile = np.array(plane.read(memory, address))
                    tile[box.tile] = bits
                    bits = tile
                plane.write(memory, address, bits)

    def _check_fills(self, op: Op) -> None:
        queue = op.attr("queue")
        if not any(dma.fills for dma in self.chip.dma.values() if queue in dma.queues):
            raise IRError(
                f"a load on the queue '{queue}' fills what lies outside the tensor",
                where=_where(op),
                rule=f"the DMA engines of {self.chip.name} on that queue don't fill",
                fix="write the fill with an instruction first, and load with filling=False",
            )

    def _store(self, core: int, instruction: Instruction, position: int) -> Iterator[None]:
        op, window = instruction.op, self._window(instruction.op)
        home = window.home
        if home.access == "in":
            raise IRError(
                f"a store into '{home.name}', an argument that is only read",
                where=_where(op),
                rule="a program stores into arguments that are out or inout",
                fix="declare the argument as an output, or store elsewhere",
            )
        yield
        buffer, memory, address = self._at(core, op.operands[1], instruction.slots[1])
        place, lists = buffer.place, self._lists(core, instruction)
        raws = [np.array(raw) for raw in place.read(memory, address)]
        combine: str = op.attr("combine")
        if combine:
            values = to_values(place.type, raws, self.formats)
            assert isinstance(values, np.ndarray), "combine of block-quantized values"
            selection = selection_of(op, window, place.type.shape, instruction.symbols, lists)
            home.combined.append(((core, position), selection, values, combine))
            return
        pers = [plane.per for plane in place.planes]
        found = boxes(op, window, place.type.shape, pers, instruction.symbols, lists)
        for spoil in (True, False) if self._spoils() else (False,):
            yield
            for box, raw, target in zip(found, raws, home.raws, strict=True):
                target[box.memory] = _ones(raw) if spoil else raw[box.tile]


def _ones(raw: Raw) -> int:
    """The number of the same width whose every bit is set."""
    return (1 << (8 * raw.dtype.itemsize)) - 1


def _where(op: Op) -> str:
    return op.span.render() if op.span is not None else ""
