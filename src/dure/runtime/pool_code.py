"""The native half of the worker pool, as LLVM IR: waiting, barrier, workers' loop and launch.

All of a pool's state is one block of memory, ``pool_state``.  Its layout, in bytes (every part
that is written by somebody else has 128 bytes of its own, because processors fetch lines of 64
bytes in pairs):

    TICKET (0)               i64; low half: the newest step's number; high half: its workers
    STEP (8), CONTEXT (16)   the newest step's function and its first argument
    PARAMETERS (128)         i32 sleepers on the ticket; i32 stop; i32 most pauses when idle, most
                             pauses at a barrier, least pauses; i32 yields; i64 workers of the
                             step before
    HELPER_CORES (256)       a bit for each processor that a helper is pinned to
    CALLER_CORE (384)        a bit for the processor that is left to the caller
    WORKER_LINES + 256 * w   i32 phase, i32 its sleepers; i32 done, i32 its sleepers;
                             at 128, for the worker alone: i32 patience at a barrier, i32 when idle

**Waiting** is the same everywhere: until a 32-bit counter has reached a target.  The waiter looks
again and again with the processor's pause instruction, and then sleeps in the kernel (a futex on
Linux; elsewhere it gives way, then naps, and looks in between).  Before it sleeps it says so in the
counter's *sleepers* word, so that whoever advances the counter pays for a system call only when
somebody sleeps.  Advancing is an atomic exchange, and a sleeper looks once more after it has said
so: one of the two sees the other.

**Patience**, how long a worker looks before it sleeps, is learnt: each wait that ended in time
makes it longer by a quarter, each that did not halves it.  On a quiet machine workers never sleep
inside a step.  Beside other busy programs they sleep almost at once, which keeps their credit with
the system's scheduler.  Only in a pool with more workers than cores a waiter gives its time slice
away a few times before it sleeps: whom it waits for most likely waits for this core.

**The barrier.** Every worker has a *phase* counter on a line of its own.  Up to four workers each
advance their own and wait for all others: one transfer of a cache line after the last arrival.
With more workers, worker 0 waits for all and the others wait for worker 0: the number of wakes
grows with the workers and not with their square, which matters when there are more workers than
cores.

**Numbers.** Every worker runs a step with the same floating-point environment (round to nearest, no
flushing of denormals), whatever the calling thread had set, and the caller gets its own back.
"""

from __future__ import annotations

import sys

TICKET = 0
STEP = 8
CONTEXT = 16
PARAMETERS = 128
HELPER_CORES = 256
CALLER_CORE = 384
WORKER_LINES = 512
LINE = 256
PRIVATE = 128

MOST_CORES = 1024
"""Processors numbered above this are left alone: the sets of cores have this many bits."""

ALL_TO_ALL_WORKERS = 4
"""Up to this many workers the barrier is symmetric; above, worker 0 gathers and releases."""

GLANCES = 30
"""Looks at another worker's counter before asking whether anybody sleeps on ours."""

_YIELDS = 200
_ALL = 2**31 - 1


def state_bytes(workers: int) -> int:
    """The size of ``pool_state`` for a pool of that many workers."""
    return WORKER_LINES + LINE * workers


def barrier_ir() -> str:
    """LLVM IR to put into a module whose steps need a barrier between their workers.

    Defines ``void @dure.barrier(ptr pool_state, i64 worker, i64 workers)``, inlined everywhere:
    one worker pays a comparison, more call ``dure_barrier``, whose address
    :func:`dure.runtime.pool.symbols` gives to the loader.  Every worker of the step must call it
    the same number of times.  What a worker wrote before it is visible to all workers after it.
    """
    return """
declare void @dure_barrier(ptr, i64, i64)

define internal void @dure.barrier(ptr %state, i64 %worker, i64 %workers) alwaysinline {
  %several = icmp ugt i64 %workers, 1
  br i1 %several, label %meet, label %alone
meet:
  call void @dure_barrier(ptr %state, i64 %worker, i64 %workers)
  br label %alone
alone:
  ret void
}
"""


