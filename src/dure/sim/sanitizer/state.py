"""The abstract state of a core, and what executing an instruction does to it.

Each queue completes its instructions in order, so what an event is ordered after is, for each
queue, a prefix of what that queue executes: a vector of counts.  A queue has such a vector, for
what its next instruction is ordered after (for a DMA queue: its issue, which its own transfers in
flight aren't ordered before), and a semaphore is a FIFO of the vectors of its signals.  Which
signals a wait takes doesn't depend on timing, because a semaphore has one queue that signals and
one that waits; so one execution, in any order, finds the one partial order of all of them.

For each cell of memory the state has its last write and the reads since.  An access that doesn't
know a conflicting one before it is a race.

Only the order of the counts matters, and only of those of accesses that some queue doesn't know
yet; :meth:`Work.freeze` numbers them anew, so that a loop's states repeat.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeAlias

from dure.sim.sanitizer.control import Decisions
from dure.sim.sanitizer.findings import Finding, NotProved, Report, Stop
from dure.sim.sanitizer.home import HomeRules
from dure.sim.sanitizer.model import Model
from dure.sim.sanitizer.pieces import SLOTS, Access, Instruction

Vector: TypeAlias = tuple[int, ...]
#: When an access was executed (the count of its queue) and what it is.
Record: TypeAlias = tuple[int, Access]

#: Instructions that may come to a blocked queue before it counts as blocked forever.
LAG = 2048

#: A semaphore that counts this high doesn't overflow for want of order between its two queues: no
#: core signals so often.
UNCOUNTED = 1 << 24

#: Nobody wrote a cell.
UNWRITTEN = -1


class State:
    """A frozen state: ``body`` is what :class:`Work` needs, ``decisions`` the unknowns' intervals.

    States are interned, so that equal ones are the same object.
    """

    __slots__ = ("body", "decisions", "number")

    def __init__(self, body: Any, decisions: Decisions, number: int) -> None:
        self.body = body
        self.decisions = decisions
        self.number = number


Found: TypeAlias = frozenset[State]


class States:
    """All states met so far."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.table: dict[Any, State] = {}

    def intern(self, body: Any, decisions: Decisions) -> State:
        """The one state that is this.  Raises :class:`NotProved` when there are too many."""
        found = self.table.get((body, decisions))
        if found is None:
            if len(self.table) >= self.limit:
                raise NotProved(f"more than {self.limit} states: they don't repeat")
            found = State(body, decisions, len(self.table))
            self.table[body, decisions] = found
        return found


