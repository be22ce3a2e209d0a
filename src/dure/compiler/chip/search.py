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
from dure.compiler.chip.sizes import Tiled, tiled_by
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
_SAMPLED = 4
#: Points in which an operand may stay although another point is better without.
_NEAR = 6
_SIMULATED = 16
#: What of a bound is believed once programs are simulated: it rests on a simplified schedule.
_TRUST = 0.95
#: Simulated instructions after which the choice is made.
_EXECUTED = 100_000
_SPLITS = 4
#: Programs that weren't simulated and may stand in for one that takes too long to prove.
_OTHERS = 16
#: Instructions of a core that a candidate may have: more take long to time, and are timed only
#: where nothing else fits, up to the most.
_LONGEST = 400_000
_MOST = 1_000_000
#: Sizes that aren't powers of two are multiples of this.
_GRAIN = 32
#: Slots of a ring at most.
_STAGES = 8

#: Picoseconds at least; of two equal ones the program with less work in its queues is better, then
#: the one with fewer bytes of tiles.
Bound: TypeAlias = tuple[float, float, int]
_NONE: Bound = (math.inf, 0.0, 0)
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
    return search.decide()


_Move: TypeAlias = Callable[[_Point], "_Point | None"]


def _rounded(size: int) -> int:
    """A size that is a multiple of the grain, or less than that."""
    return size if size < _GRAIN else -(-size // _GRAIN) * _GRAIN


def _put(tiles: tuple[int, ...], place: int, size: int) -> tuple[int, ...]:
    """The sizes with one of them replaced."""
    return (*tiles[:place], size, *tiles[place + 1 :])


def _stepped(field_name: str, by: int, least: int) -> _Move:
    """A number of the point moved by one."""

    def move(point: _Point) -> _Point | None:
        value: int = getattr(point, field_name) + by
        fits = least <= value <= _STAGES
        return replace(point, **{field_name: value}) if fits else None

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
    #: The bound of every point that was looked at.
    bounds: dict[_Point, Bound] = field(default_factory=dict["_Point", "Bound"])
    functions: dict[tuple[int, ...], Function | None] = field(
        default_factory=dict[tuple[int, ...], "Function | None"]
    )
    programs: dict[tuple[int, Partition], Function] = field(
        default_factory=dict[tuple[int, Partition], Function]
    )
    reuses: dict[_Point, list[Reuse]] = field(default_factory=dict[_Point, list[Reuse]])
    axes: dict[int, Tiled] = field(default_factory=dict[int, Tiled])
    timed: dict[_Point, tuple[Compiled, Timing]] = field(
        default_factory=dict[_Point, "tuple[Compiled, Timing]"]
    )
    failed: set[_Point] = field(default_factory=set["_Point"])
    executed: int = 0
    error: DureError | None = None
    #: The instructions of the points that fit and have many of them.
    long: dict[_Point, int] = field(default_factory=dict[_Point, int])

    def __post_init__(self) -> None:
        self.costs = Costs(self.chip)

    # --- the walk over bounds --------------------------------------------------------------------

    def walk(self) -> None:
        """Walk along each direction as long as it helps, until none does or enough were seen."""
        places = range(len(self.names))
        starts = [_Point(tuple(min(s, self.largest(p)) for p in places)) for s in _STARTS]
        best = min(starts, key=self.bound)
        moved = True
        while moved and len(self.bounds) < _BOUNDS:
            moved = False
            for move in self.directions():
                found = move(best)
                while found is not None and self.bound(found) < self.bound(best):
                    best, moved = found, True
                    found = move(best)
            near = [best, *self.distinct(self.ranked(), _NEAR)]
            found = min((best, *(p for q in near for p in self.kept(q))), key=self.bound)
            best, moved = found, moved or found != best
        if not math.isfinite(self.bound(best)[0]):
            self.anything()

    def ranked(self) -> list[_Point]:
        """The points that compile, the least bound first."""
        known = [p for p, b in self.bounds.items() if math.isfinite(b[0])]
        return sorted(known, key=self.bounds.__getitem__)

    @staticmethod
    def distinct(points: Sequence[_Point], count: int) -> list[_Point]:
        """The first points of different sizes."""
        first: dict[tuple[int, ...], _Point] = {}
        for point in points:
            first.setdefault(point.tiles, point)
        return list(first.values())[:count]

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
        found = [self.resized({place: power}) for place in places for power in (1, -1)]
        found += [self.resized({up: 1, down: -1}) for up, down in itertools.permutations(places, 2)]
        found += [self.deeper(place) for place in places]
        found += [self.evened(place) for place in places]
        found += [_stepped("stages", by, 2) for by in (1, -1)]
        found += [_stepped("split", by, 0) for by in (1, -1)]
        return [*found, _stepped("order", 1, 0)]

    def resized(self, powers: Mapping[int, int]) -> _Move:
        """Some sizes doubled (1) or halved (-1)."""

        def move(point: _Point) -> _Point | None:
            sizes = list(point.tiles)
            for place, power in powers.items():
                if power > 0:
                    sizes[place] = min(2 * sizes[place], self.largest(place))
                else:
                    sizes[place] = _rounded(sizes[place] // 2)
                if sizes[place] == point.tiles[place] or not sizes[place]:
                    return None
            return replace(point, tiles=tuple(sizes))

        return move

    def deeper(self, place: int) -> _Move:
        """Half the size in twice the slots."""
        halve = self.resized({place: -1})

        def move(point: _Point) -> _Point | None:
            halved = halve(point)
            if halved is None or 2 * point.stages > _STAGES:
                return None
            return replace(halved, stages=2 * point.stages)

        return move

    def evened(self, place: int) -> _Move:
        """The size with which all cores have as many instances: 28,672 columns on eight cores are
        seven tiles of 4,096, but eight of 3,584.  Where they have an odd number, half of it.
        """

        def move(point: _Point) -> _Point | None:
            axis, function = self.tiled(place).axis, self.function(point.tiles)
            plan = None if function is None else self.plan(function, point)
            if axis is None or plan is None:
                return None
            others = math.prod(plan.cores) // plan.cores[axis]
            cores, size = int(self.chip.cores.base) // others, point.tiles[place]
            extent = self.largest(place)
            count = -(-extent // (size * cores))
            even = _rounded(-(-extent // (cores * count)))
            if even >= size and count > 1 and count % 2:
                even = _rounded(-(-extent // (cores * (count // 2))))
            return None if even == size else replace(point, tiles=_put(point.tiles, place, even))

        return move

    def largest(self, place: int) -> int:
        """The largest size that is of any use."""
        return min(_LARGEST, self.tiled(place).largest or _LARGEST)

    def tiled(self, place: int) -> Tiled:
        """What a size tiles."""
        if place not in self.axes:
            size = _STARTS[0]
            coarse = (size,) * len(self.names)
            single, double = self.function(coarse), self.function(_put(coarse, place, 2 * size))
            self.axes[place] = Tiled()
            if single is not None and double is not None:
                self.axes[place] = tiled_by(single, double, size)
        return self.axes[place]

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
            self.long[point] = int(bound.instructions)
        return bound.ps, bound.work, sum(used.values())

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
        compiled, timing = self.timed[point]
        # Fewer loops over instances make for shorter proofs.
        tiles = dict.fromkeys(p.tiles for p in points)
        plain = [_Point(t, 0, split) for t in tiles for split in reversed(range(_SPLITS))]
        untried = [p for p in dict.fromkeys(plain) if p not in self.timed]
        others = self.others([(p, self.timed[p][0]) for p in rest], untried)
        return Choice(
            self.consts(point), compiled, timing, len(self.bounds), len(self.timed), others
        )

    def sample(self, points: Sequence[_Point]) -> None:
        """Simulate the points with the least bounds, of different sizes and of each number of
        operands that stay, as long as a bound can win.
        """
        best = math.inf
        for count in range(max(len(p.resident) for p in points) + 1):
            alike = [p for p in points if len(p.resident) == count]
            for point in self.distinct(alike, _SAMPLED):
                if self.bounds[point][0] < best:
                    best = min(best, self.time(point))

    def climb(self) -> None:
        """Walk from the fastest point as long as the simulation finds a faster one."""
        best, moved = min(self.timed, key=self.time, default=None), True
        while moved and best is not None:
            moved = False
            moves = self.directions()
            for found in (*(move(best) for move in moves), *self.kept(best)):
                if len(self.timed) >= _SIMULATED or self.executed >= _EXECUTED:
                    return
                if found is None or self.bound(found)[0] * _TRUST >= self.time(best):
                    continue
                if found in self.long:
                    continue
                if self.time(found) < self.time(best):
                    best, moved = found, True

    def time(self, point: _Point) -> float:
        """The simulated picoseconds of a point; infinite where it doesn't compile."""
        if point in self.timed:
            return self.timed[point][1].ps
        if not math.isfinite(self.bound(point)[0]) or point in self.failed:
            return math.inf
        try:
            compiled = self.compile(point)
            timing = simulate(compiled.function, self.chip, indices=self.indices)
        except DureError as error:
            self.error = error
            self.failed.add(point)
            return math.inf
        self.timed[point] = compiled, timing
        self.executed += timing.instructions
        return timing.ps

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
        if self.long:
            fewest = min(self.long.values())
            return KernelError(
                f"a core of {self.chip.name} would execute {fewest:,} instructions or more",
                rule=f"a program is timed instruction by instruction, up to {_MOST:,} a core",
                fix="give smaller sizes",
            )
        if self.error is not None:
            return self.error
        return KernelError(
            f"no sizes of {', '.join(self.names)} compile for {self.chip.name}",
            rule="an open const is a power of two with which the kernel compiles and fits",
            fix="give the consts that aren't tile sizes",
        )
