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
group was last empty, so an event costs time by the groups, not by the transfers.  While many groups
all have one rate, what they receive is counted once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from heapq import heappop, heappush
from itertools import count
from operator import attrgetter, itemgetter
from typing import Generic, TypeVar

#: Units of a byte, and of a weight.
UNIT = 1 << 32
WEIGHT = 1 << 20

#: Groups at once, at most, whose rates are remembered: more seldom are what they were before.
_REMEMBERED = 16

_Token = TypeVar("_Token")


def units_a_picosecond(bytes_a_second: float) -> int:
    """A bandwidth by the rounding law."""
    return max(1, int(Fraction(bytes_a_second) * UNIT / 10**12))


def weight_of(part: Fraction) -> int:
    """What a unit of a transfer takes of a resource, by the rounding law."""
    return -int(-part * WEIGHT // 1)


class Group(Generic[_Token]):
    """Transfers with the same limit and the same uses of resources: (resource, weight) each."""

    __slots__ = (
        "_together",
        "begun",
        "ends",
        "first",
        "held",
        "limit",
        "most",
        "number",
        "rate",
        "service",
        "uses",
    )

    def __init__(self, number: int, limit: int, uses: tuple[tuple[int, int], ...]) -> None:
        self.number = number
        #: With the number of its transfers added, what tells it from others and from itself.
        self.first = number << 32
        self.limit = limit
        together: dict[int, int] = {}
        for resource, weight in uses:
            together[resource] = together.get(resource, 0) + weight
        self.uses = tuple(together.items())
        self.service = 0
        self.rate = 0
        #: When it last was empty and a transfer began, in the order of starting.
        self.begun = 0
        # (the service at which it ends, order of starting, what it is)
        self.ends: list[tuple[int, int, _Token]] = []
        #: What all its transfers used when rates were last found, and their limit then: its own, or
        #: what resources allow that it alone uses.
        self.held: list[tuple[int, int]] = []
        self.most = limit
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
        #: From now to the next end; -1: not known.
        self._wait = -1
        #: Rates by what is under way.
        self._known: dict[tuple[int, ...], list[int]] = {}
        #: Groups whose transfers are others than when rates were last found.
        self._other: dict[Group[_Token], None] = {}
        #: By resource: the weights of all groups.
        self._loads = [0 for _ in capacities]
        #: By resource: what each group would take at its limit and 1 unit more, and all of them.
        self._users: list[dict[Group[_Token], int]] = [{} for _ in capacities]
        self._wanted = [0 for _ in capacities]
        #: Resources that can't carry that.
        self._contested: set[int] = set()
        #: Many groups' common rate (0: each has its own), what all have received at it beside their
        #: ``service``, and when each of them ends something in terms of that.
        self._level = 0
        self._risen = 0
        self._next: list[tuple[int, int, Group[_Token]]] = []
        self._order = count()
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
        self._started += 1
        if not group.ends:
            group.service = -self._risen
            group.begun = self._started
            self._active.append(group)
        finish = group.service + self._risen + units
        heappush(group.ends, (finish, self._started, token))
        self._other[group] = None
        self._changed = True
        return finish

    def take(self, group: Group[_Token]) -> list[tuple[int, _Token]]:
        """All of a group's transfers, which are under way no more: what is left of each, in the
        order of their ends.
        """
        service = self.service(group)
        found = [(finish - service, token) for finish, _, token in sorted(group.ends, key=_by_end)]
        group.ends.clear()
        self._active.remove(group)
        self._other[group] = None
        self._changed = True
        return found

    @property
    def busy(self) -> bool:
        """Whether any transfer is under way."""
        return bool(self._active)

    def service(self, group: Group[_Token]) -> int:
        """What each of a group's transfers has received since it was empty."""
        return group.service + self._risen

    def rate(self, group: Group[_Token]) -> int:
        """What each of a group's transfers receives a picosecond, since rates were last found."""
        return self._level or group.rate

    def next_end(self) -> int | None:
        """When the next transfer ends, if nothing starts before."""
        if self._changed:
            self._settle()
        if not self._active:
            return None
        if self._wait < 0:
            self._wait = self._soonest()
        return self.now + self._wait

    def _soonest(self) -> int:
        """How long it is to the next end."""
        if self._level:
            return -((self._risen - self._first()) // self._level)
        return min([-((g.service - g.ends[0][0]) // g.rate) for g in self._active])

    def advance(self, time: int) -> list[_Token]:
        """Go on to ``time``, no later than the next end; gives the transfers that end then."""
        if self._changed:
            self._settle()
        passed, self.now, self._wait = time - self.now, time, -1
        if self._level:
            ended = self._risen_by(passed)
        else:
            ended: list[Group[_Token]] = []
            for group in self._active:
                group.service = service = group.service + group.rate * passed
                if group.ends[0][0] <= service:
                    ended.append(group)
        return self._ended(ended) if ended else []

    def _risen_by(self, passed: int) -> list[Group[_Token]]:
        """Let time pass for groups of one rate; gives those of which something ends."""
        self._risen += self._level * passed
        found: dict[Group[_Token], None] = {}
        while self._next and self._next[0][0] <= self._risen:
            end, _, group = heappop(self._next)
            if group.ends and group.ends[0][0] - group.service == end:
                found[group] = None
        return sorted(found, key=_by_begun)

    def _ended(self, groups: Iterable[Group[_Token]]) -> list[_Token]:
        """The transfers of these groups that end now."""
        found: list[_Token] = []
        empty = False
        for group in groups:
            self._other[group] = None
            ends, service = group.ends, self.service(group)
            while ends and ends[0][0] <= service:
                found.append(heappop(ends)[2])
            empty |= not ends
        if empty:
            self._active = [group for group in self._active if group.ends]
        self._changed = True
        return found

    def _first(self) -> int:
        """When the first transfer ends, in terms of what all receive; there is one."""
        entries = self._next
        while True:
            end, _, group = entries[0]
            if group.ends and group.ends[0][0] - group.service == end:
                return end
            heappop(entries)

    def _settle(self) -> None:
        self._changed, self._wait = False, -1
        active = self._active
        if len(active) > _REMEMBERED:
            others = list(self._other)
            self._renew()
            level = self._common()
            if level:
                self._rise(level, others)
            else:
                if self._level:
                    self._apart()
                self._set(self._rates(active))
        else:
            if self._level:
                self._apart()
            key = tuple([group.first + len(group.ends) for group in active])
            rates = self._known.get(key)
            if rates is None:
                self._renew()
                rates = self._known[key] = self._rates(active)
            self._set(rates)
        if self.log is not None:
            self.log.append((self.now, self._using()))

    def _set(self, rates: Sequence[int]) -> None:
        """Each group has its own rate, and with that its next end."""
        soonest = -1
        for group, rate in zip(self._active, rates, strict=True):
            group.rate = rate
            wait = -((group.service - group.ends[0][0]) // rate)
            if wait < soonest or soonest < 0:
                soonest = wait
        self._wait = soonest

    def _rise(self, level: int, others: Sequence[Group[_Token]]) -> None:
        """All groups have one rate from now on; ``others`` are those that changed."""
        entered = others if self._level else self._active
        for group in entered:
            if group.ends:
                end = group.ends[0][0] - group.service
                heappush(self._next, (end, next(self._order), group))
        self._level = level

    def _apart(self) -> None:
        """Groups that had one rate have their own from now on."""
        for group in self._active:
            group.service += self._risen
        self._level = self._risen = 0
        self._next.clear()

    def _using(self) -> dict[int, int]:
        """What is used of each resource, in the units of ``capacities``."""
        found: dict[int, int] = {}
        for group in self._active:
            for resource, weight in group.together():
                found[resource] = found.get(resource, 0) + weight * self.rate(group)
        return found

    def _rates(self, active: Sequence[Group[_Token]]) -> list[int]:
        """The max-min fair rates, by the rounding law.

        What changed since the last time is all that is looked at anew.  A resource that one group
        alone uses is a limit of that group: its quotient stays as it is until the group stays
        there.  A resource that could carry all at their own limits, and 1 unit more each, has a
        quotient above every level, and is left out.
        """
        contested = self._contested
        if not contested:
            return [group.most for group in active]
        rates = self._filled(*contested) if len(contested) == 1 else self._levels()
        return [rates.get(group, group.most) for group in active]

    def _renew(self) -> None:
        """Take in what changed: users of resources, groups' limits, and what is contested."""
        users, wanted, loads = self._users, self._wanted, self._loads
        capacities = self.capacities
        touched = {r for g in self._other for r, _ in (*g.held, *(g.together() if g.ends else ()))}
        affected = dict(self._other)
        # Who was alone with a resource, or is.
        affected.update(self._alone(touched))
        for group in self._other:
            for resource, weight in group.held:
                wanted[resource] -= users[resource].pop(group)
                loads[resource] -= weight
            group.held = group.together() if group.ends else []
        for group in self._other:
            for resource, weight in group.held:
                users[resource][group] = 0
                loads[resource] += weight
        self._other = {}
        affected.update(self._alone(touched))
        for group in affected:
            most = group.limit
            for resource, weight in group.held:
                if len(users[resource]) == 1:
                    most = max(1, min(most, capacities[resource] // weight))
            group.most = most
            for resource, weight in group.held:
                taken = weight * (most + 1)
                wanted[resource] += taken - users[resource][group]
                users[resource][group] = taken
                touched.add(resource)
        for resource in touched:
            if len(users[resource]) > 1 and wanted[resource] > capacities[resource]:
                self._contested.add(resource)
            else:
                self._contested.discard(resource)

    def _alone(self, resources: Iterable[int]) -> dict[Group[_Token], None]:
        """The groups that are the only ones to use one of these resources."""
        users = self._users
        return {g: None for r in resources if len(users[r]) == 1 for g in users[r]}

    def _filled(self, resource: int) -> dict[Group[_Token], int]:
        """The rates of a resource's users where it alone is contested: those below the level at
        which it is full are at their limits.
        """
        users = sorted(self._users[resource], key=_by_most)
        weights = [self._users[resource][group] // (group.most + 1) for group in users]
        rates: dict[Group[_Token], int] = {}
        rest, total = self.capacities[resource], sum(weights)
        for place, (group, weight) in enumerate(zip(users, weights, strict=True)):
            share = max(1, rest // total)
            if share <= group.most:
                rates.update(dict.fromkeys(users[place:], share))
                break
            rates[group] = group.most
            rest -= weight * group.most
            total -= weight
        return rates

    def _common(self) -> int:
        """The rate of all groups where a resource that they all use is full before anything else
        is, and before one of them is at its limit; else 0.
        """
        contested, users, loads = self._contested, self._users, self._loads
        capacities, count = self.capacities, len(self._active)
        wide = [r for r in contested if len(users[r]) == count]
        if not wide:
            return 0
        level = max(1, min([capacities[r] // loads[r] for r in wide]))
        if min(map(_by_most, self._active)) < level:
            return 0
        return level if all(capacities[r] >= level * loads[r] for r in contested) else 0

    def _levels(self) -> dict[Group[_Token], int]:
        """The rates of all users of contested resources, which rise together."""
        contested = self._contested
        left = {resource: self.capacities[resource] for resource in contested}
        load = dict.fromkeys(contested, 0)
        rising: dict[Group[_Token], list[tuple[int, int]]] = {}
        for resource in contested:
            for group in self._users[resource]:
                if group not in rising:
                    rising[group] = [use for use in group.held if use[0] in contested]
        for uses in rising.values():
            for resource, weight in uses:
                load[resource] += weight
        rates: dict[Group[_Token], int] = {}
        while rising:
            shares = {r: left[r] // total for r, total in load.items() if total}
            level = max(1, min([*(group.most for group in rising), *shares.values()]))
            full = {r for r, share in shares.items() if share <= level}
            still: dict[Group[_Token], list[tuple[int, int]]] = {}
            for group, uses in rising.items():
                if group.most > level and not any(r in full for r, _ in uses):
                    still[group] = uses
                    continue
                rates[group] = level
                for resource, weight in uses:
                    left[resource] -= weight * level
                    load[resource] -= weight
            rising = still
        return rates


_by_most = attrgetter("most")
_by_end = itemgetter(0, 1)
_by_begun = attrgetter("begun")
