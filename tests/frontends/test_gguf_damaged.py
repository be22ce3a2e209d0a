"""Every way in which a GGUF file can be wrong is a ModelFileError that says what and where."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf_builder as gb
import pytest
from gguf_builder import Builder, Tensor

from dure.errors import ModelFileError
from dure.frontends.gguf import GGMLType, open_gguf

Refused = Callable[[bytes | Builder, str], ModelFileError]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Opens the bytes, reads everything, and expects a ModelFileError that matches."""

    def check(content: bytes | Builder, match: str) -> ModelFileError:
        path = tmp_path / "broken.gguf"
        path.write_bytes(content.build() if isinstance(content, Builder) else content)
        tracemalloc.start()
        try:
            with pytest.raises(ModelFileError, match=match) as caught:
                read_everything(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4_000_000, "memory was taken for a count that the file cannot hold"
        assert str(path) in str(caught.value)
        assert caught.value.fix
        return caught.value

    return check


def read_everything(path: Path) -> None:
    with open_gguf(path) as file:
        for key in file.metadata:
            _ = file.metadata[key]
        for name in file.tensors:
            file.bytes_of(name)


def sample() -> Builder:
    builder = Builder().add("general.architecture", gb.STRING, "llama").add("n", gb.U32, 3)
    builder.add_array("tokens", gb.STRING, ["a", "bc", "def"]).add_array("scores", gb.F32, [0.5])
    return builder.tensor("a", (4, 32), "Q8_0").tensor("b", (8,))


def test_the_sample_itself_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(sample().build())
    read_everything(path)


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    content = sample().build()
    path = tmp_path / "cut.gguf"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            read_everything(path)


def test_wrong_magic(refused: Refused) -> None:
    refused(Builder(magic=b"GGML"), "not a GGUF file: it begins with b'GGML'")
    refused(b"\x80\x04\x95 a pickle", "not a GGUF file")
    refused(b"GG", "needs 4 bytes")


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
def test_unknown_version(refused: Refused, version: int) -> None:
    refused(Builder(version=version), f"version {version}")


def test_big_endian(refused: Refused) -> None:
    refused(Builder(order=">"), "big-endian GGUF file .version 3")


def test_empty_missing_directory_pipe_and_odd_paths(tmp_path: Path, refused: Refused) -> None:
    refused(b"", "empty")
    with pytest.raises(ModelFileError, match="no such file"):
        open_gguf(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="directory"):
        open_gguf(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_gguf(str(tmp_path / "with\0nul"))
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_gguf(str(tmp_path / ("long" * 200)))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_gguf(tmp_path / "file" / "inside")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ModelFileError, match="not a regular file"):
            open_gguf(tmp_path / "pipe")


@pytest.mark.parametrize("count", [3, 10**6, 2**32, 2**63, 2**64 - 1])
def test_absurd_counts_in_the_header(refused: Refused, count: int) -> None:
    refused(Builder(tensor_count=count), "tensor")
    refused(Builder(entry_count=count), "metadata")


@pytest.mark.parametrize("length", [10**6, 2**32, 2**62, 2**63, 2**64 - 1])
def test_absurd_lengths(refused: Refused, length: int) -> None:
    u64 = struct.pack("<Q", length)
    refused(Builder().add_raw("key", gb.STRING, u64 + b"abc"), "needs")
    for item in range(13):
        if item != gb.ARRAY:
            body = struct.pack("<I", item) + u64 + bytes(64)
            refused(Builder().add_raw("key", gb.ARRAY, body), "needs")
    nested = struct.pack("<I", gb.ARRAY) + u64 + bytes(64)
    refused(Builder().add_raw("key", gb.ARRAY, nested), "needs")
    one_string = struct.pack("<IQ", gb.STRING, 2) + u64 + bytes(64)
    refused(Builder().add_raw("key", gb.ARRAY, one_string), "behind the file's end")
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    refused(header + u64 + bytes(64), "length of")


def test_more_strings_than_any_vocabulary(refused: Refused) -> None:
    count = (1 << 24) + 1
    body = struct.pack("<IQ", gb.STRING, count) + bytes(8 * count)
    refused(Builder().add_raw("key", gb.ARRAY, body), "more than any vocabulary")


def test_unknown_value_types(refused: Refused) -> None:
    refused(Builder().add_raw("key", 13, b"\0" * 8), "unknown value type 13")
    refused(Builder().add_raw("key", gb.ARRAY, struct.pack("<IQ", 99, 1)), "unknown value type 99")


def test_arrays_nested_too_deep(refused: Refused) -> None:
    body = gb.array(gb.U8, [1])
    for _ in range(1000):
        body = struct.pack("<IQ", gb.ARRAY, 1) + body
    refused(Builder().add_raw("key", gb.ARRAY, body), "more than 4 deep")


def test_keys(refused: Refused) -> None:
    refused(Builder().add("k", gb.U8, 1).add("k", gb.U8, 2), "'k' appears twice")
    refused(Builder().add("", gb.U64, 1), "length of 0")
    refused(Builder().add("k" * 65536, gb.U8, 1), "length of 65536")
    refused(Builder().add(b"\xff\xfe", gb.U8, 1), "not UTF-8")


def test_values_that_no_writer_makes(refused: Refused) -> None:
    refused(Builder().add("key", gb.STRING, b"caf\xe9"), "'key' is not UTF-8")
    refused(Builder().add_raw("key", gb.BOOL, b"\x02"), "BOOL with the value 2")
    body = struct.pack("<IQ", gb.BOOL, 2) + b"\x01\x07"
    refused(Builder().add_raw("key", gb.ARRAY, body), "neither 0 nor 1")


def one_tensor(**change: object) -> Builder:
    tensor = Tensor("w", (2, 32), "Q4_0", bytes(36))
    for name, value in change.items():
        setattr(tensor, name, value)
    builder = Builder()
    builder.tensors.append(tensor)
    return builder


def test_tensor_names(refused: Refused) -> None:
    refused(Builder().tensor("w", (4,)).tensor("w", (4,)), "'w' appears twice")
    refused(one_tensor(name=""), "length of 0")
    refused(one_tensor(name=b"\xc3("), "not UTF-8")


@pytest.mark.parametrize("rank", [0, 5, 100])
def test_rank(refused: Refused, rank: int) -> None:
    refused(one_tensor(shape=(32,) * rank), f"'w' has {rank} dimensions")


def test_rank_beyond_the_file(refused: Refused) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gb.string("w")
    refused(head + struct.pack("<I", 2**32 - 1) + bytes(64), "4294967295 dimensions")


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 32), (2**32, 2**32), (2**63,), (2**64 - 1,)])
def test_sizes(refused: Refused, shape: tuple[int, ...]) -> None:
    refused(one_tensor(shape=shape), "has the shape")


