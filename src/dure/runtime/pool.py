"""A persistent pool of workers that run native step functions.

A *step* is a native function ``void step(ptr context, i64 worker, i64 workers, ptr pool_state)``.
Every worker of the pool runs it once with its own number; the thread that calls :meth:`Pool.run`
is worker 0. Inside a step the workers meet at barriers
(:func:`dure.runtime.pool_code.barrier_ir`).  The GIL is released for the whole step, and helpers
sleep and wake without it, so that a busy Python thread slows no step; what a caller waits until it
has the GIL again is the interpreter's switch interval, which is short while a step runs.

Helpers are pinned to cores of their own where there are enough; the caller's own set of cores is
left as it is.  A helper that has nothing to do stays awake for up to ``DURE_SPIN_US``
microseconds, then sleeps. With more workers than cores, or beside other busy programs, waiting
workers give way: everything stays correct and moves on.  Steps of one process run one at a time.
A forked child starts helpers of its own at its first step.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dure import settings
from dure.errors import TargetError, UsageError
from dure.runtime import cache, host, llvm, pool_code
from dure.runtime.memory import Buffer

# Measured with 150 sections of 15 us a step on two cores.  Alone, these differ little; beside one
# busy process, 200 and 20 made three times the steps of a pool that yields instead of sleeping.
_BARRIER_SPIN_MICROSECONDS = 200
_LEAST_SPIN_MICROSECONDS = 20
_CROWDED_SPIN_MICROSECONDS = 1
_CROWDED_YIELDS = 4
#: Until another thread gives the GIL back to the caller of a step, in seconds; Python's own 5 ms
#: are longer than many a step.
_SWITCH_SECONDS = 1e-4


@dataclass(frozen=True)
class _Native:
    """The pool's compiled functions, loaded once a process; ``module`` keeps their code alive."""

    module: llvm.LoadedModule
    launch: Callable[[int, int, int, int], None]
    worker_loop: Callable[[int, int, int], None]
    stop: Callable[[int], None]
    pauses_per_microsecond: float


@dataclass
class _Helpers:
    """What must outlive the :class:`Pool` object until its helpers have left the native loop."""

    state: Buffer
    native: _Native
    threads: list[threading.Thread] = field(default_factory=list[threading.Thread])
    running: bool = False