def pool_ir(architecture: str, *, futex: bool, nudge: bool) -> str:
    """The module behind the pool.

    ``futex`` puts sleepers to sleep in the Linux kernel instead of napping; ``nudge`` moves a
    caller away from a core that a helper is pinned to (Linux).  The external functions it needs
    are listed by :func:`operating_system_functions`.
    """
    parts = [
        _pause_ir(architecture),
        _floating_point_ir(architecture),
        _futex_ir(architecture) if futex else _nap_ir(),
        _WAIT,
        _BARRIER,
        _WORKER_LOOP,
        _NUDGE if nudge else _NO_NUDGE,
        _LAUNCH,
    ]
    return "\n".join(parts)


def operating_system_functions(*, futex: bool, nudge: bool) -> dict[str, str]:
    """The name in the IR -> the name in the C library (on Windows in kernel32)."""
    windows = sys.platform == "win32"
    names = {"dure_os_yield": "SwitchToThread" if windows else "sched_yield"}
    if futex:
        names["dure_os_syscall"] = "syscall"
    else:
        names["dure_os_nap"] = "Sleep" if windows else "usleep"
    if nudge:
        for name in ("sched_getcpu", "sched_getaffinity", "sched_setaffinity"):
            names[f"dure_os_{name}"] = name
    return names


def _pause_ir(architecture: str) -> str:
    if architecture == "aarch64":
        declared = "declare void @llvm.aarch64.hint(i32)"
        call = "call void @llvm.aarch64.hint(i32 1)"
    else:
        declared, call = "declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"
    return f"""
{declared}
declare i32 @dure_os_yield()

define internal void @pause() alwaysinline {{
  {call}
  ret void
}}

define void @dure_spin(i32 %count) {{
entry:
  br label %next
next:
  %i = phi i32 [0, %entry], [%i1, %next]
  call void @pause()
  %i1 = add i32 %i, 1
  %more = icmp slt i32 %i1, %count
  br i1 %more, label %next, label %done
done:
  ret void
}}
"""


def _floating_point_ir(architecture: str) -> str:
    """``save`` returns the thread's floating-point control word; ``restore`` sets it."""
    if architecture == "aarch64":
        return """
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
@standard_control = internal constant i64 0

define internal i64 @save_control() alwaysinline {
  %word = call i64 @llvm.aarch64.get.fpcr()
  ret i64 %word
}

define internal void @set_control(i64 %word) alwaysinline {
  call void @llvm.aarch64.set.fpcr(i64 %word)
  ret void
}
"""
    return """
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
@standard_control = internal constant i64 8064

define internal i64 @save_control() alwaysinline {
  %slot = alloca i64, align 8
  store i64 0, ptr %slot
  call void @llvm.x86.sse.stmxcsr(ptr %slot)
  %word = load i64, ptr %slot
  ret i64 %word
}

define internal void @set_control(i64 %word) alwaysinline {
  %slot = alloca i64, align 8
  store i64 %word, ptr %slot
  call void @llvm.x86.sse.ldmxcsr(ptr %slot)
  ret void
}
"""


def _futex_ir(architecture: str) -> str:
    """Sleep while the word has the value seen (128: FUTEX_WAIT, private); wake all (129)."""
    number = 98 if architecture == "aarch64" else 202
    arguments = "i64 0, i64 0, i64 0"
    return f"""
declare i64 @dure_os_syscall(i64, ...)

define internal i32 @sleep_while(ptr %word, i32 %seen, i32 %nap) {{
  call i64 (i64, ...) @dure_os_syscall(i64 {number}, ptr %word, i64 128, i32 %seen, {arguments})
  ret i32 %nap
}}

define internal void @wake(ptr %word) noinline {{
  call i64 (i64, ...) @dure_os_syscall(i64 {number}, ptr %word, i64 129, i32 {_ALL}, {arguments})
  ret void
}}
"""