class Work:
    """A state that instructions are executed on."""

    def __init__(
        self, model: Model, rules: HomeRules, report: Report, forgetful: bool = False
    ) -> None:
        self.model = model
        self.forgetful = forgetful
        self.rules = rules
        self.report = report
        self.executed = 0
        queues, cells = len(model.queues), model.cells.count
        self.compute = [q in model.compute_queues for q in range(queues)]
        self.counts = [0] * queues
        self.vectors = [[0] * queues for _ in range(queues)]
        #: By cell, the last write, and the reads since by queue.
        self.last: dict[int, Record] = {}
        self.reads: dict[int, dict[int, Record]] = {}
        self.source = [UNWRITTEN] * cells
        self.tokens: list[deque[tuple[Vector, int]]] = []
        zero = (0,) * queues
        for op in model.semaphores:
            initial = int(op.attr("initial"))
            self.tokens.append(deque([(zero, initial)] if initial else []))
        #: Executed waits that the signalling queue doesn't know: position and count.
        self.waits: list[list[tuple[int, int]]] = [[] for _ in model.semaphores]
        self.turns = dict.fromkeys(model.buffers, 0)
        self.pending: list[deque[Instruction]] = [deque() for _ in range(queues)]
        #: By transfer: when it last was executed, its queue, and the outermost loop that went on
        #: since (-1: none).
        self.homes: dict[int, tuple[int, int, int]] = {}
        self.maximum = [int(op.attr("maximum")) for op in model.semaphores]
        self.waiter = [next(iter(w), -1) for w in model.waiters]
        self.signaller = [next(iter(w), -1) for w in model.signallers]

    # --- freezing --------------------------------------------------------------------------------

    def freeze(self) -> Any:
        """The state as a hashable value, counts numbered anew."""
        self._turn_back()
        vectors, counts = self.vectors, self.counts
        queues = range(len(counts))
        # What all queues of a group know: nothing later can conflict with it.
        lows = [
            [min([vectors[r][q] for r in group], default=counts[q]) for q in queues]
            for group in self.model.groups
        ]
        points = self._points(lows)
        orders = [sorted(p) for p in points]
        ranks = [{n: r for r, n in enumerate(order)} for order in orders]

        def vector(v: Any) -> Vector:
            return tuple([bisect_left(order, n) for order, n in zip(orders, v, strict=True)])

        touchers, writers = self.model.touchers, self.model.writers
        last = [
            (cell, ranks[access.queue][n], access)
            for cell, (n, access) in sorted(self.last.items(), key=_first)
            if n >= lows[touchers[cell]][access.queue]
        ]
        reads: list[Any] = []
        for cell, others in sorted(self.reads.items(), key=_first):
            low = lows[writers[cell]]
            kept = [(q, ranks[q][n], a) for q, (n, a) in sorted(others.items()) if n >= low[q]]
            if kept:
                reads.append((cell, tuple(kept)))
        tokens: list[Any] = []
        for fifo in self.tokens:
            entries: list[tuple[Vector, int]] = []
            for v, count in fifo:
                ranked = vector(v)
                if entries and entries[-1][0] == ranked:
                    entries[-1] = ranked, entries[-1][1] + count
                else:
                    entries.append((ranked, count))
            tokens.append(tuple(entries))
        waits = [
            tuple((ranks[self.waiter[s]][n], count) for n, count in entries)
            for s, entries in enumerate(self.waits)
        ]
        homes = [
            (t, ranks[q][n], q, loop)
            for t, (n, q, loop) in sorted(self.homes.items())
            if n >= lows[self.model.movers][q]
        ]
        return (
            tuple(map(len, orders)),
            tuple(map(vector, vectors)),
            tuple(last),
            tuple(reads),
            tuple(self.source),
            tuple(tokens),
            tuple(waits),
            tuple(self.turns.values()),
            tuple(tuple(p) for p in self.pending),
            tuple(homes),
        )

    def _turn_back(self) -> None:
        """Name the slots of each ring from the one it has turned to."""
        rings = self.model.rings
        turned = rings.turned(self.turns)
        if not any(turned):
            return
        order, place = rings.order(turned)
        self.last = {
            place[cell]: (n, rings.access(access, turned))
            for cell, (n, access) in self.last.items()
        }
        self.reads = {
            place[cell]: {q: (n, rings.access(a, turned)) for q, (n, a) in others.items()}
            for cell, others in self.reads.items()
        }
        keys = {key: rings.key(key, turned) for key in set(self.source)}
        self.source = [keys[self.source[other]] for other in order]
        self.pending = [
            deque([rings.instruction(i, turned) for i in queue]) for queue in self.pending
        ]
        for turn, group in zip(turned, rings.groups, strict=True):
            if turn:
                self.turns.update(dict.fromkeys(group, 0))

    def _points(self, lows: list[list[int]]) -> list[set[int]]:
        """By queue, the counts that still tell states apart."""
        points: list[set[int]] = [set() for _ in self.counts]
        touchers, writers = self.model.touchers, self.model.writers
        for cell, (n, access) in self.last.items():
            if n >= lows[touchers[cell]][access.queue]:
                points[access.queue].add(n)
        for cell, others in self.reads.items():
            low = lows[writers[cell]]
            for q, (n, _) in others.items():
                if n >= low[q]:
                    points[q].add(n)
        for s, entries in enumerate(self.waits):
            for n, _ in entries:
                points[self.waiter[s]].add(n)
        for n, q, _ in self.homes.values():
            if n >= lows[self.model.movers][q]:
                points[q].add(n)
        return points

    def thaw(self, body: Any) -> None:
        """Take a frozen state up again."""
        (counts, vectors, last, reads, source, tokens, waits, turns, pending, homes) = body
        self.counts = list(counts)
        self.vectors = [list(v) for v in vectors]
        self.last = {cell: (n, access) for cell, n, access in last}
        self.reads = {cell: {q: (n, a) for q, n, a in entries} for cell, entries in reads}
        self.source = list(source)
        self.tokens = [deque(entries) for entries in tokens]
        self.waits = [list(entries) for entries in waits]
        self.turns = dict(zip(self.turns, turns, strict=True))
        self.pending = [deque(p) for p in pending]
        self.homes = {t: (n, q, loop) for t, n, q, loop in homes}

    # --- executing -------------------------------------------------------------------------------

    def run(self, instruction: Instruction) -> None:
        """An instruction comes to its queue: it is executed if nothing before it is blocked."""
        queue = self.pending[instruction.queue]
        if queue:
            queue.append(instruction)
            if len(queue) > LAG:
                self._stuck([instruction.queue])
                raise Stop
        elif not self._execute(instruction):
            queue.append(instruction)

    def _execute(self, instruction: Instruction) -> bool:
        """Execute an instruction, and all that it unblocks; whether it could be."""
        op, q = instruction.op, instruction.queue
        if op.name == "wait":
            return self._wait(instruction)
        self.executed += 1
        vector, at = self.vectors[q], self.counts[q]
        self.counts[q] = at + 1
        if instruction.compute:
            vector[q] = at
        if op.name == "signal":
            self._signal(instruction)
        else:
            for access in instruction.reads:
                self._read(access, at, vector)
            for access in instruction.writes:
                self._write(access, at, vector, instruction.compute)
            if instruction.home >= 0:
                self._home(instruction, at, vector)
        if instruction.compute:
            vector[q] = at + 1
        return True

    def _wait(self, instruction: Instruction) -> bool:
        s, q = instruction.semaphore, instruction.queue
        fifo, need = self.tokens[s], instruction.count
        if sum(count for _, count in fifo) < need:
            return False
        self.executed += 1
        own = self.vectors[q]
        while need:
            v, count = fifo.popleft()
            for other, n in enumerate(v):
                if n > own[other]:
                    own[other] = n
            if count > need:
                fifo.appendleft((v, count - need))
                need = 0
            else:
                need -= count
        if self.maximum[s] < UNCOUNTED:
            self.waits[s].append((self.counts[q], instruction.count))
        self.counts[q] += 1
        if instruction.compute:
            own[q] = self.counts[q]
        return True

    def _signal(self, instruction: Instruction) -> None:
        s, q = instruction.semaphore, instruction.queue
        vector = list(self.vectors[q])
        # All that the queue issued before has completed.
        vector[q] = self.counts[q]
        fifo = self.tokens[s]
        fifo.append((tuple(vector), instruction.count))
        if self.waits[s]:
            seen = vector[self.waiter[s]]
            self.waits[s] = [w for w in self.waits[s] if w[0] >= seen]
        most = sum(n for _, n in fifo) + sum(n for _, n in self.waits[s])
        maximum = self.maximum[s]
        if most > maximum:
            name = instruction.op.operands[0].name
            self.report.add(
                Finding(
                    "semaphore-overflow",
                    f"semaphore '{name}' may reach {most}, its maximum is {maximum}",
                    (),
                    instruction.op,
                    f"a wait on queue '{self.model.queues[q]}' before this signal for what takes "
                    f"from '{name}'",
                )
            )
            raise Stop
        waiter = self.waiter[s]
        if waiter >= 0 and self.pending[waiter]:
            self._drain(waiter)

    def _drain(self, q: int) -> None:
        queue = self.pending[q]
        while queue:
            # It must not stand in the queue while it is executed: it may unblock its own queue.
            instruction = queue.popleft()
            if not self._execute(instruction):
                queue.appendleft(instruction)
                return

    # --- memory ----------------------------------------------------------------------------------

    def _read(self, access: Access, at: int, vector: list[int]) -> None:
        q = access.queue
        for cell in access.cells:
            record = self.last.get(cell)
            if record is not None and vector[record[1].queue] <= record[0]:
                self._race(record[1], access)
            elif self.source[cell] == UNWRITTEN:
                self._unwritten(access)
            elif self.source[cell] != access.key:
                self._clobbered(access, cell)
            reads = self.reads.get(cell)
            if reads is None:
                reads = self.reads[cell] = {}
            reads[q] = (at, access)

    def _write(self, access: Access, at: int, vector: list[int], compute: bool) -> None:
        q, defines, key = access.queue, access.defines, access.key
        for cell in access.cells:
            record = self.last.get(cell)
            if record is not None and vector[record[1].queue] <= record[0]:
                self._race(record[1], access)
            reads = self.reads.pop(cell, None)
            if reads:
                for reader, (n, other) in reads.items():
                    # A compute reads everything before it writes.
                    own = compute and reader == q and n == at
                    if vector[reader] <= n and not own:
                        self._race(other, access)
            self.last[cell] = (at, access)
            if cell in defines:
                self.source[cell] = key

    def _home(self, instruction: Instruction, at: int, vector: list[int]) -> None:
        number, q = instruction.home, instruction.queue
        for other, (n, queue, loop) in self.homes.items():
            if vector[queue] <= n and self.rules.conflict(other, number, loop):
                self.report.add(self.rules.finding(other, number, self.model.queues))
        if self.rules.matters(number, -1):
            self.homes[number] = (at, q, -1)

    def next_iteration(self, loop: int) -> None:
        """A loop goes on: the home accesses inside it belong to an earlier iteration.

        A grid instance relies on nothing that another has left in a buffer: what is only written
        inside counts as unwritten from here on, where ``forgetful``.  That makes fewer states; it
        can add findings, but hide none.
        """
        if self.forgetful:
            for cell in self.model.fresh.get(loop, ()):
                self.source[cell] = UNWRITTEN
        for number in self.rules.inside(loop):
            entry = self.homes.get(number)
            if entry is not None and not self.rules.matters(number, loop):
                del self.homes[number]
                continue
            # Loops are numbered from the outermost: an outer one that went on says more.
            if entry is not None and not 0 <= entry[2] < loop:
                self.homes[number] = (entry[0], entry[1], loop)

    # --- findings --------------------------------------------------------------------------------

    def _race(self, first: Access, second: Access) -> None:
        a, b = first.place, second.place
        missing = (
            f"no path from the completion of {a.op.name} on queue '{a.queue}' to {b.op.name} on "
            f"queue '{b.queue}'; a signal on '{a.queue}' after the one and a wait on '{b.queue}' "
            "before the other would order them"
        )
        if (a.buffer, a.slot) != (b.buffer, b.slot):
            message = f"'{a.buffer}' and '{b.buffer}' are in use at once, and share bytes"
            self.report.add(Finding("overlap", message, (a, b), missing=missing))
        elif first.accumulates and not b.write and first.queue != second.queue:
            message = f"'{b.buffer}' is read before the dot that accumulates in it has completed"
            self.report.add(Finding("accumulator-early", message, (a, b), missing=missing))
        else:
            message = f"two accesses of '{b.buffer}' aren't ordered"
            self.report.add(Finding("race", message, (a, b), missing=missing))

    def _unwritten(self, access: Access) -> None:
        place = access.place
        message = f"'{place.buffer}' is read where nobody has written"
        missing = f"a write of all of '{place.buffer}' slot {place.slot} before this"
        self.report.add(Finding("uninitialised", message, (place,), missing=missing))

    def _clobbered(self, access: Access, cell: int) -> None:
        values = self.model.names
        number, slot = divmod(self.source[cell], SLOTS)
        place = access.place
        message = (
            f"'{place.buffer}' slot {place.slot} is read, but '{values[number].name}' slot {slot} "
            "was written there since"
        )
        self.report.add(Finding("overlap", message, (place,)))

    def check_progress(self) -> None:
        """Report a deadlock as soon as queues wait for one another, or for a signal of nobody.

        Raises :class:`Stop` then: what those queues do next has no meaning.
        """
        for q, queue in enumerate(self.pending):
            seen: list[int] = []
            while queue and q not in seen:
                seen.append(q)
                q = self.signaller[queue[0].semaphore]
                if q < 0:
                    break
                queue = self.pending[q]
            else:
                if not queue:
                    continue
            self._stuck(seen if q < 0 else seen[seen.index(q) :])
            raise Stop

    def _stuck(self, queues: Sequence[int]) -> None:
        parts: list[str] = []
        for q in queues:
            semaphore = self.pending[q][0].op.operands[0].name
            by = self.signaller[self.pending[q][0].semaphore]
            who = f"queue '{self.model.queues[by]}' signals" if by >= 0 else "nobody signals"
            parts.append(f"queue '{self.model.queues[q]}' waits for '{semaphore}', which {who}")
        first = self.pending[queues[0]][0]
        name = first.op.operands[0].name
        self.report.add(
            Finding(
                "deadlock",
                "; ".join(parts),
                (),
                first.op,
                f"a signal of '{name}' that doesn't come after this wait",
            )
        )

    def finish(self) -> None:
        """What must hold at the end of the program."""
        stuck = [q for q, queue in enumerate(self.pending) if queue]
        if stuck:
            self._stuck(stuck)
            return
        for s, op in enumerate(self.model.semaphores):
            value, initial = sum(n for _, n in self.tokens[s]), int(op.attr("initial"))
            if value != initial:
                message = f"semaphore '{op.result.name}' ends at {value}, it started at {initial}"
                missing = "as much waited for as is signalled"
                self.report.add(Finding("semaphore-leak", message, (), op, missing))


def _first(entry: tuple[int, Any]) -> int:
    return entry[0]
