"""The ways to compile a kernel, and the moves from one to another.

A :class:`Point` is one way: the open tile sizes, the order of the loops over instances, the split
over cores, slots, and the operands that stay.  Sizes go by powers of two, up to the tensor's own
extents, and by what gives all cores as much to do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dure.compiler.chip.partition import Partition, grid_extents, loop_orders, splits_of
from dure.compiler.chip.resident import Reuse
from dure.compiler.chip.sizes import Tiled, tiled_by
from dure.errors import DureError
from dure.ir.core import Function
from dure.ir.devices import devices_of
from dure.ir.dtypes import Array
from dure.machine.chip import Chip

#: Tile sizes from which a search starts, all open names alike.
_STARTS = (32, 128, 512)
_LARGEST = 16384
#: Sizes that aren't powers of two are multiples of this.
_GRAIN = 32
#: Splits over the cores that are looked at, the best balanced first.
SPLITS = 4
#: Slots of a ring at most.
_STAGES = 8

Specialize: TypeAlias = Callable[[Mapping[str, int]], Function]


@dataclass(frozen=True, slots=True)
class Point:
    """One way to compile a kernel."""

    tiles: tuple[int, ...]
    order: int = 0
    split: int = 0
    stages: int = 2
    resident: tuple[Reuse, ...] = ()


Move: TypeAlias = Callable[[Point], "Point | None"]


def _rounded(size: int) -> int:
    """A size that is a multiple of the grain, or less than that."""
    return size if size < _GRAIN else -(-size // _GRAIN) * _GRAIN


def _put(tiles: tuple[int, ...], place: int, size: int) -> tuple[int, ...]:
    """The sizes with one of them replaced."""
    return (*tiles[:place], size, *tiles[place + 1 :])


def _stepped(field_name: str, by: int, least: int) -> Move:
    """A number of the point moved by one."""

    def move(point: Point) -> Point | None:
        value: int = getattr(point, field_name) + by
        fits = least <= value <= _STAGES
        return replace(point, **{field_name: value}) if fits else None

    return move


@dataclass
class Space:
    """All points of a kernel on a chip; ``specialize`` gives its tile function for values of the
    open consts ``names``.  ``error`` is the last one that it raised; ``legal`` are sizes with which
    the kernel is known to compile, and ``indices`` values of index arguments.
    """

    specialize: Specialize
    names: tuple[str, ...]
    chip: Chip
    legal: tuple[int, ...] | None = None
    indices: Mapping[str, Array] | None = None
    error: DureError | None = None
    _functions: dict[tuple[int, ...], Function | None] = field(
        default_factory=dict[tuple[int, ...], "Function | None"]
    )
    _splits: dict[int, list[tuple[int, ...]]] = field(
        default_factory=dict[int, list[tuple[int, ...]]]
    )
    _tiled: dict[int, Tiled] = field(default_factory=dict[int, Tiled])

    def starts(self) -> list[Point]:
        """Where a search may start."""
        places = range(len(self.names))
        alike = [Point(tuple(min(s, self.largest(p)) for p in places)) for s in _STARTS]
        return alike if self.legal is None else [Point(self.legal), *alike]

    def consts(self, point: Point) -> dict[str, int]:
        """The tile sizes of a point by name."""
        return dict(zip(self.names, point.tiles, strict=True))

    def function(self, tiles: tuple[int, ...]) -> Function | None:
        if tiles not in self._functions:
            self._functions[tiles] = None
            consts = dict(zip(self.names, tiles, strict=True))
            try:
                self._functions[tiles] = self.specialize(consts)
            except DureError as error:
                self.error = error
        return self._functions[tiles]

    def plan(self, function: Function, point: Point) -> Partition | None:
        grid = grid_extents(function)
        orders = loop_orders(len(grid))
        if point.order >= len(orders):
            return None
        splits = self._splits.get(id(function))
        if splits is None:
            found = splits_of(function, int(self.chip.cores.base), self.indices)
            splits = self._splits[id(function)] = list(itertools.islice(found, SPLITS))
        if point.split >= len(splits):
            return None
        return Partition(splits[point.split], orders[point.order])

    def directions(self) -> list[Move]:
        """One size doubled or halved, one up and another down, another order, split or stages."""
        places = range(len(self.names))
        found = [self.resized({place: power}) for place in places for power in (1, -1)]
        found += [self.resized({up: 1, down: -1}) for up, down in itertools.permutations(places, 2)]
        found += [self.deeper(place) for place in places]
        found += [self.evened(place) for place in places]
        found += [_stepped("stages", by, 2) for by in (1, -1)]
        found += [_stepped("split", by, 0) for by in (1, -1)]
        return [*found, _stepped("order", 1, 0)]

    def resized(self, powers: Mapping[int, int]) -> Move:
        """Some sizes doubled (1) or halved (-1)."""

        def move(point: Point) -> Point | None:
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

    def deeper(self, place: int) -> Move:
        """Half the size in twice the slots."""
        halve = self.resized({place: -1})

        def move(point: Point) -> Point | None:
            halved = halve(point)
            if halved is None or 2 * point.stages > _STAGES:
                return None
            return replace(halved, stages=2 * point.stages)

        return move

    def evened(self, place: int) -> Move:
        """The size with which all cores have as many instances: 28,672 columns on eight cores are
        seven tiles of 4,096, but eight of 3,584.  Where they have an odd number, half of it.
        """

        def move(point: Point) -> Point | None:
            tiled, function = self.tiled(place), self.function(point.tiles)
            plan = None if function is None else self.plan(function, point)
            axis, extent = tiled.axis, tiled.largest
            if axis is None or extent is None or plan is None or function is None:
                return None
            others = math.prod(plan.cores) // plan.cores[axis] // devices_of(function)
            cores, size = int(self.chip.cores.base) // others, point.tiles[place]
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
        if place not in self._tiled:
            coarse = (_STARTS[0],) * len(self.names)
            if self.function(coarse) is None and self.legal is not None:
                coarse = self.legal
            size = coarse[place]
            single, double = self.function(coarse), self.function(_put(coarse, place, 2 * size))
            self._tiled[place] = Tiled()
            if single is not None and double is not None:
                self._tiled[place] = tiled_by(single, double, size)
        return self._tiled[place]


@dataclass
class Listed(Space):
    """The points of a kernel that there is in certain sizes only: a walk goes from any of them to
    any other.
    """

    listed: tuple[tuple[int, ...], ...] = ()

    def starts(self) -> list[Point]:
        """All sizes that there are."""
        return [Point(tiles, stages=stages) for tiles in self.listed for stages in (2, 4)]

    def directions(self) -> list[Move]:
        """Other sizes, one slot more or less, another split or order."""
        found = [self.swapped(tiles) for tiles in self.listed]
        found += [_stepped("stages", by, 2) for by in (1, -1)]
        found += [_stepped("split", by, 0) for by in (1, -1)]
        return [*found, _stepped("order", 1, 0)]

    def swapped(self, tiles: tuple[int, ...]) -> Move:
        """These sizes for the point's."""

        def move(point: Point) -> Point | None:
            return None if point.tiles == tiles else replace(point, tiles=tiles)

        return move
