from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.errors import TargetError, UsageError
from dure.runtime import memory
from dure.runtime.host import huge_page_bytes
from dure.runtime.memory import Buffer


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5_000_000), st.sampled_from([1, 16, 64, 128, 4096, 1 << 16]))
def test_buffers_are_aligned_zeroed_and_writable(nbytes: int, alignment: int) -> None:
    buffer = Buffer(nbytes, alignment=alignment)
    assert buffer.address % max(alignment, 64) == 0
    assert buffer.array.shape == (nbytes,)
    assert not buffer.array.any()
    if nbytes:
        assert buffer.array.ctypes.data == buffer.address
        buffer.array[:] = 255


def test_big_buffers_are_in_huge_pages() -> None:
    huge = huge_page_bytes()
    buffer = Buffer(32 << 20)
    assert buffer.huge == bool(huge)
    assert buffer.address % (huge or 64) == 0
    buffer.array[:] = 1
    if huge and sys.platform == "linux":
        backed = 0
        inside = False
        with Path("/proc/self/smaps").open(encoding="ascii") as lines:
            for line in lines:
                first = line.split()[0]
                if "-" in first and not first.endswith(":"):
                    low, high = (int(part, 16) for part in first.split("-"))
                    inside = low < buffer.address + buffer.nbytes and buffer.address < high
                elif inside and first == "AnonHugePages:":
                    backed += int(line.split()[1]) * 1024
        # A fragmented machine may give fewer, but none means that nothing was asked for.
        assert backed > 0


def test_a_view_keeps_the_memory() -> None:
    buffer = Buffer(16 << 20)
    view = buffer.view((4, 8), np.float32, 64)
    view[:] = 3.0
    gone = weakref.ref(buffer.array.base if buffer.array.base is not None else buffer.array)
    del buffer
    gc.collect()
    assert gone() is not None
    assert (view == 3.0).all()
    del view
    gc.collect()
    assert gone() is None


def test_views_share_the_bytes() -> None:
    buffer = Buffer(256)
    words = buffer.view(4, "int32", 16)
    words[:] = 0x01020304
    assert buffer.array[16:32].any() and not buffer.array[:16].any()
    assert buffer.view((), "int64").shape == ()


@pytest.mark.parametrize(
    ("shape", "offset"), [((65,), 0), ((64,), 1), ((1,), -4), ((8, 9), 0), ((-1,), 0)]
)
def test_views_stay_inside(shape: tuple[int, ...], offset: int) -> None:
    with pytest.raises(UsageError, match="reach past"):
        Buffer(256).view(shape, "float32", offset)


def test_impossible_sizes() -> None:
    with pytest.raises(UsageError, match="-1 bytes"):
        Buffer(-1)
    with pytest.raises(UsageError, match="aligned to 48"):
        Buffer(64, alignment=48)
    for size in (1 << 60, 1 << 80):
        with pytest.raises(TargetError, match="no memory"):
            Buffer(size)


def test_available_memory_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < memory.available_bytes() < 1 << 50
    monkeypatch.setattr(memory, "_machine_available", lambda: 100)
    monkeypatch.setattr(memory, "_container_available", lambda: 40)
    assert memory.available_bytes() == 40
    monkeypatch.setattr(memory, "_container_available", lambda: 0)
    assert memory.available_bytes() == 100
    monkeypatch.setattr(memory, "_machine_available", lambda: 0)
    assert memory.available_bytes() == 0


def test_every_control_group_may_limit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that leaves least counts, of both hierarchies; a cache of files gives way."""
    inner, outer, older = (tmp_path / name for name in ("inner", "outer", "older"))
    monkeypatch.setattr(memory, "control_groups", lambda _: [inner, outer, older])
    assert memory._container_available() == 0
    for folder, files in (
        (inner, {"memory.max": "max", "memory.current": "10", "memory.stat": ""}),
        (outer, {"memory.max": "900", "memory.current": "500", "memory.stat": "inactive_file 50"}),
        (
            older,
            {
                "memory.limit_in_bytes": "800",
                "memory.usage_in_bytes": "500",
                "memory.stat": "inactive_file 400\ntotal_inactive_file 20",
            },
        ),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert memory._container_available() == 320
    (outer / "memory.current").write_text("1000")  # over its limit: nothing is left, not no limit
    assert memory._container_available() == 1


def test_without_huge_pages_the_same_code_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "huge_page_bytes", lambda: 0)
    buffer = Buffer(8 << 20)
    assert not buffer.huge
    assert buffer.address % 64 == 0
