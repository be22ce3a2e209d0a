"""What dure's own programs reach on every chip, in simulation, and what it takes to find them.

    python benchmarks/chips.py [--json FILE] [--targets tpu-v6e rngd ...]

For each chip: a 4096^3 matmul compiled with the choice of tiles, proved and timed (seconds on this
host, medians of some runs); 8192^3 in each 16-bit and 8-bit type of the matrix engine, as a part of
the published peak; products of one row with weights of 64 MB and more, as a part of what is
attainable: the best measured part of the published bandwidth where there is one, else what the
file's own memory delivers; ``attained_with_fixed`` adds to that what no program is without, its
launch and the latency of its first load and last store.  Times are simulated; only ``*_s`` are
measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from peers.machine import describe

import dure
from dure.library.build import build
from dure.library.operators import operator
from dure.machine.chip import Chip
from dure.sim.cost import duration
from dure.targets import chip, chip_names

_NAMES = {"bf16": "bfloat16", "f16": "float16", "fp8": "float8_e4m3fn", "int8": "int8"}
_STREAMS = ("1x8192x8192", "1x8192x28672", "1x16384x16384")
_RUNS = 3


def main() -> None:
    """Measure, print a table, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, help="where the result goes")
    arguments.add_argument("--targets", nargs="+", default=chip_names())
    chosen = arguments.parse_args()
    result: dict[str, Any] = {
        "dure": dure.__version__,
        "machine": describe(),
        "chips": {name: _chip(chip(name)) for name in chosen.targets},
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _chip(target: Chip) -> dict[str, Any]:
    found = {"compile": _compile(target), "peak": _peaks(target), "stream": _streams(target)}
    best = max(found["peak"].values(), key=lambda e: e["fraction"])
    streams = ", ".join(
        f"{e['attained']:.3f} ({e['attained_with_fixed']:.3f})" for e in found["stream"].values()
    )
    print(
        f"{target.name:10}  compile {found['compile']['compile_s']:.2f} s  "
        f"simulate {1e3 * found['compile']['sim_s']:.0f} ms  "
        f"8192^3 {best['fraction']:.3f} of peak in {best['dtype']}  streams {streams}",
        flush=True,
    )
    return found


def _compile(target: Chip) -> dict[str, Any]:
    call = operator("gemm", "4096x4096x4096", "bf16").calls[0]
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


def _peaks(target: Chip) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for short, name in _NAMES.items():
        multiplies = any(e.dot is not None and name in e.dot.types for e in target.engines.values())
        peak = target.peaks.compute.get(name)
        if peak is None or not multiplies:
            continue
        what = operator("gemm", "8192x8192x8192", short)
        made = build(what.calls[0], target)
        rate = what.flops / (made.timing.ps / 1e12)
        found[short] = {
            "dtype": short,
            "ns": made.timing.ps / 1e3,
            "fraction": rate / peak.base,
            "tiles": dict(made.consts),
        }
    return found


def _streams(target: Chip) -> dict[str, Any]:
    return {dims: _stream(target, dims) for dims in _STREAMS}


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
