"""How often the interpreter looks for reference cycles."""

from __future__ import annotations

import gc

#: New objects after which the youngest are looked through, and how many such times make an older
#: generation's turn.  The interpreter's own 700 or 2,000 are meant for programs of few objects.
_THRESHOLDS = (50_000, 20, 100)


def collect_rarely() -> None:
    """Let a process that compiles look for cycles less often: a compiler makes many objects that
    live long, and would spend a sixth of its time on looking through them.
    """
    gc.set_threshold(*_THRESHOLDS)
