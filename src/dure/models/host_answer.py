"""How long a model's step takes on the machine that dure runs on: each of its launches, measured.

The step is the one that the CPU target compiles, with its layouts, in the variants that the batch's
sizes pick.  Each different launch runs by itself, on tensors of ones that are there as long as it
runs, so that a model may be larger than the memory; the step is their sum.  Weights and KV cache
come from memory, not from caches: between two reads of one lie all others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from dure.compiler.barriers import executed
from dure.compiler.pipeline import prepare
from dure.compiler.plan import plan
from dure.errors import TargetError, UsageError
from dure.ir.core import Function, Op, Region, Value
from dure.ir.expr import evaluate
from dure.ir.sizes import tensor_bytes
from dure.ir.tensor.program import launch_arguments
from dure.library.answer import Confidence, peak
from dure.library.call import IndexArray
from dure.machine.chip import Chip
from dure.models.chip_answer import StepResult
from dure.models.chip_step import ChipStep
from dure.runtime.bandwidth import BandwidthProbe
from dure.runtime.host import host_features
from dure.runtime.memory import Buffer
from dure.targets.cpu.chip import host_chip
from dure.targets.cpu.launch import compile_kernel
from dure.targets.cpu.microbench import HostRates
from dure.targets.cpu.target import CpuTarget

#: Runs of a launch, and the seconds after which there are no more.
_RUNS, _SECONDS = 40, 1.0
#: Bytes that are read so that no cache has what was read before.
_EVICTING = 256 << 20
#: Ones in float32 (nearly) and in both halves as bfloat16.
_ONES = 0x3F803F80


@dataclass(frozen=True)
class HostPart:
    """A launch of the step and how often it is made; ``ps`` are picoseconds of one."""

    name: str
    kernel: str
    count: int
    ps: int
    flops: int
    bytes: int
    bound: str

    @property
    def total_ps(self) -> int:
        """Picoseconds of all."""
        return self.count * self.ps


@dataclass(frozen=True)
class HostStep(StepResult):
    """A step on the host."""

    step: ChipStep
    chip: Chip
    parts: tuple[HostPart, ...]
    confidence: Confidence
    compile_s: float
    sim_s: float
    left_out: tuple[str, ...] = ()

    @property
    def ps(self) -> int:
        """Picoseconds of the step."""
        return sum(part.total_ps for part in self.parts)

    @property
    def bound(self) -> str:
        """What bounds most of the time."""
        found: dict[str, int] = {}
        for part in self.parts:
            found[part.bound] = found.get(part.bound, 0) + part.total_ps
        return max(found, key=found.__getitem__)

    def operators(self) -> list[dict[str, object]]:
        """Its parts for JSON."""
        return [_operator(part) for part in self.parts]


def _operator(part: HostPart) -> dict[str, object]:
    return {
        "name": part.name,
        "kernel": part.kernel,
        "count": part.count,
        "ns": part.ps / 1000,
        "total_ns": part.total_ps / 1000,
        "bound": part.bound,
        "flops": part.flops,
        "bytes": part.bytes,
    }


def host_step(step: ChipStep, rates: HostRates) -> HostStep:
    """What the host does with a step.

    Raises :class:`~dure.errors.DureError` for a step that isn't the CPU target's.
    """
    program = _checked(step)
    started = time.perf_counter()
    target = CpuTarget(host_features())
    planned = plan(prepare(program, target).laid_out.step, target)
    launches = list(_launches(planned.function.body, step))
    compile_s = time.perf_counter() - started
    started = time.perf_counter()
    chip = host_chip(rates, step.weight_bytes + step.kv_bytes)
    probe = BandwidthProbe(_EVICTING)
    times: dict[object, int] = {}
    parts: list[HostPart] = []
    for launch in launches:
        if launch.key not in times:
            times[launch.key] = int(launch.seconds(probe) * 1e12)
        parts.append(launch.part(times[launch.key], chip, step.dtype))
    trust = Confidence("measured", (), ())
    return HostStep(step, chip, tuple(parts), trust, compile_s, time.perf_counter() - started)


def _checked(step: ChipStep) -> Function:
    """The step's program.  Raises for what the CPU target has no such step of."""
    if step.program is None or step.chips > 1:
        raise TargetError(
            f"{step.name} on the host" if step.chips == 1 else f"the host {step.chips} times",
            rule="the host's step is compiled from a model, for this one machine",
            fix="name the model, and leave out --chips",
        )
    if step.types != (step.dtype,) * 4:
        _, weights, kv, rows = (name or step.dtype for name in step.types)
        raise UsageError(
            f"weights in {weights}, a cache in {kv} and activations in {rows}",
            where="the target cpu",
            rule="its steps of few bits are those of GGUF files, which `dure run` and `dure bench` "
            "take; as a target, weights, cache and activations have the values' type",
            fix="leave out --weights, --kv and --activations, or --target cpu",
        )
    return step.program


