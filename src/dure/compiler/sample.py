"""Arguments for checking passes: a step over a paged cache needs index inputs that fit together.

Types say the range of each index input alone.  What attention means by them together (its op's
declaration) is drawn here: sequences of different lengths with tokens in the cache already, their
pages, and the rows of each work item.
"""

from __future__ import annotations

import numpy as np

from dure.errors import IRError
from dure.ir.core import Function, Op, Value, walk
from dure.ir.dtypes import Array
from dure.ir.expr import Const, Expr, Symbol, bounds, evaluate, symbols
from dure.ir.interpret import RuntimeValue
from dure.ir.samples import Sample, draw

#: Rows of a drawn step at most.
_ROWS = 6


def draw_step(function: Function, seed: int) -> Sample:
    """Like :func:`dure.ir.samples.draw`, with consistent index inputs for attention.

    Raises :class:`IRError` where the program's bounds leave no room for a step.
    """
    attention = [op for op in walk(function.body) if op.name == "attention"]
    if not attention:
        return draw(function, seed)
    rng = np.random.default_rng(seed)
    if all(op.attr("causal") for op in attention):
        step: _Step | _Batch = _Step(function, attention, rng)
    else:
        step = _Batch(attention, rng)
    sample = draw(function, seed, step.sizes)
    params = [p.value for p in function.params]
    arguments = [
        step.values.get(param, value) for param, value in zip(params, sample.arguments, strict=True)
    ]
    return Sample(tuple(arguments), sample.sizes)


class _Step:
    """One drawn step: a work item per sequence, as far as there are sequences."""

    def __init__(self, function: Function, attention: list[Op], rng: np.random.Generator) -> None:
        self.rng = rng
        self.sizes: dict[str, int] = {}
        self.values: dict[Value, RuntimeValue] = {}
        op = attention[0]
        q, pool, _, positions, table, context, sequence, start, rows = op.operands[:9]
        self.page: int = op.attr("page_size")
        count = self._size(q.tensor.shape[0], _ROWS)
        most = min(count, self._bound(context.tensor.shape[0]))
        items = self._size(sequence.tensor.shape[0], most)
        if items > most or count > items * int(op.attr("query_rows")):
            raise _no_room(f"{items} work items for {count} rows")
        parts = [len(p) for p in np.array_split(np.arange(count), items)]
        self.width = self._bound(table.tensor.shape[1])
        self.places(parts, self._bound(pool.tensor.shape[0]), positions)
        sequences = self._size(context.tensor.shape[0], items)
        self._lists(parts, sequences, (table, context, sequence, start, rows))
        self._fill(positions, self.positions)
        for write in (o for o in walk(function.body) if o.name == "kv_write"):
            self._fill(write.operands[2], self.slots)
        for gather in (o for o in walk(function.body) if o.name == "gather_rows"):
            if gather.operands[0].tensor.shape[0] is q.tensor.shape[0]:
                wanted = self._size(gather.operands[1].tensor.shape[0], items)
                self._fill(gather.operands[1], rng.integers(0, count, wanted).tolist())

    def _size(self, extent: Expr, wanted: int) -> int:
        """``wanted``, or what the extent must be."""
        if isinstance(extent, Const):
            return extent.value
        if not isinstance(extent, Symbol):
            raise _no_room(f"an extent of {extent}")
        low, high = bounds(extent)
        value = max(wanted, low or 0)
        value = value if high is None else min(value, high)
        return self.sizes.setdefault(extent.name, value)

    def _bound(self, extent: Expr) -> int:
        if isinstance(extent, Symbol) and extent.name in self.sizes:
            return self.sizes[extent.name]
        high = bounds(extent)[1]
        return 1 << 16 if high is None else high

    def places(self, parts: list[int], slots: int, positions: Value) -> None:
        """Draws how much each sequence has in the cache, and where its rows go."""
        assert positions.tensor.index is not None
        most = bounds(positions.tensor.index[1])[1]
        free = list(self.rng.permutation(slots // self.page))
        self.pages: list[list[int]] = []
        self.lengths: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        room = min(self.width * self.page, (len(free) // len(parts)) * self.page)
        room = room if most is None else min(room, most + 1)
        for part in parts:
            if part > room:
                raise _no_room(f"{part} rows of a sequence")
            past = int(self.rng.integers(0, min(room - part, 2 * self.page) + 1))
            length = past + part
            pages = [int(free.pop()) for _ in range(-(-length // self.page))]
            self.pages.append(pages)
            self.lengths.append(length)
            for place in range(past, length):
                self.positions.append(place)
                self.slots.append(pages[place // self.page] * self.page + place % self.page)

    def _lists(self, parts: list[int], sequences: int, operands: tuple[Value, ...]) -> None:
        table, context, sequence, start, rows = operands
        entries = np.zeros((sequences, self.width), np.int32)
        for number, pages in enumerate(self.pages):
            entries[number, : len(pages)] = pages
        lengths = np.zeros(sequences, np.int32)
        lengths[: len(parts)] = self.lengths
        self._fill(table, entries)
        self._fill(context, lengths)
        self._fill(sequence, list(range(len(parts))))
        self._fill(start, [sum(parts[:i]) for i in range(len(parts))])
        self._fill(rows, parts)

    def _fill(self, operand: Value, values: Array | list[int]) -> None:
        self.values[operand] = np.array(values, np.int32)


class _Batch:
    """A drawn batch of an encoder: its rows are the pages of its keys, a sequence a page."""

    def __init__(self, attention: list[Op], rng: np.random.Generator) -> None:
        q, _, _, positions, table, context, *work = attention[0].operands[:9]
        page: int = attention[0].attr("page_size")
        rows: int = attention[0].attr("query_rows")
        self.sizes = {entry.name: max(_low(entry), 2) for entry in symbols(q.tensor.shape[0])}
        pages = evaluate(q.tensor.shape[0], self.sizes) // page
        sequences, width = (evaluate(extent, self.sizes) for extent in table.tensor.shape)
        if not 1 <= pages <= sequences:
            raise _no_room(f"{sequences} sequences on {pages} pages")
        lengths = np.zeros(sequences, np.int32)
        lengths[:pages] = rng.integers(1, page + 1, pages)
        entries = np.zeros((sequences, width), np.int32)
        entries[:pages, 0] = np.arange(pages)
        items = [
            (s, s * page + first, min(rows, int(lengths[s]) - first))
            for s in range(pages)
            for first in range(0, int(lengths[s]), rows)
        ]
        (extent,) = work[0].tensor.shape
        self.sizes |= {entry.name: len(items) for entry in symbols(extent)}
        lists = [np.array(entry, np.int32) for entry in zip(*items, strict=True)]
        self.values: dict[Value, RuntimeValue] = {
            positions: np.tile(np.arange(page, dtype=np.int32), pages),
            table: entries,
            context: lengths,
            **dict(zip(work, lists, strict=True)),
        }


def _low(entry: Symbol) -> int:
    return bounds(entry)[0] or 0


def _no_room(what: str) -> IRError:
    return IRError(
        f"no room for {what} in a sample of a step",
        rule="a sampled step has at least one row for each work item",
        fix="widen the program's bounds",
    )
