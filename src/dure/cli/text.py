"""Text from outside: arguments, standard input, files.  What isn't UTF-8 is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

from dure.errors import UsageError
from dure.models.catalogue import printable


def argument(text: str, name: str) -> str:
    """An argument that must be text; Python passes undecodable bytes on as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        found = f"byte 0x{byte:02x}" if 0x80 <= byte <= 0xFF else "a lone surrogate"
        raise UsageError(
            f"{name} is not valid UTF-8: {found} at character {error.start}",
            rule="text is UTF-8",
            fix="check the terminal's encoding, or convert the text, for example with iconv",
        ) from None
    return text


def standard_input(name: str) -> str:
    """All of standard input as text."""
    return decode(b"" if sys.stdin is None else sys.stdin.buffer.read(), name)


def decode(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, without a byte-order mark; UsageError names the first wrong byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            rule="text is UTF-8",
            fix="convert it, for example with iconv",
        ) from None


def file(path: Path) -> str:
    """A text file's content; UsageError where it can't be read or isn't text."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{printable(str(path))} can't be read: {reason}", fix="give the path of a text file"
        ) from error
    return decode(data, printable(str(path)))


def not_empty(text: str, name: str) -> str:
    """``text``, unless there is none."""
    if not text:
        raise UsageError(f"{name} is empty", fix="give some text")
    return text
