"""A case of the suite: a kernel, arguments of several sizes, and what must come out.

The expected values are computed in float64 by NumPy, from what the arguments hold, without a look
at the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.ir.blocks import Blocks
from dure.ir.dtypes import DTYPES, DType
from dure.ir.interpret_memory import View
from dure.ir.samples import copied
from dure.ir.types import TensorType
from dure.lang.kernel import Kernel
from dure.library import operators_common
from dure.library.call import IndexArray, KernelCall, index_tensor, tensor
from dure.library.operators import Operator, operator

Array: TypeAlias = "npt.NDArray[Any]"
#: What a kernel takes: an array, block-quantized values, or nothing.
Argument: TypeAlias = "Array | Blocks | None"
Shape: TypeAlias = tuple[int, ...]

#: NumPy's types by the names of the command line.
NUMPY = {name: kind.numpy for name, kind in operators_common.DTYPES.items()}
#: How far a result of this type may be from the exact one, as a part of the largest one.
TOLERANCES = {"f32": 2e-5, "f16": 2e-3, "bf16": 1.2e-2, "fp8": 8e-2, "int8": 0.0}
#: The same in units of the result: an integer is one off where the exact value is next to one.
ABSOLUTE = {"int8": 1.0}


@dataclass(frozen=True)
class Drawn:
    """Arguments of one size; ``expected`` are the right values of outputs, by position."""

    arguments: Sequence[Argument]
    expected: Mapping[int, Array]
    consts: Mapping[str, object] = field(default_factory=dict[str, object])

    def copied(self) -> list[Argument]:
        """The arguments, safe to write into."""
        return [copied_argument(a) for a in self.arguments]


@dataclass(frozen=True)
class Case:
    """One case.

    ``item`` is the kind of kernel that it stands for.  ``draw(rng, size)`` makes arguments of one
    of ``sizes``.  ``tiles`` are the consts that a compiler chooses, with sizes that are legal for
    all of them.  An output may be away from what is expected by ``tolerance`` of the largest
    expected value, or by ``absolute``; what was chosen (argmax) must be equal.  ``large`` is an
    operator, its dims and dtype: the case at its full size, to be timed.  Where the case is
    ``pinned`` its tile sizes are those of one chip's measurement, and need not fit another.
    """

    name: str
    item: str
    kernel: Kernel
    draw: Callable[[np.random.Generator, Shape], Drawn]
    sizes: tuple[Shape, ...]
    tiles: Mapping[str, int]
    large: tuple[str, str, str]
    tolerance: float = TOLERANCES["f32"]
    absolute: float = 1e-6
    updates: tuple[int, ...] = ()
    pinned: bool = False

    def drawn(self, size: Shape, seed: int = 0) -> Drawn:
        """The arguments of a size."""
        return self.draw(np.random.default_rng([seed, *size]), size)

    def call(self, drawn: Drawn) -> KernelCall:
        """The launch of drawn arguments."""
        types, lists = types_of(self.kernel, drawn.arguments)
        return KernelCall(self.kernel, tuple(types), drawn.consts, self.tiles, lists, self.updates)

    def operator(self) -> Operator:
        """The case at its full size."""
        return operator(*self.large)

    def error(self, drawn: Drawn, found: Sequence[Argument]) -> float:
        """How far the outputs in ``found`` are from what is expected, in tolerances: at most 1 is
        right.
        """
        return max(
            (
                distance(values(found[place]), expected) / self._allowed(expected)
                for place, expected in drawn.expected.items()
            ),
            default=0.0,
        )

    def _allowed(self, expected: Array) -> float:
        if not np.issubdtype(expected.dtype, np.floating):
            return 0.5
        finite = expected[np.isfinite(expected)]
        return max(self.absolute, self.tolerance * float(np.abs(finite).max(initial=0.0)))


def copied_argument(argument: Argument) -> Argument:
    """A copy that is safe to write into."""
    if argument is None:
        return None
    found = copied(argument)
    assert not isinstance(found, View)
    return found


def distance(found: Array, expected: Array) -> float:
    """The largest difference; infinite where only one is finite, or shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(found - expected))
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))


def values(argument: Argument) -> npt.NDArray[np.float64]:
    """What an argument holds, in float64."""
    assert argument is not None
    held = argument.decode() if isinstance(argument, Blocks) else argument
    return held.astype(np.float64)


def dtype_of(array: Array) -> DType:
    """The element type of an array."""
    return next(d for d in DTYPES.values() if d.numpy == array.dtype)


def types_of(
    kernel: Kernel, arguments: Sequence[Argument]
) -> tuple[list[TensorType | None], dict[int, IndexArray]]:
    """The types of arguments, with the range of their values where they are indices; and those."""
    types: list[TensorType | None] = []
    lists: dict[int, IndexArray] = {}
    names = kernel.signature.tensor_names(len(arguments))
    for place, (name, argument) in enumerate(zip(names, arguments, strict=True)):
        declared = kernel.signature.index_of(name)
        if argument is None:
            types.append(None)
        elif isinstance(argument, Blocks):
            types.append(tensor(argument.format, *argument.shape, axis=argument.axis))
        elif declared is None:
            types.append(tensor(dtype_of(argument), *argument.shape))
        else:
            low = min(int(argument.min(initial=0)), declared.low)
            high = max(int(argument.max(initial=0)), 0)
            types.append(index_tensor(argument, low, high, unique=declared.unique))
            lists[place] = argument
    return types, lists


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> Array:
    """Random numbers: normal ones, or small integers."""
    if dtype == "int8":
        return rng.integers(-9, 10, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(NUMPY[dtype])


def empty(dtype: str, *shape: int) -> Array:
    """An output before it is written: values that would show."""
    return np.full(shape, 77, NUMPY[dtype])


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``"""
    return x / (1.0 + np.exp(-x))
