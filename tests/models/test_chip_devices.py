"""A step over several devices: chosen, compiled, proved and timed."""

from __future__ import annotations

import pytest

from dure import targets
from dure.errors import TargetError, UsageError
from dure.models import shapes
from dure.models.batch import Batch, Phase
from dure.models.chip_answer import StepAnswer, step_answer
from dure.models.chip_devices import Devices, answer_on
from dure.models.chip_step import chip_step, fewest_devices, held_bytes, sharded
from dure.models.config import ExpertsConfig, ModelConfig, RopeConfig
from dure.models.encoder_config import EncoderConfig
from dure.models.shards import Shards
from dure.sim.cost import duration

TINY = ModelConfig("llama", 64, 96, 2, 4, 2, 16, 250, 512, 1e-6, RopeConfig(1e4), tied=False)
EXPERTS = ModelConfig(
    "qwen3_moe", 64, 32, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e4), experts=ExpertsConfig(8, 2)
)
DECODE = Batch("decode", 2, 40)


def names(found: StepAnswer) -> list[str]:
    return [part.name for part in found.parts]


@pytest.mark.parametrize(
    ("name", "phase", "devices"),
    [
        ("rngd", "decode", 4),
        *(
            pytest.param(name, phase, devices, marks=pytest.mark.long)
            for name in targets.chip_names()
            if targets.chip(name).links
            for phase in ("decode", "prefill")
            for devices in (2, 4)
        ),
    ],
)
def test_a_step_over_devices(name: str, phase: Phase, devices: int) -> None:
    chip = targets.chip(name)
    batch = Batch(phase, 2, 40)
    found = answer_on(chip_step(TINY, batch), chip, Devices(chips=devices))
    assert all(p.built.verdict is not None and p.built.verdict.ok for p in found.parts)
    meeting = [p.step.part.name for p in found.parts if p.built.call.devices == devices]
    assert {"all-gather", "all-reduce"} == {name.split(", ")[-1] for name in meeting}
    # Its launches take all of its time.
    assert sum(p.total_ps for p in found.parts) + duration(chip, chip.launch) == found.ps
    # The residual is added where the sum is: nothing is left to add by itself.
    assert "add" not in names(found)
    answer = found.json()
    assert (answer["chips"], answer["tp"], answer["ep"]) == (devices, devices, 1)
    assert answer["device_kv_bytes"] == answer["kv_bytes"] // min(devices, 2)  # type: ignore[operator]
    alone = answer_on(chip_step(TINY, batch), chip, Devices(chips=1))
    assert answer["flops"] == alone.json()["flops"] and answer["bytes"] == alone.json()["bytes"]
    assert found.roofline_ps == pytest.approx(alone.roofline_ps / devices)


def test_the_launches_of_experts_that_are_dealt_out() -> None:
    whole = chip_step(EXPERTS, DECODE)
    step = sharded(whole, Shards(4, 4))
    kernels = {k.kernel.__name__ for c in step.calls for k in c.part.calls}
    assert {"part_places", "part_ends", "part_sum"} <= kernels
    gates = [c.part for s in (whole, step) for c in s.calls if c.part.name == "experts' gate+up"]
    assert 0 < gates[1].weight_bytes <= gates[0].weight_bytes


@pytest.mark.long
def test_experts_that_are_dealt_out() -> None:
    chip = targets.chip("rngd")
    found = answer_on(chip_step(EXPERTS, DECODE), chip, Devices(ep=4))
    assert found.step.shards == Shards(4, 4)
    by_width = answer_on(chip_step(EXPERTS, DECODE), chip, Devices(chips=4, ep=1))
    chosen = answer_on(chip_step(EXPERTS, DECODE), chip, Devices(chips=4))
    assert chosen.ps == min(found.ps, by_width.ps)


def test_the_fewest_devices_that_hold_it() -> None:
    config = shapes.model_config("llama-3.1-70b")
    batch = Batch("decode", 1, 1024)
    size = targets.chip("rngd").memories["hbm"].size.base
    step = chip_step(config, batch)
    assert fewest_devices(step, size) == 4
    assert sum(held_bytes(step, Shards(4))) <= size
    assert sum(held_bytes(step, Shards(2))) > size
    chip = targets.chip("rngd")
    assert Devices().count(step, chip) == 4
    assert Devices(chips=8).count(step, chip) == 8
    assert Devices(ep=2).count(step, chip) == 4


def test_what_does_not_fit_says_what_would() -> None:
    config = shapes.model_config("llama-3.1-70b")
    step = sharded(chip_step(config, Batch("decode", 1, 1024)), Shards(2))
    with pytest.raises(TargetError, match="of each of 2 devices") as caught:
        step_answer(step, targets.chip("rngd"))
    assert caught.value.fix.startswith("--chips 4, or")


def test_a_chip_without_a_link() -> None:
    alone = targets.chip("rngd").model_copy(update={"links": {}})
    with pytest.raises(TargetError, match="2 devices of rngd") as caught:
        answer_on(chip_step(TINY, DECODE), alone, Devices(chips=2))
    assert "--chips 1" in caught.value.fix
    config = shapes.model_config("llama-3.1-70b")
    with pytest.raises(TargetError, match="the weights") as caught:
        answer_on(chip_step(config, Batch("decode", 1, 64)), alone)
    assert "--batch" in caught.value.fix


def test_an_encoder_runs_on_one() -> None:
    config = EncoderConfig(64, 96, 2, 4, 256, 64)
    with pytest.raises(UsageError, match="an encoder over 2 devices"):
        answer_on(chip_step(config, Batch("prefill", 1, 8)), targets.chip("rngd"), Devices(chips=2))
