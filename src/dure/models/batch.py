"""A batch of equal sequences as the inputs of a step: what a decode or prefill step is asked to do.

Pages lie in no order, as a paged cache leaves them; tokens are drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.library.operators_common import balanced
from dure.models.config import ModelConfig
from dure.models.encoder_config import EncoderConfig

Phase: TypeAlias = Literal["decode", "prefill"]
Int32s: TypeAlias = "npt.NDArray[np.int32]"

PAGE = 64
#: Rows of a work item of attention, where nothing asks for longer ones, and where something does.
QUERY_ROWS, _MOST_ROWS = 64, 512
#: Long work items that each core has at least: they take different times.
_ITEMS = 4
#: Tokens of a step at most: each has entries in the index arguments.
MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Batch:
    """``sequences`` of ``context`` positions each when the step is done.  A decode step gives each
    its last position, a prefill step all of them.  ``rows`` are those of a work item of attention,
    at most, whose positions lie in one aligned run of so many.
    """

    phase: Phase
    sequences: int
    context: int
    rows: int = QUERY_ROWS

    def __post_init__(self) -> None:
        for name, value in (("batch", self.sequences), ("context", self.context)):
            if value < 1:
                raise UsageError(
                    f"a {name} of {value}",
                    rule="a step has at least one sequence, of at least one position",
                    fix=f"--{name} 1",
                )
        if max(self.tokens, self.sequences * self.pages) > MOST_TOKENS:
            raise UsageError(
                f"{self.sequences} sequences of {self.context} positions",
                rule=f"a step has at most {MOST_TOKENS} tokens, and as many pages",
                fix="give a smaller --batch or --context",
            )

    @property
    def new(self) -> int:
        """New tokens of each sequence."""
        return 1 if self.phase == "decode" else self.context

    @property
    def tokens(self) -> int:
        """New tokens of all."""
        return self.sequences * self.new

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return -(-self.context // PAGE)

    def cut(self, cores: int, heads: int) -> Batch:
        """The batch with longer work items, as long as each of ``cores`` still has a few of them,
        which are each item's for each of ``heads`` KV heads.
        """
        rows = self.rows
        while 2 * rows <= min(_MOST_ROWS, self.new):
            items = self.sequences * -(-self.new // (2 * rows))
            if items * heads < _ITEMS * cores:
                break
            rows *= 2
        return replace(self, rows=rows)

    def check(self, config: ModelConfig | EncoderConfig) -> None:
        """Raise :class:`UsageError` for more positions than the model knows."""
        if self.context > config.context:
            raise UsageError(
                f"a context of {self.context}",
                where=config.where,
                rule=f"the model knows {config.context} positions",
                fix=f"--context {config.context}",
            )

    def inputs(self, config: ModelConfig) -> dict[str, Int32s]:
        """The step's inputs by name, as :mod:`dure.models.decoder` declares them."""
        draw = np.random.default_rng(0)
        count, new = self.sequences, self.new
        table = draw.permutation(count * self.pages).reshape(count, self.pages)
        positions = np.tile(np.arange(self.context - new, self.context), count)
        rows = np.repeat(np.arange(count), new)
        slots = table[rows, positions // PAGE] * PAGE + positions % PAGE
        first, last = (self.context - new) // self.rows, (self.context - 1) // self.rows
        runs = np.array(balanced(list(range(first, last + 1))))
        begins = np.maximum(runs * self.rows, self.context - new)
        ends = np.minimum((runs + 1) * self.rows, self.context)
        starts = np.arange(count)[:, None] * new + begins - (self.context - new)
        found = {
            "tokens": draw.integers(0, config.vocabulary, self.tokens),
            "positions": positions,
            "slots": slots,
            "block_table": table,
            "context": np.full(count, self.context),
            "work_sequence": np.repeat(np.arange(count), len(runs)),
            "work_start": starts.ravel(),
            "work_rows": np.tile(ends - begins, count),
            "out_rows": np.arange(count) * new + new - 1,
        }
        return {name: values.astype(np.int32) for name, values in found.items()}
