"""The benchmark's side of the conversation: start a worker, ask it, freeze it while others run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent
"""The folder that workers are started in, so that ``peers`` is importable there."""

DEADLINE = 1800.0
"""Seconds after which a worker that has not answered is ended."""


class PeerError(Exception):
    """A worker could not do what was asked.  ``absent`` means that the engine is not installed."""

    def __init__(self, what: str, *, absent: bool = False) -> None:
        super().__init__(what)
        self.absent = absent


class Peer:
    """A worker process.  Use as a context manager: leaving it ends the process."""

    def __init__(self, name: str, module: str, interpreter: str) -> None:
        self.name = name
        self.started = time.perf_counter()
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "stderr"
        environment = {
            **os.environ,
            "PYTHONPATH": _search_path(interpreter),
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    [interpreter, "-m", f"peers.{module}"],
                    cwd=BENCHMARKS,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
        except OSError as error:
            raise PeerError(f"{interpreter}: {error.strerror}", absent=True) from error
        self._rest = b""
        self.answer: dict[str, Any] = {}

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.  Raises :class:`PeerError`."""
        line = json.dumps({"op": op, **arguments}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            answer = json.loads(self._line())
        except (BrokenPipeError, EOFError) as error:
            raise PeerError(f"the worker ended: {self._tail()}") from error
        if not answer.pop("ok"):
            raise PeerError(answer["error"], absent=answer["absent"])
        return answer

    def freeze(self) -> None:
        """Stop the process, so that its idle threads take nothing from the engine under test."""
        if hasattr(signal, "SIGSTOP"):
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process run again."""
        if hasattr(signal, "SIGCONT"):
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and give its pipes back."""
        self.thaw()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._folder.cleanup()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + DEADLINE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise PeerError(f"no answer within {DEADLINE:.0f} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise EOFError
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _tail(self) -> str:
        self._process.wait()
        text = self._errors.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"exit status {self._process.returncode}; " + " | ".join(lines[-3:])


def _search_path(interpreter: str) -> str:
    """Where a worker finds ``peers``, and dure's own workers what this process finds."""
    own = os.environ.get("PYTHONPATH", "") if interpreter == sys.executable else ""
    return os.pathsep.join([str(BENCHMARKS), own] if own else [str(BENCHMARKS)])
