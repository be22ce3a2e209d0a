"""Arguments as a compiled program takes them: what the chip can't store is converted on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from dure.ir.blocks import Blocks
from dure.ir.core import Function
from dure.ir.dtypes import Array, DType

Argument: TypeAlias = "Array | Blocks"


def to_chip(function: Function, arguments: Sequence[Argument]) -> list[Argument]:
    """The arguments in the types of the program's parameters; the same objects where they agree."""
    return [
        _converted(a, p.value.tensor.dtype) for p, a in zip(function.params, arguments, strict=True)
    ]


def from_chip(
    function: Function, passed: Sequence[Argument], arguments: Sequence[Argument]
) -> None:
    """Write results that were converted back into the caller's arrays."""
    for param, found, array in zip(function.params, passed, arguments, strict=True):
        if param.access != "in" and found is not array:
            assert isinstance(array, np.ndarray) and isinstance(found, np.ndarray)
            array[...] = found.astype(array.dtype)


def _converted(argument: Argument, dtype: object) -> Argument:
    if isinstance(argument, Blocks) or not isinstance(dtype, DType):
        return argument
    return argument if argument.dtype == dtype.numpy else argument.astype(dtype.numpy)
