"""The matrix of kernels and chips: what compiles, is proved, is right, and how long it takes.

A cell is one case of the suite on one target.  Its stages, in order: the case compiles at each of
its sizes, the machine program is proved, it computes the reference's values on real bytes, and the
case's full-size operator is timed.  On the CPU a cell has values alone, by the interpreter and by
the compiled code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from dure.compiler.chip.allocate import ScratchpadError
from dure.compiler.chip.host import from_chip, to_chip
from dure.compiler.chip.legalise import Conversion
from dure.compiler.chip.pipeline import Compiled, compile_for
from dure.errors import DureError, KernelError
from dure.ir.dtypes import BlockFormat, element_type
from dure.ir.verifier import verify
from dure.library.answer import check_fits
from dure.library.build import build, index_values, tile_function
from dure.library.call import KernelCall
from dure.library.suite import TOLERANCES, Argument, Case, Drawn
from dure.library.suite.execute import compile_and_run, interpret
from dure.library.work import operator_work
from dure.machine.chip import Chip
from dure.sim.sanitizer import sanitize
from dure.sim.timing import simulate
from dure.sim.values import run_values

Stage: TypeAlias = Literal["compile", "sanitizer", "values", "time"]
STAGES: tuple[Stage, ...] = ("compile", "sanitizer", "values", "time")
#: What a stage does; the last one makes the cell.
Step: TypeAlias = "Callable[[], Cell | None]"
CPU_STAGES: tuple[Stage, ...] = ("compile", "values")

#: Sizes that a short run takes of each case.
SHORT_SIZES = 1
#: How far a result may be from the exact one where operands pass through a type, as a part of the
#: largest one.
_TOLERANCE_OF = {
    "float16": TOLERANCES["f16"],
    "bfloat16": TOLERANCES["bf16"],
    "float8_e4m3fn": TOLERANCES["fp8"],
    "float8_e5m2": 2 * TOLERANCES["fp8"],
}


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

    def __init__(self, *, short: bool = False) -> None:
        self.short = short
        self.times: dict[tuple[object, ...], int] = {}

    def cell(self, case: Case, chip: Chip | None) -> Cell:
        """One case on one chip, or on the CPU where there is none."""
        target = "cpu" if chip is None else chip.name
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
            return on_cpu(case, sizes)
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

    def _full_time(self, case: Case, chip: Chip) -> int:
        key = (chip.name, *case.large)
        if key not in self.times:
            work = operator_work(*case.large)
            check_fits(work, chip)
            self.times[key] = sum(build(call, chip).timing.ps for call in work.calls)
        return self.times[key]


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
    """Raise :class:`KernelError` unless a program computes what the case expects."""
    drawn = case.drawn(size)
    found = drawn.copied()
    run_on_chip(compiled, chip, found, seed_of(case.name, chip.name, size))
    _compare(allowed(case, compiled.conversions), size, drawn, found)


def _compare(case: Case, size: tuple[int, ...], drawn: Drawn, found: Sequence[Argument]) -> None:
    error = case.error(drawn, found)
    if not error <= 1:
        raise KernelError(
            f"size {size}: {error:.3g} times as far from the reference as allowed",
            rule="values agree with float64 NumPy within the tolerance of the operands' type",
        )


def allowed(case: Case, conversions: Sequence[Conversion]) -> Case:
    """The case with the tolerance of the types that the chip converts to."""
    narrowing = [c.becomes for c in conversions if _narrows(c)]
    coarse = max((_TOLERANCE_OF.get(name, 0.0) for name in narrowing), default=0.0)
    return replace(case, tolerance=max(case.tolerance, coarse))


def _narrows(conversion: Conversion) -> bool:
    """Whether a conversion may lose digits (a block format's values may, wherever they go)."""
    found, becomes = element_type(conversion.found), element_type(conversion.becomes)
    return isinstance(found, BlockFormat) or found.bits > becomes.bits


def seed_of(*parts: object) -> int:
    """A seed that only depends on what it is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def _simulated(call: KernelCall, compiled: Compiled, chip: Chip) -> int:
    return simulate(compiled.function, chip, indices=index_values(call, compiled.function)).ps


# --- on the CPU ----------------------------------------------------------------------------------


def on_cpu(case: Case, sizes: Sequence[tuple[int, ...]]) -> Iterator[tuple[Stage, Step]]:
    """The stages of the CPU: the interpreter's values, and those of compiled code."""

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

    yield "compile", compiled
    yield "values", right
