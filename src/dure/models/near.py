"""What a step keeps in the memory in front of home: what one of its launches makes for others.

It need never reach the home memory.  Values that aren't alive at the same time may have the same
bytes; what is left of the memory caches the rest.  Weights, the KV cache, what the caller gives and
gets, and index lists lie in home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dure.ir.expr import evaluate
from dure.library.call import KernelCall
from dure.library.chip_tensors import Operand, Stored
from dure.machine.chip import Chip
from dure.models.chip_step import ChipStep


@dataclass
class _Life:
    """The launches, by their number, between which a tensor is needed, and its bytes."""

    first: int
    last: int
    size: int


@dataclass(frozen=True)
class Near:
    """The tensors that lie near, and the most bytes that they need at once."""

    tensors: frozenset[Stored] = frozenset()
    reserved: int = 0

    def arguments(self, call: KernelCall, operands: Sequence[Operand | None]) -> frozenset[int]:
        """The numbers of a launch's arguments, without absent ones, that lie near."""
        present = [n for n, kind in enumerate(call.types) if kind is not None]
        return frozenset(
            number
            for number, place in enumerate(present)
            if place not in call.indices
            and (operand := operands[place]) is not None
            and operand.stored in self.tensors
        )


def near_values(step: ChipStep, chip: Chip) -> Near:
    """What of a step lies near; the largest tensors don't where all together are too much."""
    if not chip.near:
        return Near()
    lives = _lives(step, chip)
    room = int(chip.memories[chip.near].size.base)
    while lives:
        most = _most(lives, step)
        if most <= room:
            return Near(frozenset(lives), most)
        del lives[max(lives, key=lambda stored: lives[stored].size)]
    return Near()


def most_at_once(step: ChipStep, chip: Chip) -> int:
    """The most bytes that the tensors which a step itself makes need at once."""
    return _most(_lives(step, chip), step)


def _most(lives: Mapping[Stored, _Life], step: ChipStep) -> int:
    return max(
        sum(life.size for life in lives.values() if life.first <= at <= life.last)
        for at in range(len(step.calls))
    )


def _lives(step: ChipStep, chip: Chip) -> dict[Stored, _Life]:
    """The tensors that the step itself makes, with the launches that need them."""
    given = {*step.outputs.values(), *step.made}
    found: dict[Stored, _Life] = {}
    for at, entry in enumerate(step.calls):
        launches = [launch for way in entry.part.ways(chip) for launch in way]
        for call, operands in launches:
            for place, operand in enumerate(operands):
                if operand is None or call.types[place] is None or place in call.indices:
                    continue
                stored = operand.stored
                if stored.form != "plain" or any(v.name or v in given for v in stored.values):
                    continue
                if call.devices > 1:
                    # Devices reach one another's home memories.
                    given.update(stored.values)
                    found.pop(stored, None)
                    continue
                if entry.layers and any(v in entry.layers.tables for v in stored.values):
                    continue
                life = found.setdefault(stored, _Life(at, at, _bytes(stored, step.sizes)))
                life.last = at
    return found


def _bytes(stored: Stored, sizes: Mapping[str, int]) -> int:
    """What a tensor takes; values between ops are at most as wide as the program's."""
    total = 0
    for value in stored.values:
        elements = 1
        for extent in value.tensor.shape:
            elements *= evaluate(extent, sizes)
        total += int(elements * value.tensor.dtype.bits) // 8
    return total
