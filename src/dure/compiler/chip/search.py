"""Choosing tile sizes, loop order, the split over cores and slots, by asking the timing model.

A local search over the points of :mod:`dure.compiler.chip.space` walks down the bound of
:mod:`dure.compiler.chip.estimate`, which needs no addresses and no semaphores; the best few are
compiled and simulated, and from the fastest the walk goes on by simulation, which decides.  Nothing
is chosen by hand, and no kernel or chip is known here.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dure.compiler.chip.allocate import allocate
from dure.compiler.chip.estimate import estimate
from dure.compiler.chip.lower import lower
from dure.compiler.chip.partition import Partition
from dure.compiler.chip.pipeline import Compiled, Options, Prepared, prepare, scheduled
from dure.compiler.chip.pushes import check_pushes
from dure.compiler.chip.resident import Reuse, keep, reuses
from dure.compiler.chip.share import share_reads
from dure.compiler.chip.space import SPLITS, Listed, Point, Space, Specialize
from dure.compiler.chip.stages import choose_stages
from dure.compiler.chip.tree import Tree, copied
from dure.errors import DureError, KernelError
from dure.ir.core import Function
from dure.ir.devices import device_id
from dure.ir.dtypes import Array
from dure.machine.chip import Chip
from dure.sim.cost import Costs
from dure.sim.timing import Timing, simulate

#: Programs whose bound is computed at most.
_BOUNDS = 60
#: Points in which an operand may stay although another point is better without.
_NEAR = 6
#: The best that are simulated, for each number of operands that stay, and all that are at most.
_SAMPLED = 4
_SIMULATED = 32
#: What of a bound is believed once programs are simulated: it rests on a simplified schedule.
_TRUST = 0.95
#: Simulated instructions after which the choice is made, and after which nothing more is sampled.
_EXECUTED, _ENOUGH = 100_000, 500_000
#: Programs that weren't simulated and may stand in for one that takes too long to prove.
_OTHERS = 16
#: Instructions of a core that a candidate may have: more take long to time, and are timed only
#: where nothing else fits, up to the most.
_LONGEST = 400_000
_MOST = 1_000_000

#: Picoseconds at least; of two equal ones the program with less work in its queues is better, then
#: the one with fewer bytes of tiles.
Bound: TypeAlias = tuple[float, float, int]
_NONE: Bound = (math.inf, 0.0, 0)


@dataclass(frozen=True)
class Candidate:
    """Values of the open consts and their program; its time where it was simulated, and the seconds
    that this took.
    """

    consts: dict[str, int]
    compiled: Compiled
    timing: Timing | None = None
    sim_s: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What was chosen, its program and time, and how many were looked at and simulated.

    ``others`` gives other programs, compiled as they are asked for: first those that were
    simulated, the fastest first, then plain ones of the least bounds.
    """

    chosen: Candidate
    timing: Timing
    bounds: int
    simulated: int
    others: Iterator[Candidate]

    @property
    def consts(self) -> dict[str, int]:
        """The sizes that were chosen."""
        return self.chosen.consts

    @property
    def compiled(self) -> Compiled:
        """Their program."""
        return self.chosen.compiled


def choose(
    specialize: Specialize,
    names: Sequence[str],
    chip: Chip,
    *,
    legal: Mapping[str, int] | None = None,
    indices: Mapping[str, Array] | None = None,
    base: Options | None = None,
    among: Sequence[Mapping[str, int]] = (),
) -> Choice:
    """The fastest program found for a kernel whose consts ``names`` are open.

    ``specialize`` gives the tile function for values of the open consts, and ``legal`` such values
    with which it is known to compile; where there are values ``among`` which to choose, for these
    only.  ``indices`` are values of index arguments that the time depends on; ``base`` has the
    options that aren't chosen.  Raises the error of the last try where none compiles.
    """
    known = None if legal is None else tuple(legal[name] for name in names)
    space = Space(specialize, tuple(names), chip, known, indices)
    if among:
        listed = tuple(tuple(sizes[name] for name in names) for sizes in among)
        space = Listed(specialize, tuple(names), chip, None, indices, listed=listed)
    search = _Search(space, base or Options(), indices)
    search.walk()
    return search.decide()


