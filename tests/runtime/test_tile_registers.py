"""Tile registers: asked for, and tried by a child."""

from __future__ import annotations

import platform
import signal
import sys
from pathlib import Path

import pytest

from dure.runtime import tile_registers

X86_LINUX = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="machine code of x86-64"
)

RETURNS_ZERO, ILLEGAL = bytes.fromhex("31c0 c3"), bytes.fromhex("0f0b")


def test_a_host_without_them_grants_none() -> None:
    found = Path("/proc/cpuinfo")
    flags = found.read_text(encoding="utf-8").split() if found.exists() else []
    if "amx_tile" not in flags:
        assert not tile_registers.tiles_work()


@X86_LINUX
@pytest.mark.parametrize(("code", "works"), [(RETURNS_ZERO, True), (ILLEGAL, False)])
def test_a_child_tries(code: bytes, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction that the machine lacks ends the child alone, and says nothing."""
    monkeypatch.setattr(tile_registers, "_CODE", code)
    before = signal.getsignal(signal.SIGILL)
    assert tile_registers._executed() is works
    assert signal.getsignal(signal.SIGILL) is before


@X86_LINUX
def test_a_process_that_ignores_its_children_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the child ended can't be known."""
    monkeypatch.setattr(tile_registers, "_CODE", RETURNS_ZERO)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert not tile_registers._executed()
    finally:
        signal.signal(signal.SIGCHLD, before)


@X86_LINUX
def test_a_child_that_cannot_try_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It doesn't go on with the parent's program."""

    def refused(*_: object) -> None:
        raise ValueError("no handler here")

    monkeypatch.setattr(tile_registers.signal, "signal", refused)
    monkeypatch.setattr(tile_registers, "_CODE", RETURNS_ZERO)
    assert not tile_registers._executed()


def test_they_are_not_tried_where_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried() -> bool:
        raise AssertionError("tried")

    monkeypatch.setattr(tile_registers, "_granted", lambda: False)
    monkeypatch.setattr(tile_registers, "_executed", tried)
    assert not tile_registers.tiles_work.__wrapped__()
