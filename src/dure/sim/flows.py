"""Transfers that share bandwidth: a max-min fair fluid between events, in whole numbers.

**The rounding law.**  All of the simulator's arithmetic on time is exact on integers; where a
number of the chip becomes one, and where a quotient is taken, this is the law:

1. Time is in picoseconds.  A duration is rounded to a thousandth of a picosecond, then up.
2. Bytes count in units of 2^-32 byte.  A bandwidth is in units a picosecond, rounded down.
3. A transfer's own limit is its DMA engine's ``stream`` (where there is none, ``bandwidth``) times
   the efficiency law's value, as a bandwidth, and at least 1 unit a picosecond.
4. Of each resource on its way a transfer takes its own rate; of the home memory that times
   ``granules * share / bytes``, in units of 2^-20, rounded up.
5. The rates between two events: all transfers rise together to a level, which is the least of their
   own limits and, over the resources, of (what is left) // (the weights of the transfers still
   rising).  Those that are at their limit, or use a resource whose quotient is the level, stay
   there, and take their part of each resource; the others go on rising.  A rate is at least 1.
6. A transfer ends at the first picosecond at which its units have flowed.
7. A compute advances 2^20 units in each picosecond of its cost.  While bytes of its core's DMAs
   flow into or out of a memory that it reads or writes and that has a ``contention``, it advances
   less by that times 2^20, rounded down; of several such memories, by the largest.  A transfer over
   links counts as the part that their rate is of its own limit, in 2^-20, rounded down, and all
   together count as one at most.  It ends at the first picosecond at which its units are done.

Rates change only when a transfer starts or ends.  Transfers of equal limits and ways have equal
rates: they form a :class:`Group`, whose ``service`` is what each of them has received since the
group was last empty, so an event costs time by the groups, not by the transfers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from heapq import heappop, heappush
from typing import Generic, TypeAlias, TypeVar

#: Units of a byte, and of a weight.
UNIT = 1 << 32
WEIGHT = 1 << 20

_Token = TypeVar("_Token")


def units_a_picosecond(bytes_a_second: float) -> int:
    """A bandwidth by the rounding law."""
    return max(1, int(Fraction(bytes_a_second) * UNIT / 10**12))


def weight_of(part: Fraction) -> int:
    """What a unit of a transfer takes of a resource, by the rounding law."""
    return -int(-part * WEIGHT // 1)


class Group(Generic[_Token]):
    """Transfers with the same limit and the same uses of resources: (resource, weight) each."""

    __slots__ = ("_together", "ends", "limit", "number", "rate", "service", "uses")

    def __init__(self, number: int, limit: int, uses: tuple[tuple[int, int], ...]) -> None:
        self.number = number
        self.limit = limit
        self.uses = uses
        self.service = 0
        self.rate = 0
        # (the service at which it ends, order of starting, what it is)
        self.ends: list[tuple[int, int, _Token]] = []
        self._together: dict[int, list[tuple[int, int]]] = {}

    def together(self) -> list[tuple[int, int]]:
        """What all its transfers use."""
        count = len(self.ends)
        found = self._together.get(count)
        if found is None:
            found = self._together[count] = [(r, w * count) for r, w in self.uses]
        return found


class Flows(Generic[_Token]):
    """The transfers that are under way.  ``capacities``: units a picosecond of each resource."""

    def __init__(self, capacities: Sequence[int]) -> None:
        self.capacities = [c * WEIGHT for c in capacities]
        self.groups: list[Group[_Token]] = []
        self.now = 0
        self._active: list[Group[_Token]] = []
        self._started = 0
        self._changed = False
        self._known: dict[tuple[tuple[int, int], ...], list[int]] = {}
        #: When rates changed, and the part of each resource that is used from then on; None: not
        #: kept.
        self.log: list[tuple[int, dict[int, int]]] | None = None

    def group(self, limit: int, uses: tuple[tuple[int, int], ...]) -> Group[_Token]:
        """A new group."""
        made = Group[_Token](len(self.groups), limit, uses)
        self.groups.append(made)
        return made

    def start(self, group: Group[_Token], units: int, token: _Token) -> int:
        """A transfer starts now; gives the group's service at which it will end."""
        if not group.ends:
            group.service = 0
            self._active.append(group)
        self._started += 1
        finish = group.service + units
        heappush(group.ends, (finish, self._started, token))
        self._changed = True
        return finish

    def next_end(self) -> int | None:
        """When the next transfer ends, if nothing starts before."""
        if self._changed:
            self._settle()
        soonest = None
        for group in self._active:
            wait = (group.ends[0][0] - group.service + group.rate - 1) // group.rate
            if soonest is None or wait < soonest:
                soonest = wait
        return None if soonest is None else self.now + soonest

    def advance(self, time: int) -> list[_Token]:
        """Go on to ``time``, no later than the next end; gives the transfers that end then."""
        if self._changed:
            self._settle()
        passed, self.now = time - self.now, time
        ended: list[_Token] = []
        for group in self._active:
            group.service += group.rate * passed
            ends = group.ends
            while ends and ends[0][0] <= group.service:
                ended.append(heappop(ends)[2])
        if ended:
            self._changed = True
            self._active = [group for group in self._active if group.ends]
        return ended

    def _settle(self) -> None:
        self._changed = False
        active = self._active
        key = tuple([(group.number, len(group.ends)) for group in active])
        rates = self._known.get(key)
        if rates is None:
            rates = self._known[key] = self._fair(active)
        for group, rate in zip(active, rates, strict=True):
            group.rate = rate
        if self.log is not None:
            self.log.append((self.now, self._using()))

    def _using(self) -> dict[int, int]:
        """What is used of each resource, in the units of ``capacities``."""
        found: dict[int, int] = {}
        for group in self._active:
            for resource, weight in group.together():
                found[resource] = found.get(resource, 0) + weight * group.rate
        return found

    def _fair(self, active: Sequence[Group[_Token]]) -> list[int]:
        """The max-min fair rates, by the rounding law."""
        limits, left, load, uses = self._contested(active)
        if len(left) <= 1:
            return _filled(limits, left, load, uses)
        rates = [0] * len(active)
        rising = list(range(len(active)))
        while rising:
            shares = {r: left[r] // total for r, total in load.items() if total}
            level = max(1, min([limits[place] for place in rising] + list(shares.values())))
            full = {r for r, share in shares.items() if share <= level}
            still: list[int] = []
            for place in rising:
                if limits[place] > level and not any(r in full for r, _ in uses[place]):
                    still.append(place)
                    continue
                rates[place] = level
                for resource, weight in uses[place]:
                    left[resource] -= weight * level
                    load[resource] -= weight
            rising = still
        return rates

    def _contested(self, active: Sequence[Group[_Token]]) -> _Contest:
        """The groups' limits, what is left of each resource, its load, and the groups' uses of it
        (all their transfers together).

        A resource that one group alone uses is a limit of that group: its quotient stays as it is
        until the group stays there.  A resource that could carry all at their own limits, and 1
        unit more each, has a quotient above every level, and is left out.
        """
        capacities = self.capacities
        limits = [group.limit for group in active]
        uses = [group.together() for group in active]
        users: dict[int, list[tuple[int, int]]] = {}
        for place, parts in enumerate(uses):
            for resource, weight in parts:
                users.setdefault(resource, []).append((place, weight))
        for resource, parts in users.items():
            if len(parts) == 1:
                ((place, weight),) = parts
                limits[place] = max(1, min(limits[place], capacities[resource] // weight))
        load: dict[int, int] = {}
        for resource, parts in users.items():
            if len(parts) > 1:
                most = sum([weight * (limits[place] + 1) for place, weight in parts])
                if most > capacities[resource]:
                    load[resource] = sum([weight for _, weight in parts])
        left = {resource: capacities[resource] for resource in load}
        return limits, left, load, [[u for u in parts if u[0] in left] for parts in uses]


_Contest: TypeAlias = tuple[list[int], dict[int, int], dict[int, int], list[list[tuple[int, int]]]]


def _filled(
    limits: Sequence[int],
    left: Mapping[int, int],
    load: Mapping[int, int],
    uses: Sequence[Sequence[tuple[int, int]]],
) -> list[int]:
    """The rates where at most one resource is contested: those below the level at which it is full
    are at their limits.
    """
    rates = list(limits)
    rest, total = sum(left.values()), sum(load.values())
    by_limit = sorted([(limits[place], place) for place, parts in enumerate(uses) if parts])
    for limit, place in by_limit:
        ((_, weight),) = uses[place]
        rates[place] = rate = max(1, min(limit, rest // total))
        if rate < limit:
            for _, other in by_limit:
                if limits[other] >= limit:
                    rates[other] = rate
            break
        rest -= weight * rate
        total -= weight
    return rates
