"""The passes in order: a tile kernel with known sizes to a machine program."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from dure.compiler.chip.allocate import allocate
from dure.compiler.chip.emit import emit
from dure.compiler.chip.hoist import hoist
from dure.compiler.chip.legalise import Conversion, legalise
from dure.compiler.chip.lower import lower
from dure.compiler.chip.orient import laid, orient
from dure.compiler.chip.partition import Partition, partition, splits_of
from dure.compiler.chip.pushes import check_pushes
from dure.compiler.chip.resident import Reuse, keep, stage
from dure.compiler.chip.share import share_reads
from dure.compiler.chip.stages import choose_stages
from dure.compiler.chip.synchronise import check_semaphores, synchronise
from dure.compiler.chip.throttle import throttle
from dure.compiler.chip.tree import Tree
from dure.compiler.chip.trim import trim
from dure.compiler.chip.turn import turn
from dure.compiler.chip.widen import widen_apart
from dure.ir.core import Function, Value
from dure.ir.devices import device_id
from dure.ir.dtypes import Array
from dure.ir.printer import print_function
from dure.ir.simplify import simplify, unrolled_once
from dure.machine.chip import Chip


@dataclass(frozen=True, slots=True)
class Options:
    """How a kernel is compiled: cores and loop order (None: balanced, as written), slots a ring,
    whether conversions are errors, operands that stay in the scratchpad over a loop that would load
    them again, one that is staged whole before anything else, and how many bytes of the scratchpad
    the program may use (of each partition, where there are any; None: all).

    ``oriented``: arguments may be kept the way round that the matrix engine wants, which another
    program that writes them knows nothing of.  ``ahead`` are arguments that are loaded on queues of
    their own, where the chip has such queues, into as many as ``slots`` slots.  ``standing`` are
    arguments that lie transposed, for whoever writes and reads them, and ``near`` those (by their
    number) that lie in the memory in front of home, of which the whole program keeps ``reserved``
    bytes for such tensors.
    """

    plan: Partition | None = None
    stages: int = 2
    strict: bool = False
    resident: tuple[Reuse, ...] = ()
    stage: Reuse | None = None
    budget: int | None = None
    oriented: bool = True
    ahead: frozenset[str] = frozenset()
    slots: int = 0
    standing: frozenset[str] = frozenset()
    near: frozenset[int] = frozenset()
    reserved: int = 0


@dataclass(frozen=True)
class Compiled:
    """A machine program: what it was converted to on the way, and the bytes it uses."""

    function: Function
    conversions: tuple[Conversion, ...]
    used: dict[str, int]
    options: Options

    @property
    def text(self) -> str:
        """The program as text."""
        return print_function(self.function)

    @property
    def sha256(self) -> str:
        """The hash of the program's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def default_plan(function: Function, chip: Chip) -> Partition:
    """The best balanced split over the cores, loops in the order of the grid."""
    split = next(splits_of(function, int(chip.cores.base)))
    return Partition(split, tuple(range(len(split))))


def compile_for(
    function: Function,
    chip: Chip,
    options: Options | None = None,
    indices: Mapping[str, Array] | None = None,
) -> Compiled:
    """The machine program of a tile kernel whose sizes are known.

    ``indices`` are values of index arguments, by name, where they tell how often loops turn.

    Raises :class:`~dure.errors.DureError` with the author's line for what the chip can't do, and
    :class:`~dure.compiler.chip.allocate.ScratchpadError` for tiles that don't fit.
    """
    options = options or Options()
    check_pushes(function)
    prepared = prepare(function, chip, options.plan or default_plan(function, chip), options)
    tree = lower(prepared.function, chip, options.ahead, options.near)
    return scheduled(prepared, tree, chip, options, indices)


def scheduled(
    prepared: Prepared,
    tree: Tree,
    chip: Chip,
    options: Options,
    indices: Mapping[str, Array] | None = None,
) -> Compiled:
    """The machine program of a tile program's instructions, which this changes."""
    function = prepared.function
    keep(tree, options.resident)
    if options.stage is not None:
        stage(tree, options.stage)
    choose_stages(tree, chip, options.stages, options.budget, options.slots, device_id(function))
    share_reads(tree, function, chip, options.near, options.reserved, indices)
    if options.ahead:
        throttle(tree, chip)
    synchronise(tree, chip, _inout(function))
    check_semaphores(function.name, tree, chip)
    used = allocate(tree, chip, options.budget)
    made = emit(function, tree, chip, options.near)
    return Compiled(made, prepared.conversions, used, options)


@dataclass(frozen=True)
class Prepared:
    """The tile program of one core, in types and ops that the chip has."""

    function: Function
    conversions: tuple[Conversion, ...]


def prepare(
    function: Function, chip: Chip, plan: Partition, options: Options | None = None
) -> Prepared:
    """The passes on tile IR."""
    options = options or Options()
    function = trim(simplify(partition(function, plan), (("for", unrolled_once),)))
    if options.oriented:
        function = orient(function, chip)
    function = laid(function, options.standing)
    function = simplify(turn(function, chip))
    legal = legalise(function, chip, strict=options.strict)
    return Prepared(hoist(widen_apart(legal.function, chip)), legal.conversions)


def _inout(function: Function) -> frozenset[Value]:
    return frozenset(p.value for p in function.params if p.access == "inout")
