"""This machine, described by the schema that every target has, its numbers found at run time."""

from __future__ import annotations

from pathlib import Path

from dure.machine import Machine, load_machine
from dure.runtime import host
from dure.runtime.memory import available_bytes


def describe(*, measure: bool = False) -> Machine:
    """The host at the level in use (``DURE_CPU_LEVEL``).

    ``measure`` also measures how fast memory is read, with the default number of workers over
    1 GiB, which takes about a second; else that number has no value.  Raises
    :class:`~dure.errors.TargetError` on a host that no code can be generated for.
    """
    machine = load_machine(Path(__file__).with_name("machine.toml"))
    features = host.host_features()
    values: dict[str, float] = {
        "cores": host.cores().workers,
        "engines.vector.width": features.vector_bits,
        "engines.vector.registers": features.vector_registers,
        "memories.l1d.size": features.l1d_bytes,
        "memories.l1d.line": features.line_bytes,
        "memories.l2.size": features.l2_bytes,
        "memories.l3.size": features.l3_bytes,
    }
    memory = available_bytes()
    if memory:
        values["memories.dram.size"] = memory
    if measure:
        from dure.runtime.bandwidth import read_bandwidth

        values["memories.dram.bandwidth"] = read_bandwidth().median * 1e9
    return machine.with_detected(values, (features.level, *features.features))
