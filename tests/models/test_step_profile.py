"""A model's step to look at: of a long one some layers in the middle, of one too long nothing."""

from __future__ import annotations

import pytest

from dure.errors import UsageError
from dure.models import step_profile as profiles
from dure.models.batch import Batch
from dure.models.chip_answer import StepAnswer, step_answer
from dure.models.chip_devices import Devices, answer_on
from dure.models.chip_step import chip_step
from dure.models.config import ModelConfig, RopeConfig
from dure.models.step_profile import step_profile
from dure.prof import analysis
from dure.targets import chip

TINY = ModelConfig("llama", 64, 96, 5, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), tied=False)


@pytest.fixture(scope="module")
def answered() -> StepAnswer:
    return step_answer(chip_step(TINY, Batch("decode", 2, 40)), chip("rngd"))


def test_a_whole_step(answered: StepAnswer) -> None:
    made = step_profile(answered)
    assert made.total == made.whole == answered.ps and made.window is None
    assert len(made.turns) == sum(part.step.count for part in answered.parts)
    # Each wait for the end of a phase has a cause that ended before.
    waits = [w for e in made.instructions for w in e.waits if not w.queue and w.end > w.start]
    assert waits and all(w.cause is not None for w in waits)
    assert all(made.instructions[w.cause or 0].end < w.end for w in waits)
    path = analysis.critical_path(made)
    assert sum(step.end - step.start for step in path) == made.total
    assert made.roofline.fraction == pytest.approx(answered.fraction_of_roofline)


def test_a_step_of_two_devices() -> None:
    """Numbers are one device's, and of launches that sum up what others multiplied, their own."""
    answered = answer_on(chip_step(TINY, Batch("decode", 2, 40)), chip("rngd"), Devices(2))
    made = step_profile(answered)
    assert made.roofline.fraction == pytest.approx(answered.fraction_of_roofline)
    assert 2 * made.roofline.bytes == pytest.approx(answered.step.bytes, abs=1)
    assert "2 devices make the step together" in made.notes[0]
    calls = {id(part.step): part.step.part for part in answered.parts}
    for key, call in calls.items():
        stages = [part for part in answered.parts if id(part.step) == key]
        assert sum(part.flops for part in stages) == pytest.approx(call.flops, abs=len(stages))
        assert sum(part.weight_bytes for part in stages) == pytest.approx(call.weight_bytes, abs=2)


def test_layers_in_the_middle(answered: StepAnswer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "EXACT", 10)
    made = step_profile(answered)
    assert made.whole == answered.ps and made.turns[-1][2] <= made.whole
    assert made.window is not None
    start, end = made.window
    assert made.total == end - start < answered.ps
    # Two of five layers: the second and the third.
    first = next(n for n, part in enumerate(answered.parts) if part.step.count == 5)
    begun = [at for number, at, _ in made.turns if number == first]
    assert (start, end) == (begun[1], begun[3])
    assert all(e.start >= 0 and e.end <= made.total for e in made.instructions)
    assert all(0 <= life.start <= life.end <= made.total for b in made.buffers for life in b.lives)
    assert all(0 <= at < made.total for c in made.counters for at, _ in c.points)
    path = analysis.critical_path(made)
    assert sum(step.end - step.start for step in path) == made.total
    assert "in the middle of the step" in made.notes[0]


def test_too_many_instructions(answered: StepAnswer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MOST", 10)
    with pytest.raises(UsageError, match="instructions") as caught:
        step_profile(answered)
    assert "at most 10" in str(caught.value)
