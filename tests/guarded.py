"""Memory that ends in front of a page which nobody may touch: what reads or writes past it, crashes
where it does so and not somewhere else, some day, on another machine.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def guarded_bytes(nbytes: int, alignment: int = 1) -> Array:
    """Zeroed bytes, of which the last lies less than ``alignment`` bytes in front of the page."""
    if sys.platform != "linux":
        return np.zeros(nbytes + alignment, np.uint8)[:nbytes]
    page = mmap.PAGESIZE
    before = -(-max(1, nbytes) // page) * page + (alignment if alignment > page else 0)
    pages = mmap.mmap(-1, before + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(pages, np.uint8)
    end = memory.ctypes.data + before
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    start = (end - nbytes) // alignment * alignment - memory.ctypes.data
    return memory[start : start + nbytes]


def guarded(values: Array) -> Array:
    """A contiguous copy."""
    copy = guarded_bytes(values.nbytes).view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy
