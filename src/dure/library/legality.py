"""Whether work is legal on a chip, before tile sizes are searched and anything is simulated.

For each launch: which types would be converted, and where; which rule of the chip it breaks; and
tile sizes that fit, or the map of the scratchpad where none do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dure.compiler.chip.allocate import ScratchpadError, capacity
from dure.compiler.chip.legalise import Conversion
from dure.compiler.chip.pipeline import Options, compile_for, default_plan, prepare
from dure.errors import DureError
from dure.ir.core import Function
from dure.ir.machine.compute import ops_of
from dure.library.answer import check_fits
from dure.library.build import tile_function
from dure.library.call import KernelCall
from dure.library.work import Work
from dure.machine.chip import Chip
from dure.sim.cost import Costs

#: Tile sizes that are tried, all open names alike first.
_SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
#: Slots of a ring, from the best.
_STAGES = (2, 1)
#: Sizes that are combined where no equal ones fit, and how many combinations.
_MIXED: tuple[int, ...] = (64, 8, 1)
_MOST = 200


@dataclass(frozen=True)
class Legality:
    """One launch on a chip.

    ``tiles`` are sizes that fit, with ``stages`` slots a ring and ``used`` bytes of each memory of
    those in ``room``; None where the launch is illegal or nothing fits, and ``error`` says why.
    """

    kernel: str
    conversions: tuple[Conversion, ...]
    tiles: Mapping[str, int] | None
    stages: int
    used: Mapping[str, int]
    room: Mapping[str, int]
    error: DureError | None

    @property
    def ok(self) -> bool:
        """Whether the chip runs it."""
        return self.error is None


def legality(work: Work, chip: Chip, *, strict: bool = False) -> tuple[Legality, ...]:
    """Each launch of the work on the chip."""
    try:
        check_fits(work, chip)
    except DureError as error:
        return (_illegal(work.name, (), chip, error),)
    return tuple(_checked(call, chip, strict) for call in work.calls)


def _checked(call: KernelCall, chip: Chip, strict: bool) -> Legality:
    try:
        return _launch(call, chip, strict)
    except DureError as error:  # no sizes make a legal tile program, on whatever chip
        return _illegal(call.kernel.__name__, (), chip, error)


def _launch(call: KernelCall, chip: Chip, strict: bool) -> Legality:
    name = call.kernel.__name__
    conversions: tuple[Conversion, ...] = ()
    last: DureError | None = None
    overflow: ScratchpadError | None = None
    for tiles, function in _functions(call):
        for stages in _STAGES:
            try:
                plan = default_plan(function, chip)
                conversions = prepare(function, chip, plan, Options(strict=strict)).conversions
                compiled = compile_for(function, chip, Options(plan, stages, strict))
                _has_laws(compiled.function, chip)
            except ScratchpadError as error:
                if overflow is None or error.needed <= overflow.needed:
                    overflow = error
                continue
            except DureError as error:
                last = error
                break
            used = {memory: count for memory, count in compiled.used.items() if count}
            return Legality(name, conversions, tiles, stages, used, _room(chip), None)
    error = last or overflow  # what more room would not mend comes first
    assert error is not None
    return _illegal(name, conversions, chip, error)


def _has_laws(program: Function, chip: Chip) -> None:
    """Raise :class:`DureError` for an instruction that none of the chip's laws covers."""
    costs = Costs(chip)
    for op in ops_of(program.body):
        if op.name == "compute":
            costs.compute(op)


def _functions(call: KernelCall) -> Iterator[tuple[dict[str, int], Function]]:
    """The tile function for some sizes of its open consts, large ones first."""
    if not call.open:
        yield {}, tile_function(call)
        return
    last: DureError | None = None
    found = False
    for tiles in _sizes(call):
        try:
            function = tile_function(call, tiles)
        except DureError as error:
            last = error
            continue
        found = True
        yield tiles, function
    if not found and last is not None:
        raise last


def _sizes(call: KernelCall) -> Iterator[dict[str, int]]:
    if call.variants:
        yield from map(dict, reversed(call.variants))
        return
    yield from (dict.fromkeys(call.open, size) for size in _SIZES)
    yield dict(call.tiles)
    mixed: Iterator[tuple[int, ...]] = itertools.product(_MIXED, repeat=len(call.open))
    yield from (
        dict(zip(call.open, sizes, strict=True)) for sizes in itertools.islice(mixed, _MOST)
    )


def _room(chip: Chip) -> dict[str, int]:
    return {name: capacity(memory) for name, memory in chip.memories.items()}


def _illegal(
    name: str, conversions: tuple[Conversion, ...], chip: Chip, error: DureError
) -> Legality:
    return Legality(name, conversions, None, 0, {}, _room(chip), error)
