"""Runs a library kernel on NumPy arrays with every executor there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from dure.ir.blocks import Blocks
from dure.ir.core import Function, Param
from dure.ir.dtypes import DTYPES, DType
from dure.ir.expr import const
from dure.ir.interpret import bind_sizes, run
from dure.ir.pack import pack, unpack
from dure.ir.types import TensorType, default_layout
from dure.runtime.host import HostFeatures, host_features
from dure.runtime.standalone import toolchain
from dure.targets.cpu.launch import compile_kernel
from dure.targets.cpu.standalone import of_kernel

Argument = Any


def dtype_of(array: np.ndarray[Any, Any]) -> DType:
    return next(d for d in DTYPES.values() if d.numpy == array.dtype)


def type_of(argument: Argument) -> TensorType | None:
    """The type of an argument, with known extents."""
    if argument is None:
        return None
    shape = [const(e) for e in argument.shape]
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


class Execute(Protocol):
    """Runs a kernel on arrays, which it writes in place."""

    def __call__(
        self, kernel: Any, arguments: Sequence[Argument], *, updates: bool = False, **consts: object
    ) -> None: ...


def _function(
    kernel: Any, arguments: Sequence[Argument], updates: bool, consts: dict[str, object]
) -> Function:
    """``updates``: the first argument is updated in place, though the kernel only stores to it."""
    function = specialized(kernel, arguments, **consts)
    if not updates:
        return function
    first = replace(function.params[0], access="inout")
    return replace(function, params=(first, *function.params[1:]))


def interpret(
    kernel: Any, arguments: Sequence[Argument], *, updates: bool = False, **consts: object
) -> None:
    """Run the kernel with the interpreter, its instances in a random order."""
    function = _function(kernel, arguments, updates, consts)
    run(function, [a for a in arguments if a is not None], seed=0)


def compile_and_run(
    kernel: Any, arguments: Sequence[Argument], *, updates: bool = False, **consts: object
) -> None:
    """Compile the kernel for the CPU and run it."""
    function = _function(kernel, arguments, updates, consts)
    present = [a for a in arguments if a is not None]
    buffers = [_stored(p, a) for p, a in zip(function.params, present, strict=True)]
    code = compile_kernel(function)
    code.run([b.ctypes.data for b in buffers], _sizes(function, present))
    _take_back(function, present, buffers)


def _sizes(function: Function, present: Sequence[Argument]) -> list[int]:
    sizes = bind_sizes(function, present)
    return [sizes[s.name] for s in function.symbols]


def _take_back(
    function: Function, present: Sequence[Argument], buffers: Sequence[np.ndarray[Any, Any]]
) -> None:
    """Write what the kernel left in its buffers to the arrays."""
    for param, array, buffer in zip(function.params, present, buffers, strict=True):
        if param.access != "in":
            kind = param.value.tensor
            found = unpack(buffer, default_layout(kind), kind.dtype, array.shape, -1)
            _assign(array, found)


class Emulated:
    """Runs a kernel as code of another machine, by an emulator, beside code of this one's for
    vectors of the same width, and asserts that both leave the same bits.

    Orders of sums along a vector depend on its width alone, so that nothing else may differ.
    """

    def __init__(self, host: HostFeatures) -> None:
        self.host, self.tools = host, toolchain(host.architecture)
        self.own = replace(host_features(), vector_bits=host.vector_bits)

    def __call__(
        self, kernel: Any, arguments: Sequence[Argument], *, updates: bool = False, **consts: object
    ) -> None:
        function = _function(kernel, arguments, updates, consts)
        present = [a for a in arguments if a is not None]
        buffers = [_stored(p, a) for p, a in zip(function.params, present, strict=True)]
        sizes = _sizes(function, present)
        program = of_kernel(function, self.host, [b.tobytes() for b in buffers], sizes, 2)
        results = program.run(self.tools, workers=2)
        compile_kernel(function, self.own).run([b.ctypes.data for b in buffers], sizes)
        for param, buffer in zip(function.params, buffers, strict=True):
            found = results.get(param.value.name)
            if found is not None:
                np.testing.assert_array_equal(np.frombuffer(found, np.uint8), buffer)
        _take_back(function, present, buffers)


def _stored(param: Param, array: Argument) -> np.ndarray[Any, Any]:
    kind = param.value.tensor
    packed = pack(array, default_layout(kind), kind.dtype)
    # Reading a little beyond the end must not matter; reading a lot must show.
    buffer = np.full(len(packed) + 64, 0xFF, np.uint8)
    buffer[: len(packed)] = packed
    return buffer


def _assign(array: Argument, found: Argument) -> None:
    if isinstance(array, Blocks):
        for name, plane in found.planes.items():
            array.planes[name][...] = plane
    else:
        array[...] = found


EXECUTORS = [interpret, compile_and_run]
