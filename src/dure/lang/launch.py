"""Launching kernels: specialisations kept by the form of their arguments, and checks at every
launch.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dure.errors import IRError, KernelError
from dure.ir.core import Function
from dure.ir.expr import evaluate
from dure.ir.types import TensorType
from dure.ir.verifier import verify
from dure.lang.binding import Arguments, Form, Meta, const_key, form_of, resolve_grid, type_of
from dure.lang.frontend.compile import Specialization
from dure.runtime.arrays import ArrayView, adopt

if TYPE_CHECKING:
    from dure.lang.kernel import Kernel
    from dure.targets.cpu.launch import CompiledKernel

#: Runs a compiled kernel on arrays and the values of its symbols.
Runner: TypeAlias = Callable[[Sequence[ArrayView], Sequence[int]], None]
#: Makes a function runnable.
Executor: TypeAlias = Callable[[Function], Runner]

#: Sizes that passed a specialisation's guards are remembered up to this many.
_REMEMBERED = 4096


class CpuRunner:
    """A kernel that is compiled for the host CPU."""

    def __init__(self, compiled: CompiledKernel) -> None:
        self.compiled = compiled
        self._lock = threading.Lock()

    def __call__(self, views: Sequence[ArrayView], sizes: Sequence[int]) -> None:
        with self._lock:
            self.compiled.run([v.address for v in views], sizes)


def cpu_executor(function: Function) -> Runner:
    """Compile for the host CPU."""
    from dure.targets.cpu import compile_kernel

    return CpuRunner(compile_kernel(function))


EXECUTOR: ContextVar[Executor] = ContextVar("dure_executor", default=cpu_executor)


@contextmanager
def executing(executor: Executor) -> Generator[None]:
    """Run launches with another executor inside of the ``with``."""
    token = EXECUTOR.set(executor)
    try:
        yield
    finally:
        EXECUTOR.reset(token)


@dataclass(eq=False)
class Ready:
    """A specialisation that can run: where each symbol's value comes from, and what it checks."""

    specialization: Specialization
    runner: Runner
    sources: tuple[tuple[str, int, int], ...]
    present: tuple[int, ...]
    stored: tuple[bool, ...]
    #: Sizes that passed the guards, and the instances of the grid.
    checked: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])


@dataclass(frozen=True, eq=False, slots=True)
class Launched:
    """A launch that was checked and has run: on which arrays, at which sizes, and instances."""

    ready: Ready
    views: tuple[ArrayView, ...]
    sizes: tuple[int, ...]
    instances: int


