"""Object code as a process of its own: for a machine that this one only emulates, or to be watched
by a tool that wants a plain executable.

A C compiler links the objects with a small driver (``standalone.c``) to a static executable.  The
driver reads the memory that the code works on from a file, fills in addresses, calls ``dure_load``
where there is one and then ``dure_step``, and writes the blocks that are kept to another file.

The file is words of 64 bits, little end first: how many blocks and pointers; of each block its
bytes, how many of them are given (the rest are zeros), and whether it is kept; of each pointer the
block and the word where it stands, and the block and the offset that it points to.  Then come the
given bytes of all blocks.  Block 0 is the context of ``dure_step``, block 1 that of ``dure_load``.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dure.errors import TargetError
from dure.runtime.host import architecture_name

_DRIVER = Path(__file__).with_name("standalone.c")
#: Compilers for an architecture, from the likeliest; those of this machine's own need no prefix.
_COMPILERS = {"x86-64": ("x86_64-linux-gnu-gcc",), "aarch64": ("aarch64-linux-gnu-gcc",)}
_OWN_COMPILERS = ("cc", "gcc", "clang")
_EMULATORS = {
    "x86-64": ("qemu-x86_64", "qemu-x86_64-static"),
    "aarch64": ("qemu-aarch64", "qemu-aarch64-static"),
}


@dataclass
class Memory:
    """The blocks of memory that a program works on, and the addresses in them."""

    _blocks: list[tuple[bytes, int, bool]] = field(default_factory=list[tuple[bytes, int, bool]])
    _pointers: list[tuple[int, int, int, int]] = field(
        default_factory=list[tuple[int, int, int, int]]
    )

    def add(self, given: bytes = b"", size: int = 0, *, kept: bool = False) -> int:
        """A block of at least ``size`` bytes that begins with those given; its number."""
        self._blocks.append((given, max(size, len(given)), kept))
        return len(self._blocks) - 1

    def point(self, block: int, word: int, target: int, offset: int = 0) -> None:
        """Word ``word`` of a block is the address of another block's byte ``offset``."""
        self._pointers.append((block, word, target, offset))

    def to_bytes(self) -> bytes:
        """The driver's file."""
        words = [len(self._blocks), len(self._pointers)]
        for given, size, kept in self._blocks:
            words += [size, len(given), int(kept)]
        for pointer in self._pointers:
            words += pointer
        head = struct.pack(f"<{len(words)}Q", *words)
        return b"".join([head, *(given for given, _, _ in self._blocks)])

    def split(self, results: bytes) -> list[bytes]:
        """The kept blocks, in order, from what the driver has written."""
        found: list[bytes] = []
        start = 0
        for _, size, kept in self._blocks:
            if kept:
                found.append(results[start : start + size])
                start += size
        return found


@dataclass(frozen=True)
class Toolchain:
    """A C compiler for an architecture, and the command in front of what it makes that runs it."""

    compiler: str
    runner: tuple[str, ...] = ()


def toolchain(architecture: str) -> Toolchain:
    """What builds and runs executables of an architecture here: by an emulator where it is another.

    Raises :class:`~dure.errors.TargetError` that names what is missing.
    """
    own = architecture == architecture_name()
    compilers = (*(_OWN_COMPILERS if own else ()), *_COMPILERS[architecture])
    emulators = () if own else _EMULATORS[architecture]
    return Toolchain(
        _first(compilers, architecture, "C compiler"),
        (_first(emulators, architecture, "emulator"),) if emulators else (),
    )


def _first(commands: Sequence[str], architecture: str, what: str) -> str:
    for command in commands:
        if shutil.which(command):
            return command
    raise TargetError(
        f"there is no {what} for {architecture} here",
        rule=f"executables for {architecture} need one of {', '.join(commands)}",
        fix="install it, as in Debian's gcc-aarch64-linux-gnu and qemu-user",
    )


class Executable:
    """Objects linked with the driver, in a folder of its own that goes with this object.

    Raises :class:`~dure.errors.TargetError` where they don't link.
    """

    def __init__(self, objects: Sequence[bytes], tools: Toolchain) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dure-standalone-")
        self._tools = tools
        folder = Path(self._folder.name)
        self._path = folder / "program"
        names = [folder / f"{place}.o" for place in range(len(objects))]
        for name, data in zip(names, objects, strict=True):
            name.write_bytes(data)
        command = [tools.compiler, "-O1", "-static", "-o", self._path, _DRIVER, *names]
        _run([str(part) for part in command])

    def run(
        self,
        memory: Memory,
        *,
        turns: int = 1,
        workers: int = 1,
        watched_by: Sequence[str] = (),
    ) -> tuple[list[bytes], str]:
        """The kept blocks after ``turns`` runs of the step, and what went to the standard error.

        ``watched_by`` is a command that runs the executable in the place of the toolchain's.
        Raises :class:`~dure.errors.TargetError` where it fails.
        """
        folder = Path(self._folder.name)
        given, results = folder / "memory", folder / "results"
        given.write_bytes(memory.to_bytes())
        command = [*(watched_by or self._tools.runner), self._path, given, results, turns, workers]
        said = _run([str(part) for part in command])
        return memory.split(results.read_bytes()), said


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TargetError(
            f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-800:]}",
            where=" ".join(command),
            rule="a program that stands alone links and runs to its end",
        )
    return done.stderr
