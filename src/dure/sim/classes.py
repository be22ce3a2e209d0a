"""Cores that do the same: one representative each, with its multiplicity.

Cores of one program differ in what hangs on their coordinates: how often a loop turns, which branch
is taken, where a tile is cut at a tensor's edge, which entries of an index list exist.  Cores that
agree in all of that execute equal streams at equal cost, and, since they also compete for the same
resources, at equal times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from dure.errors import IRError
from dure.ir.core import Function
from dure.ir.expr import evaluate
from dure.machine.chip import Chip
from dure.sim.expand import core_ids
from dure.sim.streams import Streams


@dataclass(frozen=True, slots=True)
class CoreClass:
    """``multiplicity`` cores that do what ``core``, one of them, does (its program ids)."""

    multiplicity: int
    core: Mapping[str, int]


def core_classes(
    function: Function, chip: Chip, streams: Streams, full: bool = False
) -> tuple[CoreClass, ...]:
    """The classes of a program's cores, in the order of their first cores; ``full`` makes every
    core a class of its own.
    """
    count = prod(evaluate(extent, {}) for extent in function.grid)
    if count > chip.cores.base:
        raise IRError(
            f"a program for {count} cores on {chip.name}, which has {chip.cores.base:g}",
            rule="each core of the chip runs at most one instance of the program",
            fix="partition the work over fewer cores",
        )
    if full:
        return tuple(CoreClass(1, core) for core in core_ids(function))
    if count == 1 or not streams.varies:
        return (CoreClass(count, next(iter(core_ids(function)))),) if count else ()
    members: dict[tuple[object, ...], list[dict[str, int]]] = {}
    for core in core_ids(function):
        members.setdefault(streams.signature(core), []).append(core)
    return tuple(CoreClass(len(cores), cores[0]) for cores in members.values())
