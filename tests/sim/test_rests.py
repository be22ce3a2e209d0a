"""Phases like earlier ones are passed over, and nothing else of a replay changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from dure.machine.chip import Chip
from dure.models.batch import Batch, Phase
from dure.models.chip_answer import StepAnswer, step_answer
from dure.models.chip_step import chip_step, sharded
from dure.models.config import ExpertsConfig, ModelConfig, RopeConfig
from dure.models.shards import Shards
from dure.sim.rests import Rests
from dure.sim.timing import Timing, simulate
from dure.targets import chip

#: Layers of two kinds, of which windows are one.
WINDOWED = ModelConfig(
    "gemma3", 64, 96, 6, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), local_rope=RopeConfig(1e4),
    windows=(16, 0, 16, 0, 16, 0), post_norms=True, qk_norm=True, activation="gelu_tanh",
    embedding_scale=8.0,
)  # fmt: skip
MIXTURE = ModelConfig(
    "qwen3moe", 64, 32, 3, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), tied=False, qk_norm=True,
    experts=ExpertsConfig(8, 2),
)  # fmt: skip


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many phases each look passes over."""
    found: list[int] = []
    look = Rests.look

    def spy(self: Rests, now: int) -> int:
        before = self.passed
        now = look(self, now)
        found.append(self.passed - before)
        return now

    monkeypatch.setattr(Rests, "look", spy)
    return found


def same(one: Timing, other: Timing) -> None:
    assert (one.ps, one.events, one.busy) == (other.ps, other.events, other.busy)
    assert (one.resources, one.bound, one.phases) == (other.resources, other.bound, other.phases)


def replayed(answer: StepAnswer, on: Chip, monkeypatch: pytest.MonkeyPatch) -> Timing:
    """The timing of a step's program, whole."""
    with monkeypatch.context() as patch:
        patch.setattr(Rests, "look", lambda self, now: now)
        return simulate(answer.program.function, on, indices=answer.program.indices)


QUICK = {("rngd", "experts", "decode"), ("tpu-v6e", "windows", "prefill")}


@pytest.mark.parametrize(
    ("name", "kind", "phase"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.long)
        for case in product(
            ("rngd", "tpu-v6e", "mtia-v2"), ("windows", "experts"), ("decode", "prefill")
        )
    ],
)
def test_phases_like_earlier_ones_are_passed_over(
    name: str,
    kind: str,
    phase: Phase,
    passed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = chip_step({"windows": WINDOWED, "experts": MIXTURE}[kind], Batch(phase, 2, 40))
    answer = step_answer(step, chip(name), prefetch=False)
    assert sum(passed) > len(answer.parts)
    same(answer.timing, replayed(answer, chip(name), monkeypatch))


def test_weights_that_are_loaded_ahead_keep_phases_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = chip_step(replace(MIXTURE, experts=None), Batch("decode", 1, 40))
    answer = step_answer(step, chip("rngd"))
    same(answer.timing, replayed(answer, chip("rngd"), monkeypatch))


def test_several_devices(passed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    step = sharded(chip_step(MIXTURE, Batch("prefill", 2, 40)), Shards(2, 1))
    answer = step_answer(step, chip("tpu-v6e"), prefetch=False)
    assert sum(passed) > 0
    same(answer.timing, replayed(answer, chip("tpu-v6e"), monkeypatch))
