"""Runs a library kernel on NumPy arrays: specialised for their types, with every executor there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dure.ir.blocks import Blocks
from dure.ir.core import Function
from dure.ir.dtypes import DTYPES, DType
from dure.ir.expr import const, symbol
from dure.ir.interpret import run
from dure.ir.types import TensorType

Argument = Any


def dtype_of(array: np.ndarray[Any, Any]) -> DType:
    return next(d for d in DTYPES.values() if d.numpy == array.dtype)


def type_of(argument: Argument, symbolic: str = "") -> TensorType | None:
    """The type of an argument; its first extent is the size ``symbolic`` if that is given."""
    if argument is None:
        return None
    shape = [const(e) for e in argument.shape]
    if symbolic:
        shape[0] = symbol(symbolic, "size", 0, 1 << 20)
    if isinstance(argument, Blocks):
        return TensorType(tuple(shape), argument.format, quantized_axis=argument.axis)
    return TensorType(tuple(shape), dtype_of(argument))


def types_of(kernel: Any, arguments: Sequence[Argument]) -> list[TensorType | None]:
    """The arguments' types; an index argument's declared range is that of its elements."""
    types = [type_of(a) for a in arguments]
    for place, name in enumerate(kernel.signature.tensor_names(len(arguments))):
        declared, values, kind = kernel.signature.index_of(name), arguments[place], types[place]
        if declared is not None and kind is not None:
            low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
            low = min(low, declared.low)
            types[place] = replace(
                kind, index=(const(low), const(max(high, 0))), unique=declared.unique
            )
    return types


def specialized(kernel: Any, arguments: Sequence[Argument], **consts: object) -> Function:
    return kernel.specialize(types_of(kernel, arguments), consts)


def interpret(
    kernel: Any,
    arguments: Sequence[Argument],
    grid: tuple[int, ...] = (),
    seed: int = 0,
    **consts: object,
) -> None:
    """Run the kernel with the interpreter, its instances in a random order."""
    function = specialized(kernel, arguments, **consts)
    sizes = {f"grid_{i}": extent for i, extent in enumerate(grid)}
    sizes = {s.name: sizes[s.name] for s in function.symbols if s.name in sizes}
    run(function, [a for a in arguments if a is not None], sizes, seed=seed)
