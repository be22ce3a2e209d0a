"""Phases that are alike are replayed once.

Between two phases a replay often is at rest: nothing is in flight, every semaphore is as in the
beginning, and all queues wait to begin the next phase.  Then all that the phase does follows from
its instructions, whenever it begins and whatever was before: a phase whose instructions cost the
same as an earlier one's (an equal layer's, or another kind of layer's with the same products) takes
as long, and ends at rest as that one did.  Nothing is estimated.

Two phases are alike where each queue of each core class executes the same kinds of instructions
with the same costs, transfers with the same numbers, and waits and signals of semaphores that play
the same part: one is the other with its semaphores renamed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeAlias, cast

from dure.ir.core import Op
from dure.sim.items import BEGIN, COMPUTE, END, MOVE, SIGNAL, WAIT, Item

if TYPE_CHECKING:
    from dure.sim.replay import Queue, Replay

#: The instructions of a queue in a phase, from one position of a list to another.
_Span: TypeAlias = tuple[list[Item], int, int]
_Key: TypeAlias = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Rest:
    """A replay at rest: when the next phase begins, and what has happened until then."""

    start: int
    complete: int
    events: int
    busy: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A phase that was replayed: picoseconds from its begin to the next one's, and what happened;
    of each queue, by how much it is done before that.
    """

    time: int
    events: int
    busy: tuple[int, ...]
    times: tuple[int, ...]
    done: tuple[int, ...]


class Rests:
    """Watches a replay between phases, and passes over those like earlier ones."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.queues: list[Queue] = [q for queues in replay.queues for q in queues]
        #: Phases that were passed over.
        self.passed = 0
        self._known: dict[_Key, _Known] = {}
        self._keys: dict[tuple[object, ...], bytes] = {}
        self._lasts: dict[tuple[int, int], int] = {}
        self._codes: dict[object, int] = {}
        self._items: dict[int, int] = {}
        #: The phase that is being replayed, and where it began.
        self._begun: tuple[_Key, _Rest] | None = None

    def look(self, now: int) -> int:
        """All queues have gone as far as they can, and a phase is complete: pass over what follows
        if it is known.  Gives the time afterwards.
        """
        begun, self._begun = self._begun, None
        while self._at_rest():
            self.replay.convoys.part_all()
            rest = self._rest()
            if begun is not None and begun[1].complete + 1 == rest.complete:
                self._known[begun[0]] = self._since(begun[1], rest)
            begun = None
            spans = [self._span(queue) for queue in self.queues]
            if any(span is None for span in spans):
                break
            whole = [span for span in spans if span is not None]
            key = self._key(whole)
            known = self._known.get(key)
            if known is None:
                self._begun = (key, rest)
                break
            now = self._pass(known, rest, whole)
        return now

    def _at_rest(self) -> bool:
        """Whether nothing but the begin of the next phase, of all queues, is to come."""
        replay = self.replay
        phases = replay.phases
        waiting = sum([len(queue.cores) for queue in phases.waiting])
        if waiting != phases.count or phases.open or not phases.times:
            return False
        start, complete = phases.times[-1] + phases.latency, phases.complete
        if replay.starts or replay.flows.busy:
            return False
        for queue in phases.waiting:
            if queue.flying or queue.computing is not None or max(queue.time, queue.done) > start:
                return False
            if queue.begun != complete or queue.ended != complete:
                return False
        for semaphore in list(replay.awake):
            semaphore.take_in(start)
            if semaphore.rests:
                replay.awake.remove(semaphore)
        return not replay.awake

    def _rest(self) -> _Rest:
        phases = self.replay.phases
        busy = tuple([queue.busy for queue in self.queues])
        return _Rest(phases.times[-1] + phases.latency, phases.complete, self.replay.events, busy)

    def _since(self, before: _Rest, rest: _Rest) -> _Known:
        return _Known(
            rest.start - before.start,
            rest.events - before.events,
            tuple([a - b for a, b in zip(rest.busy, before.busy, strict=True)]),
            tuple([rest.start - queue.time for queue in self.queues]),
            tuple([rest.start - queue.done for queue in self.queues]),
        )

    def _pass(self, known: _Known, rest: _Rest, spans: Sequence[_Span]) -> int:
        """Be at rest after a phase that is known; gives the time of its end."""
        replay, start = self.replay, rest.start + known.time
        replay.events += known.events
        entries = zip(self.queues, spans, known.busy, known.times, known.done, strict=True)
        for queue, (_, first, last), busy, time, done in entries:
            queue.busy += busy
            queue.time, queue.done = start - time, start - done
            queue.begun += 1
            queue.ended += 1
            queue.go_to(queue.position + last - first)
        end = start - replay.phases.latency
        replay.phases.completed(end, _ended(spans[0]))
        replay.flows.now = end
        self.passed += 1
        return end

    def _span(self, queue: Queue) -> _Span | None:
        """What a queue executes from the begin of a phase to that of the next, or to its end; None
        where its stream isn't laid out so, or is at its end.
        """
        items, first = queue.items, queue.at
        if not queue.left:
            return None
        last = self._last(items, first)
        if items[first][0] != BEGIN or items[last - 1][0] != END:
            return None
        after = queue.position + last - first
        if last == len(items) and after < len(queue.stream):
            following, place = queue.stream.at(after)
            if following[place][0] != BEGIN:
                return None
        return items, first, last

    def _last(self, items: list[Item], first: int) -> int:
        """Where the next phase begins in a list, or its end."""
        place = id(items), first
        last = self._lasts.get(place)
        if last is None:
            begins = (i for i in range(first + 1, len(items)) if items[i][0] == BEGIN)
            last = self._lasts[place] = next(begins, len(items))
        return last

    def _key(self, spans: Sequence[_Span]) -> _Key:
        """Equal for phases that are alike."""
        found: list[bytes] = []
        place = 0
        for queues in self.replay.queues:
            own = spans[place : place + len(queues)]
            place += len(queues)
            where = tuple([(id(items), first, last) for items, first, last in own])
            digest = self._keys.get(where)
            if digest is None:
                digest = self._keys[where] = self._digest(own)
            found.append(digest)
        return tuple(found)

    def _digest(self, spans: Sequence[_Span]) -> bytes:
        initial = [semaphore.initial for semaphore in self.replay.semaphores[0]]
        order: dict[int, int] = {}
        digest = blake2b(digest_size=16)
        for items, first, last in spans:
            span = items[first:last]
            # Each instruction once, in the order in which they come first.
            codes: dict[int, int] = {}
            for key, item in dict(zip(map(id, span), span, strict=True)).items():
                kind, _, more = item
                if kind in (WAIT, SIGNAL):
                    number, count = cast("tuple[int, int]", more)
                    part = order.setdefault(number, len(order))
                    codes[key] = self._number((kind, part, initial[number], count))
                else:
                    codes[key] = self._code(item)
            digest.update(len(span).to_bytes(8, "little"))
            digest.update(array("q", map(codes.__getitem__, map(id, span))).tobytes())
        return digest.digest()

    def _code(self, item: Item) -> int:
        """A number for what an instruction costs."""
        code = self._items.get(id(item))
        if code is None:
            kind, _, more = item
            assert kind in (COMPUTE, MOVE, BEGIN, END)
            cost = (kind, more.ps, more.memories) if kind == COMPUTE else (kind, more)
            code = self._items[id(item)] = self._number(cost)
        return code

    def _number(self, what: object) -> int:
        return self._codes.setdefault(what, len(self._codes))


def _ended(span: _Span) -> Op:
    """The phase that a span ends."""
    items, _, last = span
    return items[last - 1][1]
