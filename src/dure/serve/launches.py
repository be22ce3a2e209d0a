"""Launches of kernels, watched: what each worker takes, and what a launch costs besides.

Kernels run with arrays of random numbers, one after another and over and over, as compiled for a
call of these very sizes.  Launches that stamp their workers' begin and end take turns with launches
that don't.  Beside them stand the bytes and operations that the work needs, and what the same
workers read and multiply in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.errors import KernelError, UsageError
from dure.ir.core import Function
from dure.ir.dtypes import DType
from dure.ir.expr import evaluate
from dure.ir.printer import print_function
from dure.ir.samples import random_array
from dure.ir.types import TensorType
from dure.lang.kernel import Kernel
from dure.lang.launch import Runner, executing
from dure.library.build import tile_function
from dure.library.call import IndexArray, KernelCall, stored_bytes
from dure.library.validation_cpu import host_tiles
from dure.library.work import Work
from dure.runtime.bandwidth import BandwidthProbe
from dure.runtime.memory import Buffer, available_bytes
from dure.runtime.pool import Pool, shared_pool
from dure.serve.operations import multiplies_integers, operations
from dure.serve.products import ProductProbe
from dure.serve.stamped import Times, nanoseconds
from dure.targets.cpu.launch import compile_kernel

Bound: TypeAlias = Literal["memory", "compute", "latency"]
Walls: TypeAlias = "list[tuple[int, int]]"

_READ_BYTES = 1 << 28
#: Bytes that a burst reads at least: a smaller buffer is read again.
_BURST_BYTES = 1 << 26
#: Bursts of reading and of multiplying in a run.
_BURSTS = 10
#: Launches where the user doesn't say: as many as take so many nanoseconds, between these bounds.
_RUN_NS, _FEWEST, _MOST = 1e9, 10, 1000
#: Of a launch's time; a kernel that only writes moves its bytes twice, and more slowly.
_GOOD_PART = 1 / 3
#: Calls from Python whose checks are timed.
_CHECKED = 50
#: Random numbers of an array; a longer one repeats them.
_DRAWN = 1 << 20


@dataclass(frozen=True)
class LaunchUse:
    """A kernel launched over and over; nanoseconds, medians.

    ``ns``: what the caller of the compiled kernel waits; ``recorded_ns``: of launches that record;
    ``cost_ns``: what these take more than those right beside them.
    ``busy``: each worker's share, from its begin to its end; ``slowest_ns`` and ``fastest_ns``: the
    longest and the shortest share of a launch; ``span_ns``: from the first worker's begin to the
    last one's end.  ``outside_ns``: what a launch takes besides that, to start its workers and to
    come back.  ``checks_ns``: what a call from Python takes besides, to check its arguments; None
    for a kernel that Python can't call with these.  ``ends`` are (worker, begin and end) of the
    median launch.
    """

    kernel: str
    tiles: Mapping[str, int]
    instances: int
    tile_ir: str
    ns: float
    recorded_ns: float
    cost_ns: float
    busy: tuple[float, ...]
    slowest_ns: float
    fastest_ns: float
    span_ns: float
    outside_ns: float
    checks_ns: float | None
    ends: Times

    @property
    def idle(self) -> tuple[float, ...]:
        """What each worker waits while others work."""
        return tuple(max(0.0, self.span_ns - each) for each in self.busy)

    @property
    def imbalance(self) -> float:
        """The part of the slowest worker's time that equal shares would save."""
        return 1.0 - statistics.fmean(self.busy) / self.slowest_ns if self.slowest_ns else 0.0


@dataclass(frozen=True)
class WorkUse:
    """Work on this machine, its kernels one after another.

    ``flops`` are the definition's, or those of the instructions; None where they depend on values.
    ``bytes`` must be read or written at least.  Of the same workers in the same run: ``read`` and
    ``near`` are the bytes a second that they read, from memory (the median burst) and of as many
    bytes as the work's (the fastest, as most lie in caches); ``peaks`` the operations a second that
    they multiply, by type, and ``peak`` the type of the work's.
    """

    name: str
    dims: str
    dtype: str
    workers: int
    launches: int
    flops: int | None
    bytes: int
    read: float
    near: float
    peaks: dict[str, float]
    peak: str
    parts: tuple[LaunchUse, ...]

    @property
    def ns(self) -> float:
        """Nanoseconds of all launches."""
        return sum(part.ns for part in self.parts)

    @property
    def least(self) -> dict[Bound, float]:
        """Nanoseconds: reading the bytes, multiplying as many operations, and what was measured
        outside of the workers.
        """
        return {
            "memory": self.bytes / self.near * 1e9,
            "compute": (self.flops or 0) / self.peaks[self.peak] * 1e9,
            "latency": sum(part.outside_ns for part in self.parts),
        }

    @property
    def bound(self) -> Bound:
        """Latency where most of the time is outside of the workers, memory where reading the bytes
        takes more than the products and a good part of the time; else what the workers execute,
        which may be much that no product is: exponentials, conversions, elements beyond an edge.
        """
        least = self.least
        if least["latency"] > self.ns / 2:
            return "latency"
        reading = least["memory"]
        return "memory" if reading > max(least["compute"], self.ns * _GOOD_PART) else "compute"

    @property
    def cost(self) -> float:
        """The part of a launch's time that recording adds."""
        return sum(part.cost_ns for part in self.parts) / self.ns


