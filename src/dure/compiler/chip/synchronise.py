"""Semaphores: what one queue must know of another, and no more.

In each block the items that touch a buffer are taken in text order.  Where an item of one queue
conflicts with an earlier one of another, the earlier queue signals after its item and the later one
waits before its own, both in this block, so that every execution of the block balances.  A block
that repeats is looked at as two turns in a row: dependences from one turn to the next (for a ring
of slots, to the turn that reuses the slot) become semaphores that start with as many credits.

Dependences of one block between the same two queues share a semaphore: none of them crosses
another, so that the n-th wait is for the n-th signal.  A dependence is left out where program order
and the semaphores already there imply it.

Where an engine waits for another in front of a loop, in which it first does something else, the
wait stands in the loop, in front of what needs it.  There it is executed at every turn: the other
engine signals at the start of each turn for the next one, and behind the loop for the last signal
there is a last wait, so that each execution of the loop balances, whether it has turns or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dure.compiler.chip.tree import (
    Block,
    Branch,
    Buffer,
    Item,
    Loop,
    Rotate,
    Semaphore,
    Step,
    Structure,
    Sync,
    Tree,
    blocks,
    inner_blocks,
    steps,
)
from dure.errors import KernelError
from dure.ir.core import Value
from dure.machine.chip import Chip

#: What conflicts: a buffer's bytes, or a tensor that the program both reads and writes.
Storage: TypeAlias = "Buffer | Value"


@dataclass(slots=True)
class Touch:
    """How the queues touch one storage inside an item."""

    reads: set[str] = field(default_factory=set[str])
    writes: set[str] = field(default_factory=set[str])


@dataclass(frozen=True, slots=True)
class Edge:
    """A dependence: ``before`` after its item of this turn, ``after`` in front of its item of the
    turn that is ``distance`` later.
    """

    before: str
    source: int
    after: str
    target: int
    distance: int
    why: str
    #: The branch that loads what stays over a loop: the dependence is of its turns only.
    rare: Branch | None = None


def synchronise(tree: Tree, chip: Chip, inout: frozenset[Value]) -> None:
    """Add rotations, semaphores, waits and signals to the tree.

    ``inout`` are the tensors that the program both loads and stores.
    """
    work = _Synchroniser(chip.transfer_queues, inout)
    for block in list(blocks(tree.body)):
        tree.semaphores += work.block(block)
    tree.semaphores = list(dict.fromkeys([*_declared(tree.body), *tree.semaphores]))
    more = len(tree.semaphores) - round(chip.sync.semaphores.base)
    if more > 0:
        share_between_blocks(tree, work.plain, more)


def check_semaphores(name: str, tree: Tree, chip: Chip) -> None:
    """Raise :class:`KernelError` for a program with more semaphores than a core has."""
    found, most = len(tree.semaphores), round(chip.sync.semaphores.base)
    if found > most:
        raise KernelError(
            f"'{name}' with these tiles needs {found} semaphores; a core of {chip.name} has {most}",
            rule="each two queues that wait for one another in a block take a semaphore each way",
            fix="give sizes with fewer loops around what is loaded, or split the kernel",
        )


def share_between_blocks(tree: Tree, plain: Sequence[tuple[Block, Semaphore]], most: int) -> None:
    """Let up to ``most`` semaphores be one with that of a block before.

    Both queues go through blocks in the order of the text, and each block leaves a counter as it
    was.  So blocks that don't lie in one another can count with the same semaphore: the first waits
    of the later one then also wait for the last signals of the one before.
    """
    shared: dict[tuple[str, str, int], list[tuple[Semaphore, list[Block]]]] = {}
    instead: dict[Semaphore, Semaphore] = {}
    for block, semaphore in plain:
        known = shared.setdefault((semaphore.signals, semaphore.waits, semaphore.initial), [])
        apart = (e for e in known if not any(_related(block, other) for other in e[1]))
        found = next(apart, None) if len(instead) < most else None
        if found is None:
            known.append((semaphore, [block]))
        else:
            found[1].append(block)
            instead[semaphore] = found[0]
    for block in blocks(tree.body):
        for item in block.items:
            if isinstance(item, Sync):
                item.semaphore = instead.get(item.semaphore, item.semaphore)
    tree.semaphores = [s for s in tree.semaphores if s not in instead]


def _related(one: Block, other: Block) -> bool:
    """Whether one of two blocks lies in the other."""
    return _encloses(one, other) or _encloses(other, one)


def _declared(body: Block) -> Iterator[Semaphore]:
    """Semaphores that the tree already waits on."""
    for block in blocks(body):
        for item in block.items:
            if isinstance(item, Sync) and item.kind == "wait":
                yield item.semaphore


class _Synchroniser:
    def __init__(self, asynchronous: frozenset[str], inout: frozenset[Value]) -> None:
        self.asynchronous = asynchronous
        self.inout = inout
        self.roots: dict[Value, Value] = {}
        #: Semaphores that every run of their block leaves as they were.
        self.plain: list[tuple[Block, Semaphore]] = []
        #: Waits and signals after the items of the block at hand.
        self.put_off: dict[int, list[Item]] = {}

    # --- what an item touches --------------------------------------------------------------------

    def touches(self, item: Item) -> dict[Storage, Touch]:
        """What is touched inside an item, by whom."""
        found: dict[Storage, Touch] = {}
        if isinstance(item, Structure):
            if item.op.name == "view":
                source = item.op.operands[0]
                self.roots[item.op.result] = self.roots.get(source, source)
            return found
        inside = [item] if isinstance(item, Step) else []
        for block in inner_blocks(item):
            inside += steps(block)
        for step in inside:
            for buffer in step.reads:
                found.setdefault(buffer.root, Touch()).reads.add(step.queue)
            for buffer in step.writes:
                found.setdefault(buffer.root, Touch()).writes.add(step.queue)
            if step.tensor is not None:
                root = self.roots.get(step.tensor, step.tensor)
                if root in self.inout:
                    touch = found.setdefault(root, Touch())
                    (touch.reads if step.kind == "dma_load" else touch.writes).add(step.queue)
        return found

    # --- a block ---------------------------------------------------------------------------------

    def block(self, block: Block) -> list[Semaphore]:
        """Rotate and synchronise the items of one block (not those inside its items)."""
        touched = [self.touches(item) for item in block.items]
        edges = self.edges(block, touched)
        kept = self._needed(edges, block.repeated)
        made: list[Semaphore] = []
        left_out = set(edges).difference(kept)
        for edge in list(kept):
            item = self._first_need(block, edge, left_out, kept)
            if item is not None:
                kept.remove(edge)
                made.append(self._put_off(block, edge, item))
        return made + self._insert(block, kept, touched)

    def edges(self, block: Block, touched: list[dict[Storage, Touch]]) -> list[Edge]:
        """Every dependence between items of this block, on this turn and on later ones."""
        storages: dict[Storage, None] = {}
        for entry in touched:
            storages.update(dict.fromkeys(entry))
        found: dict[Edge, None] = {}
        for storage in storages:
            if isinstance(storage, Buffer) and not _encloses(storage.block, block):
                continue  # it turns further inside, where its ring is all that it needs
            own = isinstance(storage, Buffer) and storage.block is block
            distance = storage.stages if own and isinstance(storage, Buffer) else 1
            turns = 2 if _comes_again(block, storage) else 1
            places = [(n, e[storage]) for n, e in enumerate(touched) if storage in e]
            found.update(dict.fromkeys(self._of(storage, places, turns, distance)))
        return [replace(edge, rare=_rare(block, edge)) for edge in found]

    def _of(
        self, storage: Storage, places: list[tuple[int, Touch]], turns: int, distance: int
    ) -> Iterator[Edge]:
        name = storage.name
        written: dict[str, tuple[int, int]] = {}
        read: dict[str, tuple[int, int]] = {}
        for turn in range(turns):
            for place, touch in places:
                for queue in sorted(touch.reads | touch.writes):
                    earlier = dict(written)
                    if queue in touch.writes:
                        for other, at in read.items():
                            earlier[other] = max(at, earlier.get(other, at))
                    for other, (from_turn, source) in earlier.items():
                        if other == queue and queue not in self.asynchronous:
                            continue
                        if (turn == 1 and from_turn == 1) or turn == 0:
                            later = 0
                        else:
                            later = distance
                        if turn == 1 and later == 0:
                            continue  # the same as in the first turn
                        yield Edge(other, source, queue, place, later, name)
                if touch.writes:
                    written = dict.fromkeys(sorted(touch.writes), (turn, place))
                    read = dict.fromkeys(sorted(touch.reads), (turn, place))
                else:
                    read |= dict.fromkeys(sorted(touch.reads), (turn, place))

    def _needed(self, edges: list[Edge], repeated: bool) -> list[Edge]:
        """The edges that the others and program order don't imply, the widest left out first."""
        kept = list(edges)
        for edge in sorted(edges, key=lambda e: (-e.distance, e.source - e.target)):
            others = [e for e in kept if e is not edge and e.rare is None]
            if _implied(edge, others, repeated):
                kept.remove(edge)
        return kept

    # --- waits inside a loop ---------------------------------------------------------------------

    def _first_need(
        self, block: Block, edge: Edge, left_out: set[Edge], kept: list[Edge]
    ) -> Item | None:
        """The item of a loop's body that is the first to need an edge to the loop, where the queue
        does something else before it; None where the wait stands in front of the loop.
        """
        loop = block.items[edge.target]
        queues = {edge.before, edge.after}
        if not block.repeated or not isinstance(loop, Loop):
            return None
        if edge.distance or edge.rare is not None or len(queues) < 2:
            return None
        if queues & self.asynchronous:
            return None
        body = [(item, self.touches(item)) for item in loop.body.items]
        own = [(item, e) for item, e in body if _by(e, edge.after)]
        if not _hand_over(body, queues):
            return None
        # What the wait put in order besides.
        others = [e for e in kept if e is not edge and e.rare is None]
        names = {edge.why}
        for other in left_out:
            ends = other.after == edge.after and other.target == edge.target
            if ends and not _implied(other, others, block.repeated):
                names.add(other.why)
        for place, (item, entry) in enumerate(own):
            if any(s.name in names and edge.after in t.reads | t.writes for s, t in entry.items()):
                return item if place else None
        return None

    def _put_off(self, block: Block, edge: Edge, item: Item) -> Semaphore:
        """Wait for an edge's signal in the loop that it leads to, in front of an item: at the first
        turn for what was before the loop, later and after the loop for the turn before.
        """
        loop = block.items[edge.target]
        assert isinstance(loop, Loop)
        semaphore = Semaphore(edge.before, edge.after, 0, edge.why)
        inside = loop.body.items
        inside.insert(inside.index(item), Sync("wait", edge.after, semaphore))
        inside.insert(0, Sync("signal", edge.before, semaphore))
        self.put_off.setdefault(edge.target, []).append(Sync("wait", edge.after, semaphore))
        self.put_off.setdefault(edge.source, []).append(Sync("signal", edge.before, semaphore))
        self.plain.append((block, semaphore))
        return semaphore

    # --- writing down ----------------------------------------------------------------------------

    def _insert(
        self, block: Block, edges: list[Edge], touched: list[dict[Storage, Touch]]
    ) -> list[Semaphore]:
        made: list[Semaphore] = []
        before: dict[int, list[Item]] = {}
        after, self.put_off = self.put_off, {}
        shared: dict[tuple[str, str, int], Semaphore] = {}
        for edge in edges:
            semaphore = Semaphore(edge.before, edge.after, edge.distance, edge.why)
            key = (edge.before, edge.after, edge.distance)
            if edge.rare is None and key in shared:
                semaphore = shared[key]
                semaphore.initial += edge.distance
            else:
                made.append(semaphore)
                if edge.rare is None:
                    shared[key] = semaphore
            signal: Item = Sync("signal", edge.before, semaphore)
            wait: Item = Sync("wait", edge.after, semaphore)
            source, target = block.items[edge.source], block.items[edge.target]
            if edge.rare is not None and source is edge.rare:
                edge.rare.then.items.append(signal)
            else:
                after.setdefault(edge.source, []).append(_only(signal, edge.rare, block))
            if edge.rare is not None and target is edge.rare:
                edge.rare.then.items.insert(0, wait)
            elif edge.rare is not None:
                before.setdefault(edge.target, []).append(
                    Branch(edge.rare.condition, _alone(wait, block), Block(parent=block))
                )
            else:
                before.setdefault(edge.target, []).append(wait)
        self.plain += [(block, semaphore) for semaphore in shared.values()]
        turning = self._turning(block, touched)
        items: list[Item] = []
        for place, item in enumerate(block.items):
            if turning.get(place):
                items.append(Rotate(turning[place]))
            items += before.get(place, [])
            items.append(item)
            items += after.get(place, [])
        block.items = items
        return made

    def _turning(
        self, block: Block, touched: list[dict[Storage, Touch]]
    ) -> dict[int, list[Buffer]]:
        """The buffers that turn in this block, by the item that touches them first."""
        found: dict[int, list[Buffer]] = {}
        seen: set[Storage] = set()
        for place, entry in enumerate(touched):
            for storage in entry:
                if isinstance(storage, Buffer) and storage.block is block and storage not in seen:
                    seen.add(storage)
                    if storage.stages > 1 and not storage.turned:
                        found.setdefault(place, []).append(storage)
        return found


