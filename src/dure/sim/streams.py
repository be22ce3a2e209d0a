"""A machine program as streams of timed instructions, one a queue, for any core.

The program is made ready once, as a walk of :mod:`dure.sim.nodes`; :meth:`Streams.trace` then walks
it with the numbers of one core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dure.ir.core import Function, Op, Region, Value
from dure.ir.devices import devices_of
from dure.ir.dtypes import Array, int32
from dure.ir.expr import Expr, as_expr
from dure.ir.machine.compute import ops_of
from dure.machine.chip import Chip
from dure.machine.group import group_of
from dure.sim.contention import losses_of
from dure.sim.cost import ComputeCost, Costs
from dure.sim.items import COMPUTE, SIGNAL, WAIT, Item, refusal
from dure.sim.lists import Lists
from dure.sim.nodes import Branch, Loop, Move, Node, Phase, Plain, Rotate, Scalar
from dure.sim.sites import Sites
from dure.sim.stream import Run, Stream
from dure.sim.whole_lists import whole_lists


class Streams:
    """A program made ready for tracing.  ``queues`` and ``semaphores`` are named by number."""

    def __init__(
        self, function: Function, chip: Chip, costs: Costs, indices: Mapping[str, Array]
    ) -> None:
        self.function = function
        self.chip = chip
        self.costs = costs
        devices = devices_of(function)
        self.group = group_of(chip, devices) if devices > 1 else None
        self.queues: list[str] = []
        self.semaphores: list[Value] = []
        self.semaphore_ops: list[Op] = []
        self.out: list[list[Item]] = []
        self.lists = Lists(indices)
        self.losses = losses_of(chip)
        #: Index lists that needn't be followed.
        self.whole = whole_lists(function, self.lists.indices) if indices else frozenset[Value]()
        #: Loops and phases around what is made ready, and the runs that are laid out already.
        self.depth = 0
        self._runs: list[list[Run]] = []
        self._closed = 0
        #: Runs of all cores that were traced, by their first instruction and length.
        self._lists: dict[tuple[int, int], list[list[Item]]] = {}
        self._views: dict[Value, tuple[Value, tuple[Expr, ...]]] = {}
        self.sites = Sites(frozenset(s.name for s in function.program_ids))
        #: Whether transfers hang on what index lists hold.
        self.by_lists = False
        #: Symbols that are bound by reads.
        self.read: set[str] = set()
        #: Phases with such transfers.
        self.listing: list[Phase] = []
        for op in ops_of(function.body):
            if "queue" in op.attrs:
                self.queue(op)
        self._nodes = self.region(function.body)

    # --- walking ---------------------------------------------------------------------------------

    def trace(self, core: Mapping[str, int], nodes: Sequence[Node] | None = None) -> list[Stream]:
        """What each queue of a core executes (of these nodes only, where they are given); equal
        instructions are one object.
        """
        self.out[:] = [[] for _ in self.queues]
        self._runs = [[] for _ in self.queues]
        self._closed = 0
        self.lists.clear()
        env = dict(core)
        for node in self._nodes if nodes is None else nodes:
            node.trace(env)
        self.close()
        return [Stream(runs) for runs in self._runs]

    def close(self, times: int = 1) -> None:
        """What was traced since the last call is a run of each queue; those of several cores that
        are equal are one list.
        """
        for runs, items in zip(self._runs, self.out, strict=True):
            if items:
                runs.append((self._once(items), times))
                self._closed += len(items)
        self.out[:] = [[] for _ in self.queues]

    @property
    def runs(self) -> list[int]:
        """How many runs each queue has."""
        return [len(runs) for runs in self._runs]

    def since(self, runs: Sequence[int]) -> list[list[Run]]:
        """The runs of each queue that came since it had so many."""
        return [own[start:] for own, start in zip(self._runs, runs, strict=True)]

    def append(self, more: Sequence[Sequence[Run]], times: int = 1) -> None:
        """Each queue goes on with these runs, so many times."""
        for runs, own in zip(self._runs, more, strict=True):
            runs.extend([*own] * times)

    def _once(self, items: list[Item]) -> list[Item]:
        """The first list that was equal to this one."""
        alike = self._lists.setdefault((id(items[0]), len(items)), [])
        for known in alike:
            if known == items:
                return known
        alike.append(items)
        return items

    @property
    def laid_out(self) -> int:
        """Instructions traced so far, equal turns once."""
        return sum(map(len, self.out)) + self._closed

    def follows(self, buffer: Value) -> bool:
        """Whether what a buffer holds is an index list that must be followed."""
        return buffer.tile.dtype is int32 and bool(self.lists.indices) and buffer not in self.whole

    @property
    def varies(self) -> bool:
        """Whether cores can differ."""
        return bool(self.sites) or self.by_lists

    def signature(self, core: Mapping[str, int]) -> tuple[object, ...]:
        """What cores may differ in: cores of one signature have equal streams."""
        if self.by_lists:
            # Of a program of phases, those that read lists show what the lists change.
            apart = bool(self.listing) and all(n.needs <= core.keys() for n in self.listing)
            traced = self.trace(core, self.listing if apart else None)
            found = tuple([stream.key for stream in traced])
            return (*found, *self.sites.tables(core)) if apart else found
        return self.sites.tables(core)

    def signalling(self) -> dict[int, str]:
        """The queue that signals each semaphore."""
        numbers = {value: number for number, value in enumerate(self.semaphores)}
        return {
            numbers[op.operands[0]]: str(op.attr("queue"))
            for op in ops_of(self.function.body)
            if op.name == "signal"
        }

    # --- making ready ----------------------------------------------------------------------------

    def place(self, tensor: Value) -> tuple[Value, tuple[Expr, ...]]:
        """The argument that a tensor is a view of, and where in it the view starts."""
        return self._views.get(tensor, (tensor, (as_expr(0),) * tensor.tensor.rank))

    def queue(self, op: Op) -> int:
        """The number of an op's queue."""
        name = str(op.attr("queue"))
        if name not in self.queues:
            self.queues.append(name)
            self.out.append([])
        return self.queues.index(name)

    def region(self, region: Region) -> list[Node]:
        """The steps of a body."""
        found: list[Node] = []
        for op in region.ops:
            node = self._node(op)
            if isinstance(node, Move) and node.constant:
                node = Plain(self, op, node.item({}))
            if isinstance(node, Plain) and found and isinstance(found[-1], Plain):
                found[-1].join(node)
            elif node is not None:
                found.append(node)
        return found

    def _cost(self, op: Op) -> ComputeCost:
        """The cost of a compute, with the memories in which it contends with transfers."""
        cost = self.costs.compute(op)
        touched = {str(self.lists.buffers[v].attr("memory")) for v in op.operands}
        contended = tuple(sorted(touched & self.losses.keys()))
        return replace(cost, memories=contended) if contended else cost

    def _node(self, op: Op) -> Node | None:
        match op.name:
            case "for":
                return Loop(self, op)
            case "if":
                return Branch(self, op)
            case "phase":
                return Phase(self, op)
            case "buffer":
                self.lists.buffers[op.result] = op
            case "semaphore":
                self.semaphores.append(op.result)
                self.semaphore_ops.append(op)
            case "rotate":
                followed = [buffer for buffer in op.operands if self.follows(buffer)]
                return Rotate(self, followed) if followed else None
            case "view":
                root, starts = self.place(op.operands[0])
                axis = op.attr("axis")
                shifted = [s + op.attr("start") if a == axis else s for a, s in enumerate(starts)]
                self._views[op.result] = root, tuple(shifted)
            case "reshaped":
                pass
            case "index_load":
                return Scalar(self, op)
            case "compute":
                return Plain(self, op, (COMPUTE, op, self._cost(op)))
            case "wait" | "signal":
                number = self.semaphores.index(op.operands[0])
                kind = WAIT if op.name == "wait" else SIGNAL
                return Plain(self, op, (kind, op, (number, op.attr("count"))))
            case "dma_load" | "dma_store":
                return Move(self, op)
            case _:
                raise refusal(op, f"'{op.name}' can't be timed", "a machine program holds only its "
                             "level's ops", "lower it to machine ops")  # fmt: skip
        return None
