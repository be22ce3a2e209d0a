"""A model's step on a chip's bytes: what its program computes, given weights, caches and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dure.errors import UsageError
from dure.ir.core import Value
from dure.ir.dtypes import Array, DType
from dure.ir.types import static_extent
from dure.machine.chip import Chip
from dure.models.chip_program import Allocation, StepProgram
from dure.models.chip_step import ChipStep
from dure.sim.values import run_values


def run_step(
    step: ChipStep,
    program: StepProgram,
    chip: Chip,
    arrays: Mapping[str, Array],
    *,
    seed: int = 0,
) -> dict[str, Array]:
    """What the step gives, by name, and the pools of its cache as they are afterwards.

    ``arrays`` are weights, pools and index inputs by their names in the step's tensor program, in
    its shapes; they are converted to the types that the chip stores and aren't changed; what the
    chip keeps as codes and scales is quantized on the way in, and its numbers come out.  ``seed``
    draws every order that the program leaves open.  Raises :class:`UsageError` for a missing one,
    and what :func:`~dure.sim.values.run_values` raises.
    """
    return run_devices(step, program, chip, [arrays], seed=seed)[0]


def run_devices(
    step: ChipStep,
    program: StepProgram,
    chip: Chip,
    arrays: Sequence[Mapping[str, Array]],
    *,
    seed: int = 0,
) -> list[dict[str, Array]]:
    """What each device of a sharded step gives; the rest is :func:`run_step`'s."""
    memory = StepMemory(step, program, chip, arrays)
    memory.run(seed=seed)
    return [memory.given(device) for device in range(step.chips)]


class StepMemory:
    """A step's tensors as they lie on its devices, from one run to the next."""

    def __init__(
        self,
        step: ChipStep,
        program: StepProgram,
        chip: Chip,
        arrays: Sequence[Mapping[str, Array]],
    ) -> None:
        """``arrays`` are each device's; see :func:`run_step`."""
        self.step, self.program, self.chip = step, program, chip
        self.placed = {
            name: np.concatenate([_placed(allocation, own) for own in arrays])
            for name, allocation in program.tensors.items()
        }

    def put(self, inputs: Mapping[str, Array]) -> None:
        """Other values of index inputs, the same on each device."""
        for name, array in inputs.items():
            if name in self.placed:
                self.placed[name][...] = np.concatenate([array] * self.step.chips)

    def run(self, *, seed: int = 0) -> None:
        """Run the program; pools and outputs are then what it left."""
        run_values(self.program.function, self.chip, list(self.placed.values()), seed=seed)

    def given(self, device: int = 0) -> dict[str, Array]:
        """A device's outputs and pools, by name."""
        found = {n: np.split(a, self.step.chips)[device] for n, a in self.placed.items()}
        return _given_back(self.step, self.program, found)


def _given_back(
    step: ChipStep, program: StepProgram, found: Mapping[str, Array]
) -> dict[str, Array]:
    """A device's outputs and pools, by name."""
    given = {v: n for n, v in step.outputs.items()}
    results: dict[str, Array] = {}
    for name, allocation in program.tensors.items():
        values = allocation.stored.values
        if len(values) == 1 and values[0] in given:
            results[given[values[0]]] = found[name]
        if allocation.stored.form == "heads_first":
            results |= _pools(allocation, found[name])
        if allocation.stored.form == "pool_codes":
            scales = replace(allocation.stored, form="pool_scales")
            held: Array = found[name].astype(np.float32)
            for other, scaled in program.tensors.items():
                if scaled.stored == scales:
                    held = np.multiply(held, found[other])
            results |= _pools(allocation, held)
    return results


def _placed(allocation: Allocation, arrays: Mapping[str, Array]) -> Array:
    """What lies in an allocation on a device at the start: what was given, or no numbers."""
    kind = allocation.type
    assert isinstance(kind.dtype, DType)
    shape = [static_extent(e) or 0 for e in kind.shape]
    shape[0] //= allocation.devices
    stored, layers = allocation.stored, allocation.layers
    turns = range(layers.count) if layers is not None else (0,)
    parts = [[_given(allocation, v, turn, arrays) for v in stored.values] for turn in turns]
    if any(array is None for part in parts for array in part):
        fill = np.nan if kind.dtype.is_float else 0
        return np.full(shape, fill, kind.dtype.numpy)
    placed = [stored.placed([a for a in part if a is not None]) for part in parts]
    return np.ascontiguousarray(np.concatenate(placed).astype(kind.dtype.numpy))


def _given(
    allocation: Allocation, value: Value, turn: int, arrays: Mapping[str, Array]
) -> Array | None:
    """The array of a value in a turn; None for what the program itself makes."""
    layers = allocation.layers
    if layers is not None and value in layers.tables:
        value = layers.tables[value][turn]
    if not value.name:
        return None
    found = arrays.get(value.name)
    if found is None:
        raise UsageError(
            f"no array '{value.name}'",
            rule="a step runs on all of its weights, pools and inputs",
            fix=f"pass arrays={{'{value.name}': ...}}",
        )
    return found


def _pools(allocation: Allocation, array: Array) -> dict[str, Array]:
    """The pools in an allocation, by name, in the tensor program's shape."""
    (value,), layers = allocation.stored.values, allocation.layers
    names = [value] if layers is None else layers.tables.get(value, (value,))
    return {
        v.name: np.swapaxes(part, 0, 1)
        for v, part in zip(names, np.split(array, len(names)), strict=True)
    }
