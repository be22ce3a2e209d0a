"""Locks that a forked child finds open.

A child has no other thread than the one that forked: what another thread holds at that moment it
would hold in the child for ever.  What such a lock guards may be half done there, as a step is
whose buffers the next one writes anew.
"""

from __future__ import annotations

import os
import threading
import weakref


class StepLock:
    """A lock for ``with``, held by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def reopen(self) -> None:
        """In a forked child: nobody holds it."""
        self._lock = threading.Lock()


_all: weakref.WeakSet[StepLock] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lock in list(_all):
        lock.reopen()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
