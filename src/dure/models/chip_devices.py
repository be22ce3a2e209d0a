"""On how many devices a step runs, and how it is cut over them: asked for, or chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dure.errors import UsageError
from dure.library.build import Built
from dure.machine.chip import Chip
from dure.machine.group import group_of
from dure.models.chip_answer import StepAnswer, StepPlan, plan_step
from dure.models.chip_step import ChipStep, fewest_devices, sharded
from dure.models.config import ModelConfig
from dure.models.micro_batches import micro_batch, micro_batches
from dure.models.shards import Shards

#: Times the sum of the fastest way's launches up to which another way is timed as a whole.
_NEAR = 1.1


@dataclass(frozen=True)
class Devices:
    """What was asked for: devices, over how many tensors are cut, in how many parts experts are
    dealt out; None leaves it open.
    """

    chips: int | None = None
    tp: int | None = None
    ep: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("chips", self.chips), ("tp", self.tp), ("ep", self.ep)):
            if value is not None and value < 1:
                raise UsageError(
                    f"--{name} {value}",
                    rule="a step runs on one device or more",
                    fix=f"--{name} 1",
                )
        if self.chips is not None and self.tp is not None and self.chips != self.tp:
            raise UsageError(
                f"--chips {self.chips} with --tp {self.tp}",
                rule="tensors are cut over all devices of a step",
                fix=f"--chips {self.tp}",
            )

    @property
    def count_asked(self) -> int:
        """The devices that were asked for, 1 where that was left open."""
        return self.chips or self.tp or self.ep or 1

    def count(self, step: ChipStep, chip: Chip) -> int:
        """The devices: as many as were asked for, or the fewest that hold the step, or one where
        none do.
        """
        asked = self.chips or self.tp
        if asked is not None:
            return asked
        least = self.ep or 1
        found = fewest_devices(step, chip.memories[chip.home].size.base, least)
        return found if found is not None and (found == 1 or chip.links) else least

    def shards(self, step: ChipStep, count: int) -> Iterator[Shards]:
        """The ways to cut a step over so many devices."""
        if self.ep is not None:
            yield Shards(count, self.ep)
            return
        yield Shards(count)
        experts = step.config.experts if isinstance(step.config, ModelConfig) else None
        if experts is not None and count > 1 and experts.count % count == 0:
            yield Shards(count, count)


def answer_on(
    step: ChipStep,
    chip: Chip,
    devices: Devices | None = None,
    *,
    strict: bool = False,
    prefetch: bool = True,
    record: bool = False,
) -> StepAnswer:
    """What so many devices of a chip do with a step of one (:func:`chip_step`); of several ways to
    cut it, the fastest.  The rest is
    :func:`~dure.models.chip_answer.step_answer`'s.

    Raises :class:`~dure.errors.DureError` for a step that they can't run.
    """
    devices = devices or Devices()
    count = devices.count(step, chip)
    if count > 1:
        group_of(chip, count)
    made: dict[object, Built] = {}
    plans: list[tuple[StepPlan, ChipStep, int]] = []
    for shards in devices.shards(step, count):
        whole = sharded(step, shards)
        whole.check_fits(chip)
        times = micro_batches(whole, chip)
        part = whole if times == 1 else sharded(micro_batch(step, times), shards)
        plan = plan_step(part, chip, strict=strict, prefetch=prefetch, made=made)
        plans.append((plan, whole, times))
    # What takes much longer launch by launch isn't faster as one program.
    least = min(plan.alone_ps * times for plan, _, times in plans)
    near = [entry for entry in plans if entry[0].alone_ps * entry[2] <= _NEAR * least]
    answers = [plan.answer(record).of_all(whole, times) for plan, whole, times in near]
    return min(answers, key=lambda answer: answer.ps)
