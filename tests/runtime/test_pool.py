"""The worker pool: values after barriers, launches, parking, forks, exits, crowded machines."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dure.errors import UsageError
from dure.runtime import host, llvm, pool, pool_code
from dure.runtime.memory import Buffer
from dure.runtime.pool import Pool

LINE = 128

STEPS = (
    pool_code.barrier_ir()
    + """
; Worker w adds 1 to the first word of its slot and writes n to the second.
define void @count(ptr %c, i64 %w, i64 %n, ptr %s) {
  %o = mul i64 %w, 128
  %p = getelementptr i8, ptr %c, i64 %o
  %a = load i64, ptr %p
  %b = add i64 %a, 1
  store i64 %b, ptr %p
  %q = getelementptr i8, ptr %p, i64 8
  store i64 %n, ptr %q
  ret void
}

; The first word of the context's last line (at 128 * 64) says how many rounds.  In each round every
; worker writes the round to its slot, all meet, every worker counts the slots that do not hold it,
; and all meet again.
define void @meet(ptr %c, i64 %w, i64 %n, ptr %s) {
entry:
  %last = getelementptr i8, ptr %c, i64 8192
  %rounds = load i64, ptr %last
  %o = mul i64 %w, 128
  %mine = getelementptr i8, ptr %c, i64 %o
  %wrong_at = getelementptr i8, ptr %mine, i64 16
  br label %round
round:
  %r = phi i64 [1, %entry], [%r1, %checked]
  %bad = phi i64 [0, %entry], [%bad2, %checked]
  store i64 %r, ptr %mine
  call void @dure.barrier(ptr %s, i64 %w, i64 %n)
  br label %look
look:
  %i = phi i64 [0, %round], [%i1, %look]
  %bad1 = phi i64 [%bad, %round], [%bad2, %look]
  %io = mul i64 %i, 128
  %slot = getelementptr i8, ptr %c, i64 %io
  %v = load i64, ptr %slot
  %differs = icmp ne i64 %v, %r
  %one = zext i1 %differs to i64
  %bad2 = add i64 %bad1, %one
  %i1 = add i64 %i, 1
  %more = icmp ult i64 %i1, %n
  br i1 %more, label %look, label %met
met:
  call void @dure.barrier(ptr %s, i64 %w, i64 %n)
  br label %checked
checked:
  %r1 = add i64 %r, 1
  %again = icmp ule i64 %r1, %rounds
  br i1 %again, label %round, label %done
done:
  store i64 %bad2, ptr %wrong_at
  ret void
}

; Worker 0 is late: it spins through the number at the context's end before the barrier.
define void @late(ptr %c, i64 %w, i64 %n, ptr %s) {
entry:
  %last = getelementptr i8, ptr %c, i64 8192
  %spins = load i64, ptr %last
  %first = icmp eq i64 %w, 0
  br i1 %first, label %spin, label %meet
spin:
  %i = phi i64 [0, %entry], [%i1, %spin]
  store volatile i64 %i, ptr %c
  %i1 = add i64 %i, 1
  %more = icmp ult i64 %i1, %spins
  br i1 %more, label %spin, label %meet
meet:
  call void @dure.barrier(ptr %s, i64 %w, i64 %n)
  %o = mul i64 %w, 128
  %mine = getelementptr i8, ptr %c, i64 %o
  store i64 7, ptr %mine
  ret void
}

; Worker w writes half of the float at the context's end.
define void @denormal(ptr %c, i64 %w, i64 %n, ptr %s) {
  %last = getelementptr i8, ptr %c, i64 8192
  %x = load float, ptr %last
  %y = fmul float %x, 5.0e-1
  %o = mul i64 %w, 128
  %mine = getelementptr i8, ptr %c, i64 %o
  store float %y, ptr %mine
  ret void
}
"""
)


class Context:
    """64 slots of 128 bytes, and one more for the step's argument."""

    def __init__(self) -> None:
        self.buffer = Buffer(LINE * 65)
        self.words = self.buffer.view((65, LINE // 8), "int64")
        self.address = self.buffer.address


@pytest.fixture(scope="module")
def steps() -> dict[str, int]:
    features = host.host_features()
    module = llvm.load_object(llvm.compile_module(STEPS, features), pool.symbols())
    _keep.append(module)
    return {name: module.address(name) for name in ("count", "meet", "late", "denormal")}


_keep: list[llvm.LoadedModule] = []


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 8, 16])
def test_every_worker_runs_every_step_once(steps: dict[str, int], workers: int) -> None:
    context = Context()
    team = Pool(workers)
    for _ in range(100):
        team.run(steps["count"], context.address)
    assert (context.words[:workers, 0] == 100).all()
    assert (context.words[:workers, 1] == workers).all()
    assert (context.words[workers:] == 0).all()
    team.close()


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 8])
def test_barriers_separate_writes_from_reads(steps: dict[str, int], workers: int) -> None:
    context = Context()
    team = Pool(workers)
    context.words[64, 0] = 1000
    for _ in range(3):
        team.run(steps["meet"], context.address)
        assert (context.words[:workers, 0] == 1000).all()
        assert (context.words[:64, 2] == 0).all()
    team.close()


