"""Prefills whose sequences are taken in parts, one after another through all layers.

What launches leave for one another then stays in the memory in front of home, where a chip has one;
the price is that each part reads the weights again.
"""

from __future__ import annotations

from dataclasses import replace

from dure.library.answer import peak
from dure.machine.chip import Chip
from dure.models.chip_step import ChipStep, chip_step
from dure.models.config import ModelConfig
from dure.models.near import most_at_once

#: The part of the arithmetic's time that reading all weights may take: loads then hide behind it.
_READ = 0.5


def micro_batches(step: ChipStep, chip: Chip) -> int:
    """In how many equal parts the sequences of a step are taken: the fewest whose values lie in
    front of the home memory all together, and 1 where there is no such number.
    """
    batch = step.batch
    if not chip.near or batch.phase != "prefill" or batch.contexts:
        return 1
    if not isinstance(step.config, ModelConfig):
        return 1
    room = int(chip.memories[chip.near].size.base)
    arithmetic = step.flops / (peak(chip, step.multiplied(chip)) * step.chips)
    reading = step.device_bytes[0] / chip.peaks.bandwidth.base
    taken = most_at_once(step, chip)
    for count in range(1, batch.sequences + 1):
        if batch.sequences % count == 0 and taken <= count * room:
            return count if count * reading <= _READ * arithmetic else 1
    return 1


def micro_batch(step: ChipStep, count: int) -> ChipStep:
    """One of so many parts of a step of one device."""
    if count == 1:
        return step
    assert step.config is not None
    batch = replace(step.batch, sequences=step.batch.sequences // count)
    types = {"weights": step.weights, "kv": step.kv, "activations": step.activations}
    return chip_step(step.config, batch, step.dtype, step.name, **types)
