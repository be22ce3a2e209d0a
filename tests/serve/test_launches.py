"""Watched launches of kernels: what they count, what their workers do, what is refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dure.errors import UsageError
from dure.library.build import tile_function
from dure.library.work import Work, kernel_work, operator_work
from dure.runtime import memory
from dure.serve import launches
from dure.serve.launches import WorkUse, profile_work
from dure.serve.operations import multiplies_integers, operations
from dure.serve.profile_records import work_profile, write_profile
from dure.targets.cpu.launch import compile_kernel

KERNELS = """
import dure
import dure.lang as dl

@dure.kernel
def product(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor, bm: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bm), dl.float32)
    for k in dl.range(dl.cdiv(a.shape[1], bk)):
        acc += dl.load(a, (i, k), (bm, bk)) @ dl.load(b, (k, j), (bk, bm))
    dl.store(c, (i, j), acc)

@dure.kernel
def lower(a: dl.Tensor, c: dl.Tensor, bm: dl.const):
    i = dl.program_id(0)
    acc = dl.zeros((bm, bm), dl.float32)
    for k in dl.range(i + 1):
        if k < i:
            acc += dl.load(a, (i, k), (bm, bm))
    dl.store(c, (i, 0), acc)

@dure.kernel
def rows(x: dl.Tensor, ids: dl.Index, y: dl.Tensor, n: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i, 0), dl.load(x, (ids[i], 0), (1, n)) * 2.0)

@dure.kernel
def decoded(w: dl.Tensor, y: dl.Tensor, n: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i, 0), dl.load(w, (i, 0), (n, 32)).to(dl.float32))

@dure.kernel
def as_many(ids: dl.Index, y: dl.Tensor, n: dl.const):
    i = dl.program_id(0)
    acc = dl.zeros((n,), dl.float32)
    for k in dl.range(ids[i]):
        acc += 1.0
    dl.store(y, (i,), acc)

