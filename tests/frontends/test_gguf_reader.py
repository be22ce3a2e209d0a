"""What a whole GGUF file gives: metadata, tensor table, bytes; the `gguf` package is the judge."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import gguf_builder as gb
import numpy as np
import pytest
from gguf_builder import Builder
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.errors import ModelFileError, UsageError
from dure.frontends.gguf import BLOCK, GGMLType, open_gguf

SCALARS = {
    gb.U8: 200,
    gb.I8: -100,
    gb.U16: 60000,
    gb.I16: -30000,
    gb.U32: 4_000_000_000,
    gb.I32: -2_000_000_000,
    gb.F32: 0.15625,
    gb.U64: 2**64 - 1,
    gb.I64: -(2**63),
    gb.F64: 1e-300,
    gb.STRING: "두레 🌾",
}


@pytest.fixture
def write(tmp_path: Path):
    def write(builder: Builder) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(builder.build())
        return path

    return write


@pytest.mark.parametrize("kind", list(SCALARS))
def test_every_scalar_type(write, kind: int) -> None:
    with open_gguf(write(Builder().add("key", kind, SCALARS[kind]))) as file:
        value = file.metadata["key"]
    assert value == SCALARS[kind]
    assert type(value) is type(SCALARS[kind])


@pytest.mark.parametrize("flag", [False, True])
def test_bool(write, flag: bool) -> None:
    with open_gguf(write(Builder().add("key", gb.BOOL, flag))) as file:
        assert file.metadata["key"] is flag
        assert file.metadata.require_bool("key") is flag


@pytest.mark.parametrize("kind", [kind for kind in SCALARS if kind != gb.STRING])
def test_every_array_type(write, kind: int) -> None:
    values = [0, SCALARS[kind], 1]
    with open_gguf(write(Builder().add_array("key", kind, values))) as file:
        array = file.metadata["key"]
    assert isinstance(array, np.ndarray)
    assert array.tolist() == values
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_arrays_of_bools_strings_and_arrays(write) -> None:
    nested = gb.array(gb.I32, [1, 2]) + gb.array(gb.STRING, ["x"])
    head = (gb.ARRAY).to_bytes(4, "little") + (2).to_bytes(8, "little")
    builder = (
        Builder()
        .add_array("bools", gb.BOOL, [1, 0, 1])
        .add_array("strings", gb.STRING, ["", "a", "é"])
        .add_raw("nested", gb.ARRAY, head + nested)
        .add_array("empty", gb.STRING, [])
        .add("last", gb.U8, 7)
    )
    with open_gguf(write(builder)) as file:
        metadata = file.metadata
        bools = metadata["bools"]
        assert isinstance(bools, np.ndarray) and bools.tolist() == [True, False, True]
        assert metadata["strings"] == ["", "a", "é"]
        inner = metadata["nested"]
        assert isinstance(inner, list) and inner[1] == ["x"] and list(inner[0]) == [1, 2]
        assert metadata.require_strings("empty") == []
        assert metadata.require_int("last") == 7
        assert list(metadata) == ["bools", "strings", "nested", "empty", "last"]


def test_a_token_that_is_not_utf8_keeps_its_bytes(write) -> None:
    with open_gguf(write(Builder().add_array("tokens", gb.STRING, [b"\xff\xe2", b"ok"]))) as file:
        tokens = file.metadata.require_strings("tokens")
    assert [token.encode("utf-8", "surrogateescape") for token in tokens] == [b"\xff\xe2", b"ok"]


@pytest.mark.parametrize("type_name", list(gb.BLOCKS))
def test_tensor_of_every_type(write, type_name: str) -> None:
    number, elements, nbytes = gb.BLOCKS[type_name]
    builder = Builder().tensor("pad", (3,)).tensor("w", (5, 2 * elements), type_name)
    rng = np.random.default_rng(number)
    data = rng.integers(0, 256, 10 * nbytes, dtype=np.uint8)
    builder.tensors[1].data = data.tobytes()
    with open_gguf(write(builder)) as file:
        info = file.tensors["w"]
        assert (info.shape, info.type, info.nbytes) == (
            (5, 2 * elements),
            GGMLType[type_name],
            10 * nbytes,
        )
        assert info.offset % 32 == 0
        view = file.bytes_of("w")
        np.testing.assert_array_equal(view, data)
        assert view.dtype == np.uint8 and not view.flags.writeable
    np.testing.assert_array_equal(view, data)  # a view outlives the file object


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_shapes_are_slowest_axis_first(write, shape: tuple[int, ...]) -> None:
    path = write(Builder().tensor("t", shape))
    with open_gguf(path) as file:
        assert file.tensors["t"].shape == shape
    reference = gguf.GGUFReader(path).tensors[0]
    assert tuple(int(size) for size in reversed(reference.shape)) == shape


def test_version_2_and_own_alignment(write) -> None:
    builder = Builder(version=2, alignment=128).add("general.alignment", gb.U32, 128)
    builder.tensor("a", (3,)).tensor("b", (3,))
    with open_gguf(write(builder)) as file:
        assert file.version == 2
        assert file.tensors["b"].offset - file.tensors["a"].offset == 128
        assert file.tensors["a"].offset % 128 == 0


def test_blocks_are_those_of_the_reference_package() -> None:
    for kind, block in BLOCK.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.value)] == block
    for kind in GGMLType:
        assert gguf.GGMLQuantizationType(kind.value).name == kind.name


def test_accessors_name_the_key_and_the_type_found(write) -> None:
    builder = (
        Builder()
        .add("i", gb.U32, 3)
        .add("f", gb.F32, 0.5)
        .add("s", gb.STRING, "x")
        .add_array("is", gb.I32, [1, 2])
        .add_array("big", gb.U64, [2**63])
    )
    with open_gguf(write(builder)) as file:
        m = file.metadata
        assert (m.require_int("i"), m.require_float("i"), m.require_float("f")) == (3, 3.0, 0.5)
        assert (m.get_int("no", 9), m.get_float("no", 1.5)) == (9, 1.5)
        assert (m.get_str("no", "d"), m.get_bool("no", True)) == ("d", True)
        assert m.require_ints("is").tolist() == [1, 2]
        assert m.require_floats("is").tolist() == [1.0, 2.0]
        assert m.per_layer_ints("i", 4) == [3, 3, 3, 3]
        assert m.per_layer_ints("is", 2) == [1, 2]
        for read, key, found in [
            (m.require_int, "s", "STRING"),
            (m.require_int, "f", "FLOAT32"),
            (m.require_float, "s", "STRING"),
            (m.require_bool, "i", "UINT32"),
            (m.require_str, "i", "UINT32"),
            (m.require_strings, "is", "ARRAY of INT32"),
            (m.require_ints, "s", "STRING"),
            (m.require_ints, "big", "ARRAY of UINT64"),
            (m.require_floats, "s", "STRING"),
        ]:
            with pytest.raises(ModelFileError) as caught:
                read(key)
            assert repr(key) in str(caught.value) and found in str(caught.value)
        with pytest.raises(ModelFileError, match="'no' is missing"):
            m.require_int("no")
        with pytest.raises(ModelFileError, match="2 values for 3 layers"):
            m.per_layer_ints("is", 3)
        with pytest.raises(ModelFileError, match=r"general\.architecture"):
            _ = file.architecture


def test_use_after_close_is_said(write) -> None:
    builder = Builder().add("seen", gb.STRING, "x").add("unseen", gb.U8, 1).tensor("t", (4,))
    file = open_gguf(write(builder))
    assert file.metadata["seen"] == "x"
    file.close()
    file.close()
    assert file.metadata["seen"] == "x"
    with pytest.raises(ModelFileError, match="after the file was closed"):
        _ = file.metadata["unseen"]
    with pytest.raises(UsageError, match="after the file was closed"):
        file.bytes_of("t")


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=20), max_size=40),
    numbers=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
)
def test_what_the_reference_writes_is_read_back(tmp_path_factory, texts, numbers, shapes) -> None:
    path = tmp_path_factory.mktemp("gguf") / "reference.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if texts:  # the reference writer can't tell the type of an empty list
        writer.add_array("texts", texts)
    if numbers:
        writer.add_array("numbers", numbers)
    arrays = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    for index, data in enumerate(arrays):
        writer.add_tensor(f"t{index}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        assert file.architecture == "llama"
        if texts:
            assert file.metadata.require_strings("texts") == texts
        if numbers:
            assert file.metadata.require_ints("numbers").tolist() == numbers
        for index, data in enumerate(arrays):
            info = file.tensors[f"t{index}"]
            assert info.shape == data.shape
            got = file.bytes_of(f"t{index}").view(np.float32).reshape(info.shape)
            np.testing.assert_array_equal(got, data)


def test_opening_costs_little_beside_a_large_vocabulary(write) -> None:
    tokens = [f"token{index}" for index in range(50_000)]
    path = write(Builder().add_array("tokens", gb.STRING, tokens).add("n", gb.U32, 1))
    best = min(_seconds(lambda: open_gguf(path).metadata.require_int("n")) for _ in range(5))
    assert best < 0.1  # 10 ms where it was measured
    with open_gguf(path) as file:
        assert file.metadata.require_strings("tokens") == tokens


def _seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@pytest.mark.model
def test_a_real_file_reads_as_the_reference_reads_it(smollm2_path: Path) -> None:
    reference = gguf.GGUFReader(smollm2_path)
    with open_gguf(smollm2_path) as file:
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert info.shape == tuple(int(size) for size in reversed(tensor.shape))
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            assert info.type.name == tensor.tensor_type.name
        for key, stored in reference.fields.items():
            if not key.startswith("GGUF."):
                value = file.metadata[key]
                value = value.tolist() if isinstance(value, np.ndarray) else value
                assert value == stored.contents(), key
