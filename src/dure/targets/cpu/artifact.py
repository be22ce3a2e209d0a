"""What compiling a program leaves behind: objects and the numbers that running it needs.

An artifact is one block of bytes in the object cache, under a key made of the printed program, the
host's features and dure's own source: a warm start reads it and generates nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dure.runtime import llvm, pool
from dure.runtime.host import HostFeatures
from dure.targets.cpu.context import Arena, ContextLayout, Event, Fixed, Param

FORMAT = 5
_MAGIC = b"dure-program-1\n"


@dataclass(frozen=True)
class Artifact:
    """A compiled program.

    ``objects`` are linked in order, each with the symbols of those before it; the last is the step.
    ``report`` holds counts for people: kernels, launches, barriers, bytes.
    """

    objects: tuple[bytes, ...]
    symbols: tuple[tuple[str, ...], ...]
    layout: ContextLayout
    outputs: tuple[Fixed, ...]
    scratch_bytes: int
    arena_bytes: int
    report: dict[str, int] = field(default_factory=dict[str, int])

    def to_bytes(self) -> bytes:
        """The artifact as one block."""
        header = {
            "symbols": self.symbols,
            "lengths": [len(o) for o in self.objects],
            "layout": {
                "symbols": self.layout.symbols,
                "params": self.layout.params,
                "words": self.layout.words,
                "tables": [[first, _packed(places)] for first, places in self.layout.tables],
                "events": [
                    (e.what, e.number, e.place, e.turns, e.because) for e in self.layout.events
                ],
                "stamps": self.layout.stamps,
                "stamp_count": self.layout.stamp_count,
            },
            "outputs": _packed(self.outputs),
            "scratch_bytes": self.scratch_bytes,
            "arena_bytes": self.arena_bytes,
            "report": self.report,
        }
        text = json.dumps(header).encode()
        return b"".join([_MAGIC, len(text).to_bytes(8, "little"), text, *self.objects])

    @staticmethod
    def from_bytes(data: bytes) -> Artifact | None:
        """The artifact in a block, or None if it is none."""
        start = len(_MAGIC) + 8
        if not data.startswith(_MAGIC) or len(data) < start:
            return None
        end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
        header: dict[str, Any] = json.loads(data[start:end])
        objects: list[bytes] = []
        for length in header["lengths"]:
            objects.append(data[end : end + length])
            end += length
        layout = header["layout"]
        events = [
            Event(what, number, place, tuple((count, each) for count, each in turns), because)
            for what, number, place, turns, because in layout["events"]
        ]
        tables = [(int(first), _unpacked(places)) for first, places in layout["tables"]]
        return Artifact(
            tuple(objects),
            tuple(tuple(names) for names in header["symbols"]),
            ContextLayout(
                layout["symbols"],
                layout["params"],
                tables,
                events,
                layout["stamps"],
                layout["stamp_count"],
                layout["words"],
            ),
            _unpacked(header["outputs"]),
            header["scratch_bytes"],
            header["arena_bytes"],
            header["report"],
        )


def _packed(places: tuple[Fixed, ...]) -> list[list[int]]:
    return [[0, p.position] if isinstance(p, Param) else [1, p.offset] for p in places]


def _unpacked(places: list[list[int]]) -> tuple[Fixed, ...]:
    return tuple(Arena(value) if kind else Param(value) for kind, value in places)


def program_key(text: str, host: HostFeatures) -> str:
    """The cache key of a program that prints as ``text``."""
    parts = (
        f"program {FORMAT}",
        f"llvm {llvm.llvm_version()}",
        f"{host.triple} {host.architecture} {host.feature_string} {host.vector_bits}",
        f"{host.vector_registers} {host.l1d_bytes} {host.l2_bytes} {host.l3_bytes}",
        source_digest(),
        text,
    )
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@functools.cache
def source_digest() -> str:
    """A digest of dure's own source: another compiler makes other programs."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in ("ir", "lang", "library", "compiler", "targets", "runtime"):
        for path in _sources(root / folder):
            data = Path(path).read_bytes()
            name = path[len(str(root)) :].encode()
            digest.update(b"%d %d " % (len(name), len(data)) + name + data)
    return digest.hexdigest()


def _sources(folder: Path | str) -> Iterator[str]:
    """The Python files below a folder, in order.  (``Path.rglob`` takes several times as long, and
    every process would wait for it at its first kernel.)
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir() and entry.name != "__pycache__":
                yield from _sources(entry.path)
            elif entry.name.endswith(".py"):
                yield entry.path


def link(artifact: Artifact) -> dict[str, tuple[llvm.LoadedModule, int]]:
    """Loads an artifact's objects; gives each symbol's module and address."""
    addresses = dict(pool.symbols())
    found: dict[str, tuple[llvm.LoadedModule, int]] = {}
    for object_code, names in zip(artifact.objects, artifact.symbols, strict=True):
        module = llvm.load_object(object_code, addresses)
        for name in names:
            address = module.address(name)
            found[name] = (module, address)
            addresses[name] = address
    return found
