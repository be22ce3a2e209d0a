"""What a pull shows: a bar on standard error, only lines without a terminal, or nothing."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class PullProgress(Protocol):
    """What a pull tells its caller.  Sizes are in bytes."""

    def note(self, text: str) -> None:
        """A sentence that stays on the screen."""
        ...

    def begin(self, text: str, total: int) -> None:
        """A new stage of ``total`` bytes begins."""
        ...

    def reach(self, done: int) -> None:
        """The current stage has done this many bytes."""
        ...


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None: ...

    def begin(self, text: str, total: int) -> None: ...

    def reach(self, done: int) -> None: ...


class Terminal:
    """A rich progress bar on standard error; only the sentences where that isn't a terminal.

    A context manager: the bar is taken down on the way out, whatever happened.  ``bar=False``
    leaves it away in any case.
    """

    def __init__(self, *, bar: bool = True) -> None:
        self._wanted = bar
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def begin(self, text: str, total: int) -> None:
        if not self._wanted or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = _bar()
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=total)

    def reach(self, done: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)


def _bar() -> Progress:
    # Imported here: rich costs 50 ms that a command with nothing to pull shouldn't pay.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