class Launcher:
    """The launches of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._ready: dict[object, Ready] = {}
        self._lock = threading.Lock()

    def launch(self, grid: object, arguments: Arguments) -> Launched | None:
        """Check the arguments and run the kernel; ``grid`` of None follows from the stores.  Gives
        what was run, None where there was nothing to run.
        """
        views = adopt_all(self.kernel.__name__, arguments)
        forms = tuple(
            None if v is None else form_of(n, v)
            for n, v in zip(arguments.names, views, strict=True)
        )
        if arguments.open:
            arguments = self._closed(arguments, views, forms)
        ready = self._find(forms, arguments, grid is not None)
        present = [v for v in views if v is not None]
        extents = self._grid(ready, grid, arguments, views)
        sizes = self._sizes(ready, present, extents)
        instances = self._check(ready, arguments, present, sizes)
        if not instances:
            return None
        ready.runner(present, sizes)
        return Launched(ready, tuple(present), sizes, instances)

    def _closed(
        self,
        arguments: Arguments,
        views: Sequence[ArrayView | None],
        forms: Sequence[Form | None],
    ) -> Arguments:
        """The arguments with the compiler's choice for consts without a value."""
        from dure.lang.tune import choose_consts

        shapes = [None if v is None else v.shape for v in views]
        chosen = choose_consts(self.kernel, arguments, forms, shapes)
        return Arguments(arguments.names, arguments.tensors, {**arguments.consts, **chosen}, ())

    def _find(self, forms: tuple[Form | None, ...], arguments: Arguments, explicit: bool) -> Ready:
        executor = EXECUTOR.get()
        consts = tuple((n, const_key(v)) for n, v in arguments.consts.items())
        key = (forms, consts, explicit, executor)
        found = self._ready.get(key)
        if found is None or found.specialization.is_stale():
            with self._lock:
                found = self._ready.get(key)
                if found is None or found.specialization.is_stale():
                    found = self._prepare(forms, arguments, explicit, executor)
                    self._ready[key] = found
        return found

    def _prepare(
        self,
        forms: Sequence[Form | None],
        arguments: Arguments,
        explicit: bool,
        executor: Executor,
    ) -> Ready:
        types: list[TensorType | None] = [
            None if f is None else type_of(n, f)
            for n, f in zip(arguments.names, forms, strict=True)
        ]
        found = self.kernel.compile(types, arguments.consts, explicit_grid=explicit)
        if not explicit and not found.grid_follows and found.function.grid:
            raise KernelError(
                f"the grid of kernel '{self.kernel.__name__}' doesn't follow from its stores",
                rule="it follows where each dl.program_id(i) is by itself an index of a store",
                fix=f"give it: {self.kernel.__name__}[grid](...)",
            )
        function = found.function
        _verify(function)
        places = {p.value.name: i for i, p in enumerate(function.params)}
        sources = tuple(_source(s.name, places) for s in function.symbols)
        present = tuple(i for i, f in enumerate(forms) if f is not None)
        stored = tuple(p.access != "in" for p in function.params)
        return Ready(found, executor(function), sources, present, stored)

    def _grid(
        self,
        ready: Ready,
        grid: object,
        arguments: Arguments,
        views: Sequence[ArrayView | None],
    ) -> tuple[int, ...]:
        if grid is None:
            return ()
        name = self.kernel.__name__

        def meta() -> Meta:
            return Meta(zip(arguments.names, views, strict=True), **arguments.consts)

        extents = resolve_grid(name, grid, meta)
        used = len(ready.specialization.function.grid)
        if len(extents) < used or any(e != 1 for e in extents[used:]):
            raise KernelError(
                f"kernel '{name}' is launched with the grid {extents}",
                rule=f"its grid has {used} axes: it asks for dl.program_id(0) to ({used - 1})",
                fix=f"give {used} extents",
            )
        return extents[:used]

    def _sizes(
        self, ready: Ready, views: Sequence[ArrayView], grid: tuple[int, ...]
    ) -> tuple[int, ...]:
        found: list[int] = []
        for kind, place, axis in ready.sources:
            if kind == "size":
                found.append(views[place].shape[axis])
            elif kind == "stride":
                found.append(views[place].strides[axis] // views[place].itemsize)
            else:
                found.append(grid[axis])
        return tuple(found)

    def _check(
        self,
        ready: Ready,
        arguments: Arguments,
        views: Sequence[ArrayView],
        sizes: tuple[int, ...],
    ) -> int:
        """Check what depends on sizes, memory and index values; the instances that are to run."""
        names = [arguments.names[i] for i in ready.present]
        check_memory(self.kernel.__name__, names, views, ready.stored)
        function = ready.specialization.function
        instances = ready.checked.get(sizes)
        if instances is None:
            numbers = self._numbers(function, sizes)
            for guard in ready.specialization.guards:
                guard.check(numbers)
            if len(ready.checked) >= _REMEMBERED:
                ready.checked.clear()
            instances = math.prod(max(0, evaluate(extent, numbers)) for extent in function.grid)
            ready.checked[sizes] = instances
        for param, name, view in zip(function.params, names, views, strict=True):
            kind = param.value.tensor
            if kind.index is not None:
                numbers = self._numbers(function, sizes)
                low, high = (evaluate(e, numbers) for e in kind.index)
                check_indices(name, array_of(view), low, high, kind.unique)
        return instances

    @staticmethod
    def _numbers(function: Function, sizes: tuple[int, ...]) -> dict[str, int]:
        return dict(zip((s.name for s in function.symbols), sizes, strict=True))


def _verify(function: Function) -> None:
    """Every rule of the IR, the proof that instances are independent among them."""
    try:
        verify(function)
    except IRError as error:
        raise KernelError(error.what, where=error.where, rule=error.rule, fix=error.fix) from error


def _source(symbol: str, places: dict[str, int]) -> tuple[str, int, int]:
    """Where a symbol's value comes from: its kind, the argument and the axis."""
    if symbol.startswith("grid."):
        return "grid", 0, int(symbol.removeprefix("grid."))
    head, _, axis = symbol.rpartition("_")
    if head.endswith(".stride"):
        return "stride", places[head.removesuffix(".stride")], int(axis)
    return "size", places[head], int(axis)


def adopt_all(kernel: str, arguments: Arguments) -> list[ArrayView | None]:
    """The memory of every tensor argument."""
    return [
        None if value is None else adopt(value, f"'{name}' of kernel '{kernel}'")
        for name, value in zip(arguments.names, arguments.tensors, strict=True)
    ]


def check_memory(
    kernel: str, names: Sequence[str], views: Sequence[ArrayView], stored: Sequence[bool]
) -> None:
    """Arrays that are written are writable, and overlap no other argument."""
    for name, view, written in zip(names, views, stored, strict=True):
        if written and view.readonly:
            raise KernelError(
                f"'{name}' of kernel '{kernel}' is stored into, and its memory is read-only",
                rule="an array that a kernel writes is writable",
                fix="pass a writable copy, as in numpy.array(x)",
            )
    if not any(stored):
        return
    ranges = [v.byte_range for v in views]
    for one, other in itertools.combinations(range(len(views)), 2):
        if not (stored[one] or stored[other]):
            continue
        (low, high), (start, end) = ranges[one], ranges[other]
        if low < end and start < high and _share(views[one], views[other]):
            raise KernelError(
                f"'{names[one]}' and '{names[other]}' of kernel '{kernel}' share memory, and "
                f"'{names[one] if stored[one] else names[other]}' is stored into",
                rule="what a kernel writes overlaps no other argument: its instances have no order",
                fix="pass a copy, or write the kernel in place: load and store one parameter",
            )


def _share(one: ArrayView, other: ArrayView) -> bool:
    try:
        return bool(np.shares_memory(array_of(one), array_of(other), max_work=cast("Any", 100_000)))
    except np.exceptions.TooHardError:
        return True


_EXTRA = {n: np.dtype(getattr(ml_dtypes, n)) for n in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}


def array_of(view: ArrayView) -> npt.NDArray[Any]:
    """A NumPy array over an adopted array's memory; valid while the view is alive."""
    low, high = view.byte_range
    dtype = _EXTRA.get(view.dtype) or np.dtype(view.dtype)
    if low == high:
        return np.empty(view.shape, dtype)
    memory = (ctypes.c_char * (high - low)).from_address(low)
    offset = view.address - low
    array = np.ndarray(view.shape, dtype, cast("Any", memory), offset, view.strides)
    array.flags.writeable = not view.readonly
    return array


def check_indices(name: str, values: npt.NDArray[Any], low: int, high: int, unique: bool) -> None:
    """The elements of an index argument lie in their declared range, and differ where they must."""
    if not values.size:
        return
    if int(values.min()) < low or int(values.max()) > high:
        outside = (values < low) | (values > high)
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise KernelError(
            f"the index argument '{name}' holds {int(values[place])} at {place}",
            rule=f"its elements lie in {low} .. {high}",
            fix="pass indices that lie inside of what they address, or declare a wider range",
        )
    if unique:
        kept = values[values >= 0]
        found, counts = np.unique(kept, return_counts=True)
        if len(found) != kept.size:
            raise KernelError(
                f"the index argument '{name}' holds {int(found[counts > 1][0])} more than once",
                rule="its elements are declared unique, so that stores through them are disjoint",
                fix="pass distinct indices; -1 means absent and may repeat",
            )
