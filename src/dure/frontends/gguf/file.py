"""Opening a GGUF file: header, metadata, tensor table and the bytes of each tensor, memory-mapped.

Versions 2 and 3, little-endian.  The reader trusts nothing: every count, length, offset and size is
checked against the file's size before it is used, and whatever is wrong is a
:class:`~dure.errors.ModelFileError` that names the file and the place.  What it gives back is safe
to use without further checks: names are unique, shapes positive, sizes exact, and no two tensors
share a byte.  (A file that another process cuts short *while it is mapped* is beyond any reader:
the operating system ends the process then.  Replace model files by renaming.)

Format: ``docs/gguf.md`` in ggml-org/ggml.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dure.errors import ModelFileError, UsageError
from dure.frontends.gguf.cursor import Cursor
from dure.frontends.gguf.metadata import Entry, Metadata, scan_entry
from dure.frontends.gguf.types import BLOCK, GGMLType

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MIN_ENTRY_BYTES = 8 + 1 + 4 + 1
"""The shortest key-value pair: length, one byte of key, type tag, one byte of value."""
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
"""The shortest tensor record: length, one byte of name, rank, one dimension, type, offset."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file.

    ``shape`` is in logical order, slowest axis first: a weight matrix is ``(rows, columns)``, and
    the file's blocks run along the last axis.  ``offset`` counts from the file's first byte,
    ``nbytes`` is the exact size of the data.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file; a context manager.  Make one with :func:`open_gguf`."""

    def __init__(self, path: str, version: int, metadata: Metadata, data: mmap.mmap) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._map: mmap.mmap | None = data
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(data, dtype=np.uint8)

    @property
    def architecture(self) -> str:
        """The value of ``general.architecture``; ModelFileError when it is missing."""
        return self.metadata.require_str("general.architecture")

    @property
    def nbytes(self) -> int:
        """The file's size in bytes."""
        return 0 if self._map is None else len(self._map)

    def tensor(self, name: str) -> TensorInfo:
        """The tensor called ``name``; ModelFileError when the file has none."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(
                f"the file has no tensor {name!r}",
                where=self.path,
                fix="use a file that was converted for this architecture, with all of its parts",
            )
        return info

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """A read-only view (uint8, one axis, no copy) of a tensor's bytes in the mapped file.

        The view stays valid after :meth:`close`: the mapping goes when its last view goes.
        """
        info = self.tensor(name)
        if self._bytes is None:
            raise UsageError(
                f"the bytes of tensor {name!r} were asked for after the file was closed",
                where=self.path,
                fix="keep the GGUFFile open, or take the view before it closes",
            )
        return self._bytes[info.offset : info.offset + info.nbytes]

    def close(self) -> None:
        """Let go of the mapping; it disappears with the last view that was handed out."""
        self.metadata.close()
        self._bytes = None
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # a view still lives: the mapping goes with it
                mapping.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file; reads the header and the tensor table, and maps the rest.

    Raises :class:`~dure.errors.ModelFileError` for anything that is not a whole, consistent,
    little-endian GGUF file of version 2 or 3 whose tensor types are all known.
    """
    name = os.fspath(path)
    data = _map_file(name)
    try:
        return _read(name, data)
    except BaseException:
        # The half-built GGUFFile may still hold an array over the mapping; then it goes with it.
        with contextlib.suppress(BufferError):
            data.close()
        raise


