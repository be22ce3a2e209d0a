"""Prefills whose sequences are taken in parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dure import targets
from dure.machine.chip import Chip
from dure.models.batch import Batch
from dure.models.chip_answer import step_answer
from dure.models.chip_devices import answer_on
from dure.models.chip_step import chip_step
from dure.models.config import ModelConfig, RopeConfig
from dure.models.micro_batches import micro_batch, micro_batches
from dure.models.near import most_at_once

TINY = ModelConfig("llama", 64, 96, 2, 4, 2, 16, 250, 512, 1e-6, RopeConfig(1e4), tied=False)
PREFILL = Batch("prefill", 4, 64)


def with_room(size: float, faster: float = 128) -> Chip:
    """MTIA v2 with so many bytes in front of a home memory that is so much faster."""
    chip = targets.chip("mtia-v2")
    sram, peaks = chip.memories["sram"], chip.peaks
    kept = sram.model_copy(update={"size": replace(sram.size, value=size, unit="B")})
    rate = replace(peaks.bandwidth, value=peaks.bandwidth.value * faster)
    peaks = peaks.model_copy(update={"bandwidth": rate})
    return chip.model_copy(update={"memories": {**chip.memories, "sram": kept}, "peaks": peaks})


def test_values_that_are_too_large_are_made_in_parts() -> None:
    step = chip_step(TINY, PREFILL)
    most = most_at_once(step, targets.chip("mtia-v2"))
    quarter = -(-most // 4)
    sizes = (most, most - 1, quarter)
    assert [micro_batches(step, with_room(size)) for size in sizes] == [1, 2, 4]
    # Of parts of one sequence each there are no smaller ones.
    assert micro_batches(step, with_room(quarter - 1)) == 1
    # Where reading the weights takes longer than half of the products, once is enough.
    assert micro_batches(step, with_room(2 * quarter, 1)) == 1
    for batch in (Batch("decode", 4, 64), replace(PREFILL, contexts=(64, 8, 8, 8))):
        assert micro_batches(chip_step(TINY, batch), with_room(2 * quarter)) == 1
    assert micro_batches(step, targets.chip("rngd")) == 1


def test_the_time_is_that_of_all_parts() -> None:
    step = chip_step(TINY, PREFILL)
    chip = with_room(most_at_once(step, targets.chip("mtia-v2")) // 2)
    half = step_answer(micro_batch(step, 2), chip)
    found = answer_on(step, chip)
    assert (found.micro_batches, found.ps) == (2, 2 * half.ps)
    assert found.step.flops == step.flops and found.roofline_ps == pytest.approx(
        step_answer(step, chip).roofline_ps
    )
    assert [p.count for p in found.parts] == [2 * p.count for p in half.parts]
    assert [p.ps for p in found.parts] == [p.ps for p in half.parts]
    said = found.json()
    assert said["micro_batches"] == 2 and said["tokens"] == 4 * 64