def test_elements_fit_but_bytes_do_not(refused: Refused) -> None:
    builder = one_tensor(shape=(2**62,), type="F32", data=bytes(16))
    refused(builder, "but the file has only")


@pytest.mark.parametrize("type_name", [name for name, block in gb.BLOCKS.items() if block[1] > 1])
def test_rows_that_are_no_whole_blocks(refused: Refused, type_name: str) -> None:
    elements = gb.BLOCKS[type_name][1]
    error = refused(one_tensor(shape=(2, elements + 1), type=type_name), "'w' of type")
    assert type_name in error.what and str(elements) in error.rule


@pytest.mark.parametrize("kind", [kind for kind in GGMLType if "IQ" in kind.name])
def test_unknown_quantization_names_tensor_and_type(refused: Refused, kind: GGMLType) -> None:
    error = refused(one_tensor(type_number=kind.value), f"'w' is quantized as {kind.name}")
    assert "Q4_K" in error.rule


@pytest.mark.parametrize("number", [4, 5, 31, 38, 40, 1000, 2**32 - 1])
def test_unknown_type_number(refused: Refused, number: int) -> None:
    refused(one_tensor(type_number=number), f"'w' is of type number {number}")


@pytest.mark.parametrize("offset", [64, 4096, 2**40, 2**63, 2**64 - 32])
def test_offsets_beyond_the_file(refused: Refused, offset: int) -> None:
    refused(one_tensor(offset=offset), "but the file has only")


def test_misaligned_offset(refused: Refused) -> None:
    refused(one_tensor(offset=4), "begin at 4")


def test_overlapping_tensors(refused: Refused) -> None:
    builder = Builder().tensor("a", (16,)).tensor("b", (16,))
    builder.tensors[1].offset = 32
    refused(builder, "'a' and 'b' overlap")
    builder.tensors[1].offset = 0
    refused(builder, "overlap")


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**32 - 1])
def test_bad_alignment(refused: Refused, alignment: int) -> None:
    refused(sample().add("general.alignment", gb.U32, alignment), "general.alignment is")


def test_alignment_of_another_type(refused: Refused) -> None:
    refused(sample().add("general.alignment", gb.STRING, "32"), "is STRING, not an integer")


def test_alignment_beyond_the_file(refused: Refused) -> None:
    builder = Builder().tensor("w", (4,)).add("general.alignment", gb.U32, 2**31)
    refused(builder, "but the file has only")


def test_a_part_of_a_split_model(refused: Refused) -> None:
    error = refused(sample().add("split.count", gb.U16, 4), "one of 4 parts")
    assert "gguf-split" in error.fix


def test_a_directory_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: object, **_keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "model.gguf"
    path.write_bytes(sample().build())
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ModelFileError, match="Permission denied"):
        open_gguf(path)