def _hand_over(body: Sequence[tuple[Item, dict[Storage, Touch]]], queues: set[str]) -> bool:
    """Whether queues hand something over to one another at each turn of a loop, so that none is
    ahead of the other by more turns than that has slots.
    """
    users: dict[Storage, set[str]] = {}
    writers: dict[Storage, set[str]] = {}
    for _, entry in body:
        for storage, touch in entry.items():
            users.setdefault(storage, set()).update(touch.reads | touch.writes)
            writers.setdefault(storage, set()).update(touch.writes)
    return any(queues <= found and queues & writers[s] for s, found in users.items())


def _by(entry: dict[Storage, Touch], queue: str) -> bool:
    """Whether a queue touches something."""
    return any(queue in touch.reads or queue in touch.writes for touch in entry.values())


def _rare(block: Block, edge: Edge) -> Branch | None:
    """The branch of tiles that stay whose turns alone a dependence is about."""
    source, target = block.items[edge.source], block.items[edge.target]
    if isinstance(source, Branch) and source.last is not None:
        return source
    if isinstance(target, Branch) and target.last is not None and edge.distance:
        return target
    return None


def _only(signal: Item, rare: Branch | None, block: Block) -> Item:
    """A signal that what stays is used up, which it is at its loop's last turn."""
    if rare is None:
        return signal
    assert rare.last is not None
    return Branch(rare.last, _alone(signal, block), Block(parent=block))


