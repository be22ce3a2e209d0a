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


@dataclass
class ContextLayout:
    """Which word of the context holds what.

    ``symbols`` and ``params`` give the words of sizes (by name) and of parameters (by position);
    ``tables`` the first word of each table and the addresses that stand there.
    """

    symbols: dict[str, int] = field(default_factory=dict[str, int])
    params: list[int] = field(default_factory=list[int])
    tables: list[tuple[int, tuple[Fixed, ...]]] = field(
        default_factory=list[tuple[int, tuple[Fixed, ...]]]
    )
    #: (what, first word) of each timed launch: its cycles on worker 0, how often it ran, and
    #: the fewest cycles of a run.
    timers: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    words: int = _FIRST_WORD

    def take(self, count: int) -> int:
        """Reserves words; gives the first."""
        first = self.words
        self.words += count
        return first
