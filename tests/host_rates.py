"""Rates of a host, for tests that predict."""

from __future__ import annotations

from dure.targets.cpu.microbench import DEPTHS, PATCHES, SIZES, HostRates
from dure.targets.cpu.microkernels import CHAINS, WIDTHS


def rates(workers: int = 1) -> HostRates:
    """Rates of no machine in particular."""
    sizes = dict.fromkeys(SIZES, 20.0)
    dots = {
        (kind, height, vectors): 1.0 + 0.1 * height
        for kind in ("float32", "bfloat16")
        for height in (4, 2, 1)
        for vectors in (2, 1)
    }
    return HostRates(
        workers=workers,
        lanes=8,
        launch=1000.0,
        loop=0.5,
        read=0.1,
        row=0.5,
        instance=0.5,
        gather=3.0,
        ops=dict.fromkeys(CHAINS, 0.5),
        casts={("float32", "bfloat16"): 1.0},
        masks={(way, bits): 1.0 for way in ("load", "store") for bits in (32, 16)},
        steps={"add": 1.0, "max": 1.0},
        ends={"add": 1.0, "max": 1.0},
        dots=dots,
        blocks=5.0,
        reads=sizes,
        writes=sizes,
        copies=sizes,
        walks={few: dict.fromkeys(SIZES, 2.0) for few in WIDTHS},
        rewalks={(few, h): dict.fromkeys(DEPTHS, 2.0) for few in WIDTHS for h in (4, 1)},
        patches={
            (way, few): dict.fromkeys(PATCHES, 5.0)
            for way in ("read", "write", "exp")
            for few in WIDTHS
        },
    )
