"""A checked position in the header of a GGUF file.

Every read is checked against the end of the file before a byte is touched, so that a file cut off
anywhere, or one whose lengths lie, ends in :class:`~dure.errors.ModelFileError` with the place.
"""

from __future__ import annotations

import mmap
import struct
from typing import TypeAlias

from dure.errors import ModelFileError
from dure.frontends.gguf.types import ValueType

MAX_KEY_BYTES = 65535
"""The longest key that the GGUF specification allows."""

Buffer: TypeAlias = "mmap.mmap | bytes"

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_DAMAGED = "the file is damaged or cut off; download or convert it again"


class Cursor:
    """A position in the file's header from which every read is checked against the file's end."""

    def __init__(self, data: Buffer, path: str) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.position = 0

    def fail(self, what: str, *, rule: str = "", fix: str = _DAMAGED) -> ModelFileError:
        """The error for what was found at the present position."""
        return ModelFileError(what, where=f"{self.path}, byte {self.position}", rule=rule, fix=fix)

    def need(self, nbytes: int, what: str) -> None:
        """Raise unless ``nbytes`` more bytes exist."""
        if nbytes > self.size - self.position:
            raise self.fail(
                f"{what} needs {nbytes} bytes, but the file ends after {self.size} bytes",
            )

    def u32(self, what: str) -> int:
        self.need(4, what)
        (value,) = _U32.unpack_from(self.data, self.position)
        self.position += 4
        return value

    def u64(self, what: str) -> int:
        self.need(8, what)
        (value,) = _U64.unpack_from(self.data, self.position)
        self.position += 8
        return value

    def name(self, what: str) -> str:
        """A key or a tensor's name: 1 to 65535 bytes of UTF-8."""
        start = self.position
        length = self.u64(f"the length of {what}")
        if not 0 < length <= MAX_KEY_BYTES:
            self.position = start
            raise self.fail(
                f"{what} has a length of {length} bytes",
                rule=f"a name has 1 to {MAX_KEY_BYTES} bytes",
            )
        self.need(length, what)
        raw = self.data[self.position : self.position + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from None
        self.position += length
        return text

    def value_type(self, what: str) -> ValueType:
        start = self.position
        number = self.u32(f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            self.position = start
            raise self.fail(
                f"{what} has the unknown value type {number}",
                rule="a value's type is one of " + ", ".join(t.name for t in ValueType),
            ) from None
