"""The file of an artefact: a header with a hash of each section, and sections of text.

    dure artefact 1
    release 0.1.0
    name softmax 64x1000 bf16
    section manifest 812 4f0c...
    section kernel.0 9120 91aa...
    sha256 7be1...

    --- manifest
    ...

``sha256`` is the hash of the lines above it, and so of the whole file, since they hold the size and
the hash of each section.  The number in the first line is the format's version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from dure.errors import ArtefactError

#: The version of the format that this release writes, and the newest that it reads.
VERSION = 1
MAGIC = "dure artefact"
#: Bytes of a header at most, and of a file: a step of the largest models takes a few megabytes.
_MOST_HEADER = 1 << 20
MOST_BYTES = 1 << 28
_FIRST = re.compile(rb"dure artefact ([0-9]{1,9})\n")
_SECTION = re.compile(r"section ([a-z][a-z0-9.]{0,39}) ([0-9]{1,12}) ([0-9a-f]{64})")
_RELEASE = re.compile(r"release ([0-9A-Za-z.+-]{1,40})")
_NAME = re.compile(r"name (\S.{0,199})")
_HASH = re.compile(r"sha256 ([0-9a-f]{64})")


@dataclass(frozen=True)
class Container:
    """Sections by name; ``release`` wrote them, and ``sha256`` is the hash of the whole."""

    release: str
    name: str
    sections: Mapping[str, str]
    sha256: str = ""


def write(name: str, release: str, sections: Mapping[str, str]) -> bytes:
    """The file that holds these sections."""
    name = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in name)).strip()[:200]
    lines = [f"{MAGIC} {VERSION}", f"release {release}", f"name {name or 'unnamed'}"]
    bodies: list[bytes] = []
    for title, text in sections.items():
        body = text.encode()
        lines.append(f"section {title} {len(body)} {_sha256(body)}")
        bodies.append(_title(title) + body)
    head = "".join(f"{line}\n" for line in lines).encode()
    return head + f"sha256 {_sha256(head)}\n".encode() + b"".join(bodies)


def read(data: bytes, where: str) -> Container:
    """The sections of a file whose hashes are right; ``where`` names the file.

    Raises :class:`ArtefactError` for a file that is no artefact, of a newer format, or damaged.
    """
    _check_version(data, where)
    head, found = _header(data, where)
    hashed = _HASH.fullmatch(found[-1])
    if hashed is None or hashed[1] != _sha256(head):
        _damaged("its header has another hash than it says", where)
    release, name = (pattern.fullmatch(line) for pattern, line in zip(
        (_RELEASE, _NAME), found[1:3], strict=False))  # fmt: skip
    if release is None or name is None:
        _damaged("its header says no release and name", where)
    at = len(head) + len(found[-1]) + 1
    sections: dict[str, str] = {}
    for line in found[3:-1]:
        entry = _SECTION.fullmatch(line)
        if entry is None or entry[1] in sections:
            _damaged(f"its header has the line '{line[:60]}'", where)
        title = _title(entry[1])
        start, end = at + len(title), at + len(title) + int(entry[2])
        if data[at:start] != title or end > len(data):
            _damaged(f"its section '{entry[1]}' isn't there in full", where)
        body = data[start:end]
        if _sha256(body) != entry[3]:
            _damaged(f"its section '{entry[1]}' has another hash than the header says", where)
        sections[entry[1]] = _text(body, where)
        at = end
    if at != len(data):
        _damaged(f"it goes on for {len(data) - at} bytes behind its last section", where)
    return Container(release[1], name[1], sections, hashed[1])


def _check_version(data: bytes, where: str) -> None:
    first = _FIRST.match(data)
    if first is None:
        raise ArtefactError(
            "this is no artefact of dure",
            where=where,
            rule=f"an artefact starts with the line '{MAGIC} {VERSION}'",
            fix="write one with `dure save SUBJECT -o FILE.dure`",
        )
    if not 1 <= int(first[1]) <= VERSION:
        raise ArtefactError(
            f"an artefact of format {int(first[1])}",
            where=where,
            rule=f"this release of dure reads formats up to {VERSION}",
            fix="install the release that wrote it (its second line), or a later one; or save it "
            "again with this release",
        )


def _header(data: bytes, where: str) -> tuple[bytes, list[str]]:
    """The bytes that the header's hash is of, and its lines, that of the hash included."""
    at = data.find(b"\nsha256 ", 0, _MOST_HEADER)
    end = data.find(b"\n", at + 1, at + 100) if at >= 0 else -1
    if end < 0:
        _damaged("its header has no end", where)
    return data[: at + 1], _text(data[:end], where).split("\n")


def _title(name: str) -> bytes:
    """The line in front of a section."""
    return f"\n--- {name}\n".encode()


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        _damaged("it isn't UTF-8", where)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(what: str, where: str) -> NoReturn:
    raise damaged(what, where)


def damaged(what: str, where: str) -> ArtefactError:
    """The error of a file that isn't as it was written."""
    return ArtefactError(
        f"the artefact is damaged: {what}",
        where=where,
        rule="sizes and hashes in the header are those of the sections",
        fix="copy the file again from where it came, or save it again with `dure save`",
    )
