"""Where the tensors of a program lie in a chip's memory, and how a launch's arguments see them.

A :class:`Stored` tensor is one allocation: a tensor of the program, or several side by side.  An
:class:`Operand` is what a kernel takes of it: all, in the shape of the kernel's argument, or a
window of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import numpy as np

from dure.ir.core import Value
from dure.ir.dtypes import Array
from dure.ir.types import TensorType, static_extent
from dure.library.weight_types import WeightType

#: As the program has it; matrices (N, K) as (K, N), side by side along N, or the codes or scales of
#: such; pools (slots, heads, D) as (heads, slots, D), or the codes or scales (heads, slots, 1) of
#: such.
Form: TypeAlias = Literal[
    "plain", "columns", "codes", "scales", "heads_first", "pool_codes", "pool_scales"
]
_POOLS: frozenset[Form] = frozenset(("heads_first", "pool_codes", "pool_scales"))
#: The forms of weight matrices.
WEIGHTS: frozenset[Form] = frozenset(("columns", "codes", "scales"))


@dataclass(frozen=True)
class Stored:
    """An allocation: ``values`` side by side along the last axis, in a form; ``weights`` is how
    codes and scales are.
    """

    values: tuple[Value, ...]
    form: Form = "plain"
    weights: WeightType | None = None

    def placed(self, arrays: Sequence[Array]) -> Array:
        """What lies there, given the values' arrays."""
        match self.form:
            case "columns" | "codes" | "scales":
                turned = [np.swapaxes(array, -1, -2) for array in arrays]
            case "heads_first" | "pool_codes" | "pool_scales":
                turned = [np.swapaxes(array, 0, 1) for array in arrays]
            case "plain":
                turned = list(arrays)
        found = np.ascontiguousarray(np.concatenate(turned, -1) if len(turned) > 1 else turned[0])
        if self.weights is None:
            return found
        if self.form in _POOLS and self.weights.code.is_float:
            top = self.weights.top
            return np.clip(found.astype(np.float32), -top, top).astype(self.weights.code.numpy)
        if self.form in _POOLS:
            codes, scales = self.weights.quantize(np.swapaxes(found, -1, -2))
            found = codes if self.form == "pool_codes" else scales
            return np.ascontiguousarray(np.swapaxes(found, -1, -2))
        codes, scales = self.weights.quantize(found)
        return codes if self.form == "codes" else scales

    def turn(self, shape: list[int]) -> None:
        """Put the extents of a value in the order in which it lies."""
        if self.form in WEIGHTS:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        elif self.form in _POOLS:
            shape[0], shape[1] = shape[1], shape[0]
        if self.form == "pool_scales":
            shape[-1] = 1
        if self.form == "scales" and self.weights is not None:
            shape[-2] = self.weights.rows(shape[-2])


@dataclass(frozen=True)
class Window:
    """Elements ``start`` to ``stop`` along an axis of a tensor that is seen as ``shape``."""

    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Operand:
    """An argument: a stored tensor in the argument's own shape, or the window of it."""

    stored: Stored
    window: Window | None = None


@dataclass(frozen=True)
class Part:
    """Columns ``start`` to ``stop`` of a stored matrix of ``columns``."""

    stored: Stored
    start: int
    stop: int
    columns: int

    def seen(self, kind: TensorType) -> Operand | None:
        """The part as an argument of this type, whose first axis is the matrix's; None where its
        other axes don't divide the matrix's columns.
        """
        first, *rest = (static_extent(e) or 0 for e in kind.shape)
        unit = prod(rest[1:])
        if not rest or rest[0] * unit != self.stop - self.start:
            return None
        if self.start % unit or self.columns % unit:
            return None
        shape = (first, self.columns // unit, *rest[1:])
        return Operand(self.stored, Window(shape, 1, self.start // unit, self.stop // unit))


@dataclass(frozen=True)
class Argument:
    """An argument of a launch: its type (None where it is absent, or an index list that the call
    types) and what it takes.
    """

    type: TensorType | None
    operand: Operand | None


ABSENT = Argument(None, None)
