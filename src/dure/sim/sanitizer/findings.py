"""What the sanitizer says: findings at the author's lines, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from dure.ir.core import Op

Kind: TypeAlias = Literal[
    "race",
    "deadlock",
    "uninitialised",
    "out-of-bounds",
    "overlap",
    "semaphore-leak",
    "semaphore-overflow",
    "accumulator-early",
    "not-proved",
]


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """One access of an instruction.

    ``first`` to ``stop`` are the bytes of ``memory`` (of each partition) that it touches in this
    buffer's slot; both are 0 for a tensor.
    """

    op: Op
    queue: str
    buffer: str
    slot: int
    memory: str
    first: int
    stop: int
    write: bool

    def __str__(self) -> str:
        verb = "writes" if self.write else "reads"
        if not self.memory:
            return f"{self.op.name} on queue '{self.queue}' {verb} tensor '{self.buffer}'"
        return (
            f"{self.op.name} on queue '{self.queue}' {verb} buffer '{self.buffer}' slot {self.slot}"
            f" ({self.memory} bytes {self.first} to {self.stop})"
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    ``accesses`` are the two of a race, earlier in the text first, or the one that reads, or none;
    ``op`` is where to look where there is no access.  ``missing`` names the edge that would put it
    right.
    """

    kind: Kind
    message: str
    accesses: tuple[Place, ...] = ()
    op: Op | None = None
    missing: str = ""

    def render(self) -> str:
        """The finding as text, with the author's lines."""
        lines = [f"{self.kind}: {self.message}"]
        for place in self.accesses:
            lines.append(f"- {place}")
            lines.extend(_span(place.op))
        if self.op is not None and all(self.op is not p.op for p in self.accesses):
            lines.append(f"- {self.op.name}")
            lines.extend(_span(self.op))
        if self.missing:
            lines.append(f"missing: {self.missing}")
        return "\n".join(lines)


def _span(op: Op) -> list[str]:
    return [op.span.render()] if op.span is not None else []


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program is proved, and what is wrong where it isn't.

    ``iterations`` counts the loop iterations that were run abstractly, ``states`` the distinct
    abstract states between them; neither grows with trip counts once states repeat.
    """

    ok: bool
    findings: tuple[Finding, ...]
    iterations: int
    states: int

    def render(self) -> str:
        """All findings as text."""
        if self.ok:
            return f"proved over all interleavings ({self.states} states)"
        return "\n\n".join(f.render() for f in self.findings)


class Stop(Exception):
    """Enough was found, or what follows means nothing."""


class NotProved(Exception):
    """The program lies outside of what can be proved; ``op`` is where."""

    def __init__(self, message: str, op: Op | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.op = op


class Staleness(Protocol):
    """What says that findings mean nothing, and another run follows."""

    stale: bool


class Report:
    """Collects findings, each pair of ops once; raises :class:`Stop` at the limit."""

    def __init__(self, limit: int, model: Staleness | None = None) -> None:
        self.limit = limit
        self.model = model
        self.found: dict[object, Finding] = {}

    def add(self, finding: Finding) -> None:
        """Keep a finding that is new."""
        if self.model is not None and self.model.stale:
            return
        ops = tuple(id(p.op) for p in finding.accesses)
        buffers = tuple(p.buffer for p in finding.accesses)
        self.found.setdefault((finding.kind, id(finding.op), ops, buffers), finding)
        if len(self.found) >= self.limit:
            raise Stop
