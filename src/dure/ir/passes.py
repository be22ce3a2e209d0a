"""Running passes, and watching what they do to a program.

With ``DURE_DUMP=DIR`` the program is written as text before the first and after every pass.  With
``DURE_CHECK=1`` it is verified and interpreted on generated arguments around every pass, and the
first pass that changed a result is named: bit by bit where every op is exact under any order of
evaluation, else within the bounds that the ops declare.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dure import settings
from dure.errors import IRError
from dure.ir.blocks import Blocks
from dure.ir.core import Function, Op, Region
from dure.ir.dtypes import Array, DType
from dure.ir.expr import Range, as_expr, bounds
from dure.ir.interpret import Evaluator, execute
from dure.ir.printer import print_function
from dure.ir.samples import Sample, draw
from dure.ir.types import Type
from dure.ir.verifier import functions_in, verify

#: Gives arguments for a program from a seed, where its types don't say enough.
Sampler: TypeAlias = Callable[[Function, int], Sample]

#: Programs are compared on this many samples, out of at most so many draws.
SAMPLES, DRAWS = 2, 8
#: Programs written so far by folder and name: the passes of several stages are numbered on.
_DUMPED: Counter[tuple[Path, str]] = Counter()
#: Trips that a loop is taken to have where no bound is known.
_TRIPS = 64


@dataclass(frozen=True, slots=True)
class Pass:
    """A named step of compiling: a function from program to program."""

    name: str
    run: Callable[[Function], Function]


def run_passes(function: Function, passes: Sequence[Pass], *, sampler: Sampler = draw) -> Function:
    """The program after all passes, watched as the settings ask.

    Raises :class:`IRError` naming the first pass that broke a rule or changed a result.
    """
    watch = watcher(sampler)
    for step in passes:
        before, function = function, step.run(function)
        if watch is not None:
            watch(step.name, before, function)
    return function


def watcher(sampler: Sampler = draw) -> Watcher | None:
    """What is called as ``watch(name, before, after)`` around passes; None if nothing is asked."""
    check, folder = settings.check(), settings.dump_dir()
    return Watcher(sampler, check, folder) if check or folder is not None else None


class Watcher:
    """Dumps and checks the programs that go by.  Remembers what the last one computed."""

    def __init__(self, sampler: Sampler, check: bool, folder: Path | None) -> None:
        self.sampler = sampler
        self.check = check
        self.folder = folder
        self.last: Function | None = None
        self.samples: list[Sample] = []
        self.results: list[list[Array | Blocks]] = []

    def __call__(self, name: str, before: Function, after: Function) -> None:
        """Look at one pass.  Raises :class:`IRError` if it broke the program."""
        if self.last is not before:
            self._dump("input", before)
            if self.check:
                self._baseline(before)
        self._dump(name, after)
        if self.check:
            self._compare(name, before, after)
        self.last = after

    def _dump(self, name: str, function: Function) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = _DUMPED[self.folder, function.name]
            plain = re.sub(r"[^\w.-]+", "-", f"{function.name}.{number:02d}.{name}")
            (self.folder / f"{plain}.txt").write_text(print_function(function), encoding="utf-8")
        except OSError as error:
            raise IRError(
                f"the program after '{name}' cannot be written: {error}",
                where=str(self.folder),
                rule=f"{settings.DUMP.name} names a folder that can be written to",
                fix="choose another folder, or unset it",
            ) from error
        _DUMPED[self.folder, function.name] += 1

    def _baseline(self, function: Function) -> None:
        _verified("input", function)
        self.samples, self.results = [], []
        problem = ""
        for seed in range(DRAWS):
            if len(self.samples) == SAMPLES:
                break
            try:
                sample = self.sampler(function, seed)
                self.results.append(results_on(function, sample))
                self.samples.append(sample)
            except IRError as error:
                problem = error.what
        if not self.samples:
            warnings.warn(
                f"{settings.CHECK.name}: {function.name} runs on no generated arguments "
                f"({problem}); its passes are verified but not compared",
                stacklevel=4,
            )

    def _compare(self, name: str, before: Function, after: Function) -> None:
        _verified(name, after)
        allowed = max(allowed_error(before), allowed_error(after))
        for number, sample in enumerate(self.samples):
            try:
                found = results_on(after, sample)
            except IRError as error:
                raise IRError(
                    f"after pass '{name}' program '{after.name}' fails: {error.what}",
                    where=error.where,
                    rule="a pass keeps what a program computes",
                    fix=_fix(self.folder),
                ) from error
            if len(found) != len(self.results[number]):
                raise IRError(
                    f"pass '{name}' left {len(found)} results of {len(self.results[number])}",
                    rule="a pass keeps the arguments and results of a program",
                    fix=_fix(self.folder),
                )
            for place, (want, got) in enumerate(zip(self.results[number], found, strict=True)):
                problem = difference(want, got, allowed)
                if problem:
                    raise IRError(
                        f"pass '{name}' changed result {place} of program '{after.name}': "
                        f"{problem}",
                        where=", ".join(f"{k}={v}" for k, v in sample.sizes.items()),
                        rule="a pass keeps what a program computes, bit by bit where every order "
                        "of evaluation is exact, else within the declared bounds",
                        fix=_fix(self.folder),
                    )
            self.results[number] = found


def _fix(folder: Path | None) -> str:
    if folder is not None:
        return f"compare the last two programs in {folder}"
    return f"set {settings.DUMP.name}=DIR and compare the last two programs"


def _verified(name: str, function: Function) -> None:
    try:
        verify(function)
    except IRError as error:
        error.what = f"after '{name}': {error.what}"
        error.args = (error.what,)
        raise


def results_on(
    function: Function, sample: Sample, *, evaluator: Evaluator | None = None
) -> list[Array | Blocks]:
    """What a program leaves in its out and inout arguments, then what it yields."""
    arguments = sample.copied()
    names = {s.name for s in function.symbols}
    sizes = {name: value for name, value in sample.sizes.items() if name in names}
    yields = execute(function, arguments, sizes, seed=0, evaluator=evaluator)
    written = [a for a, p in zip(arguments, function.params, strict=True) if p.access != "in"]
    return [v for v in (*written, *yields) if isinstance(v, np.ndarray | Blocks)]


# --- how far results may lie apart --------------------------------------------------------------


def allowed_error(function: Function) -> float:
    """How far a result may move under another order of evaluation, as part of its largest value.

    0 where every op is exact.  Each other op adds its declared bound times the elements that it
    accumulates, in epsilons of its result's type; each exact op that rounds to a type coarser than
    float32 adds that type's epsilon, because it may round another way after them.  Independent
    roundings add as squares do.
    """
    inexact, coarse = _squares(function.body, 1.0)
    return min(0.25, 4 * math.sqrt(inexact + coarse)) if inexact else 0.0


def _squares(region: Region, times: float) -> tuple[float, float]:
    """The sums for inexact and for exact but coarse ops."""
    inexact, coarse = 0.0, 0.0
    for op in region.ops:
        if op.results:
            epsilon = _epsilon(op.results[0].type)
            if not op.definition.exact:
                step = op.definition.error_bound * _accumulated(op) * epsilon
                inexact += times * step * step
            elif epsilon > 2.0**-23:
                coarse += times * epsilon * epsilon
        parts = [_squares(r, times * _trips(op)) for r in op.regions]
        parts += [_squares(f.body, times) for f in _functions(op)]
        inexact += sum(part[0] for part in parts)
        coarse += sum(part[1] for part in parts)
    return inexact, coarse


def _functions(op: Op) -> Iterable[Function]:
    body = Region((), (Op(op.name, (), (), op.attrs),))
    return functions_in(Function("", "any", (), body))


def _trips(op: Op) -> int:
    if op.name == "for":
        found = Range(as_expr(op.attr("start")), as_expr(op.attr("stop")), op.attr("step"))
        high = bounds(found.trips)[1]
        return _TRIPS if high is None else min(high, 1 << 16)
    count: object = op.attrs.get("count")
    return count if isinstance(count, int) else 1


def _accumulated(op: Op) -> int:
    """Elements that one result element adds up: the largest operand's over the result's."""
    shapes = [_elements(v.type) for v in op.operands]
    return max(1, min(1 << 16, max(shapes, default=1) // max(1, _elements(op.results[0].type))))


def _elements(kind: Type) -> int:
    total = 1
    for extent in kind.shape:
        high = bounds(as_expr(extent))[1]
        total *= _TRIPS if high is None else max(1, high)
    return total


def _epsilon(kind: Type) -> float:
    """The spacing of a type's numbers at 1; one code of a block format."""
    if not isinstance(kind.dtype, DType):
        return 1 / 127
    mantissas = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
    small = {"float8_e4m3fn": 3, "float8_e5m2": 2}
    return 2.0 ** -(mantissas | small).get(kind.dtype.name, 23)


