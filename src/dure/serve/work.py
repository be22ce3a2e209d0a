"""From a ragged batch to a step's inputs: tokens, positions, slots, and attention's work list.

A work item is a run of at most ``query_rows`` consecutive tokens of one sequence.  How a prompt is
cut into items (or into steps) changes no bit of the result, see :mod:`dure.library.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dure.serve.kv import Int32s, KVCache, Sequence


@dataclass(frozen=True)
class BatchEntry:
    """New tokens of one sequence, and which of their rows want logits (indices, ascending)."""

    sequence: Sequence
    tokens: npt.NDArray[np.int32]
    logits: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepInputs:
    """The inputs of one step; all int32, named as in :mod:`dure.models.decoder`."""

    tokens: Int32s
    positions: Int32s
    slots: Int32s
    block_table: Int32s
    context: Int32s
    work_sequence: Int32s
    work_start: Int32s
    work_rows: Int32s
    out_rows: Int32s

    def arrays(self) -> dict[str, Int32s]:
        """By name, in the program's order."""
        return dict(self.__dict__)


def build_step(cache: KVCache, entries: SequenceOf[BatchEntry], query_rows: int) -> StepInputs:
    """The inputs of a step over ``entries``, for whose tokens the cache has been extended.

    Rows are the entries' tokens one after another; ``out_rows`` follow the entries' order.
    """
    if all(len(entry.tokens) == 1 for entry in entries):
        return _build_decode(cache, entries)
    rows = np.array([entry.sequence.row for entry in entries], np.int32)
    counts = np.array([len(entry.tokens) for entry in entries], np.int32)
    firsts = np.array([entry.sequence.length for entry in entries], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    starts = ends - counts
    total = int(ends[-1])
    positions = np.arange(total, dtype=np.int32) + np.repeat(firsts - starts, counts)
    items = -(-counts // query_rows)
    item_ends = np.cumsum(items, dtype=np.int32)
    within = np.arange(int(item_ends[-1]), dtype=np.int32) - np.repeat(item_ends - items, items)
    offsets = within * np.int32(query_rows)
    order = _balanced(np.repeat(firsts, items) + offsets)
    return StepInputs(
        tokens=np.concatenate([entry.tokens for entry in entries]),
        positions=positions,
        slots=_slots(cache, np.repeat(rows, counts), positions),
        block_table=cache.block_table,
        context=cache.context,
        work_sequence=np.repeat(rows, items)[order],
        work_start=(np.repeat(starts, items) + offsets)[order],
        work_rows=np.minimum(np.repeat(counts, items) - offsets, np.int32(query_rows))[order],
        out_rows=np.array(
            [int(s) + row for s, e in zip(starts, entries, strict=True) for row in e.logits],
            np.int32,
        ),
    )


def _build_decode(cache: KVCache, entries: SequenceOf[BatchEntry]) -> StepInputs:
    """One token a sequence, the step that has to be quick: few arrays, no arithmetic on them."""
    sequences = [entry.sequence for entry in entries]
    size = cache.page_size
    order = list(range(len(entries)))
    return StepInputs(
        tokens=_int32s([entry.tokens[0] for entry in entries]),
        positions=_int32s([s.length for s in sequences]),
        slots=_int32s([s.pages[s.length // size] * size + s.length % size for s in sequences]),
        block_table=cache.block_table,
        context=cache.context,
        work_sequence=_int32s([s.row for s in sequences]),
        work_start=_int32s(order),
        work_rows=_int32s([1] * len(entries)),
        out_rows=_int32s([i for i in order if entries[i].logits]),
    )


def _int32s(values: list[int]) -> Int32s:
    return np.array(values, np.int32)


def _balanced(reach: Int32s) -> npt.NDArray[np.intp]:
    """An order of the items in which any run of neighbours has about its share of the work.

    An item's work grows with the position that it reaches: short and long ones take turns.
    """
    ascending = np.argsort(reach, kind="stable")
    order = np.empty_like(ascending)
    half = -(-len(order) // 2)
    order[0::2] = ascending[:half]
    order[1::2] = ascending[half:][::-1]
    return order


def _slots(cache: KVCache, rows: Int32s, positions: Int32s) -> Int32s:
    """Where each token's key and value go: page * page_size + place in the page."""
    size = np.int32(cache.page_size)
    pages = cache.block_table[rows, positions // size]
    return (pages * size + positions % size).astype(np.int32)