@dataclass
class _Search:
    space: Space
    base: Options
    indices: Mapping[str, Array] | None = None
    chip: Chip = field(init=False)
    costs: Costs = field(init=False)
    #: The bound of every point that was looked at.
    bounds: dict[Point, Bound] = field(default_factory=dict["Point", "Bound"])
    programs: dict[tuple[int, Partition], tuple[Prepared, Tree]] = field(
        default_factory=dict[tuple[int, Partition], "tuple[Prepared, Tree]"]
    )
    reuses: dict[Point, list[Reuse]] = field(default_factory=dict[Point, list[Reuse]])
    timed: dict[Point, tuple[Candidate, Timing]] = field(
        default_factory=dict[Point, "tuple[Candidate, Timing]"]
    )
    failed: set[Point] = field(default_factory=set["Point"])
    executed: int = 0
    error: DureError | None = None
    #: The instructions of the points that fit and have many of them.
    long: dict[Point, int] = field(default_factory=dict[Point, int])

    def __post_init__(self) -> None:
        self.chip = self.space.chip
        self.costs = Costs(self.chip)

    # --- the walk over bounds --------------------------------------------------------------------

    def walk(self) -> None:
        """Walk from the best start, and from the best in which operands stay."""
        start = min(self.space.starts(), key=self.bound)
        self.descend(start, _BOUNDS)
        staying = [p for q in self.space.starts() for p in self.kept(q)]
        if staying:
            self.descend(min(staying, key=self.bound), len(self.bounds) + _BOUNDS // 2)
        if not self.ranked():
            self.anything()

    def descend(self, best: Point, most: int) -> None:
        """Walk along each direction as long as it helps, until none does or enough were seen."""
        moved = True
        while moved and len(self.bounds) < most:
            moved = False
            for move in self.space.directions():
                found = move(best)
                while found is not None and self.bound(found) < self.bound(best):
                    best, moved = found, True
                    found = move(best)
            near = [best, *self.distinct(self.ranked(), _NEAR)]
            found = min((best, *(p for q in near for p in self.kept(q))), key=self.bound)
            best, moved = found, moved or found != best

    def ranked(self) -> list[Point]:
        """The points that compile, the least bound first."""
        known = [p for p, b in self.bounds.items() if math.isfinite(b[0])]
        return sorted(known, key=self.bounds.__getitem__)

    @staticmethod
    def distinct(points: Sequence[Point], count: int) -> list[Point]:
        """The first points of different sizes."""
        first: dict[tuple[int, ...], Point] = {}
        for point in points:
            first.setdefault(point.tiles, point)
        return list(first.values())[:count]

    def kept(self, point: Point) -> list[Point]:
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
        """Where no start compiles: from the first combination of few sizes that does."""
        if isinstance(self.space, Listed):
            return
        for sizes in itertools.product((1, 8, 16, 64, 256), repeat=len(self.space.names)):
            if len(self.bounds) > 2 * _BOUNDS:
                return
            if math.isfinite(self.bound(Point(sizes))[0]):
                self.descend(Point(sizes), len(self.bounds) + _BOUNDS)
                return

    def bound(self, point: Point) -> Bound:
        """The bound of a point; infinite where it doesn't compile or fit."""
        if point not in self.bounds:
            self.bounds[point] = _NONE
            try:
                self.bounds[point] = self._bound(point)
            except DureError as error:
                self.error = error
        return self.bounds[point]

    def _bound(self, point: Point) -> Bound:
        function = self.space.function(point.tiles)
        plan = None if function is None else self.space.plan(function, point)
        if function is None or plan is None:
            return _NONE
        program, tree = self.lowered(function, plan)
        prepared = program.function
        self.reuses[point] = reuses(tree)
        keep(tree, point.resident)
        device = device_id(prepared)
        choose_stages(tree, self.chip, point.stages, self.base.budget, device=device)
        share_reads(tree, prepared, self.chip, self.base.near, self.base.reserved, self.indices)
        used = allocate(tree, self.chip, self.base.budget)
        bound = estimate(tree, prepared, self.chip, self.costs, self.indices)
        if bound.instructions > _LONGEST:
            self.long[point] = int(bound.instructions)
        return bound.ps, bound.work, sum(used.values())

    def lowered(self, function: Function, plan: Partition) -> tuple[Prepared, Tree]:
        """The tile program of one core, and its instructions, which may be changed."""
        key = (id(function), plan)
        if key not in self.programs:
            check_pushes(function)
            prepared = prepare(function, self.chip, plan, self.base)
            tree = lower(prepared.function, self.chip, self.base.ahead, self.base.near)
            self.programs[key] = prepared, tree
        prepared, tree = self.programs[key]
        return prepared, copied(tree)

    # --- the decision ----------------------------------------------------------------------------

    def decide(self) -> Choice:
        """Simulate the points with the least bounds, and walk on from the fastest."""
        points = self.ranked()
        short = [p for p in points if p not in self.long]
        if short:
            self.sample(short)
            self.climb()
        elif self.long and min(self.long.values()) <= _MOST:
            # Timing takes long, so that only the program that takes least of it is timed.
            self.time(min(self.long, key=self.long.__getitem__))
        if not self.timed:
            raise self.failure()
        point, *rest = sorted(self.timed, key=self.time)
        chosen, timing = self.timed[point]
        # Fewer loops over instances make for shorter proofs.
        tiles = dict.fromkeys(p.tiles for p in points)
        plain = [Point(t, 0, split) for t in tiles for split in reversed(range(SPLITS))]
        untried = [p for p in dict.fromkeys(plain) if p not in self.timed]
        others = self.others(rest, untried)
        return Choice(chosen, timing, len(self.bounds), len(self.timed), others)

    def sample(self, points: Sequence[Point]) -> None:
        """Simulate the points with the least bounds, of different sizes and of each number of
        operands that stay, as long as a bound can win.
        """
        best = math.inf
        for count in range(max(len(p.resident) for p in points) + 1):
            alike = [p for p in points if len(p.resident) == count]
            for point in self.distinct(alike, _SAMPLED):
                if self.bounds[point][0] < best and self.executed < _ENOUGH:
                    best = min(best, self.time(point))

    def climb(self) -> None:
        """Walk from the fastest point as long as the simulation finds a faster one."""
        best, moved = min(self.timed, key=self.time, default=None), True
        while moved and best is not None:
            moved = False
            moves = self.space.directions()
            near = (*(move(best) for move in moves), *self.kept(best), *self.resplit(best))
            for found in near:
                if len(self.timed) >= self.most or self.executed >= _EXECUTED:
                    return
                # A bound of a simple schedule may be above the time: then two bounds are compared.
                beaten = max(self.time(best), self.bound(best)[0])
                if found is None or self.bound(found)[0] * _TRUST >= beaten:
                    continue
                if found in self.long:
                    continue
                if self.time(found) < self.time(best):
                    best, moved = found, True

    @property
    def most(self) -> int:
        """Programs that are simulated at most.  What shares the scratchpad with its neighbours
        while weights stream in takes other times there than by itself: a quick look is enough.
        """
        return _SIMULATED if self.base.budget is None else _SIMULATED // 2

    def resplit(self, point: Point) -> Iterator[Point]:
        """The point with other splits, of which none is next to another, and the same operands that
        stay: they stay over another loop where cores have a single instance along an axis.
        """
        for split in range(SPLITS if point.resident and self.base.budget is None else 0):
            plain = replace(point, split=split, resident=())
            if split == point.split:
                continue
            self.bound(plain)
            found = {r.tensor: r for r in reversed(self.reuses.get(plain, []))}
            if all(r.tensor in found for r in point.resident):
                yield replace(plain, resident=tuple(found[r.tensor] for r in point.resident))

    def time(self, point: Point) -> float:
        """The simulated picoseconds of a point; infinite where it doesn't compile."""
        if point in self.timed:
            return self.timed[point][1].ps
        if not math.isfinite(self.bound(point)[0]) or point in self.failed:
            return math.inf
        try:
            compiled = self.compile(point)
            started = time.perf_counter()
            timing = simulate(compiled.function, self.chip, indices=self.indices, costs=self.costs)
        except DureError as error:
            self.error = error
            self.failed.add(point)
            return math.inf
        seconds = time.perf_counter() - started
        found = Candidate(self.space.consts(point), compiled, timing, seconds)
        self.timed[point] = found, timing
        self.executed += timing.instructions
        return timing.ps

    def others(self, timed: Sequence[Point], untried: Sequence[Point]) -> Iterator[Candidate]:
        """Programs that weren't chosen."""
        for point in timed:
            yield self.timed[point][0]
        for point in untried[:_OTHERS]:
            if not math.isfinite(self.bound(point)[0]):
                continue
            try:
                yield Candidate(self.space.consts(point), self.compile(point))
            except DureError as error:
                self.error = error

    def compile(self, point: Point) -> Compiled:
        """The program of a point that has a bound."""
        function = self.space.function(point.tiles)
        assert function is not None
        plan = self.space.plan(function, point)
        assert plan is not None
        how = replace(self.base, plan=plan, stages=point.stages, resident=point.resident)
        return scheduled(*self.lowered(function, plan), self.chip, how, self.indices)

    def failure(self) -> DureError:
        """The error of a kernel that nothing compiles."""
        if self.long:
            fewest = min(self.long.values())
            return KernelError(
                f"a core of {self.chip.name} would execute {fewest:,} instructions or more",
                rule=f"a program is timed instruction by instruction, up to {_MOST:,} a core",
                fix="give smaller sizes",
            )
        error = self.error or self.space.error
        if error is not None:
            return error
        return KernelError(
            f"no sizes of {', '.join(self.space.names)} compile for {self.chip.name}",
            rule="an open const is a power of two with which the kernel compiles and fits",
            fix="give the consts that aren't tile sizes",
        )
