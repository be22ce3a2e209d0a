"""A chip that isn't in the package: read its file, show its numbers, ask its laws, change one,
compile a matmul for it, prove it, run it on bytes and tell its time.

Usage: python examples/adding_a_chip.py [FILE.toml]     (docs/adding-a-chip.md tells the story)
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from dure.errors import TargetError
from dure.library.build import build
from dure.library.operators import operator
from dure.machine.chip import Chip
from dure.sim.values import run_values
from dure.targets import chip

FILE = Path(__file__).with_name("tpu_v4.toml")


def show(found: Chip) -> None:
    """Every number with its status and its source; guesses with their range."""
    print(f"{found.name}: {found.summary}")
    for path, number in found.quantities():
        guess = f" [{number.low:g} to {number.high:g}]" if number.low and number.high else ""
        print(
            f"  {path} = {number.value:g} {number.unit}{guess} ({number.status}: {number.source})"
        )


def implied_peak(found: Chip, dtype: str) -> float:
    """Operations a second that the law of the matrix engine gives for a large product."""
    engine = next(e for e in found.engines.values() if e.dot and dtype in e.dot.types)
    values = {name: number.base for name, number in engine.numbers.items()}
    if dtype in engine.rates:
        values["rate"] = engine.rates[dtype].base
    cycles = engine.laws["dot"]({**values, "m": 4096, "n": 4096, "k": 4096, "batch": 1})
    return 2 * 4096**3 * found.cores.base * (engine.clock or found.clock).base / cycles


def compile_a_matmul(found: Chip) -> None:
    """A small one on real bytes against float64, and a large one in time."""
    small = build(operator("gemm", "200x300x130", "bf16").calls[0], found)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 300)).astype(ml_dtypes.bfloat16)
    w = rng.standard_normal((300, 130)).astype(ml_dtypes.bfloat16)
    y = np.zeros((200, 130), ml_dtypes.bfloat16)
    run_values(small.compiled.function, found, [x, w, y])
    expected = x.astype(np.float64) @ w.astype(np.float64)
    error = np.abs(y.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < 0.01, error
    print(f"\n200x300x130 on bytes: worst error {error:.2%} of the largest value")

    what = operator("gemm", "4096x4096x4096", "bf16")
    large = build(what.calls[0], found)
    assert large.verdict.ok
    rate = what.flops / (large.timing.ps / 1e12)
    print(
        f"4096x4096x4096: {large.timing.ns / 1e3:.1f} us, {rate / 1e12:.0f} TFLOP/s, "
        f"{large.timing.bound}-bound; proved; tiles {dict(large.consts)}"
    )


def main() -> None:
    file = sys.argv[1] if len(sys.argv) > 1 else str(FILE)
    found = chip(file)
    show(found)

    print("\nThe matrix engine's law against the published peak:")
    for dtype, peak in found.peaks.compute.items():
        fraction = implied_peak(found, dtype) / peak.base
        print(f"  {dtype}: {implied_peak(found, dtype) / 1e12:.1f} TFLOP/s, {fraction:.1%}")

    path = f"memories.{found.home}.bandwidth"
    faster = chip(file, {path: "2TB/s"})
    number = dict(faster.quantities())[path]
    print(
        f"\nOverridden: {path} = {number.value:g} {number.unit} ({number.status}: {number.source})"
    )

    compile_a_matmul(found)

    try:
        chip(file, {path: "2TB"})
    except TargetError as error:
        print(f"\nA slip of the pen is refused:\n{error}")


if __name__ == "__main__":
    main()
