"""What this host's cores and caches do, measured by small kernels of the CPU's own code generator.

Each number is a rate of the machine under the code that dure generates: what a vector of one
operation takes, a step of a dot's registers, a pass of a loop, a launch, a byte from each level of
the caches.  No number belongs to a kernel of the library or to a size.  Every burst is short and
all of them take turns; the fastest of several counts, because other programs only ever add time.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dure.ir import tile
from dure.ir.parser import parse_function
from dure.runtime.bandwidth import BandwidthProbe
from dure.runtime.host import default_workers, host_features
from dure.runtime.memory import Buffer
from dure.runtime.pool import shared_pool
from dure.targets.cpu.launch import CompiledKernel, compile_kernel
from dure.targets.cpu.microkernels import (
    CHAINS,
    FORMS,
    WIDTHS,
    Micro,
    chain,
    convert,
    copying,
    dot,
    masked,
    patches,
    reduction,
    rewalk,
    rows,
    small,
    streams,
    transposed,
    walk,
    writing,
)

#: The module that declares the ops which the kernels' texts name.
OPS = tile
#: Bytes of the working sets of which bandwidth is measured.
SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 3 << 22, 1 << 26)
#: Rows of the columns that are walked again.
DEPTHS = (64, 128, 256, 1024, 4096)
#: Working sets of patches: their rows are short runs of bytes.
PATCHES = (1 << 17, 1 << 19, 1 << 21, 1 << 23, 1 << 25)
#: Nanoseconds of arithmetic on 128 bytes beside which a line's way in is hidden, and is not.
_LITTLE, _AHEAD = 6.0, 16.0
#: Sets of caches of 32 and of 512 KiB with eight ways, and how many of the latter are few.
_WAYS = 8
_L1_SETS = 64
_L2_SETS = 1024
_FEW_SETS = 256
HEIGHTS = (4, 1)
_WAYS_OF_PATCHES = ("read", "write", "exp")
_ROUNDS = 60
#: Nanoseconds of a burst at least.
_BURST = 60_000.0


@dataclass(frozen=True)
class HostRates:
    """Nanoseconds, of one worker; bandwidths (10^9 bytes a second) by the bytes of a working set.

    ``ops``: a vector of an operation; ``loop``: a pass of a loop that loads and stores a vector;
    ``read``: one more load; ``row``: an entry into an inner loop; ``instance``: into a kernel's
    instance; ``launch``: a kernel that does nothing.  ``dots``: a step of K of a block of (rows,
    vectors) of a type, and what a block takes beside.  ``walks``: a
    step of K down a column of a matrix of so many bytes, and ``rewalks`` down one of so many rows
    over and over (by dots of 4 rows or 1), by whether rows are a power of two apart.  ``patches``:
    what 128 bytes of short runs take more than in the nearest cache, read, written, or both around
    long arithmetic, which hides none of it.
    """

    workers: int
    lanes: int
    launch: float
    loop: float
    read: float
    row: float
    instance: float
    gather: float
    ops: dict[str, float] = field(default_factory=dict[str, float])
    casts: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    masks: dict[tuple[str, int], float] = field(default_factory=dict[tuple[str, int], float])
    steps: dict[str, float] = field(default_factory=dict[str, float])
    ends: dict[str, float] = field(default_factory=dict[str, float])
    dots: dict[tuple[str, int, int], float] = field(
        default_factory=dict[tuple[str, int, int], float]
    )
    blocks: float = 0.0
    reads: dict[int, float] = field(default_factory=dict[int, float])
    writes: dict[int, float] = field(default_factory=dict[int, float])
    copies: dict[int, float] = field(default_factory=dict[int, float])
    walks: dict[bool, dict[int, float]] = field(default_factory=dict[bool, dict[int, float]])
    rewalks: dict[tuple[bool, int], dict[int, float]] = field(
        default_factory=dict[tuple[bool, int], dict[int, float]]
    )
    patches: dict[tuple[str, bool], dict[int, float]] = field(
        default_factory=dict[tuple[str, bool], dict[int, float]]
    )

    def op(self, name: str) -> float:
        """Nanoseconds of a vector of an elementwise operation."""
        return self.ops.get(FORMS.get(name, name), self.ops["where"])

    def cast(self, source: str, target: str) -> float:
        """Nanoseconds of a vector's conversion."""
        found = self.casts.get((source, target))
        if found is not None:
            return found
        return 0.0 if source == target else max(self.casts.values(), default=0.0)

    def reduce_step(self, name: str) -> float:
        """Nanoseconds that a reduction takes for each vector: it waits for the one before."""
        return self.steps.get({"sum": "add", "min": "max"}.get(name, name), self.steps["max"])

    def reduce_end(self, name: str) -> float:
        """Nanoseconds of a row's reduction beside its vectors."""
        return self.ends.get({"sum": "add", "min": "max"}.get(name, name), self.ends["max"])

    def dot_step(self, dtype: str, height: int, vectors: int) -> float:
        """Nanoseconds of one step of K of a register block."""
        kind = dtype if (dtype, 4, 2) in self.dots else "bfloat16"
        return self.dots[kind, height, vectors]

    def mask(self, way: str, bits: int) -> float:
        """Nanoseconds more of a vector's ``load`` or ``store`` that may leave lanes out."""
        return self.masks[way, 32 if bits >= 32 else 16]

    def bandwidths(self, footprint: int) -> tuple[float, float, float]:
        """Reading, writing, and both at once as a copy does."""
        return (
            interpolate(self.reads, footprint),
            interpolate(self.writes, footprint),
            interpolate(self.copies, footprint),
        )

    def walk(self, footprint: int, stride: int) -> float:
        """Nanoseconds of a line down a column of rows ``stride`` bytes apart, the first time."""
        return interpolate(self.walks[sets_of(stride, _L2_SETS) <= _FEW_SETS], footprint)

    def rewalk(self, deep: int, stride: int, height: int = 4) -> float:
        """Nanoseconds of a line down a column of ``deep`` rows that was walked just before; 0 where
        all lines stay in the nearest cache.
        """
        if deep <= _WAYS * sets_of(stride, _L1_SETS):
            return 0.0
        sets = sets_of(stride, _L2_SETS)
        if sets > _FEW_SETS:
            return interpolate(self.rewalks[False, height], deep)
        # Rows of 4 KiB were measured: these have sets for more or fewer lines.
        measured = sets_of(4096, _L2_SETS)
        return interpolate(self.rewalks[True, height], max(1, deep * measured // sets))

    def chunk(self, way: str, footprint: int, stride: int) -> float:
        """Nanoseconds that 128 bytes of a very short run are waited for, read or written."""
        few = sets_of(stride, _L2_SETS) <= _FEW_SETS
        return interpolate(self.patches[way, few], footprint)

    def behind(self, stride: int, busy: float) -> float:
        """Nanoseconds that 128 bytes from the second cache are waited for between ``busy``
        nanoseconds of arithmetic, which fills what a core looks ahead.
        """
        few = sets_of(stride, _L2_SETS) <= _FEW_SETS
        whole = self.patches["exp", few][PATCHES[0]]
        return whole * min(1.0, max(0.0, busy - _LITTLE) / (_AHEAD - _LITTLE))


def sets_of(stride: int, sets: int) -> int:
    """Sets of a cache of so many that lines ``stride`` bytes apart fall into."""
    return min(sets, sets * 64 // math.gcd(max(1, stride), sets * 64))


def interpolate(curve: dict[int, float], size: int) -> float:
    """A curve's value at a size, straight between measured ones on a logarithmic axis of sizes."""
    sizes = sorted(curve)
    if size <= sizes[0]:
        return curve[sizes[0]]
    for low, high in itertools.pairwise(sizes):
        if size <= high:
            part = math.log(size / low) / math.log(high / low)
            return curve[low] * (1 - part) + curve[high] * part
    return curve[sizes[-1]]


class Runner:
    """A compiled kernel with memory for its tensors, that can be timed without much around it."""

    def __init__(self, kernel: CompiledKernel, sizes: Sequence[int], workers: int) -> None:
        self.kernel = kernel
        self.workers = workers
        self.buffers = [Buffer(max(64, size) + 64) for size in sizes]
        addresses = [b.address for b in self.buffers]
        self._arguments = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self._sizes = (ctypes.c_int64 * 1)(0)
        self._context = (ctypes.c_void_p * 3)(
            ctypes.addressof(self._arguments),
            ctypes.addressof(self._sizes),
            kernel.arena.address,
        )
        self._address = ctypes.addressof(self._context)

    def once(self) -> float:
        """Nanoseconds of a launch."""
        started = time.perf_counter_ns()
        self.kernel.pool.run(self.kernel.step, self._address, self.workers)
        return time.perf_counter_ns() - started

    def burst(self, launches: int) -> float:
        """Nanoseconds of a launch among several that follow each other."""
        run, step, context = self.kernel.pool.run, self.kernel.step, self._address
        started = time.perf_counter_ns()
        for _ in range(launches):
            run(step, context, self.workers)
        return (time.perf_counter_ns() - started) / launches


def fastest(
    runners: Sequence[Callable[[], Runner]],
    rounds: int = _ROUNDS,
    burst: float = _BURST,
    between: Callable[[], None] = lambda: None,
) -> list[float]:
    """The fastest launch of each, in nanoseconds; they take turns, with ``between`` after each."""
    ready = [make() for make in runners]
    counts: list[int] = []
    for runner in ready:
        runner.once()
        counts.append(max(1, min(200, int(burst / max(1.0, min(runner.once(), runner.once()))))))
    best = [math.inf] * len(ready)
    for _ in range(rounds):
        for place, (runner, count) in enumerate(zip(ready, counts, strict=True)):
            runner.once()
            best[place] = min(best[place], runner.burst(count))
        between()
    return best


def _runner(micro: Micro, workers: int) -> Callable[[], Runner]:
    def make() -> Runner:
        kernel = compile_kernel(parse_function(micro.text), pool=shared_pool(workers))
        runner = Runner(kernel, micro.bytes, workers)
        for buffer in runner.buffers:
            # Numbers near 1 in float32 and in both halves as 16-bit floats.
            buffer.array[: buffer.nbytes // 4 * 4].view("uint32")[:] = 0x3F803F80
        return runner

    return make


class Bench:
    """The microbenchmarks of a host, to be run in turns with whatever else is measured."""

    def __init__(self, workers: int | None = None) -> None:
        """``workers`` of None are those of the machine."""
        self.workers = default_workers() if workers is None else workers
        self.lanes = host_features().vector_bits // 32
        self._jobs = _jobs(self.workers, self.lanes)
        self._probes = {size: BandwidthProbe(size, shared_pool(self.workers)) for size in SIZES}
        self._reads: dict[int, float] = dict.fromkeys(SIZES, 0.0)

    def makers(self) -> list[Callable[[], Runner]]:
        """What makes each runner, for :func:`fastest`."""
        return [_runner(micro, count) for micro, count in self._jobs.values()]

    def probe(self) -> None:
        """One burst of reading each working set; it belongs to each round."""
        for size, probe in self._probes.items():
            probe.burst()
            self._reads[size] = max(self._reads[size], probe.burst(max(1, (1 << 20) // size)))

    def rates(self, found: Sequence[float]) -> HostRates:
        """The rates that the fastest launches of :meth:`makers` amount to."""
        launch = found[list(self._jobs).index(("empty", 0))]
        ns = {
            key: max(0.001, value - launch) / micro.units
            for (key, (micro, _)), value in zip(self._jobs.items(), found, strict=True)
        }
        return _rates(self.workers, self.lanes, launch, ns, self._reads)


@functools.cache
def measure(workers: int | None = None) -> HostRates:
    """The host's rates with so many workers (default: those of the machine)."""
    bench = Bench(workers)
    return bench.rates(fastest(bench.makers(), between=bench.probe))


def _jobs(workers: int, lanes: int) -> dict[tuple[str, int], tuple[Micro, int]]:
    """Every microbenchmark by its name and size, and the workers that run it."""
    jobs = {(name, 0): (micro, 1) for name, micro in _all(lanes).items()}
    for size in SIZES:
        jobs["write", size] = writing(size, workers), workers
        jobs["copy", size] = copying(size, workers), workers
    for aliased, wide in WIDTHS.items():
        for size in SIZES:
            jobs[f"walk {aliased}", size] = walk(size, wide), 1
        for deep in DEPTHS:
            for height in HEIGHTS:
                jobs[f"rewalk {aliased} {height}", deep] = rewalk(deep, wide, height), 1
        for way in _WAYS_OF_PATCHES:
            for size in (0, *PATCHES):
                jobs[f"{way} {aliased}", size] = patches(way, size, wide), 1
    return jobs


def _all(lanes: int) -> dict[str, Micro]:
    found: dict[str, Micro] = {
        "empty": small(1),
        "small": small(2000),
        "line": chain("add", 0, lanes),
        "rows": rows(lanes),
        "streams": streams(lanes),
        "transposed": transposed(lanes),
    }
    for name, (short, long) in CHAINS.items():
        found[f"{name} short"] = chain(name, short, lanes)
        found[f"{name} long"] = chain(name, long, lanes)
    for source, target in (
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float32", "float16"),
        ("float16", "float32"),
    ):
        found[f"cast {source} {target}"] = convert(source, target, lanes)
    for bits, dtype in ((32, "float32"), (16, "bfloat16")):
        for way in ("load", "store"):
            found[f"mask {way} {bits}"] = masked(way, dtype, lanes)
    for name in ("add", "max"):
        found[f"reduce {name} long"] = reduction(name, 64, 512, lanes)
        found[f"reduce {name} short"] = reduction(name, 512, 4 * lanes, lanes)
    for dtype in ("float32", "bfloat16"):
        for height in (4, 2, 1):
            for vectors in (2, 1):
                found[f"dot {dtype} {height} {vectors}"] = dot(dtype, height, vectors, 192, lanes)
    found["dot shallow"] = dot("float32", 4, 2, 16, lanes)
    return found


def _constant(curve: dict[int, float]) -> float:
    """What a column takes whatever its depth, from the two shallowest."""
    shallow, deeper = sorted(curve)[:2]
    return max(0.0, curve[shallow] - curve[deeper]) * shallow * deeper / (deeper - shallow)


def _slopes(curve: dict[int, float]) -> dict[int, float]:
    """Lines' times without what a column takes whatever its depth."""
    constant = _constant(curve)
    return {deep: each - constant / deep for deep, each in curve.items()}


def _rates(
    workers: int,
    lanes: int,
    launch: float,
    found: dict[tuple[str, int], float],
    reads: dict[int, float],
) -> HostRates:
    ns = {name: value for (name, size), value in found.items() if size == 0}
    base = ns["line"]
    writes = {size: 1 / found["write", size] for size in SIZES}
    ops = {
        name: max(0.0, ns[f"{name} long"] - ns[f"{name} short"]) / (long - short)
        for name, (short, long) in CHAINS.items()
    }
    casts = {
        ("float32", "bfloat16"): ns["cast float32 bfloat16"] - base,
        ("float32", "float16"): ns["cast float32 float16"] - base,
        ("bfloat16", "float32"): ns["cast bfloat16 float32"] - base,
        ("float16", "float32"): ns["cast float16 float32"] - base,
    }
    steps: dict[str, float] = {}
    ends: dict[str, float] = {}
    for name in ("add", "max"):
        # A row of 512 and one of four vectors: the slope is a vector, what is left a row's end.
        long, short = ns[f"reduce {name} long"] * 512 / lanes, ns[f"reduce {name} short"] * 4
        steps[name] = max(0.0, long - short) / (512 / lanes - 4)
        ends[name] = max(0.0, short - 4 * steps[name])
    dots = {
        (dtype, height, vectors): ns[f"dot {dtype} {height} {vectors}"]
        for dtype in ("float32", "bfloat16")
        for height in (4, 2, 1)
        for vectors in (2, 1)
    }
    shallow = ns["dot shallow"]
    block = max(0.0, (shallow - dots["float32", 4, 2]) / (1 / 16 - 1 / 192))
    # On a busy machine the shallow one may look slower than it is: a step is never nothing.
    dots = {key: max(value - block / 192, value / 2) for key, value in dots.items()}
    # The end of a long loop over K isn't foreseen, that of a short one is.
    deep = {depth: found["rewalk False 4", depth] for depth in DEPTHS}
    block = max(block, _constant(deep))
    return HostRates(
        workers=workers,
        lanes=lanes,
        launch=launch,
        loop=base,
        read=max(0.0, (ns["streams"] - base) / 3 - ops["add"]),
        row=max(0.0, ns["rows"] - base) * 2,
        instance=ns["small"],
        gather=max(0.0, ns["transposed"] - base),
        ops=ops,
        casts={key: max(0.0, value) for key, value in casts.items()},
        masks={
            (way, bits): max(0.0, ns[f"mask {way} {bits}"] - plain)
            for way in ("load", "store")
            for bits, plain in ((32, base), (16, ns["cast bfloat16 bfloat16"]))
        },
        steps=steps,
        ends=ends,
        dots=dots,
        blocks=block,
        reads=dict(reads),
        writes=writes,
        copies={size: 2 / found["copy", size] for size in SIZES},
        walks={a: {size: found[f"walk {a}", size] for size in SIZES} for a in WIDTHS},
        rewalks={
            (a, h): _slopes({deep: found[f"rewalk {a} {h}", deep] for deep in DEPTHS})
            for a in WIDTHS
            for h in HEIGHTS
        },
        patches={
            (way, a): {
                size: max(0.0, found[f"{way} {a}", size] - found[f"{way} {a}", 0])
                for size in PATCHES
            }
            for way in _WAYS_OF_PATCHES
            for a in WIDTHS
        },
    )
