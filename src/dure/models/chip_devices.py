"""On how many devices a step runs, and how it is cut over them: asked for, or chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from dure.errors import UsageError
from dure.library.build import Built
from dure.machine.chip import Chip
from dure.machine.group import group_of
from dure.models.batch import Batch
from dure.models.chip_answer import StepAnswer, step_answer
from dure.models.chip_step import chip_step, fewest_devices
from dure.models.config import ModelConfig
from dure.models.encoder_config import EncoderConfig
from dure.models.shards import Shards

_Config: TypeAlias = ModelConfig | EncoderConfig


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

    def count(self, config: _Config, batch: Batch, dtype: str, chip: Chip) -> int:
        """The devices: as many as were asked for, or the fewest that hold the model, or one where
        none do.
        """
        asked = self.chips or self.tp
        if asked is not None:
            return asked
        least = self.ep or 1
        if isinstance(config, EncoderConfig):
            return least
        size = chip.memories[chip.home].size.base
        found = fewest_devices(config, batch, dtype, size, least)
        return found if found is not None and (found == 1 or chip.links) else least

    def shards(self, config: _Config, count: int) -> Iterator[Shards]:
        """The ways to cut a model over so many devices."""
        if self.ep is not None:
            yield Shards(count, self.ep)
            return
        yield Shards(count)
        experts = config.experts if isinstance(config, ModelConfig) else None
        if experts is not None and count > 1 and experts.count % count == 0:
            yield Shards(count, count)


def answer_on(
    config: _Config,
    batch: Batch,
    dtype: str,
    name: str,
    chip: Chip,
    devices: Devices,
    *,
    strict: bool = False,
) -> StepAnswer:
    """What so many devices do with a step; of several ways to cut the model, the fastest.

    Raises :class:`~dure.errors.DureError` for a step that they can't run.
    """
    count = devices.count(config, batch, dtype, chip)
    if count > 1:
        group_of(chip, count)
    ways = devices.shards(config, count)
    steps = [chip_step(config, batch, dtype, name, shards) for shards in ways]
    made: dict[object, Built] = {}
    found = [step_answer(step, chip, strict=strict, made=made) for step in steps]
    return min(found, key=lambda answer: answer.ps)
