"""Grid instances onto cores: each core runs a contiguous block of each grid axis, in loops.

The grid of the result counts cores.  Axis ``a`` of the kernel's grid, of ``g`` instances, is cut
over ``c`` cores into blocks ``[core * g // c, (core + 1) * g // c)``, whose lengths differ by at
most one.  The loops over instances carry ``instances = true``: the verifier has proved at the tile
level that instances don't depend on one another.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from dure.errors import TargetError
from dure.ir.core import Function, Op, Region
from dure.ir.devices import devices_of
from dure.ir.dtypes import Array
from dure.ir.expr import Expr, IntLike, Symbol, as_expr, const, evaluate, symbol, symbols
from dure.ir.rewrite import clone_region

#: Instances with nothing to do that count as much as a turn of one that has.
_TURN = 16
#: Of each axis of a grid, what its instances have to do; None where that is alike.
Loads: TypeAlias = "Sequence[Sequence[int] | None]"


@dataclass(frozen=True, slots=True)
class Partition:
    """How the grid lies on the cores: cores along each axis, and the loops from the outside in."""

    cores: tuple[int, ...]
    order: tuple[int, ...]


def grid_extents(function: Function) -> tuple[int, ...]:
    """The grid's extents, which must be numbers.  Raises :class:`TargetError` if they aren't."""
    try:
        return tuple(evaluate(extent, {}) for extent in function.grid)
    except Exception as error:
        raise TargetError(
            f"the grid of '{function.name}' isn't known: {', '.join(map(str, function.grid))}",
            rule="a machine program is compiled for known sizes",
            fix="give the kernel's arguments constant shapes",
        ) from error


def core_splits(
    grid: Sequence[int], cores: int, loads: Loads | None = None
) -> Iterator[tuple[int, ...]]:
    """Ways to put the axes of a grid on at most so many cores, the best balanced first.

    Sorted by what the busiest core has to do, its number of instances, and by how square the split
    is.  ``loads`` say of each axis how much its instances have to do, None where that is alike.
    """
    loads = loads or (None,) * len(grid)

    @functools.cache
    def most_of(axis: int, count: int) -> int:
        load = loads[axis]
        return -(-grid[axis] // count) if load is None else max(block_sums(load, count))

    found = {
        split
        for split in _factors(len(grid), cores)
        if all(c <= max(1, g) for c, g in zip(split, grid, strict=True))
    }

    def busiest(split: tuple[int, ...]) -> tuple[int, int, int]:
        most = work = 1
        for axis, c in enumerate(split):
            most *= -(-grid[axis] // c)
            work *= most_of(axis, c)
        return work, most, sum(c for c in split)

    yield from sorted(found, key=busiest)


def splits_of(
    function: Function, cores: int, indices: Mapping[str, Array] | None = None
) -> Iterator[tuple[int, ...]]:
    """Ways to put a function's grid on so many cores of a device, the best balanced first for these
    values of index arguments.  The axis of devices is not cut.
    """
    grid, devices = grid_extents(function), devices_of(function)
    loads = loads_of(function, grid, indices or {})
    if devices == 1:
        return core_splits(grid, cores, loads)
    return ((devices, *split) for split in core_splits(grid[1:], cores, loads[1:]))


def loads_of(function: Function, grid: Sequence[int], indices: Mapping[str, Array]) -> Loads:
    """How much the instances along each axis have to do, where that is read from an index argument
    at the instance's place: the turns of the first loop that is as long as that says.
    """
    axes: dict[Expr, int] = {entry: axis for axis, entry in enumerate(function.program_ids)}
    places, read = dict[Symbol, int](), dict[Symbol, Array]()
    found: list[Sequence[int] | None] = [None for _ in grid]
    for op in function.body.ops:
        values = indices.get(op.operands[0].name) if op.name == "index_load" else None
        index: tuple[Expr, ...] = op.attr("index") if values is not None else ()
        axis = axes.get(index[0]) if len(index) == 1 else None
        if values is not None and axis is not None and values.shape == (grid[axis],):
            places[op.symbols[0]], read[op.symbols[0]] = axis, values
        if op.name != "for":
            continue
        length = as_expr(op.attr("stop")) - op.attr("start")
        entries = symbols(length)
        own = {places.get(s, -1) for s in entries}
        if len(own) == 1 and -1 not in own:
            (axis,) = own
            found[axis] = found[axis] or [
                1 + _TURN * max(0, evaluate(length, {s.name: int(read[s][n]) for s in entries}))
                for n in range(grid[axis])
            ]
    return tuple(found)


def block_sums(load: Sequence[int], count: int) -> list[int]:
    """The sums of a load's blocks, one for each of so many cores."""
    size = len(load)
    return [sum(load[c * size // count : (c + 1) * size // count]) for c in range(count)]


def _factors(axes: int, cores: int) -> Iterator[tuple[int, ...]]:
    """All tuples of ``axes`` counts whose product is at most ``cores`` and can't grow."""
    if axes == 0:
        yield ()
        return
    if axes == 1:
        yield from ((c,) for c in range(1, cores + 1))
        return
    for first in range(1, cores + 1):
        for rest in _factors(axes - 1, cores // first):
            yield (first, *rest)


def loop_orders(axes: int) -> list[tuple[int, ...]]:
    """The orders in which the loops over a grid may be nested."""
    return list(itertools.permutations(range(axes)))


def partition(function: Function, plan: Partition) -> Function:
    """The program of one core: loops over its instances around the kernel's body."""
    extents = grid_extents(function)
    if any(extent == 0 for extent in extents):
        return replace(function, grid=(), program_ids=(), body=Region((), ()))
    ids = [symbol(f"core{axis}", "grid", 0, count - 1) for axis, count in enumerate(plan.cores)]
    moved: dict[Expr, IntLike] = {}
    loops: list[tuple[Symbol, Expr, Expr]] = []
    for axis in plan.order:
        extent, count, core = extents[axis], plan.cores[axis], ids[axis]
        start, stop = core * extent // count, (core + 1) * extent // count
        own = function.program_ids[axis]
        if extent == 1:
            moved[own] = const(0)
            continue
        if count == extent:
            moved[own] = core
            continue
        counter = symbol(f"i{axis}", "loop", 0, extent - 1)
        moved[own] = counter
        loops.append((counter, start, stop))
    body = clone_region(function.body, symbols=moved)
    for counter, start, stop in reversed(loops):
        attrs = {"start": start, "stop": stop, "step": 1, "instances": True}
        inner = Region((), body.ops, (), (counter,))
        body = Region((), (Op("for", (), (), attrs, (inner,)),))
    kept = [(i, c) for i, c in zip(ids, plan.cores, strict=True) if c > 1]
    body = _without_single_cores(body, ids, plan.cores)
    return replace(
        function,
        grid=tuple(as_expr(c) for _, c in kept),
        program_ids=tuple(i for i, _ in kept),
        body=body,
    )


def _without_single_cores(body: Region, ids: Sequence[Expr], cores: Sequence[int]) -> Region:
    single: dict[Expr, IntLike] = {i: 0 for i, c in zip(ids, cores, strict=True) if c == 1}
    return clone_region(body, symbols=single) if single else body
