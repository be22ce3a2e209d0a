from __future__ import annotations

import numpy as np
import pytest

from dure.errors import TargetError, UsageError
from dure.runtime import bandwidth, host, llvm
from dure.runtime.bandwidth import BandwidthProbe, read_bandwidth
from dure.runtime.memory import Buffer
from dure.runtime.pool import Pool


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_probe_reads_at_least_what_it_was_asked_for(workers: int) -> None:
    probe = BandwidthProbe(1_000_003, Pool(workers))
    assert 1_000_003 <= probe.nbytes < 1_000_003 + workers * 2048
    assert probe.burst(3) > 0


@pytest.mark.parametrize("level", host.host_levels())
def test_every_byte_is_read(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """What the workers leave behind combines everything that they read: nothing was skipped."""
    monkeypatch.setenv("DURE_CPU_LEVEL", level)
    features = host.host_features()
    workers, round_bytes = 2, bandwidth.UNROLL * features.vector_bits // 8
    part = 3 * round_bytes
    data = Buffer(workers * part)
    data.array[:] = np.random.default_rng(0).integers(0, 256, data.nbytes)
    context = Buffer(64 + 64 * workers)
    context.view(3, "int64")[:] = data.address, part, 1
    module = llvm.load_object(llvm.compile_module(bandwidth._reading_ir(features), features))
    Pool(workers).run(module.address("dure_read"), context.address)
    width = features.vector_bits // 8
    for worker in range(workers):
        expected = np.bitwise_xor.reduce(
            data.array[worker * part : (worker + 1) * part].reshape(-1, width), axis=0
        )
        found = context.array[64 + 64 * worker : 64 + 64 * worker + width]
        assert (found == expected).all()


def test_the_loop_uses_whole_vectors() -> None:
    features = host.host_features()
    code = llvm.assembly(bandwidth._reading_ir(features), features)
    register = {512: "zmm", 256: "ymm"}.get(features.vector_bits)
    assert register is None or code.count(f"%{register}") >= bandwidth.UNROLL


def test_the_result_is_plausible() -> None:
    result = read_bandwidth(1 << 22, 1, bursts=3)
    assert result.nbytes >= 1 << 22
    assert result.bursts == 3
    assert 0.05 < result.median <= result.best < 5000


def test_impossible_sizes_are_errors() -> None:
    with pytest.raises(UsageError, match="0 bytes"):
        BandwidthProbe(0)
    with pytest.raises(TargetError, match="no memory"):
        BandwidthProbe(1 << 60)
