"""Watched steps and launches as records of :mod:`dure.prof`: traces and pages of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dure.prof import page, trace
from dure.prof.records import (
    CoreClass,
    Instruction,
    Operator,
    Profile,
    Program,
    Queue,
    Roofline,
    Wait,
)
from dure.serve.launches import LaunchUse, WorkUse
from dure.serve.profile import OperatorUse, StepUse

SUFFIXES = (*page.SUFFIXES, *trace.SUFFIXES)
_QUEUE = "worker"
_QUEUES = (Queue(_QUEUE, "compute", ("core",)),)


def write_profile(use: StepUse | WorkUse, path: Path) -> None:
    """Write the median step or launches to a page or a trace, as the file's name says."""
    made = step_profile(use) if isinstance(use, StepUse) else work_profile(use)
    if path.name.endswith(page.SUFFIXES):
        page.write_page([made], path)
    else:
        trace.write_trace(made, path)


def step_profile(use: StepUse) -> Profile:
    """The median step: each worker is a core, its launches are instructions."""
    ends = np.rint(use.ends * 1e3).astype(np.int64)
    total = int(ends.max())
    operators = tuple(_operator(entry, use) for entry in use.operators)
    work = sum(entry.count * entry.flops for entry in use.operators)
    moved = int(use.weight_bytes + use.kv_bytes)
    return Profile(
        title=f"{use.model}: {use.phase} of {use.batch} x {use.context} tokens",
        target="cpu",
        total=total,
        launches=((0, 0),),
        bound=_bound(use, work),
        classes=_classes(use.workers),
        queues=_QUEUES,
        instructions=tuple(_instructions(use, ends.tolist())),
        buffers=(),
        memories=(),
        counters=(),
        resources=(),
        roofline=_roofline(
            use.peaks, max(use.peaks.values()), ("memory", use.read), (work, moved), use.ns
        ),
        programs=(Program(use.model, "", {"workers": str(use.workers)}),),
        busy={},
        facts={
            "tokens a second": f"{use.tokens / use.ns * 1e9:,.4g}",
            "read bandwidth": f"{use.read / 1e9:.3g} GB/s, measured in the same run",
            "waiting": ", ".join(f"{part:.1%}" for part in use.waiting) + " of each worker's time",
        },
        notes=(
            "Peaks and bandwidth are what dure's own products and reads reached beside the steps.",
            "The timeline is that of the median step; operators are medians of all.",
        ),
        operators=operators,
        whole=total,
    )


def work_profile(use: WorkUse) -> Profile:
    """The median launch of each of the work's kernels, one after another."""
    instructions: list[Instruction] = []
    launches: list[tuple[int, int]] = []
    start = 0
    for part in use.parts:
        launches.append((start, start))
        shares = np.rint(part.ends * 1e3).astype(np.int64) + start
        instructions += sorted(_shares(part, shares.tolist()), key=lambda entry: entry.start)
        start = int(shares.max())
    waits = ", ".join(f"{part.imbalance:.1%}" for part in use.parts)
    return Profile(
        title=f"{use.name} {use.dims} {use.dtype}",
        target="cpu",
        total=start,
        launches=tuple(launches),
        bound=use.bound,
        classes=_classes(use.workers),
        queues=_QUEUES,
        instructions=tuple(instructions),
        buffers=(),
        memories=(),
        counters=(),
        resources=(),
        roofline=_roofline(
            use.peaks,
            use.peaks[use.peak],
            ("memory and caches", use.near),
            (use.flops or 0, use.bytes),
            use.ns,
        ),
        programs=tuple(_program(part, use.workers) for part in use.parts),
        busy={},
        facts={
            "a launch": f"{use.ns / 1e3:,.4g} us",
            "besides the workers": f"{use.least['latency'] / 1e3:,.4g} us of it",
            "imbalance": f"{waits} of the slowest worker's time",
            "read bandwidth": f"{use.near / 1e9:.3g} GB/s of so many bytes, {use.read / 1e9:.3g} "
            "GB/s from memory, measured in the same run",
        },
        notes=(
            "Peaks and bandwidth are what dure's own products and reads reached beside the work.",
            "The timeline is that of the median launch, from its first worker's begin to its last "
            "one's end.",
        ),
    )


def _classes(workers: int) -> tuple[CoreClass, ...]:
    return tuple(CoreClass(1, {"worker": worker}) for worker in range(workers))


def _roofline(
    peaks: dict[str, float],
    peak: float,
    memory: tuple[str, float],
    needed: tuple[int, int],
    ns: float,
) -> Roofline:
    """The yardsticks, and (operations, bytes) that ``ns`` nanoseconds went for."""
    name, bandwidth = memory
    flops, moved = needed
    return Roofline(
        peaks=peaks,
        peak=peak,
        memory=name,
        bandwidth=bandwidth,
        attainable=bandwidth,
        flops=flops,
        bytes=moved,
        moved=moved,
        seconds=ns / 1e9,
    )


def _program(part: LaunchUse, workers: int) -> Program:
    tiles = {name: str(size) for name, size in part.tiles.items()}
    counts = {"workers": str(workers), "instances": str(part.instances)}
    return Program(part.kernel, part.tile_ir, counts | tiles)


def _shares(part: LaunchUse, ends: list[list[int]]) -> list[Instruction]:
    """What each worker did of a launch."""
    return [
        Instruction(
            core_class=worker,
            queue=_QUEUE,
            name=part.kernel,
            source=None,
            start=begin,
            issued=end,
            flow=None,
            end=end,
        )
        for worker, (begin, end) in enumerate(ends)
    ]


def _bound(use: StepUse, flops: int) -> str:
    reading = (use.weight_bytes + use.kv_bytes) / use.read
    return "memory" if reading > flops / max(use.peaks.values()) else "compute"


def _operator(entry: OperatorUse, use: StepUse) -> Operator:
    reading, working = entry.bytes / use.read, entry.flops / max(use.peaks.values())
    least = max(reading, working) * 1e9
    return Operator(
        name=entry.name,
        kernel=entry.name.split(" ", 1)[0],
        count=entry.count,
        ps=int(entry.ns * 1e3),
        alone=int(entry.slowest_ns * 1e3),
        bound="memory" if reading >= working else "compute",
        flops=entry.flops,
        bytes=entry.bytes,
        moved=entry.bytes,
        fraction=least / entry.slowest_ns if entry.slowest_ns else 0.0,
    )


def _instructions(use: StepUse, ends: list[list[int]]) -> list[Instruction]:
    """Launches of all workers in the order of their start; waits at barriers come before them."""
    costs = {entry.number: entry for entry in use.operators}
    made: list[tuple[int, int, int, list[tuple[int, int]]]] = []
    for worker, mine in enumerate(ends):
        waits: list[tuple[int, int]] = []
        for place, (name, _, _) in enumerate(use.events):
            if not name:
                waits.append((mine[place], mine[place + 1]))
                continue
            made.append((mine[place], worker, place, waits))
            waits = []
    made.sort(key=lambda entry: entry[:2])
    found: list[Instruction] = []
    for start, worker, place, waits in made:
        name, _, number = use.events[place]
        cost = costs.get(number)
        found.append(
            Instruction(
                core_class=worker,
                queue=_QUEUE,
                name=name,
                source=None,
                start=start,
                issued=ends[worker][place + 1],
                flow=None,
                end=ends[worker][place + 1],
                bytes=cost.bytes // use.workers if cost is not None else 0,
                flops=cost.flops // use.workers if cost is not None else 0,
                waits=tuple(Wait("barrier", "the others", a, b) for a, b in waits),
            )
        )
    return found
