"""Fixtures that several folders of tests share.

This file also puts ``tests/`` on the import path, for the helper modules that lie beside it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from guarded import guarded_bytes

from dure.runtime.garbage import collect_rarely
from dure.runtime.memory import LINE_BYTES, Buffer
from dure.sim.recurrence import Recurrence

collect_rarely()
# A shell starts its background jobs with Ctrl-C ignored, which every process below inherits.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def jumps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many repetitions each jump of the simulator skips, as they come."""
    found: list[int] = []
    jump = Recurrence._jump

    def spy(self: Recurrence, kept: Any, now: int, times: int) -> int:
        found.append(times)
        return jump(self, kept, now, times)

    monkeypatch.setattr(Recurrence, "_jump", spy)
    return found


@pytest.fixture
def guarded_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, arenas and outputs end in front of a page that nobody may touch."""
    made = Buffer.__init__

    def guarded(self: Buffer, nbytes: int, *, alignment: int = LINE_BYTES) -> None:
        made(self, nbytes, alignment=alignment)
        if not self.huge:
            self.array = guarded_bytes(nbytes, max(alignment, LINE_BYTES))
            self.address = self.array.ctypes.data

    monkeypatch.setattr(Buffer, "__init__", guarded)


def _model(name: str) -> Path:
    """A model's GGUF: from the folder in DURE_TEST_MODELS, else pulled from the catalogue."""
    folder = os.environ.get("DURE_TEST_MODELS")
    if folder:
        return Path(folder) / f"{name}.gguf"
    from dure.models.download import resolve

    return resolve(name)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return _model("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    return _model("gemma3-270m")
