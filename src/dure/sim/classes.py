"""Cores that do the same: one representative each, with its multiplicity.

Cores of one program differ in what hangs on their coordinates: how often a loop turns, which branch
is taken, where a tile is cut at a tensor's edge, which entries of an index list exist.  Cores that
agree in all of that execute equal streams at equal cost, and, since they also compete for the same
resources, at equal times.

So do the devices of a group: every arrangement of them looks the same from each
(:mod:`dure.machine.group`).  Where each device has as many cores of every class, device 0 stands
for all: what it sends to others it also receives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from dure.errors import IRError
from dure.ir.core import Function
from dure.ir.devices import device_id, devices_of
from dure.ir.expr import evaluate
from dure.machine.chip import Chip
from dure.sim.expand import core_ids
from dure.sim.streams import Streams


@dataclass(frozen=True, slots=True)
class CoreClass:
    """``multiplicity`` cores that do what ``core``, one of them, does (its program ids).  They are
    cores of ``device``; where only device 0 has classes, all devices do the same.
    """

    multiplicity: int
    core: Mapping[str, int]
    device: int = 0


def core_classes(
    function: Function, chip: Chip, streams: Streams, full: bool = False
) -> tuple[CoreClass, ...]:
    """The classes of a program's cores, in the order of their first cores; ``full`` makes every
    core a class of its own.
    """
    devices, device = devices_of(function), device_id(function)
    count = prod(evaluate(extent, {}) for extent in function.grid) // devices
    if count > chip.cores.base:
        raise IRError(
            f"a program for {count} cores on {chip.name}, which has {chip.cores.base:g}",
            rule="each core of the chip runs at most one instance of the program",
            fix="partition the work over fewer cores",
        )

    def device_of(core: Mapping[str, int]) -> int:
        return 0 if device is None else core[device.name]

    if full:
        return tuple(CoreClass(1, core, device_of(core)) for core in core_ids(function))
    if count * devices == 1 or not streams.varies:
        return (CoreClass(count, next(iter(core_ids(function)))),) if count else ()
    members: dict[tuple[object, ...], dict[int, list[dict[str, int]]]] = {}
    for core in core_ids(function):
        found = members.setdefault(streams.signature(core), {})
        found.setdefault(device_of(core), []).append(core)
    alike = all(
        len(by_device) == devices and len({len(cores) for cores in by_device.values()}) == 1
        for by_device in members.values()
    )
    return tuple(
        CoreClass(len(cores), cores[0], where)
        for by_device in members.values()
        for where, cores in by_device.items()
        if where == 0 or not alike
    )
