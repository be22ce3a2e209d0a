"""A machine program's results beside reference values: the worst element, and how wrong it is.

The error of a float is relative to its reference value, or to the root mean square of the whole
reference where that is larger: an element that cancelled to nearly nothing owes its last bits to
the magnitude of what cancelled.  Integers and booleans must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from dure.ir.blocks import Blocks
from dure.ir.core import Function
from dure.ir.dtypes import Array, BlockFormat, DType, ElementType
from dure.ir.samples import copied
from dure.machine.chip import Chip
from dure.sim.arithmetic import Formats, formats_of
from dure.sim.storage import raw_view
from dure.sim.values import run_values

#: Units of the coarsest float type among the arguments that a result may be off by.
_UNITS = 16.0


@dataclass(frozen=True, slots=True)
class Difference:
    """The worst element of a program's results."""

    name: str
    place: tuple[int, ...]
    found: float
    expected: float
    relative: float
    tolerance: float
    seed: int

    def __str__(self) -> str:
        return (
            f"'{self.name}' is {self.found:.6g} at {list(self.place)}, expected "
            f"{self.expected:.6g}: relative error {self.relative:.3g}, tolerance "
            f"{self.tolerance:.3g} (seed {self.seed})"
        )


def compare(
    function: Function,
    chip: Chip,
    arrays: Sequence[Array | Blocks],
    reference: Sequence[Array | Blocks | None],
    *,
    tolerance: float | None = None,
    seeds: Sequence[int] = (0,),
) -> Difference | None:
    """Run on copies of ``arrays`` and give the worst difference, or None if all is within bounds.

    ``reference`` holds what each argument should be afterwards, in any float type (float64, best),
    or None for one that isn't compared.  ``tolerance`` is the relative error allowed for floats;
    None allows 16 units of the coarsest float type among the arguments.
    """
    worst: Difference | None = None
    allowed = _default_tolerance(function, formats_of(chip)) if tolerance is None else tolerance
    for seed in seeds:
        copies = cast("list[Array | Blocks]", [copied(array) for array in arrays])
        run_values(function, chip, copies, seed=seed)
        for param, found, expected in zip(function.params, copies, reference, strict=True):
            if expected is None:
                continue
            limit = allowed if param.value.type.dtype.is_float else 0.0
            here = _worst(param.value.name, found, expected, limit, seed)
            if here is not None and (worst is None or here.relative > worst.relative):
                worst = here
    return worst


def relative_errors(found: Array | Blocks, expected: Array | Blocks) -> npt.NDArray[np.float64]:
    """The relative error of every element; infinite where one of the two is NaN or infinite."""
    have, want = _wide(found), _wide(expected)
    with np.errstate(all="ignore"):
        finite = np.isfinite(want)
        typical = np.sqrt(np.mean(np.square(want[finite]))) if finite.any() else 0.0
        error = np.abs(have - want) / np.maximum(np.abs(want), typical)
    same = (have == want) | (np.isnan(have) & np.isnan(want))
    return np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf))


def _worst(
    name: str, found: Array | Blocks, expected: Array | Blocks, limit: float, seed: int
) -> Difference | None:
    errors = relative_errors(found, expected)
    if not errors.size or errors.max() <= limit:
        return None
    place = tuple(int(i) for i in np.unravel_index(int(errors.argmax()), errors.shape))
    have, want = float(_wide(found)[place]), float(_wide(expected)[place])
    return Difference(name, place, have, want, float(errors[place]), limit, seed)


def _wide(values: Array | Blocks) -> npt.NDArray[np.float64]:
    if isinstance(values, Blocks):
        return values.decode().astype(np.float64)
    if values.dtype.kind == "V" and values.dtype.itemsize == 1:
        # Types below a byte convert by way of float32.
        return values.astype(np.float32).astype(np.float64)
    return values.astype(np.float64)


def _default_tolerance(function: Function, formats: Formats) -> float:
    return _UNITS * max(
        (_unit(param.value.type.dtype, formats) for param in function.params), default=0.0
    )


def _unit(element: ElementType, formats: Formats) -> float:
    """The relative spacing of a float type's numbers; 0 for others."""
    if isinstance(element, BlockFormat) or not element.is_float:
        # A quantized weight is what its planes say, exactly.
        return 0.0
    return _spacing(element, formats)


def _spacing(element: DType, formats: Formats) -> float:
    format = formats.get(element)
    if format is not None:
        return 2.0**-format.mantissa
    one = raw_view(np.ones(1, element.numpy))
    following: Array = np.array([int(one.astype(np.int64)[0]) + 1]).astype(one.dtype)
    return float(_wide(following.view(element.numpy))[0]) - 1