@dure.kernel
def by_halves(y: dl.Tensor, n: dl.const):
    dl.store(y, (dl.program_id(0) // 2,), dl.zeros((n,), dl.float32))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "kernels.py"
    path.write_text(KERNELS)
    return path


def work_of(file: Path, kernel: str, args: str, consts: str) -> Work:
    return kernel_work(f"{file}:{kernel}", args.split(), consts.split())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_launch_is_what_its_workers_did(workers: int) -> None:
    work = operator_work("softmax", "64x200", "f32")
    found = profile_work(work, workers=workers, launches=3)
    (part,) = found.parts
    assert (found.workers, found.launches, part.kernel) == (workers, 3, "softmax")
    assert found.bytes == 2 * 64 * 200 * 4 and found.flops == work.flops
    assert len(part.busy) == len(part.idle) == workers and part.ends.shape == (workers, 2)
    assert part.ns > 0 and part.recorded_ns > 0 and part.checks_ns is not None
    assert 0 < part.fastest_ns <= part.slowest_ns <= part.span_ns
    assert part.ends.min() == 0 and (part.ends[:, 0] < part.ends[:, 1]).all()
    assert all(each > 0 for each in part.busy) and all(each >= 0 for each in part.idle)
    assert part.imbalance < 1 and part.outside_ns >= 0
    assert min(found.read, found.near, *found.peaks.values()) > 0
    assert set(found.peaks) == {"float32", "int8"} and found.peak == "float32"
    assert found.bound in found.least and found.cost == part.cost_ns / part.ns


def test_bounds_follow_from_the_shares(file: Path) -> None:
    """Which of the yardsticks explains the time, whatever the machine does meanwhile."""
    work = operator_work("elementwise_1d", "65536", "f32")
    (part,) = profile_work(work, workers=1, launches=1).parts

    def bound(outside: float, near: float, peak: float) -> str:
        timed = replace(part, ns=100.0, outside_ns=outside)
        use = WorkUse(
            "x", "", "f32", 1, 1, 1000, 1000, near, near, {"int8": peak}, "int8", (timed,)
        )
        return use.bound

    assert bound(60.0, 12e9, 12e9) == "latency"
    assert bound(10.0, 12e9, 1e12) == "memory"
    assert bound(10.0, 12e9, 11e9) == "compute"
    # Neither explains much: the time goes into other instructions.
    assert bound(10.0, 1e12, 1e13) == "compute"


def test_several_kernels_one_after_another() -> None:
    work = operator_work("ffn_gated", "8x64x96", "bf16")
    found = profile_work(work, workers=2, launches=2)
    assert [part.kernel for part in found.parts] == [c.kernel.__name__ for c in work.calls]
    assert len(found.parts) > 1
    assert found.ns == sum(part.ns for part in found.parts)


def test_types_of_products(file: Path) -> None:
    """Integers and blocks of them have another peak; Python has no arrays of blocks."""
    assert profile_work(operator_work("gemm", "8x64x64", "int8"), launches=1).peak == "int8"
    assert profile_work(operator_work("gemm", "8x64x64", "mxfp4"), launches=1).peak == "float32"
    work = work_of(file, "decoded", "w=q8_0[16x32] y=f32[16x32]", "n=8")
    found = profile_work(work, launches=1)
    assert found.bytes == 16 * 34 + 16 * 32 * 4
    assert found.parts[0].checks_ns is None and found.parts[0].instances == 2


def test_operations_of_a_kernel_of_a_file(file: Path) -> None:
    args = "a=f32[64x96] b=f32[96x32] c=f32[64x32]"
    work = work_of(file, "product", args, "bm=32 bk=32")
    found = profile_work(work, workers=1, launches=1)
    assert found.bytes == 4 * (64 * 96 + 96 * 32 + 64 * 32)
    # A dot adds to its accumulator, which the += adds to once more at most.
    assert 2 * 64 * 96 * 32 <= found.flops <= 2 * 64 * 96 * 32 + 3 * 64 * 32
    assert found.parts[0].instances == 2


def test_operations_of_loops_that_differ(file: Path) -> None:
    work = work_of(file, "lower", "a=f32[64x64] c=f32[64x16]", "bm=16")
    assert operations(tile_function(work.calls[0])) == (0 + 1 + 2 + 3) * 16 * 16


def test_operations_that_depend_on_values(file: Path) -> None:
    work = work_of(file, "as_many", "ids=int32[8]:0..7 y=f32[64]", "n=8")
    found = profile_work(work, workers=1, launches=1)
    assert found.flops is None and found.least["compute"] == 0
    assert not multiplies_integers(tile_function(work.calls[0]))


def test_indices_are_those_of_the_work(file: Path) -> None:
    """An index past the end would write where it must not, or be refused when Python calls it."""
    work = work_of(file, "rows", "x=f32[8x32] ids=int32[16]:0..7 y=f32[16x32]", "n=32")
    (part,) = profile_work(work, workers=2, launches=1).parts
    assert part.checks_ns is not None and part.instances == 16


def test_pages_and_traces(tmp_path: Path) -> None:
    found = profile_work(operator_work("ffn_gated", "8x64x96", "bf16"), workers=2, launches=1)
    made = work_profile(found)
    assert len(made.instructions) == 2 * len(found.parts)
    starts = [entry.start for entry in made.instructions]
    assert starts == sorted(starts) and made.total == max(e.end for e in made.instructions)
    assert made.roofline.flops == found.flops and made.roofline.bytes == found.bytes
    write_profile(found, tmp_path / "launch.html")
    page = (tmp_path / "launch.html").read_text()
    assert all(part.kernel in page for part in found.parts) and "tile function" in page
    write_profile(found, tmp_path / "launch.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "launch.json.gz").read_bytes()))["traceEvents"]
    assert {part.kernel for part in found.parts} <= {event["name"] for event in events}


def test_a_kernel_that_does_not_record() -> None:
    (call,) = operator_work("softmax", "8x8", "f32").calls
    with pytest.raises(UsageError, match="keeps no times"):
        compile_kernel(tile_function(call)).record([0, 0], ())


def test_what_cannot_be_launched(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = operator_work("softmax", "8x8", "f32")
    with pytest.raises(UsageError, match="at least one launch"):
        profile_work(work, launches=0)
    with pytest.raises(UsageError, match="pool cannot have 0 workers"):
        profile_work(work, workers=0)
    with pytest.raises(UsageError, match="doesn't follow from its stores"):
        profile_work(work_of(file, "by_halves", "y=f32[64]", "n=8"), launches=1)
    monkeypatch.setattr(launches, "available_bytes", lambda: 100)
    with pytest.raises(UsageError, match="the arrays of softmax take 512 bytes") as caught:
        profile_work(work, launches=1)
    assert "smaller sizes" in str(caught.value)
    assert memory.available_bytes() != 100