def _map_file(name: str) -> mmap.mmap:
    try:
        # The type is looked at before opening: opening a pipe without a writer would hang.
        status = Path(name).stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelFileError(
                f"a GGUF file is wanted, but this is {kind}", where=name, fix="name a .gguf file"
            )
        if status.st_size == 0:
            raise ModelFileError("the file is empty", where=name, fix="download it again")
        with Path(name).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(
            "there is no such file", where=name, fix="check the path, or pull the model first"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or the file shrank to 0
        raise ModelFileError(
            f"the file cannot be opened: {error}",
            where=repr(name),
            fix="check the path and its permissions",
        ) from None


def _read(name: str, data: mmap.mmap) -> GGUFFile:
    cursor = Cursor(data, name)
    version = _read_version(cursor)
    tensor_count = cursor.u64("the number of tensors")
    entry_count = cursor.u64("the number of metadata entries")
    cursor.need(entry_count * MIN_ENTRY_BYTES, f"metadata with {entry_count} entries")
    entries: dict[str, Entry] = {}
    for index in range(entry_count):
        key = cursor.name(f"metadata key {index}")
        if key in entries:
            raise cursor.fail(f"metadata key {key!r} appears twice", rule="keys are unique")
        entries[key] = scan_entry(cursor, f"the value of metadata key {key!r}")
    metadata = Metadata(data, name, entries)
    _refuse_part(metadata, name)
    alignment = _alignment(metadata, name)
    file = GGUFFile(name, version, metadata, data)
    file.tensors = _read_tensors(cursor, tensor_count, alignment)
    return file


def _read_version(cursor: Cursor) -> int:
    cursor.need(4, "the magic number")
    magic = cursor.data[:4]
    if magic != MAGIC:
        raise cursor.fail(
            f"this is not a GGUF file: it begins with {magic!r}",
            rule=f"a GGUF file begins with {MAGIC!r}",
            fix="give a .gguf file",
        )
    cursor.position = 4
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    cursor.position = 4
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        raise cursor.fail(
            f"this is a big-endian GGUF file (version {swapped})",
            rule="little-endian files are read",
            fix="convert it with gguf_convert_endian.py, or download the little-endian file",
        )
    raise cursor.fail(
        f"the file has GGUF version {version}",
        rule="versions 2 and 3 are read",
        fix="convert the model again with a current converter",
    )


def _refuse_part(metadata: Metadata, name: str) -> None:
    parts = metadata.get_int("split.count", 1)
    if parts > 1:
        raise ModelFileError(
            f"this file is one of {parts} parts of a split model",
            where=name,
            rule="a model is read from one file",
            fix="join the parts with `llama-gguf-split --merge FIRST_PART OUTPUT`",
        )


def _alignment(metadata: Metadata, name: str) -> int:
    alignment = metadata.get_int("general.alignment", DEFAULT_ALIGNMENT)
    if alignment <= 0 or alignment & (alignment - 1):
        raise ModelFileError(
            f"general.alignment is {alignment}",
            where=name,
            rule="the alignment is a power of two",
            fix="convert the model again",
        )
    return alignment


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    cursor.need(count * MIN_TENSOR_BYTES, f"a table of {count} tensors")
    relative: dict[str, TensorInfo] = {}
    for index in range(count):
        info = _read_tensor(cursor, index, alignment)
        if info.name in relative:
            raise cursor.fail(f"tensor {info.name!r} appears twice", rule="names are unique")
        relative[info.name] = info
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: TensorInfo(name, info.shape, info.type, data_start + info.offset, info.nbytes)
        for name, info in relative.items()
    }
    _check_extents(tensors, cursor)
    return tensors


def _read_tensor(cursor: Cursor, index: int, alignment: int) -> TensorInfo:
    name = cursor.name(f"the name of tensor {index}")
    rank = cursor.u32(f"the rank of tensor {name!r}")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise cursor.fail(
            f"tensor {name!r} has {rank} dimensions", rule=f"1 to {MAX_DIMENSIONS} dimensions"
        )
    sizes = [cursor.u64(f"the shape of tensor {name!r}") for _ in range(rank)]
    shape = tuple(reversed(sizes))
    if math.prod(sizes) == 0 or math.prod(sizes) >= 1 << 63:
        raise cursor.fail(
            f"tensor {name!r} has the shape {shape}",
            rule="every size is positive, and the number of elements fits in 63 bits",
        )
    kind = _tensor_type(cursor, name)
    block = BLOCK[kind]
    if shape[-1] % block.elements:
        raise cursor.fail(
            f"tensor {name!r} of type {kind.name} has rows of {shape[-1]} elements",
            rule=f"rows of {kind.name} are whole blocks of {block.elements}",
        )
    offset = cursor.u64(f"the offset of tensor {name!r}")
    if offset % alignment:
        raise cursor.fail(
            f"the data of tensor {name!r} begin at {offset}",
            rule=f"data begin at a multiple of the file's alignment, {alignment}",
        )
    nbytes = math.prod(sizes) // block.elements * block.nbytes
    return TensorInfo(name, shape, kind, offset, nbytes)


def _tensor_type(cursor: Cursor, name: str) -> GGMLType:
    number = cursor.u32(f"the type of tensor {name!r}")
    try:
        kind = GGMLType(number)
    except ValueError:
        kind = None
    if kind is None or kind not in BLOCK:
        found = f"of type number {number}" if kind is None else f"quantized as {kind.name}"
        raise cursor.fail(
            f"tensor {name!r} is {found}, which dure does not read",
            rule="types that are read: " + ", ".join(t.name for t in BLOCK),
            fix="take a file in one of these types, for example Q4_K_M, Q8_0 or F16",
        )
    return kind


def _check_extents(tensors: dict[str, TensorInfo], cursor: Cursor) -> None:
    """Every tensor lies in the file, and no two overlap."""
    by_offset = sorted(tensors.values(), key=lambda info: info.offset)
    for info in by_offset:
        if info.offset + info.nbytes > cursor.size:
            raise cursor.fail(
                f"the data of tensor {info.name!r} end at byte {info.offset + info.nbytes}, "
                f"but the file has only {cursor.size} bytes",
            )
    for before, after in pairwise(by_offset):
        if before.offset + before.nbytes > after.offset:
            raise cursor.fail(
                f"the data of tensors {before.name!r} and {after.name!r} overlap",
                rule="each tensor has bytes of its own",
            )
