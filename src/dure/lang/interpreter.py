"""Running kernels as plain Python: with print, assert and a debugger.

``dl.interpret(kernel)[grid](a, b, c)`` runs one kernel's function by CPython, one grid instance
after another, on NumPy values; ``with dl.interpret():`` does so for every kernel that is launched
inside.  Shapes, dtypes, edges, ranges and promotion are those of the compiled kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, cast, overload

import numpy as np

from dure.errors import IRError, KernelError
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.dtypes import Array
from dure.ir.expr import as_expr, evaluate
from dure.ir.types import TensorType
from dure.lang.binding import Arguments, Meta, match, resolve_grid
from dure.lang.eager import Eager, handle, place_of
from dure.lang.frontend.compile import LARGEST_INDEX
from dure.lang.launch import array_of, check_indices, check_memory
from dure.lang.tensor import Tensor
from dure.lang.values import as_tuple, building
from dure.runtime.arrays import ArrayView, adopt

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dure.lang.kernel import Kernel

INTERPRETING: ContextVar[bool] = ContextVar("dure_interpreting", default=False)


def interpreting() -> bool:
    """Whether launches run as plain Python now."""
    return INTERPRETING.get()


class Interpreted:
    """A kernel that runs as plain Python."""

    def __init__(self, kernel: Kernel, grid: object = None) -> None:
        self.kernel = kernel
        self.grid = grid

    def __getitem__(self, grid: object) -> Interpreted:
        return Interpreted(self.kernel, grid)

    def __call__(self, *args: object, **keywords: object) -> None:
        run(self.kernel, self.grid, match(self.kernel.signature, args, keywords))


@overload
def interpret(kernel: Kernel) -> Interpreted: ...
@overload
def interpret(kernel: None = None) -> AbstractContextManager[None]: ...
def interpret(kernel: Kernel | None = None) -> Interpreted | AbstractContextManager[None]:
    """Run a kernel, or every kernel launched in a ``with`` block, as plain Python."""
    return _everything() if kernel is None else Interpreted(kernel)


@contextmanager
def _everything() -> Generator[None]:
    token = INTERPRETING.set(True)
    try:
        yield
    finally:
        INTERPRETING.reset(token)


def run(kernel: Kernel, grid: object, arguments: Arguments) -> None:
    """Run a kernel's function over its grid; arrays are written in place."""
    arrays, views = _arrays(kernel, arguments)
    if arguments.open or grid is None:
        arguments, extents = _follow(kernel, grid, arguments, arrays)
    else:
        extents = None
    if extents is None:
        meta = Meta(zip(arguments.names, arguments.tensors, strict=True), **arguments.consts)
        extents = resolve_grid(kernel.__name__, grid, lambda: meta)
    check = _StoreCheck(kernel.__name__, arguments.names, views)
    handles = [
        None if a is None else _handle(kernel, n, a)
        for n, a in zip(arguments.names, arrays, strict=True)
    ]
    found = kernel.signature.arguments(handles, arguments.consts)
    positional, keywords = _python_call(kernel, found)
    for instance in itertools.product(*map(range, extents)):
        with building(Eager(extents, instance, check)):
            try:
                result: object = kernel.function(*positional, **keywords)
            except KernelError as error:
                error.where = error.where or place_of(error)
                raise
            except IRError as error:
                raise KernelError(
                    error.what, where=error.where, rule=error.rule, fix=error.fix
                ) from error
        if result is not None:
            raise KernelError(
                f"the kernel '{kernel.__name__}' returns a value",
                rule="a kernel gives its results by storing them",
                fix="store the tile into a tensor parameter",
            )


class _StoreCheck:
    """Refuses to store into arrays that are read-only or that other arguments share."""

    def __init__(
        self, kernel: str, names: Sequence[str], views: Sequence[ArrayView | None]
    ) -> None:
        self.kernel = kernel
        self.views = {n: v for n, v in zip(names, views, strict=True) if v is not None}
        self.allowed: set[str] = set()

    def __call__(self, name: str) -> None:
        if name in self.allowed or name not in self.views:
            return
        names = list(self.views)
        stored = [n == name for n in names]
        check_memory(self.kernel, names, list(self.views.values()), stored)
        self.allowed.add(name)


