"""Which numbers of a chip's file a program's time rests on.

Each number that the program can feel is made a tenth larger, and the same program is simulated
again.  What can't be a tenth larger becomes the next that it can be, a whole number (transfers in
flight) or the double (granules), and what that changes is scaled down to a tenth.  A law counts as
a number: all that it gives is made a tenth larger.  Numbers of engines that take next to none of
the time are left out, which saves most of the work, and of a program that takes long to simulate
only the first few numbers are tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

from pydantic import BaseModel

from dure.errors import DureError
from dure.ir.core import Function, Op, Value
from dure.ir.devices import devices_of
from dure.ir.dtypes import Array
from dure.ir.machine.compute import ops_of, works
from dure.machine.chip import Chip
from dure.machine.group import group_of
from dure.machine.law import Law
from dure.machine.quantity import STATUSES, Quantity
from dure.sim.cost import Costs
from dure.sim.items import engine_of
from dure.sim.timing import Timing, simulate

#: How much larger a number is made.
STEP = 0.1
#: The least part of the time that an engine must compute for its numbers to be tried.
LEAST = 0.02
#: Instructions that are replayed for the numbers of one status at most.
EFFORT = 500_000


@dataclass(frozen=True, slots=True)
class Moved:
    """A number, its status, and the picoseconds by which a tenth more of it moves the time; None
    if it wasn't tried.
    """

    path: str
    status: str
    ps: float | None


@dataclass(frozen=True)
class _Used:
    """What of a chip a program occupies: operations by engine, DMA engines, whether by lists.

    ``issuing`` are engines of instructions, ``engines`` those of them that take time, ``link`` what
    joins the devices where there are several.
    """

    issuing: frozenset[str]
    engines: Mapping[str, frozenset[str]]
    dma: frozenset[str]
    lists: bool
    link: str = ""


def sensitivity(
    function: Function,
    chip: Chip,
    timing: Timing,
    *,
    indices: Mapping[str, Array] | None = None,
    statuses: Collection[str] = STATUSES,
) -> tuple[Moved, ...]:
    """How far each number of these statuses that can matter moves the time of a program, which was
    simulated as ``timing``.
    """
    used = _used(function, chip, {n for n, ps in timing.busy.items() if ps > LEAST * timing.ps})
    costs = Costs(chip)  # what no engine's number changes is computed once
    found: list[Moved] = []
    tries = max(1, EFFORT // max(timing.instructions, 1))
    numbers = [(path, n) for path, n in _numbers(chip, used) if n.status in statuses]
    for place, (path, number) in enumerate(sorted(numbers, key=_likely)):
        if place >= tries:
            found.append(Moved(path, number.status, None))
            continue
        changed, step = _larger(path, number)
        other = _with(chip, path.split("."), changed)
        shared = costs if path.startswith(("memories", "dma", "fabrics", "links", "sync")) else None
        try:
            time = simulate(function, other, indices=indices, costs=shared).ps
        except DureError:  # a chip that can't exist: nothing is known about its time
            continue
        found.append(Moved(path, number.status, abs(time - timing.ps) * STEP / step))
    return tuple(found)


def _likely(entry: tuple[str, object]) -> tuple[int, str]:
    """Sorts numbers by how likely they move a time: bandwidths, then laws, then the rest."""
    path, _ = entry
    kinds = (".bandwidth", "clock", ".laws.", ".rates.", ".latency")
    return next((n for n, kind in enumerate(kinds) if kind in path), len(kinds)), path


def _larger(path: str, number: Quantity | Law) -> tuple[Quantity | Law, float]:
    """The number a tenth larger, or the next whole one, and by which part it is larger."""
    if isinstance(number, Law):
        return dataclasses.replace(number, text=f"({number.text}) * {1 + STEP}"), STEP
    assert number.value is not None
    value = number.value * (1 + STEP)
    if path.endswith(".outstanding"):
        value = float(ceil(value))
    elif path.endswith(".granule"):
        value = number.value * 2
    return dataclasses.replace(number, value=value), value / number.value - 1


def _with(table: Any, path: list[str], entry: object) -> Any:
    """A chip, or a table of one, with another entry at a path; nothing is checked."""
    first, *rest = path
    if isinstance(table, BaseModel):
        inner = _with(getattr(table, first), rest, entry) if rest else entry
        return table.model_copy(update={first: inner})
    known = cast("dict[str, object]", table)
    return {**known, first: _with(known[first], rest, entry) if rest else entry}


def _numbers(chip: Chip, used: _Used) -> Iterator[tuple[str, Quantity | Law]]:
    """The numbers and laws that the program's time may depend on."""
    names = _names(chip, used)
    for path, number in chip.quantities():
        if number.known and _matters(path.split("."), chip, used, names):
            yield path, number
    for path, law in chip.laws():
        parts = path.split(".")
        operations = used.engines.get(parts[1], ()) if parts[0] == "engines" else ()
        if parts[-1] in operations or (parts[0] == "dma" and parts[1] in used.dma):
            yield path, law


def _names(chip: Chip, used: _Used) -> dict[str, frozenset[str]]:
    """The names in the laws of each engine that the program occupies."""
    return {
        name: frozenset(n for o in operations for n in chip.engines[name].laws[o].names)
        for name, operations in used.engines.items()
    }


def _matters(
    parts: list[str], chip: Chip, used: _Used, names: Mapping[str, frozenset[str]]
) -> bool:
    match parts:
        case ["clock" | "launch"] | ["sync", "latency"]:
            return True
        case ["engines", name, "numbers", number]:
            return number in names.get(name, ())
        case ["engines", name, "rates", _]:
            return "rate" in names.get(name, ())
        case ["engines", name, "clock" | "issue"]:
            return name in used.issuing
        case ["dma", name, "descriptor"]:
            return used.lists and name in used.dma
        case ["dma", name, "bandwidth" | "stream" | "latency" | "issue"]:
            return name in used.dma
        case ["dma", name, "outstanding" | "granule"] | ["dma", name, "numbers", _]:
            return name in used.dma
        case ["memories" | "fabrics", name, "bandwidth"]:
            return any(name in chip.dma[d].route for d in used.dma)
        case ["links", name, "bandwidth" | "latency"]:
            return name == used.link or any(name in chip.dma[d].route for d in used.dma)
        case _:
            return False


def _used(function: Function, chip: Chip, busy: Collection[str]) -> _Used:
    engines: dict[str, set[str]] = {}
    moving: set[str] = set()
    lists = False
    buffers: dict[Value, Op] = {}
    for op in ops_of(function.body):
        if op.name == "buffer":
            buffers[op.result] = op
        elif op.name == "compute":
            mine = op.attr("engines")
            for name in mine:
                engines.setdefault(name, set())
            for operation, _ in works(op.regions[0]):
                name = next((e for e in mine if chip.engines[e].law(operation)), None)
                if name is not None:
                    engines[name].add(chip.engines[name].law(operation))
        elif op.name in ("dma_load", "dma_store"):
            moving.add(engine_of(chip, buffers, op))
            lists = lists or bool(op.attr("list_axes"))
    taking = {n: frozenset(o) for n, o in engines.items() if n in busy}
    devices = devices_of(function)
    link = group_of(chip, devices).name if devices > 1 else ""
    return _Used(frozenset(engines), taking, frozenset(moving), lists, link)