def _nap_ir() -> str:
    """For systems without a futex: give way a number of times, then nap, longer each time.

    ``%nap`` counts how often this wait has done so.  Naps last up to a millisecond (``usleep``
    counts microseconds, Windows' ``Sleep`` milliseconds).
    """
    first, longest = (1, 1) if sys.platform == "win32" else (50, 1000)
    return f"""
declare i32 @dure_os_nap(i32)

define internal i32 @sleep_while(ptr %word, i32 %seen, i32 %nap) {{
  %lively = icmp slt i32 %nap, {_YIELDS}
  br i1 %lively, label %give_way, label %doze
give_way:
  call i32 @dure_os_yield()
  %once_more = add i32 %nap, 1
  ret i32 %once_more
doze:
  %naps = sub i32 %nap, {_YIELDS}
  %long = shl i32 {first}, %naps
  %too_long = icmp ugt i32 %long, {longest}
  %time = select i1 %too_long, i32 {longest}, i32 %long
  call i32 @dure_os_nap(i32 %time)
  %longer = add i32 %nap, 1
  %next = select i1 %too_long, i32 %nap, i32 %longer
  ret i32 %next
}}

define internal void @wake(ptr %word) alwaysinline {{
  ret void
}}
"""


_WAIT = """
; Wait until the counter at %flag is at %target or past it; the word after it counts the sleepers.
define internal i1 @reached(ptr %flag, i32 %target) alwaysinline {
  %value = load atomic i32, ptr %flag acquire, align 4
  %ahead = sub i32 %value, %target
  %there = icmp sge i32 %ahead, 0
  ret i1 %there
}

; %patience_at is the waiter's own patience, between %least and %most.
define internal void @wait_for(ptr %flag, i32 %target, ptr %sleepers, ptr %patience_at,
    i32 %most, i32 %least, i32 %yields) noinline {
entry:
  %patience = load i32, ptr %patience_at, align 4
  br label %look
look:
  %i = phi i32 [0, %entry], [%i1, %spin]
  %there = call i1 @reached(ptr %flag, i32 %target)
  br i1 %there, label %in_time, label %tired
tired:
  %spinning = icmp slt i32 %i, %patience
  br i1 %spinning, label %spin, label %crowded
spin:
  call void @pause()
  %i1 = add i32 %i, 1
  br label %look
in_time:
  %quarter = lshr i32 %patience, 2
  %more = add i32 %patience, %quarter
  %grown = add i32 %more, 1
  %too_much = icmp sgt i32 %grown, %most
  %longer = select i1 %too_much, i32 %most, i32 %grown
  store i32 %longer, ptr %patience_at, align 4
  ret void
crowded:
  %j = phi i32 [0, %tired], [%j1, %look_again]
  %yielding = icmp slt i32 %j, %yields
  br i1 %yielding, label %give_way, label %announce
give_way:
  call i32 @dure_os_yield()
  %j1 = add i32 %j, 1
  br label %look_again
look_again:
  %there3 = call i1 @reached(ptr %flag, i32 %target)
  br i1 %there3, label %in_time, label %crowded
announce:
  atomicrmw add ptr %sleepers, i32 1 seq_cst
  br label %last_look
last_look:
  %nap = phi i32 [0, %announce], [%nap1, %sleep]
  %seen = load atomic i32, ptr %flag seq_cst, align 4
  %ahead = sub i32 %seen, %target
  %there2 = icmp sge i32 %ahead, 0
  br i1 %there2, label %awake, label %sleep
sleep:
  %nap1 = call i32 @sleep_while(ptr %flag, i32 %seen, i32 %nap)
  br label %last_look
awake:
  atomicrmw sub ptr %sleepers, i32 1 seq_cst
  %half = lshr i32 %patience, 1
  %too_little = icmp slt i32 %half, %least
  %shorter = select i1 %too_little, i32 %least, i32 %half
  store i32 %shorter, ptr %patience_at, align 4
  ret void
}

; Advance the counter at %flag, and wake whoever sleeps on it.
define internal void @advance(ptr %flag, i32 %value, ptr %sleepers) alwaysinline {
  atomicrmw xchg ptr %flag, i32 %value seq_cst
  %count = load atomic i32, ptr %sleepers seq_cst, align 4
  %any = icmp ne i32 %count, 0
  br i1 %any, label %rouse, label %done
rouse:
  call void @wake(ptr %flag)
  br label %done
done:
  ret void
}

define internal i32 @parameter(ptr %state, i64 %offset) alwaysinline {
  %place = getelementptr i8, ptr %state, i64 %offset
  %value = load i32, ptr %place, align 4
  ret i32 %value
}
"""

