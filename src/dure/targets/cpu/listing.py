"""A kernel to read: tile IR, LLVM IR, and machine code beside the lines that it comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dure.ir.core import Function, Span
from dure.ir.printer import print_function
from dure.runtime.host import HostFeatures
from dure.runtime.llvm import assembly, optimized_ir
from dure.targets.cpu.codegen import emit_kernel
from dure.targets.cpu.locations import Locations

_FILE = re.compile(r'\s*\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]*)"')
_LOCATION = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
#: Labels that code jumps to; others belong to the debugger.
_LABEL = re.compile(r"(\.LBB\S+|[A-Za-z_]\w*):")


@dataclass(frozen=True)
class Run:
    """Instructions and labels that follow one another and come from one line, if it is known."""

    span: Span | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """A kernel's code on a host: ``tile`` and ``llvm`` (after LLVM's passes) as text."""

    name: str
    tile: str
    llvm: str
    machine: tuple[Run, ...]

    @property
    def instructions(self) -> int:
        """Machine instructions."""
        return sum(not line.endswith(":") for run in self.machine for line in run.lines)


def listing(function: Function, host: HostFeatures) -> Listing:
    """The code of a tile kernel.

    Raises :class:`dure.errors.KernelError` where it cannot be compiled.
    """
    locations = Locations()
    traced = emit_kernel(function, host, locations)
    return Listing(
        function.name,
        print_function(function),
        optimized_ir(emit_kernel(function, host).llvm_ir, host),
        tuple(_runs(assembly(traced.llvm_ir, host), locations.spans)),
    )


def _runs(text: str, spans: list[Span]) -> list[Run]:
    known = {(span.file, span.line): span for span in spans}
    files: dict[str, str] = {}
    found: list[Run] = []
    here: Span | None = None
    lines: list[str] = []
    for line in text.splitlines():
        named, moved = _FILE.match(line), _LOCATION.match(line)
        if named is not None:
            folder, name = named[2] or "", named[3]
            files[named[1]] = f"{folder}/{name}" if folder else name
        elif moved is not None:
            span = known.get((files.get(moved[1], ""), int(moved[2])))
            if span is not here and lines:
                found.append(Run(here, tuple(lines)))
                lines = []
            here = span
        elif _LABEL.match(line):
            lines.append(line.split(":", 1)[0] + ":")
        elif line.startswith("\t") and not line.startswith("\t."):
            lines.append("  " + line.strip().replace("\t", " "))
    if lines:
        found.append(Run(here, tuple(lines)))
    return found