def profile_work(work: Work, *, workers: int | None = None, launches: int | None = None) -> WorkUse:
    """Watch ``launches`` of each of the work's kernels (None: about a second of them).

    ``workers`` of None are those of the machine.  Raises :class:`~dure.errors.DureError` for a
    kernel that doesn't compile, and :class:`UsageError` for arrays that memory can't hold.
    """
    if launches is not None and launches < 1:
        raise UsageError(f"{launches} launches", rule="at least one launch is watched")
    pool = shared_pool(workers)
    _check_memory(work)
    ready = [_Launch(call, pool) for call in work.calls]
    for one in ready:
        one.turn()
    if launches is None:
        spent = sum(one.turn() for one in ready)
        launches = int(min(_MOST, max(_FEWEST, _RUN_NS / max(spent, 1))))
    yardsticks = _Yardsticks(work.bytes, pool)
    for number in range(launches):
        if number % max(1, launches // _BURSTS) == 0:
            yardsticks.burst()
            for one in ready:
                one.warm()
        for one in ready:
            one.turn()
    integers = any(multiplies_integers(one.function) for one in ready)
    return WorkUse(
        name=work.name,
        dims=work.dims,
        dtype=work.dtype,
        workers=pool.workers,
        launches=launches,
        flops=_operations(work, [one.function for one in ready]),
        bytes=work.bytes,
        read=yardsticks.read,
        near=yardsticks.near,
        peaks=yardsticks.peaks,
        peak="int8" if integers else "float32",
        parts=tuple(one.use(launches) for one in ready),
    )


def _operations(work: Work, functions: Sequence[Function]) -> int | None:
    if work.flops is not None:
        return work.flops
    counted = [operations(function) for function in functions]
    known = [count for count in counted if count is not None]
    return sum(known) if len(known) == len(counted) else None


class _Yardsticks:
    """What the pool's workers read and multiply, in bursts between launches."""

    def __init__(self, nbytes: int, pool: Pool) -> None:
        """``nbytes`` are those of the work."""
        self._far = BandwidthProbe(_READ_BYTES, pool)
        self._near = BandwidthProbe(min(max(nbytes, 1), _READ_BYTES), pool)
        self._products = ProductProbe(pool.workers)
        self._reads: list[tuple[float, float]] = []

    def burst(self) -> None:
        """One of each."""
        passes = max(1, _BURST_BYTES // self._near.nbytes)
        self._reads.append((self._far.burst(), self._near.burst(passes)))
        self._products.burst()

    @property
    def read(self) -> float:
        """Bytes a second from memory."""
        return statistics.median(far for far, _ in self._reads) * 1e9

    @property
    def near(self) -> float:
        """Bytes a second of as many bytes as the work's."""
        return max(near for _, near in self._reads) * 1e9

    @property
    def peaks(self) -> dict[str, float]:
        """Operations a second by type."""
        return self._products.peaks()


def _check_memory(work: Work) -> None:
    needed = sum(stored_bytes(t) for call in work.calls for t in call.types if t is not None)
    free = available_bytes()
    if free and needed > free:
        raise UsageError(
            f"the arrays of {work.name} take {needed:,} bytes",
            rule=f"the system has {free:,} bytes to give",
            fix="give smaller sizes",
        )


class _Launch:
    """A call, compiled, with its arrays and what its launches took so far."""

    def __init__(self, call: KernelCall, pool: Pool) -> None:
        self._call = call
        self._tiles = host_tiles(call)
        self.function = tile_function(call, self._tiles)
        _check_grid(self.function)
        self._kernel = compile_kernel(self.function, pool=pool, recorded=True)
        present = [place for place, kind in enumerate(call.types) if kind is not None]
        kinds = [param.value.tensor for param in self.function.params]
        rng = np.random.default_rng(0)
        self._buffers = {
            place: _filled(kind, call.indices.get(place), rng)
            for place, kind in zip(present, kinds, strict=True)
        }
        self._addresses = [buffer.address for buffer in self._buffers.values()]
        self._plain: Walls = []
        self._recorded: Walls = []
        self._stamps: list[npt.NDArray[np.int64]] = []

    def warm(self) -> None:
        """A launch that doesn't count: its arrays are where launches leave them, afterwards."""
        self._kernel.run(self._addresses, ())

    def turn(self) -> int:
        """A launch and one that records, either first by turns; gives the nanoseconds of both."""
        first = len(self._stamps) % 2
        walls: Walls = []
        for recorded in (first == 1, first == 0):
            run = self._kernel.record if recorded else self._kernel.run
            begin = time.perf_counter_ns()
            run(self._addresses, ())
            walls.append((begin, time.perf_counter_ns()))
        self._recorded.append(walls[1 - first])
        self._plain.append(walls[first])
        self._stamps.append(self._kernel.stamps())
        return walls[1][1] - walls[0][0]

    def use(self, launches: int) -> LaunchUse:
        """The last ``launches`` turns; those before it only told the counter's rate."""
        ends = nanoseconds(np.array(self._stamps), self._recorded)[-launches:]
        shares = ends[:, :, 1] - ends[:, :, 0]
        plain, recorded = _spent(self._plain[-launches:]), _spent(self._recorded[-launches:])
        middle = int(np.argsort(recorded)[launches // 2])
        spans = ends[:, :, 1].max(axis=1)
        extents = [evaluate(extent, {}) for extent in self.function.grid]
        return LaunchUse(
            kernel=self._call.kernel.__name__,
            tiles=self._tiles,
            instances=int(np.prod(extents, dtype=np.int64)),
            tile_ir=print_function(self.function),
            ns=float(np.median(plain)),
            recorded_ns=float(np.median(recorded)),
            cost_ns=float(np.median(recorded - plain)),
            busy=tuple(np.median(shares, axis=0).tolist()),
            slowest_ns=float(np.median(shares.max(axis=1))),
            fastest_ns=float(np.median(shares.min(axis=1))),
            span_ns=float(np.median(spans)),
            # At least nothing: the counter's rate is known to a part in many thousands.
            outside_ns=max(0.0, float(np.median(recorded - spans))),
            checks_ns=self._checks(),
            ends=ends[middle],
        )

    def _checks(self) -> float | None:
        """What a call from Python takes before anything runs."""
        kernel, call = self._call.kernel, self._call
        kinds = call.types
        if not isinstance(kernel, Kernel) or any(
            kind is not None and not _is_array(kind) for kind in kinds
        ):
            return None
        arrays = [
            None if kind is None else _array(self._buffers[place], kind)
            for place, kind in enumerate(kinds)
        ]
        consts = {**call.consts, **self._tiles}
        times: list[int] = []
        try:
            with executing(_nothing):
                for _ in range(_CHECKED):
                    begin = time.perf_counter_ns()
                    kernel.launch(None, arrays, consts)
                    times.append(time.perf_counter_ns() - begin)
        except KernelError:
            return None
        return float(statistics.median(times))


def _spent(walls: Walls) -> npt.NDArray[np.int64]:
    """Nanoseconds of each call."""
    return np.diff(np.array(walls), axis=1)[:, 0]


def _nothing(_: Function) -> Runner:
    """An executor of launches that are only checked."""
    return lambda views, sizes: None


def _check_grid(function: Function) -> None:
    if function.symbols:
        raise UsageError(
            f"the grid of kernel '{function.name}' doesn't follow from its stores",
            rule="what is profiled is launched without a grid",
            fix="make each dl.program_id(i) by itself an index of a store",
        )


def _is_array(kind: TensorType) -> bool:
    """Whether NumPy has arrays of this type."""
    return isinstance(kind.dtype, DType) and kind.dtype.bits >= 8


def _array(buffer: Buffer, kind: TensorType) -> npt.NDArray[np.generic]:
    assert isinstance(kind.dtype, DType)
    return buffer.view(_shape(kind), kind.dtype.numpy)


def _shape(kind: TensorType) -> tuple[int, ...]:
    return tuple(evaluate(extent, {}) for extent in kind.shape)


def _filled(kind: TensorType, indices: IndexArray | None, rng: np.random.Generator) -> Buffer:
    """Memory of a tensor's size: its indices, or random numbers.

    Bytes of codes and of their scales are such that they are finite numbers near 1 in every type.
    """
    buffer = Buffer(stored_bytes(kind) + 64)
    if indices is not None:
        _repeat(_array(buffer, kind), indices.reshape(-1))
    elif _is_array(kind):
        assert isinstance(kind.dtype, DType)
        array = _array(buffer, kind)
        _repeat(array, random_array(kind.dtype, (min(max(array.size, 1), _DRAWN),), rng))
    else:
        _repeat(buffer.array, rng.integers(0x34, 0x40, _DRAWN, np.uint8))
    return buffer


def _repeat(array: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
    """Fill an array with values, over and over."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, len(values)):
        part = flat[start : start + len(values)]
        part[:] = values[: len(part)]