def _python_call(
    kernel: Kernel, found: dict[str, object]
) -> tuple[list[object], dict[str, object]]:
    positional: list[object] = []
    keywords: dict[str, object] = {}
    many_seen = False
    for parameter in kernel.signature.parameters:
        value = found[parameter.name]
        if parameter.many:
            positional.extend(as_tuple(value))
            many_seen = True
        elif many_seen or _keyword_only(kernel, parameter.name):
            keywords[parameter.name] = value
        else:
            positional.append(value)
    return positional, keywords


def _keyword_only(kernel: Kernel, name: str) -> bool:
    parameter = kernel.signature.python.parameters[name]
    return parameter.kind is parameter.KEYWORD_ONLY


def _arrays(
    kernel: Kernel, arguments: Arguments
) -> tuple[list[Array | Blocks | None], list[ArrayView | None]]:
    arrays: list[Array | Blocks | None] = []
    views: list[ArrayView | None] = []
    for name, value in zip(arguments.names, arguments.tensors, strict=True):
        if value is None or isinstance(value, Blocks):
            arrays.append(value)
            views.append(None)
            continue
        view = adopt(value, f"'{name}' of kernel '{kernel.__name__}'")
        views.append(view)
        arrays.append(cast("Array", value) if isinstance(value, np.ndarray) else array_of(view))
    return arrays, views


def _type(kernel: Kernel, name: str, array: Array | Blocks) -> TensorType:
    shape = tuple(as_expr(int(e)) for e in array.shape)
    if isinstance(array, Blocks):
        return TensorType(shape, array.format, None, array.axis)
    return TensorType(shape, _dtype(array))


def _dtype(array: Array) -> dtypes.DType:
    for dtype in dtypes.DTYPES.values():
        if dtype.numpy == array.dtype and dtype is not dtypes.uint1:
            return dtype
    raise KernelError(
        f"an array of {array.dtype}",
        rule=f"dure's element types are {', '.join(dtypes.DTYPES)}",
        fix='convert it, as in x.astype("float32")',
    )


def _handle(kernel: Kernel, name: str, array: Array | Blocks) -> Tensor:
    kind = _type(kernel, name, array)
    index = kernel.signature.index_of(name)
    if index is None:
        return handle(name, kind, array)
    if isinstance(array, Blocks) or kind.dtype is not dtypes.int32:
        raise KernelError(
            f"the index argument '{name}' has elements of {kind.dtype}",
            rule="a dl.Index argument is int32",
            fix='convert it, as in x.astype("int32")',
        )
    high = LARGEST_INDEX if index.high is None else index.high
    check_indices(name, array, index.low, high, index.unique)
    # A range left open is what the values are: each use is checked by itself.
    top = int(array.max()) if index.high is None and array.size else (index.high or 0)
    ranged = TensorType(
        kind.shape, kind.dtype, None, -1, (as_expr(index.low), as_expr(top)), index.unique
    )
    return handle(name, ranged, array)


def _follow(
    kernel: Kernel, grid: object, arguments: Arguments, arrays: Sequence[Array | Blocks | None]
) -> tuple[Arguments, tuple[int, ...] | None]:
    """The consts that were left open, and the grid where it follows from the stores."""
    types = [
        None if a is None else _type(kernel, n, a)
        for n, a in zip(arguments.names, arrays, strict=True)
    ]
    if arguments.open:
        from dure.lang.tune import choose_for_types

        chosen = choose_for_types(kernel, types, arguments.consts, arguments.open)
        arguments = Arguments(
            arguments.names, arguments.tensors, {**arguments.consts, **chosen}, ()
        )
    if grid is not None:
        return arguments, None
    found = kernel.compile(types, arguments.consts)
    if not found.grid_follows and found.function.grid:
        raise KernelError(
            f"the grid of kernel '{kernel.__name__}' doesn't follow from its stores",
            rule="it follows where each dl.program_id(i) is by itself an index of a store",
            fix=f"give it: dl.interpret({kernel.__name__})[grid](...)",
        )
    return arguments, tuple(evaluate(e, {}) for e in found.function.grid)
