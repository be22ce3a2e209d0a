"""A catalogue model from the Hugging Face hub.

The hub has :data:`ANSWER_S` seconds, all told, from the first name lookup to the first byte of the
file; after that every :data:`STALL_S` seconds must bring at least one byte.  What touches the
network runs in a daemon thread, because a name lookup or a connection into a black hole can't be
interrupted otherwise: when time is up the thread is left to itself.
"""

from __future__ import annotations

import queue
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dure.models.catalogue import CatalogueModel
from dure.models.progress import PullProgress
from dure.models.storage import named_disk_errors, require_free, sha256_of

ANSWER_S = 3.0
"""Seconds from the start of the attempt to the first byte."""

STALL_S = 10.0
"""Seconds without a byte after which a transfer that had begun is given up (and can be resumed)."""

_BLOCK = 1 << 16


class SourceFailed(Exception):
    """A source that could not deliver; the text says why, ``fix`` what might help."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class _Begin:
    """The file's bytes follow, from ``offset`` on (0 where the server can't resume)."""

    offset: int


_Message = _Begin | bytes | Exception | None


def fetch(
    model: CatalogueModel, part: Path, progress: PullProgress, endpoint: str | None = None
) -> None:
    """Fetch the model's GGUF into ``part``, going on where an earlier attempt stopped.

    On return ``part`` is complete and has the pinned sha256.  Raises SourceFailed where the hub is
    at fault (``part`` then holds what has arrived, unless it was wrong), PullError for the disk.
    """
    with named_disk_errors(part):
        have = part.stat().st_size if part.exists() else 0
        if have > model.size:
            part.unlink()
            have = 0
        require_free(part.parent, model.size - have, model.name)
    if have < model.size:
        _transfer(model, part, have, progress, endpoint)
    progress.begin(f"{model.name}: checking", model.size)
    with named_disk_errors(part):
        found = sha256_of(part, progress.reach)
        if found != model.sha256:
            part.unlink()
            raise SourceFailed(
                f"the file arrived with sha256 {found} in place of {model.sha256}, and was removed"
            )


def _transfer(
    model: CatalogueModel, part: Path, have: int, progress: PullProgress, endpoint: str | None
) -> None:
    worker = _Worker(model, have, endpoint)
    deadline = time.monotonic() + ANSWER_S
    worker.start()
    try:
        first = worker.next(deadline, f"no answer within {ANSWER_S:g} s")
        if not isinstance(first, _Begin):
            raise SourceFailed("the hub broke off")
        block = worker.next(deadline, f"no data within {ANSWER_S:g} s")
        progress.begin(f"{model.name}: Hugging Face hub", model.size)
        done = first.offset
        with named_disk_errors(part), part.open("r+b" if first.offset else "wb") as file:
            file.seek(done)
            file.truncate()
            while isinstance(block, bytes):
                file.write(block)
                done += len(block)
                progress.reach(done)
                if done > model.size:
                    raise SourceFailed(f"the hub sent more than the file's {model.size} bytes")
                block = worker.next(time.monotonic() + STALL_S, f"no data for {STALL_S:g} s")
        if done < model.size:
            raise SourceFailed(f"the connection broke after {done} of {model.size} bytes")
    finally:
        worker.stopped.set()


class _Worker(threading.Thread):
    """Everything that touches the network; its findings go through a short queue."""

    def __init__(self, model: CatalogueModel, have: int, endpoint: str | None) -> None:
        super().__init__(name="dure-hub", daemon=True)
        self.stopped = threading.Event()
        self._model = model
        self._have = have
        self._endpoint = endpoint
        self._messages: queue.Queue[_Message] = queue.Queue(maxsize=64)

    def next(self, deadline: float, late: str) -> _Begin | bytes | None:
        """The next message, None at the end; SourceFailed if it is late or the worker failed."""
        try:
            message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise SourceFailed(late) from None
        if isinstance(message, SourceFailed):
            raise message
        if isinstance(message, Exception):
            raise SourceFailed(_reason(message)) from message
        return message

    def run(self) -> None:
        try:
            self._download(self._locate())
            self._put(None)
        except Exception as error:  # whatever went wrong belongs to the thread that waits
            self._put(error)

    def _locate(self) -> str:
        """Ask the hub for the file's address, and whether it is the very file that is pinned."""
        from huggingface_hub import HfApi, hf_hub_url

        hub = self._model.hub
        url = hf_hub_url(hub.repository, hub.file, revision=hub.revision, endpoint=self._endpoint)
        metadata = HfApi().get_hf_file_metadata(url=url, timeout=ANSWER_S)
        if metadata.etag != self._model.sha256:
            raise SourceFailed(f"the hub's file is another one (its sha256 is {metadata.etag})")
        return metadata.location

    def _download(self, location: str) -> None:
        request = urllib.request.Request(location, headers={"User-Agent": "dure"})
        if self._have:
            request.add_header("Range", f"bytes={self._have}-")
        with urllib.request.urlopen(request, timeout=STALL_S) as response:
            resumed = response.status == 206
            self._put(_Begin(self._have if resumed else 0))
            while not self.stopped.is_set() and (block := response.read1(_BLOCK)):
                self._put(block)

    def _put(self, message: _Message) -> None:
        while not self.stopped.is_set():
            try:
                self._messages.put(message, timeout=0.2)
                return
            except queue.Full:
                continue


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__ or cause
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror[0].lower() + cause.strerror[1:]
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
