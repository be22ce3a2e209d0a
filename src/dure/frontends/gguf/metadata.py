"""The key-value section of a GGUF file, decoded on first use.

Opening a file only walks the section: each key is kept with the place of its value.  A value is
decoded when it is asked for, and then kept, so that a list of 262,144 tokens costs nothing to a
caller who only wants the number of layers.

Contract: whatever the bytes, scanning and decoding end in values or in
:class:`~dure.errors.ModelFileError`; nothing is allocated from a count that the file's size has not
been checked against, and time is linear in the section's bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from dure.errors import ModelFileError
from dure.frontends.gguf.cursor import Buffer, Cursor
from dure.frontends.gguf.types import ValueType

MAX_ARRAY_DEPTH = 4
"""Arrays nested deeper than this are refused; real files don't nest them at all."""
MAX_STRINGS = 1 << 24
"""The most strings in one array: 64 times the largest published vocabulary."""

NumericArray: TypeAlias = NDArray[np.integer] | NDArray[np.floating] | NDArray[np.bool_]
MetadataValue: TypeAlias = "int | float | bool | str | NumericArray | Sequence[MetadataValue]"

_U64 = struct.Struct("<Q")
_SCALAR: dict[ValueType, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: _U64,
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_NUMPY: dict[ValueType, str] = {
    ValueType.UINT8: "<u1",
    ValueType.INT8: "<i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.BOOL: "<u1",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
}


class Entry(NamedTuple):
    """Where a value lies: ``start`` is its first byte, behind the type tag and an array's head."""

    kind: ValueType
    item: ValueType
    length: int
    start: int


def scan_entry(cursor: Cursor, what: str) -> Entry:
    """Read a value's type tag and step over the value; ModelFileError if it isn't whole."""
    kind = cursor.value_type(what)
    if kind is not ValueType.ARRAY:
        entry = Entry(kind, kind, 1, cursor.position)
        _skip_scalar(cursor, kind, what)
        return entry
    item = cursor.value_type(f"the items of {what}")
    count = cursor.u64(f"the number of items of {what}")
    entry = Entry(kind, item, count, cursor.position)
    _skip_items(cursor, item, count, what, depth=1)
    return entry


def _skip_scalar(cursor: Cursor, kind: ValueType, what: str) -> None:
    if kind is ValueType.STRING:
        length = cursor.u64(f"the length of {what}")
        cursor.need(length, what)
        cursor.position += length
        return
    size = _SCALAR[kind].size
    cursor.need(size, what)
    cursor.position += size


def _skip_items(cursor: Cursor, item: ValueType, count: int, what: str, depth: int) -> None:
    if item is ValueType.STRING:
        _skip_strings(cursor, count, what)
    elif item is ValueType.ARRAY:
        if depth >= MAX_ARRAY_DEPTH:
            raise cursor.fail(
                f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep",
                rule="metadata arrays hold numbers or strings",
            )
        cursor.need(12 * count, what)
        for _ in range(count):
            inner = cursor.value_type(f"the items of an array in {what}")
            inner_count = cursor.u64(f"the number of items of an array in {what}")
            _skip_items(cursor, inner, inner_count, what, depth + 1)
    else:
        nbytes = _SCALAR[item].size * count
        cursor.need(nbytes, what)
        cursor.position += nbytes


def _skip_strings(cursor: Cursor, count: int, what: str) -> None:
    cursor.need(8 * count, f"{what} with {count} strings")
    if count > MAX_STRINGS:
        raise cursor.fail(f"{what} has {count} strings, more than any vocabulary")
    data, position, unpack = cursor.data, cursor.position, _U64.unpack_from
    last_head = cursor.size - 8
    for index in range(count):
        if position > last_head:
            raise cursor.fail(f"string {index} of {count} of {what} starts behind the file's end")
        position += 8 + unpack(data, position)[0]
    if position > cursor.size:
        raise cursor.fail(f"a string of {what} reaches behind the file's end")
    cursor.position = position


class Metadata(Mapping[str, MetadataValue]):
    """The metadata of one file: a mapping from key to value, and accessors that check the type.

    Numbers come as ``int``, ``float`` or ``bool``, text as ``str``, arrays of numbers as read-only
    NumPy arrays of the file's own dtype, arrays of strings as ``list[str]``, nested ones as lists.
    A string in an array that is not UTF-8 keeps its bytes as surrogate escapes (PEP 383), because a
    vocabulary may hold pieces of characters.  A lone string that is not UTF-8, or a bool that is
    neither 0 nor 1, is a ModelFileError when it is asked for.
    """

    def __init__(self, data: Buffer, path: str, entries: dict[str, Entry]) -> None:
        self._data: Buffer | None = data
        self._path = path
        self._entries = entries
        self._decoded: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key in self._decoded:
            return self._decoded[key]
        value = self._decode(key, self._entries[key])
        self._decoded[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def close(self) -> None:
        """Let go of the file; values that were decoded before stay."""
        self._data = None

    def type_of(self, key: str) -> str:
        """The type of a key's value in words: ``INT32``, ``ARRAY of STRING``."""
        entry = self._entries[key]
        if entry.kind is ValueType.ARRAY:
            return f"ARRAY of {entry.item.name}"
        return entry.kind.name

    # -- accessors ---------------------------------------------------------------------------------

    def require_int(self, key: str) -> int:
        """An integer of any width, or ModelFileError when it is absent or something else."""
        value = self._require(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self.wrong_type(key, "an integer")

    def get_int(self, key: str, default: int) -> int:
        return self.require_int(key) if key in self._entries else default

    def require_float(self, key: str) -> float:
        """A number (an integer is taken too), or ModelFileError when absent or something else."""
        value = self._require(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self.wrong_type(key, "a number")

    def get_float(self, key: str, default: float) -> float:
        return self.require_float(key) if key in self._entries else default

    def require_bool(self, key: str) -> bool:
        value = self._require(key)
        if isinstance(value, bool):
            return value
        raise self.wrong_type(key, "a bool")

    def get_bool(self, key: str, default: bool) -> bool:
        return self.require_bool(key) if key in self._entries else default

    def require_str(self, key: str) -> str:
        value = self._require(key)
        if isinstance(value, str):
            return value
        raise self.wrong_type(key, "a string")

    def get_str(self, key: str, default: str) -> str:
        return self.require_str(key) if key in self._entries else default

    def require_strings(self, key: str) -> list[str]:
        """An array of strings; an empty array of any type is an empty list."""
        value = self._require(key)
        entry = self._entries[key]
        if entry.kind is ValueType.ARRAY and not entry.length:
            return []
        if entry.kind is ValueType.ARRAY and entry.item is ValueType.STRING:
            return cast(list[str], value)
        raise self.wrong_type(key, "an array of strings")

    def require_ints(self, key: str) -> NDArray[np.int64]:
        """An array of integers, widened to int64; a uint64 beyond that range is an error."""
        value = self._require(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            if (
                value.dtype == np.uint64
                and value.size
                and int(value.max()) > np.iinfo(np.int64).max
            ):
                raise self.wrong_type(key, "an array of integers that fit in int64")
            return value.astype(np.int64)
        raise self.wrong_type(key, "an array of integers")

    def require_floats(self, key: str) -> NDArray[np.float64]:
        """An array of numbers, widened to float64."""
        value = self._require(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
            with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
                return value.astype(np.float64)
        raise self.wrong_type(key, "an array of numbers")

    def per_layer_ints(self, key: str, layers: int) -> list[int]:
        """One integer a layer: the file may say one for all layers, or an array of ``layers``."""
        entry = self._entries.get(key)
        if entry is not None and entry.kind is ValueType.ARRAY:
            values = [int(value) for value in self.require_ints(key)]
            if len(values) != layers:
                raise ModelFileError(
                    f"{key} has {len(values)} values for {layers} layers",
                    where=self._path,
                    rule="a value per layer is one integer or an array with one for each layer",
                    fix="convert the model again with a current converter",
                )
            return values
        return [self.require_int(key)] * layers

    def wrong_type(self, key: str, wanted: str) -> ModelFileError:
        """The error for a key whose value has another type than ``wanted``."""
        return ModelFileError(
            f"metadata key {key!r} is {self.type_of(key)}, not {wanted}",
            where=self._path,
            fix="convert the model again with a current converter",
        )

    def _require(self, key: str) -> MetadataValue:
        if key not in self._entries:
            raise ModelFileError(
                f"metadata key {key!r} is missing",
                where=self._path,
                fix="convert the model again with a current converter",
            )
        return self[key]

    # -- decoding ----------------------------------------------------------------------------------

    def _decode(self, key: str, entry: Entry) -> MetadataValue:
        if self._data is None:
            raise ModelFileError(
                f"metadata key {key!r} was first read after the file was closed",
                where=self._path,
                fix="read it while the GGUFFile is open",
            )
        cursor = Cursor(self._data, self._path)
        cursor.position = entry.start
        if entry.kind is ValueType.ARRAY:
            return _decode_items(cursor, entry.item, entry.length, key)
        return _decode_scalar(cursor, entry.kind, key)


def _decode_scalar(cursor: Cursor, kind: ValueType, key: str) -> MetadataValue:
    if kind is ValueType.STRING:
        length = cursor.u64(f"metadata key {key!r}")
        raw = cursor.data[cursor.position : cursor.position + length]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise cursor.fail(f"the string of metadata key {key!r} is not UTF-8: {error}") from None
    (value,) = _SCALAR[kind].unpack_from(cursor.data, cursor.position)
    if kind is not ValueType.BOOL:
        return value
    if value > 1:
        raise cursor.fail(f"metadata key {key!r} is a BOOL with the value {value}", rule="0 or 1")
    return bool(value)


def _decode_items(cursor: Cursor, item: ValueType, count: int, key: str) -> MetadataValue:
    if item is ValueType.STRING:
        return _decode_strings(cursor, count)
    if item is ValueType.ARRAY:
        values: list[MetadataValue] = []
        for _ in range(count):
            inner = cursor.value_type(key)
            inner_count = cursor.u64(key)
            values.append(_decode_items(cursor, inner, inner_count, key))
        return values
    dtype = np.dtype(_NUMPY[item])
    array = np.frombuffer(cursor.data, dtype=dtype, count=count, offset=cursor.position).copy()
    cursor.position += array.nbytes
    if item is ValueType.BOOL:
        if count and int(array.max()) > 1:
            raise cursor.fail(f"metadata key {key!r} has a BOOL that is neither 0 nor 1")
        array = array.view(np.bool_)
    array.flags.writeable = False
    return array


def _decode_strings(cursor: Cursor, count: int) -> list[str]:
    data, position, unpack = cursor.data, cursor.position, _U64.unpack_from
    strings: list[str] = []
    append = strings.append
    try:
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            append(data[start:position].decode())
    except UnicodeDecodeError:  # rare: begin again with the slower codec that keeps any bytes
        position = cursor.position
        strings.clear()
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            append(data[start:position].decode("utf-8", "surrogateescape"))
    cursor.position = position
    return strings
