"""Which values between a step's kernels lie transposed.

A matrix engine that wants its left operand with K along the rows has each tile of it transposed
first, once for every tile of columns that it is multiplied with.  Where all that read a value
multiply it so, and its writer can, the value is transposed once, on its way out, and lies so.
"""

from __future__ import annotations

from collections.abc import Sequence

from dure.compiler.chip.orient import orientable
from dure.ir.core import Value
from dure.ir.types import static_extent
from dure.library.build import tile_function
from dure.library.call import KernelCall
from dure.library.chip_tensors import Operand
from dure.machine.chip import Chip
from dure.models.chip_step import ChipStep

#: Rows from which on a column of a transposed value is a run of bytes worth a transfer.
_ROWS = 128


def standing_values(step: ChipStep, chip: Chip) -> frozenset[Value]:
    """The values that lie transposed on this chip."""
    if not any(e.dot is not None and e.dot.stationary_k_first for e in chip.engines.values()):
        return frozenset()
    fits: dict[Value, list[bool]] = {}
    for entry in step.calls:
        ways = entry.part.others(chip) or entry.part.ways(chip)
        launches = [launch for way in ways for launch in way]
        operands = [given for _, given in launches]
        # What devices exchange is bytes in their order.
        alone = all(call.devices == 1 for call, _ in launches)
        whole = _whole(operands) if alone else set[Value]()
        for value in whole:
            able = any(_able(call, given, value, chip) for call, given in launches)
            fits.setdefault(value, []).append(able)
        for value in _seen(operands) - whole:
            fits.setdefault(value, []).append(False)
    kept = {*step.outputs.values()}
    return frozenset(v for v, able in fits.items() if all(able) and len(able) > 1 and v not in kept)


def standing(
    call: KernelCall, operands: Sequence[Operand | None], values: frozenset[Value], chip: Chip
) -> frozenset[str] | None:
    """The names of a launch's parameters that lie transposed; None where it can't have one so."""
    names = _names(call, operands)
    wanted = {name for name, value in names.items() if value in values}
    if not wanted:
        return frozenset()
    return frozenset(wanted) if wanted <= orientable(tile_function(call), chip) else None


def _names(call: KernelCall, operands: Sequence[Operand | None]) -> dict[str, Value]:
    """The (first) values that a launch's parameters are, by their names."""
    present = [n for n, kind in enumerate(call.types) if kind is not None]
    pairs = zip(tile_function(call).params, (operands[n] for n in present), strict=True)
    return {p.value.name: o.stored.values[0] for p, o in pairs if o is not None}


def _able(call: KernelCall, operands: Sequence[Operand | None], value: Value, chip: Chip) -> bool:
    function = tile_function(call)
    able = orientable(function, chip)
    names = [name for name, other in _names(call, operands).items() if other is value]
    rows = {p.value.name: static_extent(p.value.tensor.shape[0]) or 0 for p in function.params}
    return bool(names) and all(name in able and rows[name] >= _ROWS for name in names)


def _seen(calls: Sequence[Sequence[Operand | None]]) -> set[Value]:
    return {v for operands in calls for o in operands if o is not None for v in o.stored.values}


def _whole(calls: Sequence[Sequence[Operand | None]]) -> set[Value]:
    """Values of ops that have an allocation of their own."""
    return {
        o.stored.values[0]
        for operands in calls
        for o in operands
        if o is not None and o.window is None and o.stored.form == "plain"
        if len(o.stored.values) == 1 and not o.stored.values[0].name
    }
