"""A machine program as the sanitizer runs it: queues and semaphores by number, accesses as cells.

The body becomes blocks of pieces.  A :class:`Straight` piece has no control in it; loops, branches
and scalar reads are pieces of their own.  Each block knows the symbols that decide how it runs, so
that two runs of it which agree on them, and on the abstract state, are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, product

from dure.ir.core import Function, Op, Region, Value, walk
from dure.ir.expr import (
    Const,
    Expr,
    Symbol,
    as_expr,
    bounds,
    cdiv,
    linear,
    substitute,
    symbol,
)
from dure.machine.chip import Chip
from dure.sim.sanitizer.cells import Cells, Rectangle, part, whole
from dure.sim.sanitizer.control import leaves, names
from dure.sim.sanitizer.findings import Place
from dure.sim.sanitizer.pieces import (
    SLOTS,
    Access,
    Block,
    Branch,
    Control,
    Cut,
    Instruction,
    Loop,
    Partial,
    Piece,
    Scalar,
    Straight,
    Transfer,
)
from dure.sim.sanitizer.rings import Rings
from dure.sim.sanitizer.transfers import Transfers, cuts
from dure.sim.storage import TilePlace, place_tile


@dataclass(eq=False)
class Model:
    """The program; ``concrete`` says that scalars are read from given values."""

    function: Function
    chip: Chip
    concrete: bool
    queues: list[str] = field(default_factory=list[str])
    semaphores: list[Op] = field(default_factory=list[Op])
    buffers: dict[Value, Op] = field(default_factory=dict[Value, Op])

    def __post_init__(self) -> None:
        self.cells = Cells()
        self.queue_number: dict[str, int] = {}
        self.semaphore_number: dict[Value, int] = {}
        self.buffer_number: dict[Value, int] = {}
        #: The first buffer with the same bytes: a buffer may be seen as a tile of another shape.
        self.storage_number: dict[Value, int] = {}
        self.compute_queues: set[int] = set()
        #: By semaphore: queues that signal it, and that wait on it.
        self.signallers: list[set[int]] = []
        self.waiters: list[set[int]] = []
        self.loops: list[Op] = []
        #: By the symbol of a loop's iterations, how many there are.
        self.iterations: dict[Symbol, Expr] = {}
        self.transfers = Transfers(self.buffers)
        self.places: dict[Value, TilePlace] = {}
        self._declare()
        self.names = list(self.buffers)
        self.owner = self._owners()
        self.body = self._block(self.function.body, ())
        for value, op in self.buffers.items():
            self.cells.add(self.rectangles(value, slot) for slot in range(op.attr("stages")))
        for transfer in self.transfers.of.values():
            self._expect(transfer)

    @property
    def instances(self) -> bool:
        """Whether the program has a loop over grid instances."""
        return any(op.attrs.get("instances") for op in self.loops)

    def _declare(self) -> None:
        sources: dict[Value, Value] = {}
        for op in walk(self.function.body):
            if op.name in ("dma_load", "compute"):
                for value in op.operands[1:2] if op.name == "dma_load" else _written(op):
                    self.transfers.filled.setdefault(self.transfers.root(value), []).append(op)
            if op.name == "buffer":
                memory = self.chip.memories[str(op.attr("memory"))]
                count = memory.partitions
                self.buffer_number[op.result] = len(self.buffers)
                self.storage_number[op.result] = (
                    self.storage_number[op.operands[0]] if op.operands else len(self.buffers)
                )
                self.buffers[op.result] = op
                partitions = None if count is None else round(count.base)
                self.places[op.result] = place_tile(op.result.tile, partitions)
            elif op.name == "semaphore":
                self.semaphore_number[op.result] = len(self.semaphores)
                self.semaphores.append(op)
                self.signallers.append(set())
                self.waiters.append(set())
            elif "queue" in op.attrs:
                queue = str(op.attrs["queue"])
                if queue not in self.queue_number:
                    self.queue_number[queue] = len(self.queues)
                    self.queues.append(queue)
                number = self.queue_number[queue]
                if op.name == "compute":
                    self.compute_queues.add(number)
                elif op.name in ("wait", "signal"):
                    ends = self.waiters if op.name == "wait" else self.signallers
                    ends[self.semaphore_number[op.operands[0]]].add(number)
            if op.name == "dma_store":
                self.transfers.stored.add(op.operands[0])
            elif op.name == "view":
                sources[op.result] = op.operands[0]
            elif op.name == "reshaped":
                sources[op.result] = self.transfers.shaped[op.result] = op.operands[0]
        for value in list(self.transfers.stored):
            while value in sources:
                value = sources[value]
                self.transfers.stored.add(value)
        self.transfers.stored |= {
            v for v, source in self.transfers.shaped.items() if source in self.transfers.stored
        }
        known = self.chip.transfer_queues
        for name, number in self.queue_number.items():
            if name not in known:
                self.compute_queues.add(number)

    def _owners(self) -> dict[Value, int]:
        """By buffer, the number of the one whose bytes it reads.

        A buffer that nothing writes is another shape of one that lies exactly there.
        """
        written: set[Value] = set()
        for op in walk(self.function.body):
            if op.name == "compute":
                written.update(op.operands[int(op.attr("reads")) :])
            elif op.name == "dma_load":
                written.add(op.operands[1])
        keys = {value: self._storage(value) for value in self.buffers}
        found: dict[Value, int] = {}
        for value, number in self.buffer_number.items():
            found[value] = number
            if value in written:
                continue
            same = [v for v in written if keys.get(v) == keys[value]]
            same.sort(key=lambda v: (v.name != value.name, self.buffer_number[v]))
            if same:
                found[value] = self.buffer_number[same[0]]
        return found

    def _storage(self, value: Value) -> object:
        op = self.buffers[value]
        kind = value.tile
        place = [op.attr(k) for k in ("memory", "offset", "pitch", "stages")]
        return (*place, kind.dtype, kind.elements)

    def rectangles(self, buffer: Value, slot: int) -> list[Rectangle]:
        """The bytes of a buffer's slot."""
        op = self.buffers[buffer]
        address = int(op.attr("offset")) + slot * int(op.attr("pitch"))
        return whole(self.places[buffer], str(op.attr("memory")), address)

    # --- blocks ----------------------------------------------------------------------------------

    def _block(self, region: Region, loops: tuple[Op, ...]) -> Block:
        pieces: list[Piece] = []
        run: list[Op] = []
        controls: list[Control] = []
        defines: set[str] = set()

        def flush(loop: int = -1) -> None:
            if run or loop >= 0:
                needs = {s for op in run if op in self.transfers.of for s in self._needs(op)}
                pieces.append(Straight(tuple(run), frozenset(needs), loop))
                run.clear()

        def add(op: Op) -> None:
            if op.name in ("dma_load", "dma_store"):
                transfer = self.transfers.enter(op, loops)
                controls.extend(cuts(transfer))
                if transfer.partial:
                    flush()
                    pieces.append(Partial(op, transfer.edges(), transfer.needs()))
                    return
            elif op.name in ("buffer", "semaphore", "reshaped"):
                return
            run.append(op)

        for op in self._flat(region):
            match op.name:
                case "for":
                    flush()
                    pieces.append(self._loop(op, loops, controls))
                case "if":
                    flush()
                    pieces.append(self._branch(op, loops, controls))
                case "index_load":
                    if self.concrete:
                        flush()
                        pieces.append(self._scalar(op, controls))
                    defines |= {s.name for s in op.symbols}
                case "view":
                    self.transfers.view(op)
                case _:
                    add(op)
        # What the home tensors' accesses of this iteration mean to the next changes at its end.
        goes_on = bool(loops) and loops[-1].regions[0] is region
        moves = goes_on and (
            bool(loops[-1].attrs.get("instances"))
            or any(loops[-1] in t.loops for t in self.transfers.of.values())
        )
        flush(self.loops.index(loops[-1]) if moves else -1)
        controls.extend(c for p in pieces for c in _controls(p))
        needs_all = frozenset(s for p in pieces for s in p.needs) - defines
        later: frozenset[str] = frozenset()
        over: list[frozenset[str]] = []
        for piece in reversed(pieces):
            over.append(frozenset(defines) - later)
            later |= piece.needs
        return Block(
            tuple(pieces), needs_all, frozenset(defines), tuple(controls), tuple(reversed(over))
        )

    def _flat(self, region: Region) -> Iterator[Op]:
        """The ops of a region, those of branches that are always taken among them."""
        for op in region.ops:
            condition = as_expr(op.attr("condition")) if op.name == "if" else None
            if isinstance(condition, Const):
                yield from self._flat(op.regions[0 if condition.value else 1])
            else:
                yield op

    def _scalar(self, op: Op, controls: list[Control]) -> Scalar:
        index = [as_expr(e) for e in op.attr("index")]
        needs = {s for e in index for s in names(e)} | self.transfers.starts(op.operands[0])
        controls.extend(Control(e, "exact") for e in index)
        controls.extend(Control(e, "exact") for e in self.transfers.window(op.operands[0])[1])
        return Scalar(op, frozenset(needs))

    def _needs(self, op: Op) -> frozenset[str]:
        return self.transfers.of[op].needs()

    def _loop(self, op: Op, loops: tuple[Op, ...], controls: list[Control]) -> Loop:
        number = len(self.loops)
        self.loops.append(op)
        start, stop = as_expr(op.attr("start")), as_expr(op.attr("stop"))
        step = int(op.attr("step"))
        trips = cdiv(stop - start, step)
        body = self._block(op.regions[0], (*loops, op))
        controls.append(Control(trips, "trips"))
        counter, most = op.regions[0].symbols[0].name, bounds(trips)[1]
        last = None if most is None else max(0, most - 1)
        iteration = symbol(f"{counter}'{number}", "loop", 0, last)
        self.iterations[iteration] = trips
        # Where the body needs the counter, it needs where the counter starts.
        own = names(trips) | (names(start) if counter in body.needs else set[str]())
        needs = frozenset(own) | (body.needs - {counter})
        return Loop(op, number, counter, iteration, start, trips, step, body, needs)

    def _branch(self, op: Op, loops: tuple[Op, ...], controls: list[Control]) -> Branch:
        condition = as_expr(op.attr("condition"))
        then, otherwise = (self._block(region, loops) for region in op.regions)
        controls.extend(Control(leaf, "truth") for leaf in leaves(condition))
        needs = frozenset(names(condition)) | then.needs | otherwise.needs
        return Branch(op, condition, then, otherwise, needs)

    def _expect(self, transfer: Transfer) -> None:
        """Enter the parts of a tile that a transfer probably moves at its tensor's edge."""
        if not (transfer.partial or transfer.store):
            return
        value = transfer.op.operands[1]
        sides: list[list[tuple[int, int]]] = []
        for axis, extent in enumerate(value.tile.shape):
            start, inside = transfer.starts[axis], transfer.inside[axis]
            sides.append([(0, extent)])
            if not inside and start is not None and transfer.strides[axis] == 1:
                terms, room = linear(transfer.extents[axis] - start)
                if room % extent and all(n % extent == 0 for n in dict(terms).values()):
                    sides[-1].append((0, room % extent))
        for cut in islice(product(*sides), 1, None):
            for slot in range(int(self.buffers[value].attr("stages"))):
                self.cells.add(self._parts(value, slot, cut))

    # --- instructions ----------------------------------------------------------------------------

    def instruction(self, op: Op, slots: tuple[int, ...], cut: Cut) -> Instruction:
        """An op of a queue; ``slots`` of its operands (-1 for others).

        New cuts may need new cells: then the model is ``stale``, what is found means nothing, and
        all starts anew with them.
        """
        key = (op, slots, cut)
        found = self.instructions.get(key)
        if found is None:
            found = self.instructions[key] = self._instruction(op, slots, cut)
        return found

    def _instruction(self, op: Op, slots: tuple[int, ...], cut: Cut) -> Instruction:
        queue = self.queue_number[str(op.attrs["queue"])]
        made = Instruction(op, slots, cut, queue, queue in self.compute_queues)
        if op.name in ("wait", "signal"):
            made.semaphore = self.semaphore_number[op.operands[0]]
            made.count = int(op.attr("count"))
            return made
        if op.name == "compute":
            reads = int(op.attr("reads"))
            found = [self._access(op, n, slots[n], n >= reads) for n in range(len(op.operands))]
            made.compute = True
            made.reads, made.writes = tuple(found[:reads]), tuple(found[reads:])
            return made
        load = op.name == "dma_load"
        moved = self._access(op, 1, slots[1], load, cut)
        lists = [self._access(op, n, slots[n], False) for n in range(2, len(op.operands))]
        made.reads = tuple(lists) if load else (*lists, moved)
        made.writes = (moved,) if load else ()
        if self.transfers.of[op].root in self.transfers.stored:
            made.home = self.transfers.of[op].number
        return made

    def _access(self, op: Op, place: int, slot: int, write: bool, cut: Cut = "") -> Access:
        family = self.accesses.setdefault((op, place, cut), {})
        if slot not in family:
            value = op.operands[place]
            stages = int(self.buffers[value].attr("stages"))
            parts = [self._parts(value, s, cut) for s in range(stages)]
            # All slots are cut alike, so that they stay like one another.
            if self.cells.add(region for pair in parts for region in pair):
                self.stale = True
            if self.stale:
                parts = [(self.rectangles(value, s), list[Rectangle]()) for s in range(stages)]
            for s, (touched, defined) in enumerate(parts):
                family[s] = self._made(op, value, s, write, touched, defined, family)
        return family[slot]

    def _parts(self, value: Value, slot: int, cut: Cut) -> tuple[list[Rectangle], list[Rectangle]]:
        """The bytes that an access touches, and those that it surely fills."""
        touched = self.rectangles(value, slot)
        if isinstance(cut, str):
            return touched, touched
        if cut is None:
            return touched, []
        op, place = self.buffers[value], self.places[value]
        memory = str(op.attr("memory"))
        address = int(op.attr("offset")) + slot * int(op.attr("pitch"))
        outer = part(place, memory, address, cut, inward=False)
        inner = part(place, memory, address, cut, inward=True)
        return (touched, []) if outer is None or inner is None else (outer, inner)

    def _made(
        self,
        op: Op,
        value: Value,
        slot: int,
        write: bool,
        touched: list[Rectangle],
        defined: list[Rectangle],
        family: dict[int, Access],
    ) -> Access:
        declared = self.buffers[value]
        address = int(declared.attr("offset")) + slot * int(declared.attr("pitch"))
        stop = address + self.places[value].size
        queue = str(op.attrs["queue"])
        memory = str(declared.attr("memory"))
        where = Place(op, queue, value.name, slot, memory, address, stop, write)
        return Access(
            where,
            self.queue_number[queue],
            self.owner[value] * SLOTS + slot,
            self.cells.of(touched),
            frozenset(self.cells.of(defined)) if write else frozenset[int](),
            write and _accumulates(op, value),
            value,
            family,
        )

    def build(self) -> None:
        """Number the cells, after all bytes that are touched have been entered."""
        self.cells.build()
        self.stale = False
        self.instructions: dict[object, Instruction] = {}
        self.accesses: dict[object, dict[int, Access]] = {}
        self.rings = Rings(self)
        self._touchers()
        self._fresh()

    def _fresh(self) -> None:
        """By loop over grid instances, the cells that are written inside it alone."""
        loops: list[set[int]] = [set() for _ in range(self.cells.count)]

        def enter(region: Region, inside: tuple[int, ...]) -> None:
            for op in region.ops:
                if op.name == "for" and op in self.loops:
                    enter(op.regions[0], (*inside, self.loops.index(op)))
                elif op.name == "if":
                    for branch in op.regions:
                        enter(branch, inside)
                elif op.name in ("compute", "dma_load"):
                    first = int(op.attr("reads")) if op.name == "compute" else 1
                    for value in op.operands[first : None if op.name == "compute" else 2]:
                        for slot in range(int(self.buffers[value].attr("stages"))):
                            for cell in self.cells.of(self.rectangles(value, slot)):
                                known = seen.setdefault(cell, set(inside))
                                known &= set(inside)

        seen: dict[int, set[int]] = {}
        enter(self.function.body, ())
        for cell, inside in seen.items():
            loops[cell] = inside
        self.fresh = {
            number: tuple(c for c, inside in enumerate(loops) if number in inside)
            for number, op in enumerate(self.loops)
            if op.attrs.get("instances")
        }

    def _touchers(self) -> None:
        """By cell, the groups of queues that touch it, and that write it; group 0 is empty."""
        count = self.cells.count
        touching: list[set[int]] = [set() for _ in range(count)]
        writing: list[set[int]] = [set() for _ in range(count)]
        for op in walk(self.function.body):
            if op.name not in ("compute", "dma_load", "dma_store"):
                continue
            queue = self.queue_number[str(op.attrs["queue"])]
            for place, value in enumerate(op.operands):
                if value not in self.buffers:
                    continue
                writes = op.name == "dma_load" and place == 1
                if op.name == "compute":
                    writes = place >= int(op.attr("reads"))
                for slot in range(int(self.buffers[value].attr("stages"))):
                    for cell in self.cells.of(self.rectangles(value, slot)):
                        touching[cell].add(queue)
                        if writes:
                            writing[cell].add(queue)
        groups: dict[tuple[int, ...], int] = {(): 0}
        self.touchers, self.writers = (
            [groups.setdefault(tuple(sorted(queues)), len(groups)) for queues in found]
            for found in (touching, writing)
        )
        movers = tuple(
            sorted({self.queue_number[str(o.attrs["queue"])] for o in self.transfers.of})
        )
        self.movers = groups.setdefault(movers, len(groups))
        self.groups = list(groups)


def _controls(piece: Piece) -> Iterator[Control]:
    """What decides how the blocks of a piece run, in terms of what is around it: a loop's counter
    is where it starts and an iteration, which may be any.
    """
    if isinstance(piece, Branch):
        yield from piece.then.controls
        yield from piece.otherwise.controls
    elif isinstance(piece, Loop):
        at = piece.start + piece.iteration * piece.step
        put: dict[Expr, int | Expr] = {piece.op.regions[0].symbols[0]: at}
        for control in piece.body.controls:
            if piece.symbol in names(control.expr):
                yield replace(control, expr=substitute(control.expr, put))
            else:
                yield control


def _accumulates(op: Op, value: Value) -> bool:
    """Whether a compute writes a dot's accumulator to this buffer."""
    if op.name != "compute":
        return False
    reads = int(op.attr("reads"))
    region = op.regions[0]
    dots = {r for inner in region.ops if inner.name == "dot" for r in inner.results}
    return any(
        target is value and result in dots
        for target, result in zip(op.operands[reads:], region.yields, strict=True)
    )


def _written(op: Op) -> tuple[Value, ...]:
    """The buffers that a compute writes."""
    return op.operands[int(op.attr("reads")) :]