class Pool:
    """``workers`` workers: the calling thread and ``workers - 1`` helper threads.

    Helpers start with the first step that needs them.
    """

    def __init__(self, workers: int) -> None:
        """Raises :class:`~dure.errors.UsageError` unless 1 <= workers <= 1024."""
        if not 1 <= workers <= settings.MOST_THREADS:
            raise UsageError(
                f"a pool cannot have {workers} workers",
                rule=f"a pool has from 1 to {settings.MOST_THREADS} workers",
                fix=f"use {host.default_workers()}, the number that fits this machine",
            )
        self.workers = workers
        self._helpers: _Helpers | None = None
        self._finalizer: weakref.finalize[..., Pool] | None = None
        self._closed = False
        _pools.add(self)

    @property
    def state_address(self) -> int:
        """The address of ``pool_state``; it changes when a forked process starts helpers anew."""
        with _steps:
            return self._start().state.address

    def run(self, step: int, context: int, workers: int | None = None) -> None:
        """Run the native function at address ``step`` on all workers, or on the first ``workers``.

        ``context`` is the address that every worker gets as its first argument.  Returns when all
        have finished; memory they wrote is visible then.  Ctrl-C is raised after the step.
        """
        count = self.workers if workers is None else workers
        if not 1 <= count <= self.workers:
            raise UsageError(
                f"a step cannot run on {count} workers of a pool of {self.workers}",
                rule="a step runs on at least one worker and at most all",
            )
        if not step:
            raise UsageError("the step's address is null", rule="a step is a native function")
        with _steps:
            helpers = self._helpers or self._start()
            helpers.running = True
            interval = sys.getswitchinterval()
            sys.setswitchinterval(min(interval, _SWITCH_SECONDS))
            try:
                helpers.native.launch(helpers.state.address, step, context, count)
            finally:
                sys.setswitchinterval(interval)
                helpers.running = False

    @property
    def helpers(self) -> object:
        """What stands for the helpers that run now; another object after a fork."""
        with _steps:
            return self._start()

    def call(
        self, function: Callable[..., bool], arguments: Sequence[object], helpers: object
    ) -> bool:
        """Call a native function that launches steps of these ``helpers`` by itself, if they are
        still there: what it gives, else False.
        """
        with _steps:
            mine = self._helpers
            if mine is not helpers or mine is None:
                return False
            mine.running = True
            try:
                return function(*arguments)
            finally:
                mine.running = False

    def close(self) -> None:
        """End the helpers and wait for them.  A closed pool runs nothing any more."""
        with _steps:
            self._closed = True
            if self._finalizer is not None:
                self._finalizer()
            self._helpers = None

    def _start(self) -> _Helpers:
        if self._closed:
            raise UsageError("the pool is closed", rule="a step needs an open pool")
        if self._helpers is None:
            helpers = _start_helpers(self.workers)
            self._helpers = helpers
            self._finalizer = weakref.finalize(self, _stop_helpers, helpers, os.getpid())
        return self._helpers

    def forget_helpers(self) -> None:
        """In a forked child: the helpers are threads of the parent, and this copy has none."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = None
        self._helpers = None


def launch_address() -> int:
    """Where ``void dure_launch(ptr pool_state, ptr step, ptr context, i64 workers)`` is."""
    return _native().module.address("dure_launch")


def shared_pool(workers: int | None = None) -> Pool:
    """The process's pool of that many workers, or of the machine's default, made on first use."""
    count = host.default_workers() if workers is None else workers
    with _registry_lock:
        pool = _shared.get(count)
        if pool is None:
            pool = _shared[count] = Pool(count)
        return pool


def symbols() -> dict[str, int]:
    """What generated modules that contain :func:`~dure.runtime.pool_code.barrier_ir` link with."""
    return {"dure_barrier": _native().module.address("dure_barrier")}


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_shared: dict[int, Pool] = {}
_registry_lock = threading.Lock()
_steps = threading.RLock()
"""Held during a step: two steps at once would share the cores that both have pinned workers on."""


@functools.cache
def _native() -> _Native:
    features = host.host_features()
    on_linux = sys.platform == "linux"
    return _load_native(features, futex=on_linux, nudge=on_linux)


def _load_native(features: host.HostFeatures, *, futex: bool, nudge: bool) -> _Native:
    text = pool_code.pool_ir(features.architecture, futex=futex, nudge=nudge)
    names = pool_code.operating_system_functions(futex=futex, nudge=nudge)
    library = ctypes.CDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)
    addresses: dict[str, int] = {}
    for symbol, name in names.items():
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        assert address is not None
        addresses[symbol] = address
    module = llvm.load_object(cache.compile_cached(text, features, llvm.OptLevel.O2), addresses)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    launch = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, number)
    loop = ctypes.CFUNCTYPE(None, pointer, number, ctypes.c_int32)
    return _Native(
        module,
        launch(module.address("dure_launch")),
        loop(module.address("dure_worker_loop")),
        ctypes.CFUNCTYPE(None, pointer)(module.address("dure_stop")),
        _measure_pauses(module),
    )


def _measure_pauses(module: llvm.LoadedModule) -> float:
    """Pause instructions in a microsecond: processors differ by a factor of ten."""
    spin = ctypes.CFUNCTYPE(None, ctypes.c_int32)(module.address("dure_spin"))
    count, best = 2000, float("inf")
    for _ in range(5):
        started = time.perf_counter()
        spin(count)
        best = min(best, time.perf_counter() - started)
    return count / (best * 1e6)


def _start_helpers(workers: int) -> _Helpers:
    native = _native()
    state = Buffer(pool_code.state_bytes(workers), alignment=pool_code.LINE)
    caller_core, helper_cores = _choose_cores(workers)
    _write_parameters(state, native, workers, caller_core, helper_cores)
    helpers = _Helpers(state, native)
    try:
        for worker in range(1, workers):
            core = helper_cores[worker - 1] if helper_cores else None
            thread = threading.Thread(
                target=_help, args=(helpers, worker, core), name=f"dure-{worker}", daemon=True
            )
            thread.start()
            helpers.threads.append(thread)
    except RuntimeError as error:
        _stop_helpers(helpers, os.getpid())
        raise TargetError(
            f"the system started only {len(helpers.threads)} of {workers - 1} helper threads",
            rule="every worker but the first is a thread",
            fix=f"use fewer workers, as in {settings.THREADS.name}={len(helpers.threads) + 1}",
        ) from error
    return helpers


def _choose_cores(workers: int) -> tuple[int, list[int]]:
    """The core left to the caller, and one for each helper; no cores where there are too few.

    The caller keeps the core it is on now, so that two processes with small pools rarely choose
    alike.
    """
    order = list(host.cores().physical)
    if not 1 < workers <= len(order) or max(order) >= pool_code.MOST_CORES:
        return -1, []
    current = _current_core()
    start = order.index(current) if current in order else 0
    turned = order[start:] + order[:start]
    return turned[0], turned[1:workers]


def _current_core() -> int:
    library = ctypes.CDLL(None)
    return int(library.sched_getcpu()) if hasattr(library, "sched_getcpu") else -1


def _write_parameters(
    state: Buffer, native: _Native, workers: int, caller_core: int, helper_cores: list[int]
) -> None:
    """Fill the parts of ``pool_state`` that the native code only reads."""
    rate = native.pauses_per_microsecond
    crowded = workers > max(1, len(host.cores().allowed) or os.cpu_count() or 1)
    shortest = _CROWDED_SPIN_MICROSECONDS if crowded else _LEAST_SPIN_MICROSECONDS
    least = max(1, int(shortest * rate))
    idle = barrier = least
    if not crowded:
        idle = max(least, int(settings.spin_microseconds() * rate))
        barrier = max(least, int(_BARRIER_SPIN_MICROSECONDS * rate))
    yields = _CROWDED_YIELDS if crowded else 0
    state.view(4, "int32", pool_code.PARAMETERS + 8)[:] = idle, barrier, least, yields
    for worker in range(workers):
        private = pool_code.WORKER_LINES + pool_code.LINE * worker + pool_code.PRIVATE
        state.view(2, "int32", private)[:] = barrier, idle
    for core in helper_cores:
        state.array[pool_code.HELPER_CORES + core // 8] |= 1 << core % 8
    if helper_cores:
        state.array[pool_code.CALLER_CORE + caller_core // 8] |= 1 << caller_core % 8


def _help(helpers: _Helpers, worker: int, core: int | None) -> None:
    """A helper thread: pinned if it can be, it lives in the native loop until the pool ends."""
    if core is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {core})
    helpers.native.worker_loop(helpers.state.address, worker, 0)


def _stop_helpers(helpers: _Helpers, process: int) -> None:
    """End the helpers; runs when a pool is closed or collected, and at the interpreter's exit."""
    if os.getpid() != process:
        return
    deadline = time.monotonic() + 1.0
    while helpers.running and time.monotonic() < deadline:
        time.sleep(0.001)
    if not helpers.running:
        helpers.native.stop(helpers.state.address)
        for thread in set(helpers.threads) - {threading.current_thread()}:
            thread.join(max(0.0, deadline + 1.0 - time.monotonic()))
    if helpers.running or any(thread.is_alive() for thread in helpers.threads):
        # The interpreter goes down in the middle of a step of another thread: what the native code
        # still reads must stay where it is until the process ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(helpers))


def _after_fork_in_child() -> None:
    global _steps, _registry_lock
    _steps = threading.RLock()
    _registry_lock = threading.Lock()
    for pool in list(_pools):
        pool.forget_helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
