"""The matrix of kernels and chips: what compiles, is proved, is right, and how long it takes.

A cell is one case of the suite on one target.  Its stages, in order: the case compiles at each of
its sizes, the machine program is proved, it computes the reference's values on real bytes, and the
case's full-size operator is timed.  On the CPU values are the interpreter's and those of compiled
code, nothing is proved, and the time is predicted from the host's measured rates.
"""

from __future__ import annotations

import functools
import hashlib
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast

import ml_dtypes
import numpy as np

from dure import targets
from dure.compiler.chip.allocate import ScratchpadError
from dure.compiler.chip.host import from_chip, to_chip
from dure.compiler.chip.pipeline import Compiled, compile_for
from dure.errors import DureError, KernelError
from dure.ir.blocks import Blocks
from dure.ir.dtypes import BlockFormat, element_type
from dure.ir.verifier import verify
from dure.library.answer import check_fits
from dure.library.answer_host import host_answer
from dure.library.build import build, index_values, tile_function
from dure.library.call import KernelCall
from dure.library.suite import Argument, Case, Drawn
from dure.library.suite import case as case_of
from dure.library.suite.case import Array, distance, dtype_of, values
from dure.library.suite.execute import compile_and_run, interpret
from dure.library.work import operator_work
from dure.machine.chip import Chip
from dure.runtime.garbage import collect_rarely
from dure.sim.sanitizer import sanitize
from dure.sim.timing import simulate
from dure.sim.values import run_values
from dure.targets.cpu.microbench import HostRates, measure

Stage: TypeAlias = Literal["compile", "sanitizer", "values", "time"]
STAGES: tuple[Stage, ...] = ("compile", "sanitizer", "values", "time")
#: What a stage does; the last one makes the cell.
Step: TypeAlias = "Callable[[], Cell | None]"
CPU = "cpu"
CPU_STAGES: tuple[Stage, ...] = ("compile", "values", "time")

#: Sizes that a short run takes of each case.
SHORT_SIZES = 1
#: How far a result may be from the exact one, as a part of the largest one, in roundings of the
#: narrowest type: what the suite's own tolerances are.
_ROUNDINGS = 4
#: How often operands are perturbed, and how much further off than the worst draw a result may be.
_DRAWS = 8
_SPREAD = 2


