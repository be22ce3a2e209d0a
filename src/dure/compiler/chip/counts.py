"""How often each instruction of a tree runs on the core that runs the most, or in the mean over the
cores, and on what it depends.

Loops whose trips only the run tells count the middle of their range.  Of a branch the side counts
that is taken as a rule: of a tile at the tensor's edge and a whole one, the whole one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dure.compiler.chip.tree import Block, Branch, Loop, Step, Structure
from dure.errors import DureError
from dure.ir.core import Function, Value
from dure.ir.devices import device_id
from dure.ir.dtypes import Array
from dure.ir.expr import Compare, Expr, Symbol, as_expr, bounds, evaluate, substitute, symbols
from dure.ir.rewrite import expressions_in

#: Entries of an index argument that a loop's length is averaged over at most.
_SAMPLES = 256


@dataclass
class Counts:
    """The cores of a program, and what its views and loops depend on.

    ``cores`` are the extents of a device's core grid by program id, ``device`` the id of the device
    where there are several; ``roots`` the argument behind each
    view, filled in as blocks are walked.
    """

    cores: Mapping[Symbol, int]
    roots: dict[Value, Value] = field(default_factory=dict[Value, Value])
    depends: dict[object, frozenset[Symbol]] = field(
        default_factory=dict[object, frozenset[Symbol]]
    )
    turns: dict[Symbol, int] = field(default_factory=dict[Symbol, int])
    means: dict[Symbol, float] = field(default_factory=dict[Symbol, float])
    #: The values of scalars that are read, in their order.
    samples: dict[Symbol, Array] = field(default_factory=dict[Symbol, "Array"])
    #: Where scalars are read: the loop or core coordinate that counts their places.
    places: dict[Symbol, Symbol] = field(default_factory=dict[Symbol, Symbol])
    loops: dict[Symbol, Loop] = field(default_factory=dict[Symbol, Loop])
    #: Values of index arguments by name: a scalar that is read counts as their mean.
    indices: Mapping[str, Array] = field(default_factory=dict[str, "Array"])
    device: Symbol | None = None

    @classmethod
    def of(cls, function: Function, indices: Mapping[str, Array] | None = None) -> Counts:
        """The counts of a tile program whose grid counts cores."""
        ids, device = zip(function.program_ids, function.grid, strict=True), device_id(function)
        cores = {s: evaluate(e, {}) for s, e in ids if s is not device}
        return cls(cores, indices=indices or {}, device=device)

    @property
    def total(self) -> int:
        """All cores."""
        count = 1
        for extent in self.cores.values():
            count *= extent
        return count

    def start(self) -> dict[str, int]:
        """The first core's coordinates."""
        first = {s.name: 0 for s in self.cores}
        return first if self.device is None else {self.device.name: 0, **first}

    def structure(self, item: Structure, known: dict[str, int]) -> None:
        """Note a view, or a scalar that is read, and what it counts as."""
        op = item.op
        before = self.depends.get(op.operands[0], frozenset())
        found = before | self.cores_in(e for v in op.attrs.values() for e in expressions_in(v))
        if op.name == "view":
            self.roots[op.result] = self.root(op.operands[0])
            self.depends[op.result] = found
        values = self.indices.get(self.root(op.operands[0]).name)
        for entry in op.symbols:
            self.depends[entry] = found
            if values is not None and values.size:
                known[entry.name] = round(float(values.astype(np.int64).mean()))
                self.samples[entry] = values.reshape(-1)
                place = op.attr("index")[0] if op.name == "index_load" else None
                if values.ndim == 1 and isinstance(place, Symbol):
                    self.places[entry] = place

    def root(self, tensor: Value) -> Value:
        """The argument that a tensor is a view of."""
        return self.roots.get(tensor, tensor)

    def trips(self, loop: Loop, known: Mapping[str, int]) -> tuple[float, int]:
        """The trips of a loop on the core that has the most, and where it starts there; of a loop
        whose length is read from an index argument, the mean over what that core reads.
        """
        self.depends[loop.symbol] = self.cores_in((loop.start, loop.stop))
        self.loops[loop.symbol] = loop
        places = self._places(loop)
        found: list[tuple[int, int]] = []
        for place in places:
            here = {**known, **place}
            length = number(as_expr(loop.stop - loop.start), here, least=0)
            found.append((max(0, -(-length // loop.step)), number(loop.start, here)))
        best: tuple[float, int] = max(found)
        self.turns[loop.symbol] = max(1, int(best[0]))
        sampled = self._sampled(loop, known, places)
        if sampled is not None:
            self.means[loop.symbol], most = sampled
            return most, best[1]
        self.means[loop.symbol] = sum(trips for trips, _ in found) / len(found)
        return best

    def _places(self, loop: Loop) -> list[dict[str, int]]:
        """The core's coordinates on which the end of a loop depends, each with its values; the
        first ones where it depends on several.
        """
        entries = [s for s in self.cores if s in symbols(loop.stop)]
        if len(entries) != 1:
            return [dict.fromkeys([s.name for s in entries], 0)]
        return [{entries[0].name: value} for value in range(self.cores[entries[0]])]

    def _sampled(
        self, loop: Loop, known: Mapping[str, int], places: Sequence[Mapping[str, int]]
    ) -> tuple[float, float] | None:
        """The mean trips of a loop over places of the core, and over the entries of the index
        arguments that its length is read from together, and of those of the core that has the most;
        None where it is read from none, or from ones of different lengths.
        """
        length = as_expr(loop.stop - loop.start)
        read = [s for s in symbols(length) if s in self.samples]
        sizes = {len(self.samples[s]) for s in read}
        if len(sizes) != 1:
            return None
        (size,) = sizes

        def trips(n: int) -> float:
            read_here = {s.name: int(self.samples[s][n]) for s in read}
            total = 0
            for place in places:
                here = {**known, **place, **read_here}
                total += max(0, -(-number(length, here, least=0) // loop.step))
            return total / len(places)

        count = min(size, max(1, _SAMPLES // len(places)))
        if count < size:
            mean = sum(trips(n * size // count) for n in range(count)) / count
            return mean, mean
        each = [trips(n) for n in range(size)]
        mean = sum(each) / size
        return mean, max(mean, self._busiest(each, {self.places.get(s) for s in read}))

    def _busiest(self, each: Sequence[float], places: set[Symbol | None]) -> float:
        """The mean over what the core reads that has the most of it, of so much at each place."""
        (place, *others) = places
        if others or place is None:
            return 0.0
        if place in self.cores:
            return max(each)
        loop = self.loops.get(place)
        if loop is None:
            return 0.0
        sums, most = [0.0], 1
        for here in self._places(loop):
            start, stop = number(loop.start, here), number(loop.stop, here)
            most = max(most, len(range(start, stop, loop.step)))
            sums.append(sum(each[start : stop : loop.step]))
        return max(sums) / most

    def share_of(self, branch: Branch, known: Mapping[str, int]) -> tuple[Block, float]:
        """The side of a branch that counts, and in which part of its turns it is taken."""
        if not branch.otherwise.items and any(branch.then.items):
            entries = [s for s in symbols(branch.condition) if s in self.turns]
            if (
                isinstance(branch.condition, Compare)
                and branch.condition.relation == "=="
                and entries
            ):
                return branch.then, 1 / self.turns[entries[0]]
        return usual(branch, known), 1.0

    def cores_in(self, expressions: Iterable[Expr]) -> frozenset[Symbol]:
        """The core coordinates that expressions depend on."""
        found: set[Symbol] = set()
        for expr in expressions:
            for entry in symbols(expr):
                found |= {entry} if entry in self.cores else self.depends.get(entry, frozenset())
        return frozenset(found)

    def sharers(self, step: Step) -> int:
        """How many cores read the same bytes at the same turn."""
        assert step.tensor is not None
        used = self.cores_in(e for v in step.attrs.values() for e in expressions_in(v))
        used |= self.depends.get(step.tensor, frozenset())
        for entries in step.lists:
            used |= self.depends.get(entries.root, frozenset())
        sharers = 1
        for entry, count in self.cores.items():
            sharers *= 1 if entry in used else count
        return sharers

    def steps(
        self, block: Block, times: float, known: dict[str, int]
    ) -> Iterator[tuple[Step, float, dict[str, int]]]:
        """Every instruction of a block with how often it runs, in the mean over the cores, and what
        is known there; of a branch, those of the side that doesn't count run 0 times.
        """
        for item in block.items:
            if isinstance(item, Structure):
                self.structure(item, known)
            elif isinstance(item, Loop):
                trips, start = self.trips(item, known)
                inner = {**known, item.symbol.name: start + int(trips) // 2 * item.step}
                yield from self.steps(item.body, times * self.means[item.symbol], inner)
            elif isinstance(item, Branch):
                side, part = self.share_of(item, known)
                other = item.then if side is item.otherwise else item.otherwise
                yield from self.steps(side, times * part, known)
                yield from self.steps(other, 0, known)
            elif isinstance(item, Step):
                self.listed(item)
                yield item, times, known

    def listed(self, step: Step) -> None:
        """Note what a tile depends on, which may be an index list of later loads."""
        if step.kind == "dma_load" and step.tensor is not None:
            found = self.cores_in(e for v in step.attrs.values() for e in expressions_in(v))
            found |= self.depends.get(step.tensor, frozenset())
            self.depends[step.writes[0].root] = found


def usual(branch: Branch, known: Mapping[str, int]) -> Block:
    """The side of a branch that counts."""
    if any(isinstance(s, Step) and s.kind == "dma_load" for s in branch.otherwise.items):
        return branch.otherwise
    if _is_first_turn(branch):
        return branch.otherwise
    return branch.then if number(branch.condition, known) else branch.otherwise


def _is_first_turn(branch: Branch) -> bool:
    """Whether a branch does something at one turn of a loop only."""
    condition = branch.condition
    return (
        not branch.otherwise.items
        and isinstance(condition, Compare)
        and condition.relation == "=="
        and any(s.kind == "loop" for s in symbols(condition))
    )


def direct(body: Block) -> Iterator[Step]:
    """The steps of a block that aren't in a loop of their own."""
    for item in body.items:
        if isinstance(item, Step):
            yield item
        elif isinstance(item, Branch):
            yield from direct(usual(item, {}))


def number(expr: Expr | int, known: Mapping[str, int], least: int | None = None) -> int:
    """An expression with what is known, else the middle of its range (from ``least`` on)."""
    if isinstance(expr, int):
        return expr
    try:
        return evaluate(expr, known)
    except DureError:
        low, high = bounds(
            substitute(expr, {s: known[s.name] for s in symbols(expr) if s.name in known})
        )
        if least is not None:
            low = least if low is None else max(low, least)
            high = high if high is None else max(high, least)
        if low is None or high is None:
            return 1 if low is None else max(low, 1)
        return (low + high + 1) // 2