_BARRIER = f"""
; Wait until the counters of workers 0 to %workers - 1, %worker's own apart, are at %target or past
; it.  %field is the counter's place in a worker's line.
define internal void @wait_for_others(ptr %state, i64 %worker, i64 %workers, i32 %target,
    i64 %field) {{
entry:
  %most = call i32 @parameter(ptr %state, i64 {PARAMETERS + 12})
  %least = call i32 @parameter(ptr %state, i64 {PARAMETERS + 16})
  %yields = call i32 @parameter(ptr %state, i64 {PARAMETERS + 20})
  %lines = getelementptr i8, ptr %state, i64 {WORKER_LINES}
  %own_distance = mul i64 %worker, {LINE}
  %own_line = getelementptr i8, ptr %lines, i64 %own_distance
  %patience = getelementptr i8, ptr %own_line, i64 {PRIVATE}
  %fields = getelementptr i8, ptr %lines, i64 %field
  br label %next
next:
  %other = phi i64 [0, %entry], [%other1, %met]
  %self = icmp eq i64 %other, %worker
  br i1 %self, label %met, label %look
look:
  %distance = mul i64 %other, {LINE}
  %flag = getelementptr i8, ptr %fields, i64 %distance
  %there = call i1 @reached(ptr %flag, i32 %target)
  br i1 %there, label %met, label %wait
wait:
  %sleepers = getelementptr i8, ptr %flag, i64 4
  call void @wait_for(ptr %flag, i32 %target, ptr %sleepers, ptr %patience, i32 %most, i32 %least,
    i32 %yields)
  br label %met
met:
  %other1 = add i64 %other, 1
  %more = icmp ult i64 %other1, %workers
  br i1 %more, label %next, label %done
done:
  ret void
}}

; Announce that %worker has arrived, and wait for workers 0 to %workers - 1.  While the store of our
; own counter is on its way to the others we look at theirs already, for about a microsecond: only
; then comes the full fence that the question for sleepers needs (with two workers, 100 ns a barrier
; against 350 ns with the fence first).
define internal void @arrive_and_wait(ptr %state, i64 %worker, i64 %workers, ptr %mine,
    ptr %my_sleepers, i32 %target) alwaysinline {{
  store atomic i32 %target, ptr %mine release, align 4
  %distance = mul i64 %worker, {-LINE}
  %first = getelementptr i8, ptr %mine, i64 %distance
  %is_first = icmp eq i64 %worker, 0
  %beside = select i1 %is_first, i64 {LINE}, i64 0
  %flag = getelementptr i8, ptr %first, i64 %beside
  br label %glance
glance:
  %i = phi i32 [0, %0], [%i1, %again]
  %there = call i1 @reached(ptr %flag, i32 %target)
  br i1 %there, label %ask, label %glanced
glanced:
  %i1 = add i32 %i, 1
  %patient = icmp slt i32 %i1, {GLANCES}
  br i1 %patient, label %again, label %ask
again:
  call void @pause()
  br label %glance
ask:
  %count = atomicrmw add ptr %my_sleepers, i32 0 seq_cst
  %any = icmp ne i32 %count, 0
  br i1 %any, label %rouse, label %wait
rouse:
  call void @wake(ptr %mine)
  br label %wait
wait:
  call void @wait_for_others(ptr %state, i64 %worker, i64 %workers, i32 %target, i64 0)
  ret void
}}

define void @dure_barrier(ptr %state, i64 %worker, i64 %workers) {{
entry:
  %several = icmp ugt i64 %workers, 1
  br i1 %several, label %start, label %done
start:
  %distance = mul i64 %worker, {LINE}
  %lines = getelementptr i8, ptr %state, i64 {WORKER_LINES}
  %mine = getelementptr i8, ptr %lines, i64 %distance
  %my_sleepers = getelementptr i8, ptr %mine, i64 4
  %before = load atomic i32, ptr %mine monotonic, align 4
  %target = add i32 %before, 1
  %few = icmp ule i64 %workers, {ALL_TO_ALL_WORKERS}
  %root = icmp eq i64 %worker, 0
  %follow = xor i1 %root, true
  %others = select i1 %few, i64 %workers, i64 1
  %simple = or i1 %few, %follow
  br i1 %simple, label %arrive, label %gather
arrive:
  call void @arrive_and_wait(ptr %state, i64 %worker, i64 %others, ptr %mine, ptr %my_sleepers,
    i32 %target)
  br label %done
gather:
  call void @wait_for_others(ptr %state, i64 %worker, i64 %workers, i32 %target, i64 0)
  call void @advance(ptr %mine, i32 %target, ptr %my_sleepers)
  br label %done
done:
  ret void
}}
"""