def _alone(item: Item, block: Block) -> Block:
    return Block([item], block, block.repeated)


def _encloses(outer: Block, block: Block) -> bool:
    inner: Block | None = block
    while inner is not None and inner is not outer:
        inner = inner.parent
    return inner is outer


def _comes_again(block: Block, storage: Storage) -> bool:
    """Whether another run of the block touches the storage before it has turned.

    Grid instances don't depend on one another through tensors.
    """
    if isinstance(storage, Buffer) and storage.block is block:
        return block.repeated
    inner: Block | None = block
    while inner is not None:
        if isinstance(storage, Buffer) and inner is storage.block:
            return False
        if isinstance(storage, Value) and inner.instances:
            return False
        if inner.loop:
            return True
        inner = inner.parent
    return False


def _implied(edge: Edge, others: list[Edge], repeated: bool) -> bool:
    """Whether signals, waits and program order already put an edge's ends in order.

    A state is a queue, a turn, and the item of it from which on everything is ordered after the
    edge's source.
    """
    pending = [(edge.before, 0, edge.source)]
    best: dict[tuple[str, int], int] = {}
    first = True
    while pending:
        queue, turn, place = pending.pop()
        arrived = not first
        first = False
        reached = turn < edge.distance or (turn == edge.distance and place <= edge.target)
        if arrived and queue == edge.after and reached:
            return True
        if turn > edge.distance or best.get((queue, turn), place + 1) <= place:
            continue
        best[queue, turn] = place
        onward = (o for o in others if o.before == queue and o.source >= place)
        pending += [(o.after, turn + o.distance, o.target) for o in onward]
        if repeated and turn < edge.distance:
            later = (o for o in others if o.before == queue)
            pending += [(o.after, turn + 1 + o.distance, o.target) for o in later]
    return False
