"""What a step keeps in the memory in front of home."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import small

from dure.ir.machine.compute import ops_of
from dure.models.batch import Batch
from dure.models.chip_answer import step_answer
from dure.models.chip_step import ChipStep, chip_step
from dure.models.config import ModelConfig, RopeConfig
from dure.models.near import Near, near_values
from dure.sim.sanitizer import sanitize
from dure.targets import chip, chip_names

TINY = ModelConfig(
    "qwen3", 64, 96, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), tied=False, qk_norm=True
)
MTIA = chip("mtia-v2")


@pytest.fixture(scope="module")
def step() -> ChipStep:
    return chip_step(TINY, Batch("decode", 2, 40))


def test_values_between_launches_lie_near(step: ChipStep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dure.models.chip_answer.streams", lambda step, chip: False)
    answer = step_answer(step, MTIA)
    function = answer.program.function
    near = function.attrs["near"]
    assert near and all(name.startswith("value") for name in near)
    kept = {p.value.name for p in function.params} - set(near)
    assert kept
    queues = {op.attr("queue") for op in ops_of(function.body) if op.name.startswith("dma")}
    assert {"shared_load", "shared_store", "dma_load"} <= queues
    attrs = {name: value for name, value in function.attrs.items() if name != "near"}
    found = sanitize(replace(function, attrs=attrs), MTIA)
    assert not found.ok and "doesn't move from 'dram'" in found.render()


def test_tensors_that_are_alive_together_fit(step: ChipStep) -> None:
    whole = near_values(step, MTIA)
    assert 0 < whole.reserved <= MTIA.memories["sram"].size.base
    sram = MTIA.memories["sram"]
    size = replace(sram.size, value=whole.reserved - 1, unit="B")
    small = sram.model_copy(update={"size": size})
    memories = {**MTIA.memories, "sram": small}
    found = near_values(step, MTIA.model_copy(update={"memories": memories}))
    assert found.tensors < whole.tensors and found.reserved < whole.reserved


@pytest.mark.parametrize("name", [n for n in chip_names() if not chip(n).near])
def test_a_chip_without_such_a_memory_keeps_nothing_there(name: str, step: ChipStep) -> None:
    assert near_values(step, chip(name)) == Near()


def test_index_lists_lie_in_home() -> None:
    config = small("gpt-oss-120b", vocabulary=512)
    step = chip_step(config, Batch("prefill", 2, 90, chunk=90))
    near = near_values(step, MTIA)
    launches = [
        launch
        for c in step.calls
        for way in c.part.ways(MTIA)
        for launch in way
        if launch[0].indices
    ]
    lists = {operands[n].stored for call, operands in launches for n in call.indices}
    made = {stored for stored in lists if stored.values[0] in step.made}
    # Places by columns, and where each expert's rows start and stop, of both kinds of layers.
    assert len(made) == 6
    assert near.tensors and not near.tensors & lists