@dataclass(frozen=True)
class _Launch:
    """A launch as the batch makes it: its kernel with its sizes, and its lists by name."""

    op: Op
    count: int
    kernel: Function
    sizes: tuple[int, ...]
    lists: Mapping[str, IndexArray]
    #: Whether it reads what the model keeps in memory.
    stored: bool

    @property
    def key(self) -> object:
        """What makes two launches the same work."""
        lists = tuple((name, values.tobytes()) for name, values in sorted(self.lists.items()))
        return self.kernel, self.sizes, lists

    def seconds(self, probe: BandwidthProbe) -> float:
        """The fastest of some runs: other programs can only make one slower."""
        made = compile_kernel(self.kernel)
        buffers = [self._buffer(p.value) for p in self.kernel.params]
        addresses = [buffer.address for buffer in buffers]
        found: list[float] = []
        far = self.stored and self.op.attr("bytes") > host_features().l2_bytes
        while len(found) < _RUNS and sum(found) < _SECONDS:
            if far:
                probe.burst()
            started = time.perf_counter()
            made.run(addresses, self.sizes)
            found.append(time.perf_counter() - started)
        return min(found)

    def _buffer(self, param: Value) -> Buffer:
        sizes = {s.name: n for s, n in zip(self.kernel.symbols, self.sizes, strict=True)}
        nbytes = tensor_bytes(param.tensor, sizes)
        found = Buffer(max(64, -(-nbytes // 64) * 64))
        if param.name in self.lists:
            values = np.ascontiguousarray(self.lists[param.name]).reshape(-1).view(np.uint8)
            found.array[: values.nbytes] = values
        elif param.tensor.dtype.is_float:
            found.array.view(np.uint32)[:] = _ONES
        return found

    def part(self, ps: int, chip: Chip, dtype: str) -> HostPart:
        """The launch with its time: bound by memory where moving its bytes takes longer."""
        name = str(self.op.attr("source")).replace("_", " ")
        flops, moved = int(self.op.attr("flops")), int(self.op.attr("bytes"))
        reading = moved / chip.peaks.bandwidth.base
        bound = "memory" if reading > flops / peak(chip, dtype) else "compute"
        return HostPart(name, self.kernel.name, self.count, ps, flops, moved, bound)


def _launches(body: Region, step: ChipStep) -> Iterator[_Launch]:
    """The launches of a planned program."""
    # Lists that the program makes are of the same ops in every layer, in the same order.
    made = cycle(step.made.values()) if step.made else None
    lists: dict[Value, IndexArray] = {}
    stored: set[Value] = set()
    sizes = dict(step.sizes)
    for op, count in executed(body):
        if op.name == "repeat":
            stored.update(op.regions[0].args[int(op.attr("carried")) :])
        if op.name != "launch":
            continue
        variants = zip(op.attr("variants"), op.attr("sizes"), strict=True)
        chosen = next(((k, v) for (g, k), v in variants if evaluate(g, sizes)), None)
        if chosen is None:
            continue
        kernel, values = chosen
        pairs = launch_arguments(op)
        if op.attr("source") == "dispatch" and made is not None:
            lists.update((r, next(made)) for _, r in pairs if r is not None)
        given: dict[str, IndexArray] = {}
        for param, (operand, _) in zip(kernel.params, pairs, strict=True):
            found = None if operand is None else lists.get(operand, step.inputs.get(operand.name))
            if found is not None:
                given[param.value.name] = found
        reads = any(operand in stored or operand.name for operand, _ in pairs if operand)
        known = tuple(evaluate(size, sizes) for size in values)
        yield _Launch(op, count, kernel, known, given, reads)
