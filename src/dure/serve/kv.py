"""The paged KV cache's bookkeeping: pages, block tables, and who holds what.

A page is ``page_size`` slots in every layer's pools.  A sequence owns a row of the block table,
whose entries are its pages in order, and grows page by page. Entries beyond its length say page 0:
attention masks by position, so that any page will do where none is meant.  The table and the
lengths are the very arrays that a step reads, so that nothing is copied from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError

Int32s = npt.NDArray[np.int32]


@dataclass(eq=False)
class Sequence:
    """One sequence in the cache: its ``row`` of the block table and how many tokens are cached."""

    row: int
    length: int = 0
    pages: list[int] = field(default_factory=list[int])
    released: bool = False


class KVCache:
    """Allocates pages to sequences.

    ``block_table`` is (sequences, pages a sequence) int32, ``context`` (sequences,) int32 the
    length of each sequence with the tokens of the step that is being prepared.
    """

    def __init__(
        self, *, sequences: int, pool_pages: int, pages_per_sequence: int, page_size: int = 16
    ) -> None:
        if min(sequences, pool_pages, pages_per_sequence, page_size) < 1:
            raise UsageError(
                f"a KV cache of {sequences} sequences and {pool_pages} pages of {page_size}",
                rule="a cache has at least one of each",
                fix="ask for a larger context",
            )
        self.page_size = page_size
        self.pool_pages = pool_pages
        self.block_table: Int32s = np.zeros((sequences, pages_per_sequence), np.int32)
        self.context: Int32s = np.zeros(sequences, np.int32)
        self._free_pages = list(range(pool_pages - 1, -1, -1))
        self._free_rows = list(range(sequences - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free_pages)

    @property
    def free_sequences(self) -> int:
        """Rows of the block table that are free."""
        return len(self._free_rows)

    @property
    def longest(self) -> int:
        """Tokens that one sequence may hold."""
        return self.block_table.shape[1] * self.page_size

    def sequence(self) -> Sequence:
        """A new, empty sequence; raises :class:`UsageError` when no row is free."""
        if not self._free_rows:
            raise UsageError(
                f"all {len(self.context)} sequences of the KV cache are in use",
                rule="a cache holds as many sequences as it was made for",
                fix="release one, or load the model with a larger batch",
            )
        return Sequence(self._free_rows.pop())

    def pages_wanted(self, sequence: Sequence, tokens: int) -> int:
        """Pages that ``tokens`` more tokens of a sequence would take from the free ones."""
        return -(-(sequence.length + tokens) // self.page_size) - len(sequence.pages)

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Make room for ``tokens`` more tokens, and count them in ``context``.

        The sequence's ``length`` moves when the step has run (:meth:`commit`).  Raises
        :class:`UsageError`, and changes nothing, when the sequence or the pool is full.
        """
        self._check(sequence)
        total = sequence.length + tokens
        if total > self.longest:
            raise UsageError(
                f"a sequence of {total} tokens in a context of {self.longest}",
                rule="a sequence is no longer than the context",
                fix="shorten the prompt, ask for fewer tokens, or load with a larger context",
            )
        wanted = self.pages_wanted(sequence, tokens)
        if wanted > len(self._free_pages):
            raise UsageError(
                f"the KV cache is full: {wanted} more pages are wanted, "
                f"{len(self._free_pages)} of {self.pool_pages} are free",
                rule="the pages of all sequences fit in the pool",
                fix="release a sequence, or load with a larger context",
            )
        for _ in range(wanted):
            page = self._free_pages.pop()
            self.block_table[sequence.row, len(sequence.pages)] = page
            sequence.pages.append(page)
        self.context[sequence.row] = total

    def commit(self, sequence: Sequence) -> None:
        """The step that :meth:`extend` made room for has run."""
        sequence.length = int(self.context[sequence.row])

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget all but the first ``length`` tokens of a sequence, and free their pages."""
        self._check(sequence)
        if not 0 <= length <= sequence.length:
            raise UsageError(
                f"a sequence of {sequence.length} tokens cut to {length}",
                rule="a sequence is cut to a part of itself",
                fix="give a length between 0 and the sequence's own",
            )
        kept = -(-length // self.page_size)
        self._free_pages.extend(reversed(sequence.pages[kept:]))
        del sequence.pages[kept:]
        self.block_table[sequence.row, kept:] = 0
        sequence.length = length
        self.context[sequence.row] = length

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's pages and its row back; a second time is an error."""
        self.truncate(sequence, 0)
        sequence.released = True
        self._free_rows.append(sequence.row)

    def _check(self, sequence: Sequence) -> None:
        if sequence.released:
            raise UsageError(
                "a sequence was used after it was released",
                rule="a released sequence is gone",
                fix="start a new sequence",
            )
