"""Kernel calls compiled for a chip: tile sizes chosen, program proved, time simulated.

This is what every command that shows a kernel on a chip calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from dure.compiler.chip.allocate import ScratchpadError
from dure.compiler.chip.pipeline import Compiled, Options, compile_for
from dure.compiler.chip.search import Candidate, Choice, choose
from dure.errors import DureError, UnprovedError
from dure.ir.core import Function
from dure.ir.devices import over_devices
from dure.ir.verifier import verify
from dure.library.call import IndexArray, KernelCall
from dure.machine.chip import Chip
from dure.sim.sanitizer import Verdict, sanitize
from dure.sim.timing import Timing, simulate

#: States that the proof of one of several programs may take before the next one is tried, and the
#: programs that are tried so.
_STATES, _TRIED = 4000, 4


@dataclass(frozen=True)
class Built:
    """A call on a chip: its program, how it was proved, and its time.

    ``consts`` are the tile sizes; ``compile_s`` and ``sim_s`` the seconds that compiling (with the
    choice of tiles) and one simulation took.  ``verdict`` is None for the host, which runs other
    code than the program that its time is predicted with.
    """

    call: KernelCall
    chip: Chip
    consts: Mapping[str, int]
    compiled: Compiled
    verdict: Verdict | None
    timing: Timing
    compile_s: float
    sim_s: float


def tile_function(call: KernelCall, tiles: Mapping[str, int] | None = None) -> Function:
    """The call's tile function, with what it updates in place declared so."""
    function = over_devices(call.specialize(tiles), call.devices)
    if not call.updates:
        return function
    present = [place for place, kind in enumerate(call.types) if kind is not None]
    params = list(function.params)
    for place in call.updates:
        number = present.index(place)
        params[number] = replace(params[number], access="inout")
    return replace(function, params=tuple(params))


def index_values(call: KernelCall, function: Function) -> dict[str, IndexArray]:
    """The values of a call's index arguments, by the names of the function's parameters."""
    present = [place for place, kind in enumerate(call.types) if kind is not None]
    return {
        function.params[present.index(place)].value.name: values
        for place, values in call.indices.items()
    }


def build(
    call: KernelCall,
    chip: Chip,
    *,
    strict: bool = False,
    tiles: Mapping[str, int] | None = None,
    options: Options | None = None,
    base: Options | None = None,
    record: bool = False,
) -> Built:
    """Compile a call for a chip, prove the program and simulate it.

    The compiler chooses the open tile sizes, loop order and split, unless ``tiles`` (all of them)
    or ``options`` pin them; ``base`` has the options that it doesn't choose.
    Raises :class:`~dure.errors.DureError` for a kernel that the chip can't run, and
    :class:`UnprovedError` for a program that isn't proved.
    """
    started = time.perf_counter()
    programs = _programs(call, chip, strict=strict, tiles=tiles, options=options, base=base)
    found, verdict = _proved(programs, chip)
    compiled, timing, sim_s = found.compiled, found.timing, found.sim_s
    compile_s = time.perf_counter() - started - sim_s
    check_proved(verdict, f"'{call.kernel.__name__}' for {chip.name}", "kernel")
    if timing is None or record:
        started = time.perf_counter()
        indices = index_values(call, compiled.function)
        timing = simulate(compiled.function, chip, indices=indices, record=record)
        sim_s = time.perf_counter() - started
    return Built(call, chip, found.consts, compiled, verdict, timing, compile_s, sim_s)


def check_proved(verdict: Verdict, program: str, kind: str) -> None:
    """Raises :class:`UnprovedError` for a program that isn't proved, with what was found."""
    if verdict.ok:
        return
    raise UnprovedError(
        f"the program of {program} isn't proved",
        where="\n".join(f.render() for f in verdict.findings[:3]),
        rule="a program is free of races, deadlocks and reads of what nobody wrote",
        fix=f"this is a defect of the compiler: please report the {kind} and its sizes",
    )


def choose_program(
    call: KernelCall,
    chip: Chip,
    *,
    strict: bool = False,
    tiles: Mapping[str, int] | None = None,
    options: Options | None = None,
    base: Options | None = None,
) -> tuple[dict[str, int], Compiled]:
    """The call's tile sizes on a chip and its program, as :func:`build` chooses them, not proved
    yet.
    """
    found = next(_programs(call, chip, strict=strict, tiles=tiles, options=options, base=base))
    return found.consts, found.compiled


def _proved(programs: Iterable[Candidate], chip: Chip) -> tuple[Candidate, Verdict]:
    """The first program that is proved, or the first that is wrong, or else the first of all.

    A proof may be too long for one split over the cores and short for another.
    """
    first: Candidate | None = None
    for found in islice(programs, _TRIED):
        function = found.compiled.function
        verify(function)
        verdict = sanitize(function, chip, states=_STATES)
        if verdict.ok or any(f.kind != "not-proved" for f in verdict.findings):
            return found, verdict
        first = first or found
    assert first is not None
    return first, sanitize(first.compiled.function, chip)


def _programs(
    call: KernelCall,
    chip: Chip,
    *,
    strict: bool,
    tiles: Mapping[str, int] | None,
    options: Options | None,
    base: Options | None = None,
) -> Iterator[Candidate]:
    """The tile sizes and programs of a call, the fastest first; one where they are pinned."""
    base = base or Options(strict=strict)
    if options is None and (tiles is None or not call.open):
        choice = _choice(call, chip, base)
        yield choice.chosen
        yield from choice.others
        return
    consts = {**call.tiles, **(tiles or {})}
    how = options or base
    try:
        function = tile_function(call, consts)
        indices = index_values(call, function)
        yield Candidate(consts, compile_for(function, chip, how, indices))
    except ScratchpadError as error:
        _name_what_fits(error, call, chip, base)
        raise


def _choice(call: KernelCall, chip: Chip, base: Options) -> Choice:
    return choose(
        lambda sizes: tile_function(call, sizes),
        call.open,
        chip,
        legal=call.tiles,
        indices=index_values(call, tile_function(call)),
        base=base,
        among=call.variants,
    )


def _name_what_fits(error: ScratchpadError, call: KernelCall, chip: Chip, base: Options) -> None:
    """Put sizes that fit, and their time, into the error of tiles that don't."""
    if not call.open:
        return
    try:
        found = _choice(call, chip, base)
    except DureError:
        return
    sizes = " ".join(f"{name}={size}" for name, size in found.consts.items())
    error.fix = f"these tile sizes fit, and take {found.timing.ns / 1e3:.1f} us: {sizes}"


def total_ps(parts: Sequence[Built]) -> int:
    """The time of launches one after another: each starts when the one before has ended."""
    return sum(part.timing.ps for part in parts)
