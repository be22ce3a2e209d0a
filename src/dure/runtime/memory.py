"""Memory for weights, arenas and outputs: aligned, in huge pages where it is big, freed by itself.

A :class:`Buffer` starts on a cache line at least.  One of several megabytes starts on a huge page
and asks for huge pages, without which a core that streams weights loses a third of the memory's
bandwidth to address translation.  Where a system has no such request, the same memory comes in
small pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dure.errors import TargetError, UsageError
from dure.runtime.host import control_groups, huge_page_bytes

LINE_BYTES = 64
"""The least alignment of a buffer, in bytes: a cache line and the widest vector."""


class Buffer:
    """``nbytes`` of zeroed memory at ``address``, which is a multiple of ``alignment``.

    ``array`` is the memory as uint8.  The memory is freed when neither the buffer nor an array
    that was taken from it is alive any more; an address by itself keeps nothing alive.  ``huge``
    tells whether huge pages were asked for.
    """

    __slots__ = ("address", "array", "huge", "nbytes")

    def __init__(self, nbytes: int, *, alignment: int = LINE_BYTES) -> None:
        """Raises :class:`UsageError` on a size or alignment that makes no sense, and
        :class:`TargetError` when there is not that much memory."""
        if nbytes < 0:
            raise UsageError(f"a buffer cannot have {nbytes} bytes", rule="a size is at least 0")
        if alignment < 1 or alignment & (alignment - 1):
            raise UsageError(
                f"memory cannot be aligned to {alignment} bytes",
                rule="an alignment is a power of two",
                fix=f"use {LINE_BYTES}",
            )
        huge_page = huge_page_bytes()
        self.huge = bool(huge_page) and nbytes >= 2 * huge_page
        alignment = max(alignment, LINE_BYTES, huge_page if self.huge else 0)
        try:
            # Rounded up, so that the last page can be a huge one as well.
            span = -(-nbytes // alignment) * alignment + alignment
            base = _map_pages(span) if self.huge else np.zeros(span, np.uint8)
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            raise TargetError(
                f"there is no memory for {nbytes:,} bytes",
                rule=f"the system has {available_bytes():,} bytes to give",
                fix="use a smaller model or context, or end other programs",
            ) from error
        skip = -base.ctypes.data % alignment
        if self.huge:
            _advise_huge_pages(base.ctypes.data + skip, span - alignment)
        self.array: NDArray[np.uint8] = base[skip : skip + nbytes]
        self.nbytes = nbytes
        self.address: int = base.ctypes.data + skip

    def view(self, shape: int | tuple[int, ...], dtype: DTypeLike, offset: int = 0) -> NDArray[Any]:
        """An array of ``shape`` and ``dtype`` over the bytes from ``offset`` on, which shares them.

        Raises :class:`UsageError` where it would reach past the end.
        """
        kind = np.dtype(dtype)
        sizes = (shape,) if isinstance(shape, int) else shape
        needed = kind.itemsize
        for size in sizes:
            needed *= size
        if offset < 0 or needed < 0 or offset + needed > self.nbytes:
            raise UsageError(
                f"{needed} bytes at offset {offset} reach past a buffer of {self.nbytes} bytes",
                rule="a view lies inside its buffer",
            )
        return self.array[offset : offset + needed].view(kind).reshape(sizes)

    def __repr__(self) -> str:
        return f"Buffer({self.nbytes} bytes at {self.address:#x}{', huge pages' * self.huge})"


def available_bytes() -> int:
    """Bytes of memory that this process could still use without swapping, as the system estimates.

    The smaller of what the machine has left and what a container's limit leaves; 0 where unknown.
    """
    candidates = [_machine_available(), _container_available()]
    return min((size for size in candidates if size > 0), default=0)


def _map_pages(span: int) -> NDArray[np.uint8]:
    """Private anonymous pages: memory mapped as shared would not get transparent huge pages."""
    if sys.platform == "win32":
        return np.zeros(span, np.uint8)
    pages = mmap.mmap(-1, span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8)


def _advise_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages; a system that refuses leaves the memory as it was."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_HUGEPAGE)


def _machine_available() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return _windows_available()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


#: Files of a control group's folder: its limit, what it uses, and the part of that which gives way
#: (the cache of files).
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _container_available() -> int:
    """What the limits of all control groups leave; 0 where nothing limits it."""
    left = [
        _left_by(folder, *names) for folder in control_groups("memory") for names in _MEMORY_FILES
    ]
    return min((size for size in left if size > 0), default=0)


def _left_by(folder: Path, limit: str, used: str, cached: str) -> int:
    """Bytes that a control group leaves, at least 1; 0 where it limits nothing."""
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / limit).read_text(encoding="ascii"))
        taken = int((folder / used).read_text(encoding="ascii"))
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == cached:
                taken -= int(value)
        return max(1, most - taken)
    return 0


def _windows_available() -> int:
    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    kernel = ctypes.CDLL("kernel32")
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else 0
