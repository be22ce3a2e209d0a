"""Writes GGUF files for tests: valid ones with little code, broken ones with one lie each.

Independent of the reader under test: sizes and type numbers are written out here once more.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMAT = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
_FORMAT |= {U64: "Q", I64: "q", F64: "d"}

# (elements, bytes) of a block, from ggml's own tables.
BLOCKS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "I32": (26, 1, 4),
    "BF16": (30, 1, 2),
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: object) -> bytes:
    if kind == STRING:
        assert isinstance(value, str | bytes)
        return string(value)
    return struct.pack("<" + _FORMAT[kind], value)


def array(kind: int, values: Sequence[object], length: int | None = None) -> bytes:
    """The body of an array value; ``length`` is what it claims, where that is to be a lie."""
    head = struct.pack("<IQ", kind, len(values) if length is None else length)
    if kind in _FORMAT and kind != BOOL:
        return head + struct.pack(f"<{len(values)}{_FORMAT[kind]}", *values)
    return head + b"".join(scalar(kind, value) for value in values)


@dataclass
class Tensor:
    name: str | bytes
    shape: tuple[int, ...]
    """Logical order: (rows, columns)."""
    type: str = "F32"
    data: bytes | None = None
    """Zeros of the right size when left out."""
    type_number: int | None = None
    offset: int | None = None

    def payload(self) -> bytes:
        if self.data is not None:
            return self.data
        _, elements, nbytes = BLOCKS[self.type]
        count = 1
        for size in self.shape:
            count *= size
        return bytes(count // elements * nbytes)


@dataclass
class Builder:
    """Collects metadata and tensors; :meth:`build` gives the file's bytes."""

    version: int = 3
    magic: bytes = b"GGUF"
    order: str = "<"
    alignment: int = 32
    entries: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    tensor_count: int | None = None
    entry_count: int | None = None

    def add(self, key: str | bytes, kind: int, value: object) -> Builder:
        self.entries.append(string(key) + struct.pack("<I", kind) + scalar(kind, value))
        return self

    def add_array(
        self, key: str, kind: int, values: Sequence[object], length: int | None = None
    ) -> Builder:
        self.entries.append(string(key) + struct.pack("<I", ARRAY) + array(kind, values, length))
        return self

    def add_raw(self, key: str | bytes, kind: int, body: bytes) -> Builder:
        self.entries.append(string(key) + struct.pack("<I", kind) + body)
        return self

    def tensor(self, name: str | bytes, shape: tuple[int, ...], type: str = "F32") -> Builder:
        self.tensors.append(Tensor(name, shape, type))
        return self

    def build(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        entries = len(self.entries) if self.entry_count is None else self.entry_count
        head = self.magic + struct.pack(self.order + "IQQ", self.version, tensors, entries)
        head += b"".join(self.entries)
        data = b""
        for tensor in self.tensors:
            data += bytes(-len(data) % self.alignment)
            offset = len(data) if tensor.offset is None else tensor.offset
            number = BLOCKS[tensor.type][0] if tensor.type_number is None else tensor.type_number
            sizes = tuple(reversed(tensor.shape))
            head += string(tensor.name) + struct.pack("<I", len(sizes))
            head += struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", number, offset)
            data += tensor.payload()
        return head + bytes(-len(head) % self.alignment) + data if self.tensors else head
