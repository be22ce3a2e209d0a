"""Choosing tile sizes, loop order, the split over cores and slots, by asking the timing model.

A local search over powers of two walks down the bound of :mod:`dure.compiler.chip.estimate`, which
needs no addresses and no semaphores; the best few are compiled and simulated, and the simulation
decides.  Nothing is chosen by hand, and no kernel or chip is known here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dure.compiler.chip.allocate import allocate
from dure.compiler.chip.estimate import estimate
from dure.compiler.chip.lower import lower
from dure.compiler.chip.partition import Partition, core_splits, grid_extents, loop_orders
from dure.compiler.chip.pipeline import Compiled, Options, compile_for, prepare
from dure.compiler.chip.resident import Reuse, keep, reuses
from dure.compiler.chip.share import share_reads
from dure.compiler.chip.stages import choose_stages
from dure.errors import DureError, KernelError
from dure.ir.core import Function
from dure.ir.dtypes import Array
from dure.machine.chip import Chip
from dure.sim.cost import Costs
from dure.sim.timing import Timing, simulate

#: Tile sizes from which the search starts, all open names alike.
_STARTS = (32, 128, 512)
_LARGEST = 16384
#: Programs whose bound is computed at most, and how many of the best are simulated.
_BOUNDS = 60
_SIMULATED = 5
_SPLITS = 4
#: Programs that weren't simulated and may stand in for one that takes too long to prove.
_OTHERS = 16
#: Instructions of a core that a candidate may have: more take too long to time.
_LONGEST = 400_000
#: Slots of a ring at most.
_STAGES = 8

#: A bound; of two equal ones the program with fewer bytes of tiles is better.
Bound: TypeAlias = tuple[float, int]
_NONE: Bound = (math.inf, 0)
Specialize: TypeAlias = Callable[[Mapping[str, int]], Function]


@dataclass(frozen=True)
class Choice:
    """What was chosen, its program and time, and how many were looked at and simulated.

    ``others`` gives other programs, compiled as they are asked for: first those that were
    simulated, the fastest first, then plain ones of the least bounds.
    """

    consts: dict[str, int]
    compiled: Compiled
    timing: Timing
    bounds: int
    simulated: int
    others: Iterator[tuple[dict[str, int], Compiled]]


@dataclass(frozen=True, slots=True)
class _Point:
    """One way to compile a kernel."""

    tiles: tuple[int, ...]
    order: int = 0
    split: int = 0
    stages: int = 2
    resident: tuple[Reuse, ...] = ()


def choose(
    specialize: Specialize,
    names: Sequence[str],
    chip: Chip,
    *,
    indices: Mapping[str, Array] | None = None,
    strict: bool = False,
    budget: int | None = None,
) -> Choice:
    """The fastest program found for a kernel whose consts ``names`` are open.

    ``specialize`` gives the tile function for values of the open consts.  ``indices`` are values
    of index arguments that the time depends on; ``budget`` is how much of the scratchpad the
    program may use (bytes; of each partition where there are any).  Raises the error of the last
    try where none compiles.
    """
    search = _Search(specialize, tuple(names), chip, strict, budget, indices)
    search.walk()
    return search.decide(indices)


_Move: TypeAlias = Callable[[_Point], "_Point | None"]


def _resized(powers: Mapping[int, int]) -> _Move:
    """Some sizes multiplied by powers of two."""

    def move(point: _Point) -> _Point | None:
        sizes = list(point.tiles)
        for place, power in powers.items():
            sizes[place] = sizes[place] * 2 if power > 0 else sizes[place] // 2
        fits = all(1 <= size <= _LARGEST for size in sizes)
        return replace(point, tiles=tuple(sizes)) if fits else None

    return move


def _stepped(field_name: str, by: int, least: int) -> _Move:
    """A number of the point moved by one."""

    def move(point: _Point) -> _Point | None:
        value: int = getattr(point, field_name) + by
        fits = least <= value <= _STAGES
        return replace(point, **{field_name: value}) if fits else None

    return move


def _deeper(place: int) -> _Move:
    """Half the size in twice the slots."""

    def move(point: _Point) -> _Point | None:
        halved = _resized({place: -1})(point)
        fits = halved is not None and 2 * point.stages <= _STAGES
        return replace(halved, stages=2 * point.stages) if fits and halved is not None else None

    return move


@dataclass
class _Search:
    specialize: Specialize
    names: tuple[str, ...]
    chip: Chip
    strict: bool
    budget: int | None = None
    indices: Mapping[str, Array] | None = None
    costs: Costs = field(init=False)
    #: (picoseconds, bytes of tiles) of every point that was looked at.
    bounds: dict[_Point, Bound] = field(default_factory=dict["_Point", "Bound"])
    functions: dict[tuple[int, ...], Function | None] = field(
        default_factory=dict[tuple[int, ...], "Function | None"]
    )
    programs: dict[tuple[int, Partition], Function] = field(
        default_factory=dict[tuple[int, Partition], Function]
    )
    reuses: dict[_Point, list[Reuse]] = field(default_factory=dict[_Point, list[Reuse]])
    error: DureError | None = None
    #: The fewest instructions of the candidates that fit and have too many of them.
    fewest: int = 0

    def __post_init__(self) -> None:
        self.costs = Costs(self.chip)

    # --- the walk over bounds --------------------------------------------------------------------

    def walk(self) -> None:
        """Walk along each direction as long as it helps, until none does or enough were seen."""
        starts = [_Point((s,) * len(self.names)) for s in _STARTS]
        best = min(starts, key=self.bound)
        moved = True
        while moved and len(self.bounds) < _BOUNDS:
            moved = False
            for move in self.directions():
                found = move(best)
                while found is not None and self.bound(found) < self.bound(best):
                    best, moved = found, True
                    found = move(best)
            found = min((best, *self.kept(best)), key=self.bound)
            best, moved = found, moved or found != best
        if not math.isfinite(self.bound(best)[0]):
            self.anything()

    def kept(self, point: _Point) -> list[_Point]:
        """The point with one operand more that stays, or one less."""
        found = [
            replace(point, resident=(*point.resident, reuse))
            for reuse in self.reuses.get(point, ())
            if all(r.tensor != reuse.tensor for r in point.resident)
        ]
        return found + [
            replace(point, resident=tuple(r for r in point.resident if r != reuse))
            for reuse in point.resident
        ]

    def anything(self) -> None:
        """Where no start compiles: every combination of few sizes."""
        for sizes in itertools.product((1, 8, 16, 64, 256), repeat=len(self.names)):
            if len(self.bounds) > 2 * _BOUNDS:
                return
            if math.isfinite(self.bound(_Point(sizes))[0]):
                return

    def directions(self) -> list[_Move]:
        """One size doubled or halved, one up and another down, another order, split or stages."""
        places = range(len(self.names))
        found = [_resized({place: power}) for place in places for power in (1, -1)]
        found += [_resized({up: 1, down: -1}) for up, down in itertools.permutations(places, 2)]
        found += [_deeper(place) for place in places]
        found += [_stepped("stages", by, 2) for by in (1, -1)]
        found += [_stepped("split", by, 0) for by in (1, -1)]
        return [*found, _stepped("order", 1, 0)]

    def bound(self, point: _Point) -> Bound:
        """The bound of a point; infinite where it doesn't compile or fit."""
        if point not in self.bounds:
            self.bounds[point] = _NONE
            try:
                self.bounds[point] = self._bound(point)
            except DureError as error:
                self.error = error
        return self.bounds[point]

    def _bound(self, point: _Point) -> Bound:
        function = self.function(point.tiles)
        plan = None if function is None else self.plan(function, point)
        if function is None or plan is None:
            return _NONE
        prepared = self.prepared(function, plan)
        tree = lower(prepared, self.chip)
        self.reuses[point] = reuses(tree)
        keep(tree, point.resident)
        choose_stages(tree, self.chip, point.stages, self.budget)
        share_reads(tree, prepared, self.chip)
        used = allocate(tree, self.chip, self.budget)
        bound = estimate(tree, prepared, self.chip, self.costs, self.indices)
        if bound.instructions > _LONGEST:
            fewest = min(bound.instructions, self.fewest or math.inf)
            self.fewest = int(fewest)
            return _NONE
        return bound.ps, sum(used.values())

    def prepared(self, function: Function, plan: Partition) -> Function:
        """The tile program of one core."""
        key = (id(function), plan)
        found = self.programs.get(key)
        if found is None:
            found = prepare(function, self.chip, plan, strict=self.strict).function
            self.programs[key] = found
        return found

    def function(self, tiles: tuple[int, ...]) -> Function | None:
        if tiles not in self.functions:
            self.functions[tiles] = None
            consts = dict(zip(self.names, tiles, strict=True))
            try:
                self.functions[tiles] = self.specialize(consts)
            except DureError as error:
                self.error = error
        return self.functions[tiles]

    def plan(self, function: Function, point: _Point) -> Partition | None:
        grid = grid_extents(function)
        orders = loop_orders(len(grid))
        if point.order >= len(orders):
            return None
        splits = itertools.islice(core_splits(grid, int(self.chip.cores.base)), _SPLITS)
        split = next(itertools.islice(splits, point.split, None), None)
        return None if split is None else Partition(split, orders[point.order])

    # --- the decision ----------------------------------------------------------------------------

    def decide(self, indices: Mapping[str, Array] | None) -> Choice:
        """Simulate the points with the least bounds, and take the fastest."""
        points = sorted(
            (p for p, b in self.bounds.items() if math.isfinite(b[0])),
            key=self.bounds.__getitem__,
        )
        if not points:
            raise self.failure()
        found: list[tuple[int, _Point, Compiled, Timing]] = []
        tried = 0
        seen: set[object] = set()
        for point in points:
            best = min((entry[0] for entry in found), default=math.inf)
            if tried >= _SIMULATED or self.bounds[point][0] >= best:
                break
            # Points that differ in order or slots alone, with one bound, are as good as the same.
            alike = (point.tiles, point.split, point.resident, round(self.bounds[point][0]))
            if alike in seen:
                continue
            seen.add(alike)
            tried += 1
            try:
                compiled = self.compile(point)
                timing = simulate(compiled.function, self.chip, indices=indices)
            except DureError as error:
                self.error = error
                continue
            found.append((timing.ps, point, compiled, timing))
        if not found:
            raise self.failure()
        found.sort(key=lambda entry: entry[0])
        (_, point, compiled, timing), *rest = found
        # Fewer loops over instances make for shorter proofs.
        tiles = dict.fromkeys(p.tiles for p in points)
        plain = [_Point(t, 0, split) for t in tiles for split in reversed(range(_SPLITS))]
        untried = [p for p in dict.fromkeys(plain) if all(p != q for _, q, _, _ in found)]
        others = self.others([(p, c) for _, p, c, _ in rest], untried)
        return Choice(self.consts(point), compiled, timing, len(self.bounds), tried, others)

    def others(
        self, ready: Sequence[tuple[_Point, Compiled]], points: Sequence[_Point]
    ) -> Iterator[tuple[dict[str, int], Compiled]]:
        """Programs that weren't chosen."""
        for point, compiled in ready:
            yield self.consts(point), compiled
        for point in points[:_OTHERS]:
            try:
                yield self.consts(point), self.compile(point)
            except DureError as error:
                self.error = error

    def consts(self, point: _Point) -> dict[str, int]:
        """The tile sizes of a point by name."""
        return dict(zip(self.names, point.tiles, strict=True))

    def compile(self, point: _Point) -> Compiled:
        function = self.function(point.tiles)
        assert function is not None
        plan = self.plan(function, point)
        return compile_for(
            function,
            self.chip,
            Options(plan, point.stages, self.strict, point.resident, budget=self.budget),
        )

    def failure(self) -> DureError:
        """The error of a kernel that nothing compiles."""
        if self.fewest:
            return KernelError(
                f"a core of {self.chip.name} would execute {self.fewest:,} instructions or more",
                rule=f"a program is timed instruction by instruction, up to {_LONGEST:,} a core",
                fix="give smaller sizes",
            )
        if self.error is not None:
            return self.error
        return KernelError(
            f"no sizes of {', '.join(self.names)} compile for {self.chip.name}",
            rule="an open const is a power of two with which the kernel compiles and fits",
            fix="give the consts that aren't tile sizes",
        )
