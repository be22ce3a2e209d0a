"""A batch of sequences as the inputs of a step: what a decode, prefill or mixed step is to do.

Pages lie in no order, as a paged cache leaves them; tokens are drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.library.operators_common import balanced
from dure.models.config import ModelConfig
from dure.models.encoder_config import EncoderConfig

Phase: TypeAlias = Literal["decode", "prefill", "mixed"]
Int32s: TypeAlias = "npt.NDArray[np.int32]"

PAGE = 64
#: Rows of a work item of attention, where nothing asks for others, and where something does.
QUERY_ROWS, _LEAST_ROWS, _MOST_ROWS = 64, 16, 512
#: Long work items that each core has at least: they take different times.
_ITEMS = 4
#: Tokens of a step at most: each has entries in the index arguments.
MOST_TOKENS = 1 << 20


def phase_of(name: str) -> Phase:
    """The phase of a name.  Raises :class:`UsageError` for another one."""
    for phase in get_args(Phase):
        if phase == name:
            return phase
    raise UsageError(
        f"the phase '{name[:40]}'",
        rule="a step decodes a token of each sequence, prefills all of them, or decodes while one "
        "more sequence is prefilled",
        fix="--phase decode, --phase prefill, or --phase mixed",
    )


@dataclass(frozen=True)
class Batch:
    """``sequences`` of ``context`` positions each when the step is done, or of ``contexts`` where
    they differ, ``context`` being the longest.  A decode step gives each its last position, a
    prefill step its last ``chunk`` (0: all, with nothing in the cache before).  A mixed step
    decodes all of them while one more sequence of ``context`` positions is prefilled so.

    ``query_rows`` are those of a work item of attention, at most, whose positions lie in one
    aligned run of so many.
    """

    phase: Phase
    sequences: int
    context: int
    chunk: int = 0
    contexts: tuple[int, ...] = ()
    query_rows: int = QUERY_ROWS

    def __post_init__(self) -> None:
        for name, value in (("batch", self.sequences), ("context", self._shortest)):
            if value < 1:
                raise UsageError(
                    f"a {name} of {value}",
                    rule="a step has at least one sequence, of at least one position",
                    fix=f"--{name} 1",
                )
        if self.contexts and (len(self.contexts), max(self.contexts)) != (
            self.sequences,
            self.context,
        ):
            raise UsageError(
                f"{len(self.contexts)} contexts for a batch of {self.sequences}",
                rule="each sequence has one",
                fix=f"--batch {len(self.contexts)}, or leave it out",
            )
        longest = self.context if self.phase == "mixed" else self._shortest
        if self.chunk and (self.phase == "decode" or not 0 < self.chunk <= longest):
            raise UsageError(
                f"a chunk of {self.chunk} of a {self.phase} at {longest} positions",
                rule="a prefill makes a chunk of the positions of each sequence; a decode one",
                fix="leave out --chunk" if self.phase == "decode" else f"--chunk {longest}",
            )
        if max(self.tokens, self.pool_pages) > MOST_TOKENS:
            raise UsageError(
                f"{self.sequences} sequences of {self.context} positions",
                rule=f"a step has at most {MOST_TOKENS} tokens, and as many pages",
                fix="give a smaller --batch or --context",
            )

    @property
    def _shortest(self) -> int:
        return min(self.contexts, default=self.context)

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """Positions of each sequence, and how many of them are new."""
        contexts = self.contexts or (self.context,) * self.sequences
        if self.phase == "prefill":
            return tuple((context, self.chunk or context) for context in contexts)
        more = ((self.context, self.chunk or self.context),) if self.phase == "mixed" else ()
        return (*((context, 1) for context in contexts), *more)

    @property
    def count(self) -> int:
        """The sequences that the step knows."""
        return self.sequences + (self.phase == "mixed")

    @property
    def tokens(self) -> int:
        """New tokens of all."""
        if self.contexts:
            return sum(new for _, new in self.rows)
        new = self.chunk or self.context
        if self.phase == "mixed":
            return self.sequences + new
        return self.sequences * (new if self.phase == "prefill" else 1)

    @property
    def pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.context // PAGE)

    @property
    def pool_pages(self) -> int:
        """Pages of all sequences."""
        if self.contexts:
            return sum(-(-context // PAGE) for context, _ in self.rows)
        return self.count * self.pages

    @property
    def text(self) -> str:
        """What is asked, in words."""
        each = "" if self.contexts else f" at {self.context} positions"
        of = f" at {', '.join(map(str, self.contexts))} positions" if self.contexts else each
        new = self.chunk or self.context
        if self.phase == "mixed":
            return f"decode of {self.sequences} tokens{of}, and prefill of {new} at {self.context}"
        many = f"{self.sequences} x {new}" if self.phase == "prefill" else f"{self.sequences} x 1"
        if self.contexts and self.phase == "prefill" and not self.chunk:
            many = str(self.tokens)
        return f"{self.phase} of {many} tokens{of}"

    def cut(self, cores: int, heads: int, whole: bool = False) -> Batch:
        """The batch with longer work items, as long as each of ``cores`` still has a few of them,
        which are each item's for each of ``heads`` KV heads; with ``whole``, of any length where
        each core can have all items, for heads of its own.
        """
        news = self._news
        most, least = _MOST_ROWS, _ITEMS * cores
        if whole and heads % cores == 0:
            most, least = max(news), 0
        rows = self.query_rows
        while 2 * rows <= min(most, max(news)):
            if sum(-(-new // (2 * rows)) for new in news) * heads < least:
                break
            rows *= 2
        return replace(self, query_rows=rows)

    def shared(self, cores: int, heads: int) -> Batch:
        """The batch with shorter work items where each of ``cores`` hasn't a pair of them, a short
        one and a long one, which are each item's for each of ``heads`` KV heads.
        """
        rows = self.query_rows
        while rows > _LEAST_ROWS:
            items = sum(-(-new // rows) for new in self._news)
            if items == len(self._news) or items * heads >= 2 * cores:
                break
            rows //= 2
        return replace(self, query_rows=rows)

    @property
    def _news(self) -> list[int]:
        return [new for _, new in self.rows]

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
        pages = np.array([-(-context // PAGE) for context, _ in self.rows])
        pool = draw.permutation(self.pool_pages)
        begins = np.cumsum(pages) - pages
        # Beyond a sequence's end stands its first page: nothing there is looked at.
        place = np.arange(self.pages)[None, :]
        table = pool[begins[:, None] + np.where(place < pages[:, None], place, 0)]
        positions = np.concatenate([np.arange(c - new, c) for c, new in self.rows])
        news = np.array([new for _, new in self.rows])
        rows = np.repeat(np.arange(self.count), news)
        first = np.cumsum(news) - news
        work = [
            (number, first[number] + start - (context - new), stop - start)
            for number, (context, new) in enumerate(self.rows)
            for start, stop in _runs(context, new, self.query_rows)
        ]
        found = {
            "tokens": draw.integers(0, config.vocabulary, self.tokens),
            "positions": positions,
            "slots": table[rows, positions // PAGE] * PAGE + positions % PAGE,
            "block_table": table,
            "context": np.array([context for context, _ in self.rows]),
            "work_sequence": np.array([number for number, _, _ in work]),
            "work_start": np.array([start for _, start, _ in work]),
            "work_rows": np.array([count for _, _, count in work]),
            "out_rows": first + news - 1,
        }
        return {name: values.astype(np.int32) for name, values in found.items()}


def _runs(context: int, new: int, rows: int) -> list[tuple[int, int]]:
    """The positions of a sequence's work items: those of each aligned run of so many rows."""
    runs = range((context - new) // rows, (context - 1) // rows + 1)
    return [
        (max(run * rows, context - new), min((run + 1) * rows, context))
        for run in balanced(list(runs))
    ]
