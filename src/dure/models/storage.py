"""Large files on disk, never half-written: checksums, free space, disk errors with a name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from dure.errors import DureError

CHUNK = 1 << 20
"""Bytes read or written at a time."""

SPARE_BYTES = 16 * 1024**2
"""Room in bytes that must be left on the disk after a pull: logs, directory entries, others."""

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no EDQUOT


class PullError(DureError):
    """A model that cannot be pulled."""


class NoSourceError(PullError):
    """No source of the model could be reached; says for each what was tried and what happened."""


class ChecksumError(PullError):
    """A file whose sha256 is not the pinned one."""


class DiskFullError(PullError):
    """The disk has no room for the model, or ran full while it was being written."""


def sha256_of(path: Path, report: Callable[[int], None] | None = None) -> str:
    """The file's sha256 in hexadecimal; ``report`` gets the bytes read so far."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(CHUNK):
            digest.update(block)
            done += len(block)
            if report is not None:
                report(done)
    return digest.hexdigest()


def require_free(folder: Path, needed: int, what: str) -> None:
    """Raise DiskFullError unless the disk of ``folder`` has ``needed`` bytes and some to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise DiskFullError(
            f"the disk has no room for {what}: {readable_bytes(needed + SPARE_BYTES)} are needed, "
            f"{readable_bytes(free)} are free",
            where=str(folder),
            fix="free some space, or set DURE_CACHE_DIR to a folder on a larger disk",
        )


@contextmanager
def named_disk_errors(path: Path) -> Generator[None]:
    """Turn an OSError inside, which must do nothing but disk work at ``path``, into a PullError."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> PullError:
    """The named error for an operating system's error while writing at ``path``."""
    if error.errno in _FULL:
        return disk_full(path)
    return PullError(
        f"{path} cannot be written: {error.strerror or error}",
        where=error.filename if isinstance(error.filename, str) else "",
        fix="make the folder writable, or set DURE_CACHE_DIR to another one",
    )


def disk_full(path: Path) -> DiskFullError:
    """The named error for a disk that ran full while something at ``path`` was being written."""
    return DiskFullError(
        f"the disk ran full while {path.name} was being written",
        where=str(path),
        rule="what has arrived is kept; nothing unfinished has the finished file's name",
        fix="free some space and pull again: it goes on where it stopped; "
        "or set DURE_CACHE_DIR to a folder on a larger disk",
    )


def finish(part: Path, target: Path) -> None:
    """Give a complete ``part`` its final name at once, after its bytes have reached the disk."""
    with named_disk_errors(target):
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)


def readable_bytes(count: int) -> str:
    """``93 MB``: decimal units, as download tools and disks count."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
