"""The host as a chip: it is one, its programs are proved, and predictions come from its rates."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from host_rates import rates

from dure.ir.verifier import verify
from dure.library import validation_cpu
from dure.library.validation_cpu import SHAPES, CpuRow, calls_of, predict, summary, validate_cpu
from dure.machine.chip_checks import check_chip
from dure.sim.sanitizer import sanitize
from dure.targets.cpu import microbench
from dure.targets.cpu.chip import host_chip
from dure.targets.cpu.microbench import interpolate, sets_of

FEW = (
    ("gemm", "40x24x50", "f32"),
    ("gemm", "8x64x48", "bf16"),
    ("softmax", "20x100", "f32"),
    ("transpose", "40x33", "f32"),
    ("gather_rows", "20x50x64", "f32"),
    ("silu", "8x96", "f32"),
)


def test_there_are_forty_shapes_that_are_operators() -> None:
    assert len(SHAPES) >= 40
    assert len(set(SHAPES)) == len(SHAPES)
    for shape in SHAPES:
        assert calls_of(*shape)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_host_is_a_chip(workers: int) -> None:
    chip = host_chip(rates(workers), 1 << 20)
    check_chip(chip, "the host")
    assert chip.cores.base == workers
    assert all(q.source for _, q in chip.quantities())


@pytest.mark.parametrize("shape", FEW, ids=lambda s: s[0])
@pytest.mark.parametrize("workers", [1, 2])
def test_programs_of_the_host_are_proved(shape: tuple[str, str, str], workers: int) -> None:
    for call in calls_of(*shape):
        found = predict(call, rates(workers))
        verify(found.compiled.function)
        verdict = sanitize(found.compiled.function, found.chip)
        assert verdict.ok, [f.render() for f in verdict.findings]
        assert found.timing.ns > rates().launch


def test_a_prediction_follows_the_rates() -> None:
    """A host of half the speed takes longer, and the same one the same."""
    (call,) = calls_of("gemm", "64x64x64", "f32")
    slow = replace(rates(), dots={key: 2 * value for key, value in rates().dots.items()})
    assert predict(call, rates()).timing.ps == predict(call, rates()).timing.ps
    assert predict(call, slow).timing.ps > predict(call, rates()).timing.ps


def test_every_microbenchmark_compiles_and_runs() -> None:
    bench = microbench.Bench(1)
    makers = bench.makers()
    found = microbench.fastest(makers, rounds=1, burst=1.0, between=bench.probe)
    assert len(found) == len(makers)
    known = bench.rates(found)
    assert all(math.isfinite(v) and v >= 0 for v in known.ops.values())
    assert all(v > 0 for v in known.reads.values())
    assert known.dot_step("float16", 4, 2) == known.dot_step("bfloat16", 4, 2)
    check_chip(host_chip(known, 1 << 22), "the host")


def test_rows_have_what_the_command_prints() -> None:
    said: list[str] = []
    rows = validate_cpu(said.append, shapes=FEW[:3], rounds=1)
    assert [(row.op, row.dims, row.dtype) for row in rows] == list(FEW[:3])
    assert said
    for row in rows:
        assert row.measured_ns > 0
        assert row.predicted_ns > 0
        assert row.error == pytest.approx((row.predicted_ns - row.measured_ns) / row.measured_ns)
    assert set(summary(rows)) == {"median", "mean", "p90"}


def test_the_summary_counts_sizes_of_errors() -> None:
    rows = [CpuRow("gemm", "1x1x1", "f32", 100.0, 100.0 + e) for e in (-50.0, 10.0, 20.0)]
    found = summary(rows)
    assert found["median"] == pytest.approx(0.2)
    assert found["mean"] == pytest.approx(0.8 / 3)
    assert found["p90"] == pytest.approx(0.5)


def test_curves_are_straight_between_sizes_and_flat_beyond() -> None:
    curve = {16: 1.0, 64: 3.0}
    assert [interpolate(curve, size) for size in (1, 16, 32, 64, 1000)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize(("stride", "sets"), [(64, 64), (4096, 1), (2048, 2), (800, 64), (192, 64)])
def test_sets_of_a_cache(stride: int, sets: int) -> None:
    found = len({(line * stride // 64) % 64 for line in range(4096)})
    assert sets_of(stride, 64) == sets == found


def test_the_command_prints_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dure.cli.validate import validate

    row = CpuRow("gemm", "1x1x1", "f32", 100.0, 110.0)
    monkeypatch.setattr(validation_cpu, "validate_cpu", lambda progress=None: [row])
    validate(target="cpu", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0].keys() >= {"op", "dims", "measured_ns", "predicted_ns", "error"}
    assert found["summary"]["median"] == pytest.approx(0.1)
