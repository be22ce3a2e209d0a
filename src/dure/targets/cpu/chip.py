"""The host as a chip of schema 2, its numbers measured: what a replay of machine programs runs on.

A worker is a core.  Its one compute queue does what the generated loops do; its caches stand in for
DMA engines, because prefetchers and out-of-order execution bring data in beside the arithmetic, as
a double-buffered DMA does.  The tensors' memory is the level of the hierarchy where so many bytes
stay from one use to the next, at the bandwidth that was measured with a working set of that size.
"""

from __future__ import annotations

from typing import Any

from dure.ir.dtypes import DTYPES
from dure.machine.chip import Chip
from dure.machine.chip_checks import check_chip
from dure.targets.cpu.microbench import HostRates

_SOURCE = "microbenchmarks of this host, in this process"


def host_chip(
    rates: HostRates, footprint: int, store_issue: float = 0.0, *, inside: bool = False
) -> Chip:
    """The host for kernels whose tensors are ``footprint`` bytes together.

    ``store_issue``: nanoseconds of a store's own loop, where it stores what was loaded.
    ``inside``: what loads take is counted in the dots that read tensors where they lie.

    Cycles are nanoseconds: the clock is 1 GHz, as no virtual machine tells its own.
    """
    chip = Chip.model_validate(_table(rates, footprint, store_issue, inside))
    check_chip(chip, "the host")
    return chip


def _number(value: float, unit: str = "1", source: str = _SOURCE) -> dict[str, object]:
    return {"value": max(value, 1e-6), "unit": unit, "status": "derived", "source": source}


def _law(text: str) -> dict[str, str]:
    return {"law": text, "unit": "cycle", "status": "derived", "source": _SOURCE}


def _table(rates: HostRates, footprint: int, store_issue: float, inside: bool) -> dict[str, Any]:
    read, write, both = rates.bandwidths(footprint)
    if inside:
        read, both = 1000 * read, 1000 * both
    whole = "as large as addresses: caches hold what is used, whatever its address"
    free = "not a step of its own on a CPU"
    move = {
        "latency": _number(0.001, "ns", free),
        "outstanding": _number(64, "1", "lines that are on their way don't limit a tile"),
        "fills": True,
        "lists": True,
    }
    names = [n for n in DTYPES if n != "float64"]
    peak = 2 * rates.lanes * 8 / rates.dot_step("float32", 4, 2)
    return {
        "schema": 2,
        "name": "cpu",
        "kind": "chip",
        "summary": "the processor that dure runs on, as measured",
        "cores": _number(rates.workers),
        "clock": _number(1, "GHz", "cycles are nanoseconds"),
        "home": "memory",
        "scratchpad": "cache",
        "lists": "cache",
        "launch": _number(rates.launch, "ns"),
        "storage": names,
        "memories": {
            "memory": {
                "scope": "chip",
                "size": _number(1 << 40, "B", whole),
                "alignment": _number(64, "B", "a cache line"),
                "bandwidth": _number(both, "GB/s"),
            },
            "cache": {
                "scope": "core",
                "size": _number(1 << 34, "B", whole),
                "alignment": _number(64, "B", "a cache line"),
            },
        },
        "engines": {"core": _engine(rates, names)},
        "dma": {
            "load": {
                "queue": "load",
                "moves": [["memory", "cache"]],
                "bandwidth": _number(read, "GB/s"),
                "route": ["memory"],
                "issue": _number(0.001, "ns", free),
                **move,
            },
            "store": {
                "queue": "store",
                "moves": [["cache", "memory"]],
                "bandwidth": _number(write, "GB/s"),
                "route": ["memory"],
                "issue": _number(store_issue, "ns"),
                **move,
            },
        },
        "sync": {
            "semaphores": _number(1 << 16, "1", free),
            "maximum": _number(1 << 30, "1", free),
            "latency": _number(0.001, "ns", free),
        },
        "peaks": {
            "compute": {"float32": _number(peak * rates.workers, "GFLOP/s")},
            "bandwidth": _number(read * rates.workers, "GB/s"),
        },
    }


def _engine(rates: HostRates, names: list[str]) -> dict[str, Any]:
    """The laws by classes of work; :class:`~dure.targets.cpu.cost.HostCosts` knows each op."""
    numbers = {
        "lanes": rates.lanes,
        "vector": rates.loop + rates.op("add"),
        "transcendental": rates.loop + rates.op("exp"),
        "partial": rates.reduce_step("add"),
        "across": rates.reduce_end("add"),
        "step": rates.dot_step("float32", 4, 2),
        "gathered": rates.gather,
    }
    return {
        "queue": "compute",
        "reads": ["cache"],
        "writes": ["cache"],
        "issue": _number(rates.instance, "ns"),
        "types": names,
        "numbers": {name: _number(value) for name, value in numbers.items()},
        "laws": {
            "dot": _law("batch * ceil(m / 4) * ceil(n / (2 * lanes)) * k * step"),
            "elementwise": _law("ceil(elements / lanes) * vector"),
            "transcendental": _law("ceil(elements / lanes) * transcendental"),
            "reduce": _law("ceil(elements / lanes) * partial + elements / axis * across"),
            "scan": _law("ceil(elements / lanes) * partial"),
            "transpose": _law("ceil(elements / lanes) * gathered"),
            "convert": _law("ceil(elements / lanes) * vector"),
            "copy": _law("ceil(elements / lanes) * vector"),
        },
        "dot": {"accumulators": ["cache"], "transposed": ["a", "b"], "types": names},
    }
