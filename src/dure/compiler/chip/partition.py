"""Grid instances onto cores: each core runs a contiguous block of each grid axis, in loops.

The grid of the result counts cores.  Axis ``a`` of the kernel's grid, of ``g`` instances, is cut
over ``c`` cores into blocks ``[core * g // c, (core + 1) * g // c)``, whose lengths differ by at
most one.  The loops over instances carry ``instances = true``: the verifier has proved at the tile
level that instances don't depend on one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dure.errors import TargetError
from dure.ir.core import Function, Op, Region
from dure.ir.devices import devices_of
from dure.ir.expr import Expr, IntLike, Symbol, as_expr, const, evaluate, symbol
from dure.ir.rewrite import clone_region


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


def core_splits(grid: Sequence[int], cores: int) -> Iterator[tuple[int, ...]]:
    """Ways to put the axes of a grid on at most so many cores, the best balanced first.

    Sorted by the number of instances of the busiest core, then by how square the split is.
    """
    found = {
        split
        for split in _factors(len(grid), cores)
        if all(c <= max(1, g) for c, g in zip(split, grid, strict=True))
    }

    def busiest(split: tuple[int, ...]) -> tuple[int, int]:
        most = 1
        for c, g in zip(split, grid, strict=True):
            most *= -(-g // c)
        return most, sum(c for c in split)

    yield from sorted(found, key=busiest)


def splits_of(function: Function, cores: int) -> Iterator[tuple[int, ...]]:
    """Ways to put a function's grid on so many cores of a device, the best balanced first.  The
    axis of devices is not cut.
    """
    grid, devices = grid_extents(function), devices_of(function)
    if devices == 1:
        return core_splits(grid, cores)
    return ((devices, *split) for split in core_splits(grid[1:], cores))


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
