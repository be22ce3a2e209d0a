"""The entry point of ``dure``: runs a command and turns how it ended into an exit code.

0 done (also where the reader of a pipe had enough), 1 a defect in dure, 2 something the user can
mend (one readable sentence on standard error), 130 Ctrl-C.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence

from dure.runtime.garbage import collect_rarely

EXIT_USER = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line of this process and exit with its code."""
    code = run(sys.argv[1:])
    if code == EXIT_INTERRUPTED:
        # A second Ctrl-C while the interpreter cleans up after the first one changes nothing.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    _repair_streams()
    collect_rarely()
    try:
        # Imported under the handlers: Ctrl-C may come before the first command has been looked up.
        from dure.cli.app import dispatch

        code = dispatch(list(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("dure: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more.  What is still buffered must not fail once again at exit.
        _discard(sys.stdout.fileno())
        return 0


def _repair_streams() -> None:
    """Make both streams usable though they are closed, or have an encoding of few letters."""
    if sys.stdout is None:
        sys.stdout = io.StringIO()
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _discard(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


if __name__ == "__main__":
    main()