_WORKER_LOOP = f"""
; A helper's life: wait for a ticket past %seen, run its step if it counts this worker in, repeat.
define void @dure_worker_loop(ptr %state, i64 %worker, i32 %first) {{
entry:
  %standard = load i64, ptr @standard_control
  call void @set_control(i64 %standard)
  %sleepers = getelementptr i8, ptr %state, i64 {PARAMETERS}
  %step_at = getelementptr i8, ptr %state, i64 {STEP}
  %context_at = getelementptr i8, ptr %state, i64 {CONTEXT}
  %stop_at = getelementptr i8, ptr %state, i64 {PARAMETERS + 4}
  %distance = mul i64 %worker, {LINE}
  %lines = getelementptr i8, ptr %state, i64 {WORKER_LINES}
  %mine = getelementptr i8, ptr %lines, i64 %distance
  %done_flag = getelementptr i8, ptr %mine, i64 8
  %done_sleepers = getelementptr i8, ptr %mine, i64 12
  %patience = getelementptr i8, ptr %mine, i64 {PRIVATE + 4}
  br label %idle
idle:
  %seen = phi i32 [%first, %entry], [%number, %look], [%number, %work]
  %target = add i32 %seen, 1
  %most = call i32 @parameter(ptr %state, i64 {PARAMETERS + 8})
  %least = call i32 @parameter(ptr %state, i64 {PARAMETERS + 16})
  call void @wait_for(ptr %state, i32 %target, ptr %sleepers, ptr %patience, i32 %most, i32 %least,
    i32 0)
  %ticket = load atomic i64, ptr %state seq_cst, align 8
  %number = trunc i64 %ticket to i32
  %workers = lshr i64 %ticket, 32
  %stop = load atomic i32, ptr %stop_at acquire, align 4
  %stopped = icmp ne i32 %stop, 0
  br i1 %stopped, label %leave, label %look
look:
  ; One read of the ticket gives number and workers: a helper that isn't counted in must not look
  ; at the step, which the caller may be replacing.
  %counted = icmp ult i64 %worker, %workers
  br i1 %counted, label %work, label %idle
work:
  %step = load ptr, ptr %step_at, align 8
  %context = load ptr, ptr %context_at, align 8
  call void %step(ptr %context, i64 %worker, i64 %workers, ptr %state)
  call void @advance(ptr %done_flag, i32 %number, ptr %done_sleepers)
  br label %idle
leave:
  ret void
}}
"""

_NUDGE = f"""
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare i32 @dure_os_sched_getcpu()
declare i32 @dure_os_sched_getaffinity(i32, i64, ptr)
declare i32 @dure_os_sched_setaffinity(i32, i64, ptr)

; A caller on a pinned helper's core would wait for itself until the system's balancer notices.
; Restricting it to the free core moves it there at once; then it gets its own set of cores back.
define internal void @nudge(ptr %state) {{
  %core = call i32 @dure_os_sched_getcpu()
  %known = icmp ult i32 %core, {MOST_CORES}
  br i1 %known, label %look, label %done
look:
  %byte = lshr i32 %core, 3
  %offset = zext i32 %byte to i64
  %cores = getelementptr i8, ptr %state, i64 {HELPER_CORES}
  %place = getelementptr i8, ptr %cores, i64 %offset
  %bits = load i8, ptr %place
  %low = and i32 %core, 7
  %index = trunc i32 %low to i8
  %shifted = lshr i8 %bits, %index
  %taken = trunc i8 %shifted to i1
  br i1 %taken, label %move, label %done
move:
  %own = alloca [{MOST_CORES // 8} x i8], align 8
  call void @llvm.memset.p0.i64(ptr %own, i8 0, i64 {MOST_CORES // 8}, i1 false)
  %size = call i32 @dure_os_sched_getaffinity(i32 0, i64 {MOST_CORES // 8}, ptr %own)
  %failed = icmp slt i32 %size, 0
  br i1 %failed, label %done, label %restrict
restrict:
  %free = getelementptr i8, ptr %state, i64 {CALLER_CORE}
  call i32 @dure_os_sched_setaffinity(i32 0, i64 {MOST_CORES // 8}, ptr %free)
  call i32 @dure_os_sched_setaffinity(i32 0, i64 {MOST_CORES // 8}, ptr %own)
  br label %done
done:
  ret void
}}
"""

