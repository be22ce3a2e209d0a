"""Hosts whose registers are of another width: LLVM splits what this machine doesn't hold."""

from __future__ import annotations

from dataclasses import replace

from dure.runtime.host import LEVELS, HostFeatures, host_features


def host_with(bits: int) -> HostFeatures:
    """This host with vectors of so many bits, and as many registers as x86-64 has of them."""
    level = next(x for x in LEVELS if x.vector_bits == bits)
    return replace(host_features(), vector_bits=bits, vector_registers=level.vector_registers)
