"""Files that a user asked for: written whole, or not at all, with an error that names the path."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dure.errors import UsageError


def check_path(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a path that can't be written, before the work for it is done."""
    shown = ascii(str(path))[1:-1]
    if not path.name.endswith(suffixes):
        raise UsageError(
            f"-o {shown} isn't the name of a {' or '.join(suffixes)} file",
            rule="the name says what is written",
            fix=f"-o {ascii(path.name.partition('.')[0] or 'result')[1:-1]}{suffixes[0]}",
        )
    try:
        folder, exists = path.parent.is_dir(), path.is_dir()
    except (OSError, ValueError):
        folder, exists = False, False
    if exists or not folder:
        raise UsageError(
            f"{shown} can't be written: "
            + ("it is a folder" if exists else "its folder isn't there"),
            fix="give the path of a file in a folder that exists",
        )


def write(path: Path, data: bytes) -> None:
    """Write a file; :class:`UsageError` where that can't be done."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            part.unlink()
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{ascii(str(path))[1:-1]} can't be written: {reason}",
            fix="give the path of a file in a folder with room and permission to write",
        ) from error