@dataclass(frozen=True)
class Cell:
    """A case on a target: the stages that it passed, its time, and what stopped it.

    ``ps`` is the time of the full-size operator; in a short run, of the first small size.  ``note``
    says why there is none though nothing failed.
    """

    case: str
    item: str
    target: str
    passed: tuple[Stage, ...]
    ps: int | None = None
    failed: str = ""
    error: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether every stage passed."""
        return not self.failed


class Matrix:
    """Computes cells; remembers the times of operators that several cases share.

    ``short`` takes one size of each case, and times that.
    """

    def __init__(self, *, short: bool = False, rates: HostRates | None = None) -> None:
        self.short = short
        self.rates = rates
        self.times: dict[tuple[object, ...], int] = {}

    def cell(self, case: Case, chip: Chip | None) -> Cell:
        """One case on one chip, or on the CPU where there is none."""
        target = CPU if chip is None else chip.name
        stages = CPU_STAGES if chip is None else STAGES
        made = Cell(case.name, case.item, target, stages)
        stage: Stage = "compile"
        try:
            for step in self._steps(case, chip):
                stage = step[0]
                made = step[1]() or made
        except Exception as error:  # a defect of whatever kind is what the matrix is there to show
            said = (
                str(error) if isinstance(error, DureError) else f"{type(error).__name__}: {error}"
            )
            passed = stages[: stages.index(stage)]
            return replace(made, passed=passed, failed=stage, error=said)
        return made

    def _steps(self, case: Case, chip: Chip | None) -> Iterator[tuple[Stage, Step]]:
        sizes = case.sizes[:SHORT_SIZES] if self.short else case.sizes
        if chip is None:
            return self._on_cpu(case, sizes)
        return self._on_chip(case, chip, sizes)

    def _on_chip(
        self, case: Case, chip: Chip, sizes: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[Stage, Step]]:
        programs: dict[tuple[int, ...], Compiled] = {}

        def compiled() -> None:
            for size in sizes:
                made = compile_for(tile_function(case.call(case.drawn(size))), chip)
                verify(made.function)
                programs[size] = made

        def proved() -> None:
            for size, made in programs.items():
                verdict = sanitize(made.function, chip)
                if not verdict.ok:
                    raise KernelError(f"size {size}: {verdict.render()}")

        def right() -> None:
            for size, made in programs.items():
                check_values(case, chip, size, made)

        def timed() -> Cell:
            cell = Cell(case.name, case.item, chip.name, STAGES)
            if self.short:
                call = case.call(case.drawn(sizes[0]))
                return replace(cell, ps=_simulated(call, programs[sizes[0]], chip))
            try:
                return replace(cell, ps=self._full_time(case, chip))
            except ScratchpadError as error:
                if not case.pinned:
                    raise
                return replace(cell, note=f"its pinned tiles don't fit: {error.what}")

        yield "compile", compiled
        yield "sanitizer", proved
        yield "values", right
        yield "time", timed

    def _on_cpu(self, case: Case, sizes: Sequence[tuple[int, ...]]) -> Iterator[tuple[Stage, Step]]:
        """The CPU's values are the interpreter's and those of compiled code."""

        def compiled() -> None:
            for size in sizes:
                tile_function(case.call(case.drawn(size)))

        def right() -> None:
            for size in sizes:
                for execute in (interpret, compile_and_run):
                    drawn = case.drawn(size)
                    found = drawn.copied()
                    execute(tile_function(case.call(drawn)), found)
                    _compare(case, size, drawn, found)

        def timed() -> Cell:
            cell = Cell(case.name, case.item, CPU, CPU_STAGES)
            if self.rates is None:
                return cell
            key = (CPU, *case.large)
            if key not in self.times:
                self.times[key] = host_answer(operator_work(*case.large), self.rates).ps
            return replace(cell, ps=self.times[key])

        yield "compile", compiled
        yield "values", right
        yield "time", timed

    def _full_time(self, case: Case, chip: Chip) -> int:
        key = (chip.name, *case.large)
        if key not in self.times:
            work = operator_work(*case.large)
            check_fits(work, chip)
            self.times[key] = sum(build(call, chip).timing.ps for call in work.calls)
        return self.times[key]


def matrix(
    cases: Sequence[Case], names: Sequence[str], *, short: bool = False, jobs: int = 1
) -> Iterator[list[Cell]]:
    """The cells of cases on targets, a few at a time as they are done, ``jobs`` at once.

    Cases that are timed by the same operator are done together, so that it is timed once.  The
    host's rates are measured first, while nothing else runs; a short run does without.
    """
    rates = measure() if CPU in names and not short else None
    groups: dict[tuple[str, str, str], list[str]] = {}
    for case in cases:
        groups.setdefault(case.large, []).append(case.name)
    if jobs == 1:
        for group in groups.values():
            yield _cells(group, names, short, rates)
        return
    spawning = multiprocessing.get_context("spawn")  # forks don't go with threads
    with ProcessPoolExecutor(jobs, spawning, collect_rarely) as pool:
        tasks = [pool.submit(_cells, group, names, short, rates) for group in groups.values()]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _cells(
    cases: Sequence[str], names: Sequence[str], short: bool, rates: HostRates | None
) -> list[Cell]:
    work = Matrix(short=short, rates=rates)
    return [work.cell(case_of(case), chip_of(name)) for case in cases for name in names]


@functools.cache
def chip_of(name: str) -> Chip | None:
    """The chip of this name or file; None for the CPU."""
    return None if name == CPU else targets.chip(name)


# --- on a chip -----------------------------------------------------------------------------------


def run_on_chip(
    compiled: Compiled, chip: Chip, arguments: Sequence[Argument], seed: int = 0
) -> None:
    """Run a program on its arguments, which it writes in place."""
    present = [a for a in arguments if a is not None]
    passed = to_chip(compiled.function, present)
    run_values(compiled.function, chip, passed, seed=seed)
    from_chip(compiled.function, passed, present)


def check_values(case: Case, chip: Chip, size: tuple[int, ...], compiled: Compiled) -> None:
    """Raise :class:`KernelError` unless a program computes what the case expects.

    Where the chip computes in a type of fewer digits than the operands have, the tolerance is that
    type's.  A result that is small beside what it sums may then be further off, by as much as it
    moves when the operands are moved by one rounding of that type.
    """
    drawn = case.drawn(size)
    found = drawn.copied()
    seed = seed_of(case.name, chip.name, size)
    run_on_chip(compiled, chip, found, seed)
    least = fewest_digits(chip, compiled)
    wider = case
    if least is not None:
        wider = replace(case, tolerance=max(case.tolerance, _ROUNDINGS * 2.0**-least))
        if wider.error(drawn, found) > 1:
            wider = _conditioned(wider, drawn, least, seed)
    _compare(wider, size, drawn, found)


def _compare(case: Case, size: tuple[int, ...], drawn: Drawn, found: Sequence[Argument]) -> None:
    error = case.error(drawn, found)
    if not error <= 1:
        raise KernelError(
            f"size {size}: {error:.3g} times as far from the reference as allowed",
            rule="values agree with float64 NumPy within the tolerance of the operands' type",
        )


def _conditioned(case: Case, drawn: Drawn, least: int, seed: int) -> Case:
    """The case, allowing what operands of so few digits may do to its results."""
    rng = np.random.default_rng(seed)
    function = tile_function(case.call(drawn))
    moved = 0.0
    for _ in range(_DRAWS):
        arguments = [_perturbed(a, 2.0**-least, rng) for a in drawn.copied()]
        interpret(function, arguments)
        for place, expected in drawn.expected.items():
            moved = max(moved, distance(values(arguments[place]), expected))
    largest = min(float(np.abs(e).max(initial=0.0)) for e in drawn.expected.values())
    allowed = case.tolerance * largest
    return replace(case, absolute=max(case.absolute, allowed + _SPREAD * moved))


def _perturbed(argument: Argument, part: float, rng: np.random.Generator) -> Argument:
    """An argument whose floats are off by up to this part."""
    if isinstance(argument, Blocks):
        for plane in argument.planes.values():
            plane[...] = _moved(plane, part, rng)
        return argument
    return None if argument is None else _moved(argument, part, rng)


def _moved(array: Array, part: float, rng: np.random.Generator) -> Array:
    if not dtype_of(array).is_float:
        return array
    factors = 1 + part * rng.uniform(-1, 1, array.shape)
    return (array.astype(np.float64) * factors).astype(array.dtype)


def fewest_digits(chip: Chip, compiled: Compiled) -> int | None:
    """The digits of the narrowest type that values are rounded to on the chip and not in the tile
    program; None where there is none.
    """
    narrow = [
        digits(c.becomes, chip)
        for c in compiled.conversions
        if digits(c.becomes, chip) < digits(c.found)
    ]
    held = {str(p.value.tensor.dtype) for p in compiled.function.params} & set(chip.formats)
    narrow += [digits(name, chip) for name in held if digits(name, chip) < digits(name)]
    return min(narrow, default=None)


def digits(name: str, chip: Chip | None = None) -> int:
    """Binary digits that an element type holds exactly, on a chip in its own format; of a block
    format as many as float32.
    """
    kind = element_type(name)
    if chip is not None and name in chip.formats:
        return int(chip.formats[name].mantissa.base) + 1
    if isinstance(kind, BlockFormat):
        return digits("float32")
    if not kind.is_float:
        return kind.bits
    finfo = cast("Any", ml_dtypes).finfo(kind.numpy)
    return 1 - round(math.log2(float(finfo.eps)))


def seed_of(*parts: object) -> int:
    """A seed that only depends on what it is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def _simulated(call: KernelCall, compiled: Compiled, chip: Chip) -> int:
    return simulate(compiled.function, chip, indices=index_values(call, compiled.function)).ps
