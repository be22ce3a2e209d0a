"""What dure's own programs reach on every chip, in simulation, and what it takes to find them.

    python benchmarks/chips.py [--json FILE] [--targets tpu-v6e rngd ...] [--smallest]

For each chip: a 4096^3 matmul compiled with the choice of tiles, proved and timed (seconds on this
host, medians of some runs); 8192^3 in each 16-bit and 8-bit type of the matrix engine, as a part of
the published peak; products of one row with weights of 64 MB and more, as a part of what is
attainable: the best measured part of the published bandwidth where there is one, else what the
file's own memory delivers; ``attained_with_fixed`` adds to that what no program is without, its
launch and the latency of its first load and last store.  Times are simulated; only ``*_s`` are
measured.  ``--smallest`` takes sizes about which nothing is claimed, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.results import stamp, write
from report.chips import columns, row
from report.markdown import head, line

from dure.library.build import build
from dure.library.operators import operator
from dure.machine.chip import Chip
from dure.sim.cost import duration
from dure.targets import chip, chip_names

_NAMES = {"bf16": "bfloat16", "f16": "float16", "fp8": "float8_e4m3fn", "int8": "int8"}
_RUNS = 3


@dataclass(frozen=True)
class Sizes:
    """Dims of the products that are compiled: once timed, held against the peak, of one row."""

    timed: str
    large: str
    streams: tuple[str, ...]


_SIZES = Sizes("4096x4096x4096", "8192x8192x8192", ("1x8192x8192", "1x8192x28672", "1x16384x16384"))
_SMALLEST = Sizes("512x512x512", "512x512x512", ("1x1024x1024",))


def main() -> None:
    """Measure, print a table row by row, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, help="where the result goes")
    arguments.add_argument("--targets", nargs="+", default=chip_names())
    arguments.add_argument("--smallest", action="store_true", help="small sizes, without a claim")
    chosen = arguments.parse_args()
    sizes = _SMALLEST if chosen.smallest else _SIZES
    result = stamp()
    chips: dict[str, Any] = {}
    result["chips"] = chips
    print(head(columns(sizes.streams)), flush=True)
    for name in chosen.targets:
        chips[name] = _chip(chip(name), sizes)
        print(line(row(name, chips[name])), flush=True)
    write(chosen.json, result)


def _chip(target: Chip, sizes: Sizes) -> dict[str, Any]:
    return {
        "compile": _compile(target, sizes.timed),
        "peak": _peaks(target, sizes.large),
        "stream": {dims: _stream(target, dims) for dims in sizes.streams},
    }


def _compile(target: Chip, dims: str) -> dict[str, Any]:
    call = operator("gemm", dims, "bf16").calls[0]
    build(call, target)  # what is imported and cached once
    runs = [build(call, target) for _ in range(_RUNS)]
    started = time.process_time()
    build(call, target)
    return {
        "compile_s": statistics.median(r.compile_s for r in runs),
        "sim_s": statistics.median(r.sim_s for r in runs),
        "cpu_s": time.process_time() - started,
        "ns": runs[0].timing.ps / 1e3,
    }


def _peaks(target: Chip, dims: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for short, name in _NAMES.items():
        multiplies = any(e.dot is not None and name in e.dot.types for e in target.engines.values())
        peak = target.peaks.compute.get(name)
        if peak is None or not multiplies:
            continue
        what = operator("gemm", dims, short)
        made = build(what.calls[0], target)
        rate = what.flops / (made.timing.ps / 1e12)
        found[short] = {
            "dtype": short,
            "ns": made.timing.ps / 1e3,
            "fraction": rate / peak.base,
            "tiles": dict(made.consts),
        }
    return found


def _stream(target: Chip, dims: str) -> dict[str, Any]:
    what = operator("gemm", dims, "bf16")
    made = build(what.calls[0], target)
    return {
        "ns": made.timing.ps / 1e3,
        "attained": _attainable_ps(target, what.bytes) / made.timing.ps,
        "attained_with_fixed": (_attainable_ps(target, what.bytes) + _fixed_ps(target))
        / made.timing.ps,
        "of_published": what.bytes / (made.timing.ps / 1e12) / target.peaks.bandwidth.base,
        "tiles": dict(made.consts),
    }


def _attainable_ps(target: Chip, count: int) -> float:
    best = target.ceiling.bandwidth
    if best is not None:
        return count / (best.base * target.peaks.bandwidth.base) * 1e12
    own = target.memories[target.home].bandwidth
    assert own is not None, f"{target.name} has no bandwidth"
    return count / target.bytes_a_second(own) * 1e12


def _fixed_ps(target: Chip) -> int:
    """What no program is without: its launch, the way of its first load and of its last store."""
    ways = [
        min(
            duration(target, d.latency)
            for d in target.dma.values()
            if any(move[end] == target.home for move in d.moves)
        )
        for end in (0, 1)
    ]
    return duration(target, target.launch) + sum(ways)


if __name__ == "__main__":
    main()
