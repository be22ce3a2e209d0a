"""The context of a step: which of its 64-bit words holds what.

The host fills it, native code reads it.  Word 0 is the arena's address, word 1 that of the workers'
scratch; then come the program's sizes, the addresses of its parameters, and for each repeat the
tables of addresses that its turns read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

#: Names of the native functions of a program.
STEP = "dure_step"
CHECK = "dure_check"
LOAD = "dure_load"

ARENA_WORD = 0
SCRATCH_WORD = 1
_FIRST_WORD = 2


@dataclass(frozen=True)
class Param:
    """An address that the host gives: the parameter's position."""

    position: int


@dataclass(frozen=True)
class Arena:
    """An address in the arena: its offset in bytes."""

    offset: int


Fixed: TypeAlias = "Param | Arena"

#: What is told of a barrier, and of what only moves a value to another place.
BARRIER, COPY = "barrier", "copy"


@dataclass(frozen=True)
class Event:
    """A launch, a copy or a barrier of a step that stamps the time at which each worker ended it.

    ``number`` is that of the launch's op among the program's (see :func:`numbered` in
    :mod:`dure.compiler.lower`), -1 of a barrier and a copy; ``because`` is why a barrier stands
    there.  ``place`` is the stamp of its first run; ``turns`` are (count, stamps a turn) of the
    repeats around it, the outermost first.
    """

    what: str
    number: int
    place: int
    turns: tuple[tuple[int, int], ...] = ()
    because: str = ""


@dataclass
class ContextLayout:
    """Which word of the context holds what.

    ``symbols`` and ``params`` give the words of sizes (by name) and of parameters (by position);
    ``tables`` the first word of each table and the addresses that stand there.  A step that
    records has ``events``, and ``stamps`` is the word of the address where each worker has
    ``stamp_count`` words: when it began, and when it ended each event.
    """

    symbols: dict[str, int] = field(default_factory=dict[str, int])
    params: list[int] = field(default_factory=list[int])
    tables: list[tuple[int, tuple[Fixed, ...]]] = field(
        default_factory=list[tuple[int, tuple[Fixed, ...]]]
    )
    events: list[Event] = field(default_factory=list[Event])
    stamps: int = 0
    stamp_count: int = 0
    words: int = _FIRST_WORD

    def take(self, count: int) -> int:
        """Reserves words; gives the first."""
        first = self.words
        self.words += count
        return first
