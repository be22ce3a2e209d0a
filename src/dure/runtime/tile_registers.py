"""Whether this process may use the processor's tile registers (AMX), and whether they work.

Linux hands them out when a process asks, and may refuse; a virtual machine may report more than it
runs.  So the system is asked first, once a process, and then a child of this process executes every
instruction that dure's code uses: what a processor reports is no proof.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import signal
import struct
import sys
import warnings
from collections.abc import Sequence

#: ``arch_prctl``, its request for a feature of this process and those after it, and the feature.
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18
#: ``ldtilecfg [rdi]; mov eax, 64; tilezero tmm0; tileloadd tmm1 and tmm2, [rdi + rax + 64];
#: tdpbssd tmm0, tmm1, tmm2; tdpbf16ps tmm0, tmm1, tmm2; tilestored [rdi + rax + 64], tmm0;
#: tilerelease; xor eax, eax; ret``
_CODE = bytes.fromhex(
    "c4e2784907 b840000000 c4e27b49c0 c4e27b4b4c0740 c4e27b4b540740"
    "c4e26b5ec1 c4e26a5cc1 c4e27a4b440740 c4e27849c0 31c0 c3"
)
_ROWS, _LINE, _TILES = 16, 64, 3


@functools.cache
def tiles_work() -> bool:
    """Ask for the registers and try them; False wherever that isn't Linux on x86-64."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return _granted() and _executed()


def _granted() -> bool:
    ask = ctypes.CDLL(None, use_errno=True).syscall
    ask.restype = ctypes.c_long
    return ask(*(ctypes.c_long(word) for word in (_ARCH_PRCTL, _REQUEST, _TILE_DATA))) == 0


def _executed() -> bool:
    """Whether a child that executes the instructions ends as it should."""
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return False
    code.write(_CODE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(code))
    run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(start)
    whole = configuration([(_ROWS, _LINE)] * _TILES)
    data = ctypes.create_string_buffer(whole, 2 * _LINE + _ROWS * _LINE)
    with warnings.catch_warnings():
        # The child runs nothing that another thread could have locked.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGILL, signal.SIG_DFL)
            os._exit(run(ctypes.addressof(data)))
        finally:
            # The rest of the program is the parent's, whatever is wrong here.
            os._exit(1)
    try:
        return os.waitpid(child, 0)[1] == 0
    except ChildProcessError:
        # The process ignores how its children end, so that nothing is proved.
        return False


def configuration(shapes: Sequence[tuple[int, int]]) -> bytes:
    """What ``ldtilecfg`` reads: each tile's rows (from the 48th byte on) and bytes of a row."""
    rest = [0] * (16 - len(shapes))
    heights, widths = [rows for rows, _ in shapes], [wide for _, wide in shapes]
    return struct.pack("<2B14x16H16B", 1, 0, *widths, *rest, *heights, *rest)