def test_a_crowd_of_sixteen_passes_ten_thousand_barriers() -> None:
    result = run_program(
        "crowd = pool.Pool(16); context.words[64, 0] = 5000\n"
        "crowd.run(module.address('meet'), context.address)\n"
        "print((context.words[:64, 2] == 0).all())"
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, b"True", b"")


def test_steps_on_fewer_workers_than_the_pool_has(steps: dict[str, int]) -> None:
    context = Context()
    team = Pool(6)
    context.words[64, 0] = 20
    generator = np.random.default_rng(0)
    for _ in range(200):
        workers = int(generator.integers(1, 7))
        context.words[:64] = 0
        team.run(steps["meet"], context.address, workers)
        assert (context.words[:workers, 0] == 20).all()
        assert (context.words[workers:64] == 0).all()
        assert (context.words[:64, 2] == 0).all()
    team.close()


def test_workers_sleep_at_a_barrier_and_wake(steps: dict[str, int]) -> None:
    context = Context()
    context.words[64, 0] = 300_000_000  # a good tenth of a second: everybody else sleeps
    for workers in (2, 6):
        team = Pool(workers)
        context.words[:64] = 0
        before = resource.getrusage(resource.RUSAGE_SELF)
        started = time.monotonic()
        team.run(steps["late"], context.address)
        elapsed = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert (context.words[:workers, 0] == 7).all()
        assert used < 1.5 * elapsed + 0.05
        team.close()


def test_an_idle_pool_uses_no_processor_time(steps: dict[str, int]) -> None:
    context = Context()
    team = Pool(4)
    team.run(steps["count"], context.address)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.02
    team.run(steps["count"], context.address)
    assert (context.words[:4, 0] == 2).all()
    team.close()


def test_a_busy_python_thread_does_not_hold_steps_up(steps: dict[str, int]) -> None:
    if (os.cpu_count() or 1) < 2:
        team = Pool(1)
    else:
        team = Pool(2)
    context = Context()
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        context.words[64, 0] = 2000
        started = time.monotonic()
        for _ in range(5):
            team.run(steps["meet"], context.address)
        # Waking by the GIL would cost its switch interval of 5 ms at every barrier: 100 s.
        assert time.monotonic() - started < 20
    finally:
        stop.set()
        thread.join()
    team.close()


def test_the_gil_comes_back_soon_while_a_step_runs(steps: dict[str, int]) -> None:
    team, context, before = Pool(2), Context(), sys.getswitchinterval()
    context.words[64, 0] = 20_000
    seen: set[float] = set()
    thread = threading.Thread(target=team.run, args=(steps["meet"], context.address))
    try:
        sys.setswitchinterval(0.003)
        thread.start()
        while thread.is_alive():
            seen.add(sys.getswitchinterval())
        thread.join()
        assert min(seen) == pytest.approx(1e-4)
        assert sys.getswitchinterval() == pytest.approx(0.003)
    finally:
        sys.setswitchinterval(before)
    team.close()


def test_calls_from_several_threads_are_serialized(steps: dict[str, int]) -> None:
    pools = [Pool(2), Pool(3)]
    contexts = [Context() for _ in range(4)]

    def work(number: int) -> None:
        for _ in range(200):
            pools[number % 2].run(steps["count"], contexts[number].address)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, context in enumerate(contexts):
        assert (context.words[: 2 + number % 2, 0] == 200).all()
    for team in pools:
        team.close()


def test_the_callers_affinity_is_left_alone(steps: dict[str, int]) -> None:
    if not hasattr(os, "sched_getaffinity"):
        assert host.cores().allowed == ()
        return
    before = os.sched_getaffinity(0)
    team = Pool(max(1, len(before)))
    context = Context()
    for core in sorted(before):
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(0, before)
        team.run(steps["count"], context.address)
        assert os.sched_getaffinity(0) == before
    team.close()


def test_helpers_have_cores_of_their_own(steps: dict[str, int]) -> None:
    order = host.cores().physical
    if len(order) < 2:
        assert pool._choose_cores(2) == (-1, [])
        return
    caller, helpers = pool._choose_cores(len(order))
    assert sorted([caller, *helpers]) == sorted(order)
    assert pool._choose_cores(len(order) + 1) == (-1, [])
    team = Pool(2)
    context = Context()
    team.run(steps["count"], context.address)
    assert team._helpers is not None
    thread = team._helpers.threads[0]
    assert thread.native_id is not None
    assert len(os.sched_getaffinity(thread.native_id)) == 1
    team.close()


def test_workers_share_the_floating_point_environment(steps: dict[str, int]) -> None:
    context = Context()
    context.buffer.view(1, "float32", LINE * 64)[0] = 3e-45  # two units of the smallest denormal
    team = Pool(2)
    if host.architecture_name() == "x86-64":
        _flush_denormals(True)
    try:
        team.run(steps["denormal"], context.address)
    finally:
        if host.architecture_name() == "x86-64":
            assert _flush_denormals(False)
    results = context.buffer.view((2, LINE // 4), "uint32")[:, 0]
    assert results.tolist() == [1, 1]
    team.close()


def _flush_denormals(on: bool) -> bool:
    """Set or clear flushing of denormals in this thread; returns whether it was set."""
    text = """
    declare void @llvm.x86.sse.stmxcsr(ptr)
    declare void @llvm.x86.sse.ldmxcsr(ptr)
    define i32 @set(i32 %word) {
      %slot = alloca i32
      call void @llvm.x86.sse.stmxcsr(ptr %slot)
      %old = load i32, ptr %slot
      store i32 %word, ptr %slot
      call void @llvm.x86.sse.ldmxcsr(ptr %slot)
      ret i32 %old
    }"""
    module = llvm.load_object(llvm.compile_module(text, host.host_features()))
    function = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32)(module.address("set"))
    return bool(function(0x1F80 | (0x8040 if on else 0)) & 0x8040)


def test_a_pool_that_nobody_holds_ends_its_helpers(steps: dict[str, int]) -> None:
    team = Pool(3)
    context = Context()
    team.run(steps["count"], context.address)
    assert team._helpers is not None
    threads = list(team._helpers.threads)
    del team
    deadline = time.monotonic() + 5
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in threads)


def test_wrong_uses_are_errors(steps: dict[str, int]) -> None:
    for workers in (0, -1, 100_000):
        with pytest.raises(UsageError, match="workers"):
            Pool(workers)
    team = Pool(2)
    for workers in (0, 3):
        with pytest.raises(UsageError, match="pool of 2"):
            team.run(steps["count"], 0, workers)
    with pytest.raises(UsageError, match="null"):
        team.run(0, 0)
    team.close()
    team.close()
    with pytest.raises(UsageError, match="closed"):
        team.run(steps["count"], 0)


def test_shared_pools_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.shared_pool(2) is pool.shared_pool(2)
    monkeypatch.setenv("DURE_THREADS", "2")
    assert pool.shared_pool() is pool.shared_pool(2)


def test_without_futex_and_affinity_the_same_steps_run(
    steps: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pool._load_native(host.host_features(), futex=False, nudge=False)
    monkeypatch.setattr(pool, "_native", lambda: plain)
    monkeypatch.setattr(pool, "_choose_cores", lambda workers: (-1, []))
    context = Context()
    team = Pool(3)
    context.words[64, 0] = 200
    team.run(steps["meet"], context.address)
    assert (context.words[:64, 2] == 0).all()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.06
    team.run(steps["count"], context.address)
    team.close()


def test_the_code_for_arm_compiles() -> None:
    features = host.features_of("neon")
    text = pool_code.pool_ir("aarch64", futex=True, nudge=True)
    assert "dure_worker_loop" in llvm.assembly(text, features)


def test_a_forked_child_starts_helpers_of_its_own(steps: dict[str, int]) -> None:
    if not hasattr(os, "fork"):
        assert sys.platform == "win32"
        return
    team = Pool(3)
    context = Context()
    team.run(steps["count"], context.address)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            for _ in range(10):
                team.run(steps["count"], context.address)
            code = 0 if (context.words[:3, 0] == 11).all() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0
    team.run(steps["count"], context.address)
    assert (context.words[:3, 0] == 2).all()
    team.close()


PROGRAM = """
import sys, threading, time, signal, os
sys.path.insert(0, {folder!r})
import test_pool as t
from dure.runtime import host, llvm, pool
module = llvm.load_object(llvm.compile_module(t.STEPS, host.host_features()), pool.symbols())
context = t.Context()
context.words[64, 0] = 1000
team = pool.Pool(3)
team.run(module.address("meet"), context.address)
"""


def run_program(body: str) -> subprocess.CompletedProcess[bytes]:
    """The program's output; one that hangs is ended, however slow the machine is."""
    program = PROGRAM.format(folder=str(Path(__file__).parent)) + body
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=600, check=False
    )


@pytest.mark.parametrize(
    "body",
    [
        "print('done')",
        "shared = pool.shared_pool(2); shared.run(module.address('count'), context.address)\n"
        "print('done')",
        "print('done'); sys.exit(0)",
        # Another thread is in the middle of a very long step; its memory outlives Python.
        "import ctypes; ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))\n"
        "ctypes.pythonapi.Py_IncRef(ctypes.py_object(context.buffer))\n"
        "context.words[64, 0] = 10**12\n"
        "threading.Thread(target=team.run, args=(module.address('late'), context.address),"
        " daemon=True).start()\n"
        "time.sleep(0.3)\nprint('done')",
    ],
)
def test_the_interpreter_exits_with_a_pool_alive(body: str) -> None:
    result = run_program(body)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, b"done", b"")


def test_control_c_is_raised_after_the_step() -> None:
    result = run_program(
        "context.words[64, 0] = 500_000_000\n"
        "threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    for _ in range(1000):\n"
        "        team.run(module.address('late'), context.address)\n"
        "except KeyboardInterrupt:\n"
        "    context.words[64, 0] = 1000\n"
        "    team.run(module.address('meet'), context.address)\n"
        "    print('interrupted')\n"
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, b"interrupted", b"")
