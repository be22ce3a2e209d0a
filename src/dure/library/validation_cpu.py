"""Predictions for this host, and what it then takes: the one chip that dure always has.

The host's rates come from microbenchmarks (:mod:`dure.targets.cpu.microbench`).  A kernel is
compiled for the host as a chip (:mod:`dure.targets.cpu.chip`), with the tile sizes that a launch on
the CPU has, and its machine program is replayed like any other chip's.  Then the kernel runs, as
the CPU's code generator makes it, and the fastest of many launches is compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dure.compiler.chip.pipeline import Compiled, Options, compile_for
from dure.compiler.tiles import estimate
from dure.ir.core import Function
from dure.lang.kernel import Kernel
from dure.lang.tune import choose_for_types, cpu_machine
from dure.library import elementwise
from dure.library.build import index_values, tile_function
from dure.library.call import KernelCall, stored_bytes, tensor
from dure.library.operators import operator
from dure.library.operators_common import DTYPES, call, tile
from dure.machine.chip import Chip
from dure.runtime.pool import shared_pool
from dure.sim.timing import Timing, simulate
from dure.targets.cpu.chip import host_chip
from dure.targets.cpu.cost import HostCosts
from dure.targets.cpu.launch import compile_kernel
from dure.targets.cpu.microbench import Bench, HostRates, Runner, fastest

#: Operators, dims and dtypes that are predicted and measured.
SHAPES: tuple[tuple[str, str, str], ...] = (
    ("gemm", "64x64x64", "f32"),
    ("gemm", "128x256x512", "f32"),
    ("gemm", "256x256x256", "f32"),
    ("gemm", "100x300x200", "f32"),
    ("gemm", "8x1024x1024", "f32"),
    ("gemm", "512x512x512", "f32"),
    ("gemm", "64x128x256", "bf16"),
    ("gemm", "128x512x384", "bf16"),
    ("gemm", "32x1024x1024", "bf16"),
    ("gemm", "1x1024x1024", "f32"),
    ("gemm", "1x2048x1000", "f32"),
    ("gemm", "1x768x3072", "f32"),
    ("gemm", "1x2048x2048", "bf16"),
    ("gemm_gelu", "64x256x512", "f32"),
    ("gemm_bias", "128x256x384", "f32"),
    ("matmul", "64x256x256", "f32"),
    ("batched_matmul", "8x64x64x64", "f32"),
    ("softmax", "64x256", "f32"),
    ("softmax", "256x1000", "f32"),
    ("softmax", "512x2048", "f32"),
    ("softmax", "128x512", "bf16"),
    ("softmax_rows", "256x512", "f32"),
    ("rms_norm", "128x1024", "f32"),
    ("rms_norm", "512x4096", "f32"),
    ("rms_norm", "64x2048", "bf16"),
    ("layer_norm", "128x768", "f32"),
    ("layer_norm", "1024x1024", "f32"),
    ("elementwise_1d", "65536", "f32"),
    ("elementwise_1d", "1048576", "f32"),
    ("elementwise_1d", "8388608", "f32"),
    ("elementwise_2d", "512x512", "f32"),
    ("elementwise_2d", "1024x4096", "bf16"),
    ("gelu_tanh", "256x1024", "f32"),
    ("silu", "512x4096", "f32"),
    ("exp", "128x512", "f32"),
    ("reduce_last", "256x4096", "f32"),
    ("reduce_last", "1000x1000", "f32"),
    ("reduce_middle", "8x256x1024", "f32"),
    ("gather_rows", "256x4096x512", "f32"),
    ("embedding", "128x8192x1024", "f32"),
    ("transpose", "512x512", "f32"),
    ("transpose", "1024x2048", "f32"),
    ("dense_attention", "8x8x128x128x64", "f32"),
    ("dense_attention", "4x4x256x256x64", "f32"),
    ("paged_attention", "8x8x1x512x64", "f32"),
    ("attention_scores", "4x128x128x64", "f32"),
    ("rope", "128x8x64", "f32"),
    ("kv_write", "256x8x64", "f32"),
)
_FUNCTIONS = ("gelu_tanh", "silu", "exp")
_ROUNDS = 40


@dataclass(frozen=True)
class CpuRow:
    """A kernel on the host: nanoseconds measured and predicted; ``error`` is signed, of what was
    measured.
    """

    op: str
    dims: str
    dtype: str
    measured_ns: float
    predicted_ns: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_ns / self.measured_ns - 1.0


@dataclass(frozen=True)
class Predicted:
    """A call on the host: the tile sizes, the program, and its time."""

    chip: Chip
    consts: Mapping[str, int]
    compiled: Compiled
    timing: Timing


def calls_of(op: str, dims: str, dtype: str) -> tuple[KernelCall, ...]:
    """The launches of a row: an operator, or a function of every element of a matrix."""
    if op not in _FUNCTIONS:
        return operator(op, dims, dtype).calls
    m, n = (int(part) for part in dims.split("x"))
    x = tensor(DTYPES[dtype], m, n)
    function = elementwise.apply(elementwise.function_of(op, 0.0), ((False, False),), 2)
    tiles = {"bm": tile(m, 8), "bn": tile(n, 256)}
    return (call(elementwise.elementwise_2d, [x, x], tiles, {"function": function}),)


def host_tiles(launch: KernelCall) -> dict[str, int]:
    """The tile sizes that a launch on the CPU has."""
    if not launch.open:
        return {}
    if launch.variants:
        functions = [tile_function(launch, sizes) for sizes in launch.variants]
        times = [estimate(function, {}, cpu_machine()).seconds for function in functions]
        return dict(launch.variants[times.index(min(times))])
    assert isinstance(launch.kernel, Kernel)
    return choose_for_types(launch.kernel, launch.types, launch.consts, launch.open)


def predict(launch: KernelCall, rates: HostRates) -> Predicted:
    """The time of a call on the host, replayed with caches as memories.

    Raises :class:`~dure.errors.DureError` for a kernel that doesn't compile.
    """
    consts = host_tiles(launch)
    function = tile_function(launch, consts)
    footprint = sum(stored_bytes(t) for t in launch.types if t is not None)
    if launch.indices:
        # Of what is indexed, only what the indices name is touched.
        footprint = min(footprint, _replay(launch, function, rates, footprint)[2].bytes)
    chip, compiled, timing = _replay(launch, function, rates, footprint)
    return Predicted(chip, consts, compiled, timing)


def _replay(
    launch: KernelCall, function: Function, rates: HostRates, footprint: int
) -> tuple[Chip, Compiled, Timing]:
    """The kernel on the host, its tensors ``footprint`` bytes together."""
    chip = host_chip(rates, footprint)
    compiled = compile_for(function, chip)
    costs = HostCosts(chip, rates, compiled.function, footprint)
    if costs.alternates():
        compiled = compile_for(function, chip, Options(stages=1))
        costs = HostCosts(chip, rates, compiled.function, footprint)
    program = compiled.function
    chip = host_chip(rates, footprint, costs.direct(), inside=costs.multiplies())
    timing = simulate(program, chip, indices=index_values(launch, program), costs=costs)
    return chip, compiled, timing


def runner(launch: KernelCall, workers: int) -> Runner:
    """A call ready to run on the host, its tensors full of ones and its indices as they are."""
    consts = host_tiles(launch)
    function = tile_function(launch, consts)
    present = [place for place, kind in enumerate(launch.types) if kind is not None]
    sizes = [stored_bytes(p.value.tensor) for p in function.params]
    made = Runner(compile_kernel(function, pool=shared_pool(workers)), sizes, workers)
    for place, buffer in zip(present, made.buffers, strict=True):
        if place in launch.indices:
            values = np.ascontiguousarray(launch.indices[place]).reshape(-1).view(np.uint8)
            buffer.array[: values.nbytes] = values
        else:
            buffer.array[: buffer.nbytes // 4 * 4].view(np.uint32)[:] = 0x3F803F80
    return made


def validate_cpu(
    progress: Callable[[str], None] | None = None,
    *,
    shapes: Sequence[tuple[str, str, str]] = SHAPES,
    workers: int | None = 1,
    rounds: int = _ROUNDS,
) -> list[CpuRow]:
    """Predict every shape, and measure it.

    Microbenchmarks and kernels take turns, so that both see the machine alike where other programs
    use it too; a prediction is made from the microbenchmarks alone.  ``progress`` is told what
    happens.  ``workers`` of None are those of the machine.
    """
    say = progress or _silent
    bench = Bench(workers)
    launches = [(shape, one) for shape in shapes for one in calls_of(*shape)]
    micros = bench.makers()
    makers = [lambda one=one: runner(one, bench.workers) for _, one in launches]
    say(f"measuring the host's rates and {len(shapes)} kernels in turns")
    found = fastest([*micros, *makers], rounds, between=bench.probe)
    say("predicting from the host's rates")
    rates = bench.rates(found[: len(micros)])
    measured: dict[tuple[str, str, str], float] = dict.fromkeys(shapes, 0.0)
    predicted: dict[tuple[str, str, str], float] = dict.fromkeys(shapes, 0.0)
    for (shape, one), value in zip(launches, found[len(micros) :], strict=True):
        measured[shape] += value
        predicted[shape] += predict(one, rates).timing.ns
    return [CpuRow(*shape, measured[shape], predicted[shape]) for shape in shapes]


def _silent(_: str) -> None:
    """Progress that nobody wants to hear of."""


def summary(rows: Sequence[CpuRow]) -> dict[str, float]:
    """The median, the mean and the 90th percentile of the errors' sizes."""
    errors = sorted(abs(row.error) for row in rows)
    return {
        "median": statistics.median(errors),
        "mean": statistics.fmean(errors),
        "p90": errors[min(len(errors) - 1, -(-9 * len(errors) // 10) - 1)],
    }
