"""Several equal devices and the links between them.

A :class:`Group` arranges N devices on one of the chip's ``links`` as well as its topology allows,
and says which links a transfer between two of them occupies:

- ``host`` and ``switch``: the sender's links out (all of them together), and the receiver's in;
- ``ring``, ``torus-2d`` and ``torus-3d``: the devices are a grid, as near to a square or a cube as
  N allows.  Each axis of more than two closes to a ring, with a port each way; of two, it is one
  link.  A transfer goes along one axis after another, the shorter way; where both are as long, half
  of its bytes go either way.

Every arrangement looks the same from each device.  So a transfer is known by its *relation*: the
difference of the two devices' places, as a number from 0 (the device itself) to N - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod
from typing import TypeAlias

from dure.errors import TargetError
from dure.machine.chip import Chip, Link

#: A link resource: which way out of (or into) which device.
Way: TypeAlias = tuple[str, int]

_AXES = {"ring": 1, "torus-2d": 2, "torus-3d": 3}
_SWITCHED = ("host", "switch")


@dataclass(frozen=True)
class Group:
    """``count`` devices on the link ``name``; ``shape`` is the grid that they form (three axes,
    those that the topology lacks 1), in whose row-major order they are numbered.
    """

    chip: Chip
    count: int
    name: str
    shape: tuple[int, int, int]

    @property
    def link(self) -> Link:
        """The machine file's entry."""
        return self.chip.links[self.name]

    @property
    def capacity(self) -> float:
        """Bytes a second of each way."""
        link = self.link
        parts = 1 if link.topology in _SWITCHED else 2 * _AXES[link.topology]
        return self.chip.bytes_a_second(link.bandwidth) * link.count.base / parts

    @property
    def out_bandwidth(self) -> float:
        """Bytes a second that a device sends at most, over all of its ways out."""
        if self.link.topology in _SWITCHED:
            return self.capacity
        return self.capacity * sum(min(extent, 3) - 1 for extent in self.shape)

    def relation(self, device: int, other: int) -> int:
        """The difference of two devices' places."""
        own, theirs = self._place(device), self._place(other)
        return self._number(
            tuple((t - o) % n for o, t, n in zip(own, theirs, self.shape, strict=True))
        )

    def other(self, device: int, relation: int) -> int:
        """The device at this relation from one."""
        own, moved = self._place(device), self._place(relation)
        return self._number(
            tuple((o + m) % n for o, m, n in zip(own, moved, self.shape, strict=True))
        )

    def hops(self, relation: int) -> int:
        """How many links a transfer crosses one after another."""
        if self.link.topology in _SWITCHED:
            return int(relation != 0)
        steps = zip(self._place(relation), self.shape, strict=True)
        return sum(min(step, extent - step) for step, extent in steps)

    @property
    def farthest(self) -> int:
        """The hops between the two devices that are farthest apart."""
        return max(self.hops(relation) for relation in range(self.count))

    def route(self, device: int, relation: int) -> dict[Way, Fraction]:
        """The ways that a transfer takes, each with the part of its bytes."""
        if not relation:
            return {}
        if self.link.topology in _SWITCHED:
            return {("out", device): Fraction(1), ("in", self.other(device, relation)): Fraction(1)}
        found: dict[Way, Fraction] = {}
        paths = list(self._paths(device, self._place(relation)))
        for path in paths:
            for way in path:
                found[way] = found.get(way, Fraction()) + Fraction(1, len(paths))
        return found

    def _paths(self, device: int, moved: tuple[int, ...]) -> Iterator[list[Way]]:
        """The shortest ways, along one axis after another: two where both directions are."""
        turns = [
            [1] if 2 * step < extent or extent == 2 else [-1] if 2 * step > extent else [1, -1]
            for step, extent in zip(moved, self.shape, strict=True)
        ]
        for signs in product(*turns):
            at, path = list(self._place(device)), list[Way]()
            for axis, sign in enumerate(signs):
                extent = self.shape[axis]
                for _ in range(moved[axis] if sign > 0 else extent - moved[axis]):
                    path.append((f"{'+' if sign > 0 else '-'}{'xyz'[axis]}", self._number(at)))
                    at[axis] = (at[axis] + sign) % extent
            yield path

    def _place(self, device: int) -> tuple[int, ...]:
        _, rows, columns = self.shape
        return device // (rows * columns), device // columns % rows, device % columns

    def _number(self, place: tuple[int, ...] | list[int]) -> int:
        _, rows, columns = self.shape
        return (place[0] * rows + place[1]) * columns + place[2]


def group_of(chip: Chip, count: int) -> Group:
    """So many devices of a chip on the widest of its links (the first in the file of equal ones).

    Raises :class:`TargetError` for a chip without links, and for a topology that isn't known.
    """
    if not chip.links:
        raise TargetError(
            f"{count} devices of {chip.name}",
            rule="devices that work together are joined by a link of the machine file, and "
            f"{chip.name} has none",
            fix="--chips 1, or a machine file with [links.NAME]",
        )
    for name, link in chip.links.items():
        if link.topology not in _AXES and link.topology not in _SWITCHED:
            raise TargetError(
                f"the link '{name}' of {chip.name} has the topology '{link.topology[:40]}'",
                rule=f"a topology is one of {', '.join((*_SWITCHED, *_AXES))}",
                fix='topology = "switch"',
            )
    name = max(chip.links, key=lambda n: _width(chip, chip.links[n]))
    return Group(chip, count, name, _arranged(count, _AXES.get(chip.links[name].topology, 1)))


def _width(chip: Chip, link: Link) -> float:
    return chip.bytes_a_second(link.bandwidth) * link.count.base


def _arranged(count: int, axes: int) -> tuple[int, int, int]:
    """The grid of so many devices that is most like a cube."""
    found = [
        shape
        for shape in product(*(_divisors(count) if a >= 3 - axes else [1] for a in range(3)))
        if prod(shape) == count and tuple(sorted(shape)) == shape
    ]
    first, second, third = min(found, key=lambda shape: (max(shape), shape))
    return first, second, third


def _divisors(count: int) -> list[int]:
    return [d for d in range(1, count + 1) if count % d == 0]
