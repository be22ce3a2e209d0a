"""A watched step of the engine as records of :mod:`dure.prof`: a trace and a page of it."""

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
from dure.serve.profile import OperatorUse, StepUse

SUFFIXES = (*page.SUFFIXES, *trace.SUFFIXES)
_QUEUE = "worker"


def write_profile(use: StepUse, path: Path) -> None:
    """Write the median step to a page or a trace, as the file's name says."""
    made = step_profile(use)
    if path.name.endswith(page.SUFFIXES):
        page.write_page([made], path)
    else:
        trace.write_trace(made, path)


def step_profile(use: StepUse) -> Profile:
    """The median step: each worker is a core, its launches are instructions."""
    ends = np.rint(use.ends * 1e3).astype(np.int64)
    total = int(ends.max())
    operators = tuple(_operator(entry, use) for entry in use.operators)
    return Profile(
        title=f"{use.model}: {use.phase} of {use.batch} x {use.context} tokens",
        target="cpu",
        total=total,
        launches=((0, 0),),
        bound=_bound(use, sum(o.flops for o in use.operators)),
        classes=tuple(CoreClass(1, {"worker": worker}) for worker in range(use.workers)),
        queues=(Queue(_QUEUE, "compute", ("core",)),),
        instructions=tuple(_instructions(use, ends.tolist())),
        buffers=(),
        memories=(),
        counters=(),
        resources=(),
        roofline=Roofline(
            peaks=use.peaks,
            peak=max(use.peaks.values()),
            memory="memory",
            bandwidth=use.read,
            attainable=use.read,
            flops=sum(entry.count * entry.flops for entry in use.operators),
            bytes=int(use.weight_bytes + use.kv_bytes),
            moved=int(use.weight_bytes + use.kv_bytes),
            seconds=use.ns / 1e9,
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