_NO_NUDGE = """
define internal void @nudge(ptr %state) alwaysinline {
  ret void
}
"""

_LAUNCH = f"""
; Run a step on workers 0 to %workers - 1 and return when all have finished; we are worker 0.
define void @dure_launch(ptr %state, ptr %step, ptr %context, i64 %workers) {{
entry:
  %control = call i64 @save_control()
  %standard = load i64, ptr @standard_control
  call void @set_control(i64 %standard)
  %several = icmp ugt i64 %workers, 1
  br i1 %several, label %prepare, label %alone
alone:
  call void %step(ptr %context, i64 0, i64 1, ptr %state)
  br label %done
prepare:
  call void @nudge(ptr %state)
  %last_at = getelementptr i8, ptr %state, i64 {PARAMETERS + 24}
  %last = load i64, ptr %last_at, align 8
  %same = icmp eq i64 %last, %workers
  br i1 %same, label %publish, label %level
level:
  ; Other workers met at the last step's barriers than will meet now: bring all phases level.
  store i64 %workers, ptr %last_at, align 8
  %lines = getelementptr i8, ptr %state, i64 {WORKER_LINES}
  br label %clear
clear:
  %w = phi i64 [0, %level], [%w1, %clear]
  %away = mul i64 %w, {LINE}
  %phase = getelementptr i8, ptr %lines, i64 %away
  store atomic i32 0, ptr %phase monotonic, align 4
  %w1 = add i64 %w, 1
  %more = icmp ult i64 %w1, %workers
  br i1 %more, label %clear, label %publish
publish:
  %step_at = getelementptr i8, ptr %state, i64 {STEP}
  %context_at = getelementptr i8, ptr %state, i64 {CONTEXT}
  %sleepers_at = getelementptr i8, ptr %state, i64 {PARAMETERS}
  store ptr %step, ptr %step_at, align 8
  store ptr %context, ptr %context_at, align 8
  %before = load atomic i32, ptr %state monotonic, align 8
  %number = add i32 %before, 1
  %low = zext i32 %number to i64
  %high = shl i64 %workers, 32
  %ticket = or i64 %high, %low
  atomicrmw xchg ptr %state, i64 %ticket seq_cst
  %sleepers = load atomic i32, ptr %sleepers_at seq_cst, align 4
  %any = icmp ne i32 %sleepers, 0
  br i1 %any, label %rouse, label %work
rouse:
  call void @wake(ptr %state)
  br label %work
work:
  call void %step(ptr %context, i64 0, i64 %workers, ptr %state)
  call void @wait_for_others(ptr %state, i64 0, i64 %workers, i32 %number, i64 8)
  br label %done
done:
  call void @set_control(i64 %control)
  ret void
}}

define void @dure_stop(ptr %state) {{
  %stop_at = getelementptr i8, ptr %state, i64 {PARAMETERS + 4}
  store atomic i32 1, ptr %stop_at seq_cst, align 4
  %before = load atomic i32, ptr %state monotonic, align 8
  %number = add i32 %before, 1
  %ticket = zext i32 %number to i64
  atomicrmw xchg ptr %state, i64 %ticket seq_cst
  call void @wake(ptr %state)
  ret void
}}
"""
