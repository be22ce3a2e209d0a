"""Arguments as a compiled program takes them: what the chip can't store is converted by the host,
and what it wants the other way round is turned.
"""

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
    turned: object = function.attrs.get("transposed", ())
    assert isinstance(turned, tuple)
    found: list[Argument] = []
    for param, argument in zip(function.params, arguments, strict=True):
        converted = _converted(argument, param.value.tensor.dtype)
        if param.value.name in turned:
            assert isinstance(converted, np.ndarray)
            converted = np.ascontiguousarray(converted.T)
        found.append(converted)
    return found


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