def difference(want: Array | Blocks, got: Array | Blocks, allowed: float) -> str:
    """What is wrong with ``got``, or nothing.

    ``allowed`` is relative to the largest magnitude in ``want``; 0 asks for the same bits (every
    NaN is the same).  Integers must be equal whatever is allowed.
    """
    one = want.decode() if isinstance(want, Blocks) else want
    other = got.decode() if isinstance(got, Blocks) else got
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{other.dtype} of {other.shape} instead of {one.dtype} of {one.shape}"
    if not one.size:
        return ""
    exact = one.dtype.kind in "iub" or not allowed
    wide, seen = one.astype(np.float64), other.astype(np.float64)
    if exact:
        same = (wide == seen) & (np.signbit(wide) == np.signbit(seen))
        wrong = ~(same | (np.isnan(wide) & np.isnan(seen)))
    else:
        finite = np.isfinite(wide)
        largest = float(np.abs(wide[finite]).max(initial=0.0))
        with np.errstate(invalid="ignore"):
            close = np.abs(wide - seen) <= allowed * largest
        wrong = ~np.where(finite, close, (wide == seen) | (np.isnan(wide) & np.isnan(seen)))
    if not wrong.any():
        return ""
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    limit = f", more than {allowed:.2g} of the largest value apart" if not exact else ""
    return (
        f"{int(wrong.sum())} of {wrong.size} elements differ{limit}; "
        f"at {place} {wide[place]:.9g} became {seen[place]:.9g}"
    )
