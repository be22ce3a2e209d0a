"""A model that answers on a simulated chip: every token is a decode step on the chip's bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.ir.blocks import Blocks
from dure.ir.dtypes import Array, element_type
from dure.ir.pack import unpack
from dure.ir.stored import stored_layout
from dure.ir.types import static_extent
from dure.machine.chip import Chip
from dure.models.batch import PAGE, Batch
from dure.models.chip_answer import StepAnswer, step_answer
from dure.models.chip_step import chip_step
from dure.models.chip_values import StepMemory
from dure.models.config import ModelConfig
from dure.models.stored import StoredModel


class ChipModel:
    """A decoder with its weights on one chip, and one sequence of at most ``positions`` tokens.

    ``weights`` are the model's, and rope tables, by their names in the step program; they are
    rounded to ``dtype``, which is also that of the KV cache and of the values between kernels.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Array],
        chip: Chip,
        positions: int = PAGE,
        dtype: str = "bf16",
    ) -> None:
        step = chip_step(config, Batch("decode", 1, positions), dtype)
        self.answer: StepAnswer = step_answer(step, chip)
        self.step = self.answer.step
        self.positions = positions
        self.length = 0
        self.tables = self.step.inputs
        assert self.step.program is not None
        given: dict[str, Array] = {**weights, **self.step.inputs}
        for param in self.step.program.params:
            if param.access == "inout":
                shape = [static_extent(e) or 0 for e in param.value.tensor.shape]
                given[param.value.name] = np.zeros(shape, np.float32)
        self.memory = StepMemory(self.step, self.answer.program, chip, [given])

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """The logits after one more token.  Raises :class:`UsageError` for one too many."""
        place = self.length
        if place == self.positions:
            raise UsageError(
                f"token {place + 1} of a sequence",
                rule=f"it was made for {self.positions} positions",
                fix="make the model with more positions",
            )
        page = self.tables["block_table"][0, place // PAGE]
        inputs = {
            "tokens": [token],
            "positions": [place],
            "slots": [page * PAGE + place % PAGE],
            "context": [place + 1],
        }
        self.memory.put({name: np.array(value, np.int32) for name, value in inputs.items()})
        self.memory.run()
        self.length += 1
        return self.memory.given()["logits"][0].astype(np.float32)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest ``count`` tokens after a prompt of at least one, one after another."""
        logits = [self.decode(token) for token in prompt][-1]
        found = [int(logits.argmax())]
        while len(found) < count:
            found.append(int(self.decode(found[-1]).argmax()))
        return found


def numbers(model: StoredModel, positions: int) -> dict[str, Array]:
    """The weights of a file as numbers, and its rope tables, by their names in the step program."""
    found: dict[str, Array] = dict(model.tables(positions))
    for weight in model.weights():
        element = element_type(weight.dtype)
        layout = stored_layout(weight.shape, element)
        array = unpack(weight.data, layout, element, weight.shape)
        found[weight.name] = array.decode() if isinstance(array, Blocks) else array
    return found
