"""Tile registers: asked for, and tried by a child."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from dure.runtime import tile_registers

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="machine code of x86-64"
)

RETURNS_ZERO, ILLEGAL = bytes.fromhex("31c0 c3"), bytes.fromhex("0f0b")


def test_a_host_without_them_grants_none() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    if "amx_tile" not in flags:
        assert not tile_registers.tiles_work()


@pytest.mark.parametrize(("code", "works"), [(RETURNS_ZERO, True), (ILLEGAL, False)])
def test_a_child_tries(code: bytes, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction that the machine lacks ends the child alone, and says nothing."""
    monkeypatch.setattr(tile_registers, "_CODE", code)
    before = signal.getsignal(signal.SIGILL)
    assert tile_registers._executed() is works
    assert signal.getsignal(signal.SIGILL) is before


def test_they_are_not_tried_where_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried() -> bool:
        raise AssertionError("tried")

    monkeypatch.setattr(tile_registers, "_granted", lambda: False)
    monkeypatch.setattr(tile_registers, "_executed", tried)
    assert not tile_registers.tiles_work.__wrapped__()
