"""Grid instances, loops and what is decided when a kernel is compiled."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from dure.errors import KernelError
from dure.ir.expr import Expr
from dure.lang import indices
from dure.lang.values import Counter, Index, TileBase, builder, builtin, describe, is_index


@builtin
def program_id(axis: int) -> Any:
    """This instance's position along a grid axis (0 to 3)."""
    return builder().program_id(_grid_axis(axis, "program_id"))


@builtin
def num_programs(axis: int) -> Any:
    """The grid's extent along an axis."""
    return builder().num_programs(_grid_axis(axis, "num_programs"))


MAX_GRID_AXES = 4


def _grid_axis(axis: object, name: str) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < MAX_GRID_AXES:
        raise KernelError(
            f"dl.{name}({describe(axis)})",
            rule=f"a grid has axes 0 to {MAX_GRID_AXES - 1}",
            fix=f"dl.{name}(0)",
        )
    return axis


@builtin
def cdiv(numerator: Any, divisor: Any) -> Any:
    """``ceil(numerator / divisor)`` of index scalars or integers."""
    for value in (numerator, divisor):
        if not is_index(value):
            raise KernelError(
                f"dl.cdiv of {describe(value)}",
                rule="dl.cdiv divides index scalars",
                fix="use // for tiles",
            )
    if isinstance(divisor, int) and divisor <= 0:
        raise KernelError(
            f"dl.cdiv by {divisor}",
            rule="the divisor of dl.cdiv is positive",
            fix="divide by a tile size",
        )
    return indices.cdiv(numerator, divisor)


@dataclass(frozen=True, eq=False, slots=True)
class LoopRange:
    """``start, start + step, ...`` below ``stop``: a loop that runs when the kernel does."""

    start: Index
    stop: Index
    step: int

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.start, Expr) or isinstance(self.stop, Expr):
            raise KernelError(
                f"a range({self.start}, {self.stop}) is taken apart when the kernel is compiled",
                rule="its bounds are known when the kernel runs",
                fix="loop over it with a for statement, or use numbers known to the compiler",
            )
        return map(Counter, builtins.range(self.start, self.stop, self.step))

    def __len__(self) -> int:
        return len(tuple(self))


@builtin
def range(start: Any, stop: Any = None, step: Any = 1) -> LoopRange:
    """A loop that runs when the kernel does, as Python's range; ``step`` is a positive constant."""
    first, last = (0, start) if stop is None else (start, stop)
    for bound in (first, last):
        if not is_index(bound):
            raise KernelError(
                f"a loop bounded by {describe(bound)}",
                rule="a loop's bounds are integers, sizes, program ids or elements of a dl.Index",
                fix="compute the bound from those",
            )
    if isinstance(step, bool) or not isinstance(step, int) or step <= 0:
        raise KernelError(
            f"a loop with the step {describe(step)}",
            rule="a loop's step is a positive integer known when the kernel is compiled",
            fix="count upwards from 0 and compute the index from the loop variable",
        )
    return LoopRange(cast("Index", first), cast("Index", last), step)


@builtin
def static_range(start: Any, stop: Any = None, step: Any = 1) -> builtins.range:
    """A loop that is unrolled when the kernel is compiled; all three are integers known then."""
    for bound in (start, step) if stop is None else (start, stop, step):
        if isinstance(bound, bool) or not isinstance(bound, int):
            raise KernelError(
                f"dl.static_range with {describe(bound)}",
                rule="an unrolled loop has bounds that are known when the kernel is compiled",
                fix="use dl.range, which runs when the kernel does",
            )
    if step == 0:
        raise KernelError(
            "dl.static_range with a step of 0", rule="a step is not zero", fix="use a step of 1"
        )
    return builtins.range(start) if stop is None else builtins.range(start, stop, step)


@builtin
def static_assert(condition: Any, message: str = "") -> None:
    """Check a condition when the kernel is compiled; on sizes, when it is launched."""
    if isinstance(condition, TileBase):
        raise KernelError(
            f"dl.static_assert of {describe(condition)}",
            rule="it checks constants and conditions on sizes",
            fix="compare shapes or consts",
        )
    builder().require(
        condition,
        KernelError(
            f"the assertion fails: {message or condition}",
            rule="dl.static_assert holds for every launch",
            fix="pass arguments for which it holds",
        ),
    )
