"""What a step could attain on a chip: the published roofline, derated by the best measurement there
is, or else by the chip's own laws.

The published roofline itself is never derated (:func:`dure.library.answer.roofline_seconds`); this
is the ceiling that a program is compared with beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dure.library.answer import peak, roofline_seconds
from dure.library.operators_common import DTYPES
from dure.machine.chip import Chip, Engine

#: A dot so large that a matrix engine reaches its rate.
_LARGE: Mapping[str, float] = {"m": 8192.0, "n": 8192.0, "k": 8192.0, "batch": 1.0}
_FLOPS = 2 * 8192.0**3


@dataclass(frozen=True)
class Ceiling:
    """The fractions of published bandwidth and of the published peak that can be attained, and
    where each is from: ``measured`` or ``laws``.
    """

    bandwidth: float
    bandwidth_from: str
    compute: float
    compute_from: str


def ceiling(chip: Chip, dtype: str) -> Ceiling:
    """A chip's ceiling for a dtype."""
    measured = chip.ceiling
    if measured.bandwidth is not None:
        bandwidth, bandwidth_from = measured.bandwidth.base, "measured"
    else:
        bandwidth, bandwidth_from = _bandwidth_by_laws(chip), "laws"
    if measured.compute is not None:
        compute, compute_from = measured.compute.base, "measured"
    else:
        compute, compute_from = _compute_by_laws(chip, dtype), "laws"
    return Ceiling(bandwidth, bandwidth_from, compute, compute_from)


def attainable_fraction(chip: Chip, dtype: str, flops: int, moved: int) -> float:
    """The fraction of the published roofline that work could attain."""
    found = ceiling(chip, dtype)
    compute = flops / (peak(chip, dtype) * found.compute) if flops else 0.0
    seconds = max(compute, moved / (chip.peaks.bandwidth.base * found.bandwidth))
    return roofline_seconds(chip, dtype, flops, moved) / seconds if seconds else 1.0


def _bandwidth_by_laws(chip: Chip) -> float:
    """The part of the published bandwidth that the file gives its far memory."""
    given = chip.memories[chip.home].bandwidth
    if given is None:
        return 1.0
    return min(1.0, chip.bytes_a_second(given) / chip.peaks.bandwidth.base)


def _compute_by_laws(chip: Chip, dtype: str) -> float:
    """The part of the published peak that the matrix engines reach by their laws."""
    name = DTYPES[dtype].name if dtype in DTYPES else dtype
    seen: set[str] = set()
    while name not in seen:
        rates = [_rate(chip, e, name) for e in chip.engines.values() if _takes(e, name)]
        if rates:
            return min(1.0, max(rates) * chip.cores.base / peak(chip, dtype))
        seen.add(name)
        name = chip.conversions.get(name, name)
    return 1.0


def _takes(engine: Engine, dtype: str) -> bool:
    return engine.dot is not None and "dot" in engine.laws and dtype in engine.dot.types


def _rate(chip: Chip, engine: Engine, dtype: str) -> float:
    """Operations a second of one core's engine."""
    law = engine.laws["dot"]
    values = {**_LARGE, **{name: number.base for name, number in engine.numbers.items()}}
    if "rate" in law.names and "rate" not in values:
        values["rate"] = engine.rates[dtype].base if dtype in engine.rates else 1.0
    return _FLOPS / law(values) * (engine.clock or chip.clock).base
