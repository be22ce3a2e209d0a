"""The targets' machine files, and the host's, filled in."""

from __future__ import annotations

import pytest

from dure.errors import TargetError
from dure.runtime import host
from dure.targets import describe, host_names, machines, target_names


def test_every_target_has_a_machine_with_sources() -> None:
    assert "cpu" in target_names()
    for machine, name in zip(machines(), host_names(), strict=True):
        assert machine.name == name
        assert all(quantity.source for _, quantity in machine.quantities())


def test_cpu_is_what_the_host_reports() -> None:
    machine, features = describe("cpu"), host.host_features()
    vector = machine.engine("vector")
    assert vector.width.base == features.vector_bits
    assert vector.registers.base == features.vector_registers
    assert machine.cores.base == host.cores().workers
    assert machine.memory("l1d").size.base == features.l1d_bytes
    assert machine.memory("l2").size.base == features.l2_bytes
    assert machine.memory("l3").size.base == features.l3_bytes
    assert machine.features[0] == features.level
    unknown = {path for path, quantity in machine.quantities() if not quantity.known}
    assert unknown <= {"memories.dram.bandwidth", "memories.dram.size"}


def test_cpu_follows_the_level_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = host.host_levels()[0]
    monkeypatch.setenv("DURE_CPU_LEVEL", lowest)
    assert describe("cpu").features[0] == lowest
    assert describe("cpu").engine("vector").width.base == 128


@pytest.mark.parametrize("name", ["rngd", "nothing"])
def test_only_the_host_is_described(name: str) -> None:
    with pytest.raises(TargetError, match="doesn't run on"):
        describe(name)
