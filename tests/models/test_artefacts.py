"""dure.save and dure.load: what comes back is what was saved, and bad files are refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden_artefacts import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

import dure
import dure.lang as dl
from dure.errors import ArtefactError, DureError, KernelError, UsageError
from dure.ir.core import Function
from dure.ir.dtypes import float32
from dure.ir.parser import parse_function
from dure.ir.printer import print_function
from dure.library.answer import answer
from dure.library.artefact import container, lists
from dure.library.build import build, tile_function
from dure.library.call import tensor
from dure.library.matrix import run_on_chip
from dure.library.suite.execute import interpret
from dure.library.work import Work, operator_work
from dure.models.artefact import launches, packed, unpacked
from dure.models.batch import Batch
from dure.models.chip_answer import step_answer
from dure.models.chip_program import Chosen, StepProgram, options_for, step_program
from dure.models.chip_step import ChipStep, chip_step
from dure.models.config import ModelConfig, RopeConfig
from dure.targets import chip

SMALL = ModelConfig(
    "llama", 64, 96, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e4), tied=False
)  # fmt: skip


@dure.kernel
def add_rows(
    table: dl.Tensor, rows: dl.Index(0, None), y: dl.Tensor, bias: dl.Tensor | None, bt: dl.const
):
    """y = table[rows] (+ bias)."""
    t = dl.program_id(0)
    found = dl.load(table, (rows[t], 0), (1, 32))
    if bias is not None:
        found = found + dl.load(bias, (0,), (32,))
    dl.store(y, (t, 0), found)


@cache
def small() -> bytes:
    """A file of a softmax, in few sizes."""
    return packed(operator_work("softmax", "8x64", "bf16"), ())


def loaded(data: bytes) -> Work | ChipStep:
    return unpacked(data, "a.dure")


# --- what comes back -----------------------------------------------------------------------------


def test_an_operator_comes_back(tmp_path: Path) -> None:
    work = operator_work("gemm_gelu", "64x64x128", "bf16")
    target = chip("rngd")
    path = tmp_path / "gemm.dure"
    dure.save(path, work, chips=[target])
    found = dure.load(path)
    assert isinstance(found, Work)
    assert (found.name, found.dims, found.dtype) == (work.name, work.dims, work.dtype)
    assert (found.flops, found.bytes) == (work.flops, work.bytes)
    # The best sizes are among the stored ones, and so the time is about the same.
    assert answer(found, target).ps <= 1.1 * answer(work, target).ps
    # Saved again it is the same file: nothing was lost.
    assert packed(found, [target]) == path.read_bytes()


def test_the_file_is_text_with_its_release_and_hashes() -> None:
    lines = small().decode().split("\n")
    assert lines[0] == "dure artefact 1"
    assert lines[1] == f"release {dure.__version__}"
    assert lines[2] == "name softmax 8x64 bf16"
    sections = [line.split() for line in lines if line.startswith("section ")]
    assert [s[1] for s in sections] == ["manifest", "kernel.0"]
    assert "tile function softmax" in lines
    # Nothing of the machine that wrote it.
    assert str(Path.cwd()) not in small().decode()


def test_every_attribute_is_written() -> None:
    """The defaults of a later release may be others."""
    function = tile_function(operator_work("softmax", "8x64", "bf16").calls[0])
    text = print_function(function, defaults=True)
    assert "axis" in text and len(text) > len(print_function(function))
    assert print_function(parse_function(text)) == print_function(function)


def test_a_kernel_of_the_language_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((16, 32)).astype(np.float32)
    bias = rng.standard_normal(32).astype(np.float32)
    rows = np.array([3, 1, 15, 3, 0, 7], np.int32)
    path = tmp_path / "rows.dure"
    dure.save(path, add_rows, table, rows, np.zeros((6, 32), np.float32), bias, bt=1, chips=())
    found = dure.load(path)
    assert isinstance(found, Work) and found.name == "add_rows" and found.flops is None
    (call,) = found.calls
    assert not call.open and np.array_equal(call.indices[1], rows)
    built = build(call, chip("atom"))
    assert built.verdict is not None and built.verdict.ok
    y = np.zeros((6, 32), np.float32)
    run_on_chip(built.compiled, chip("atom"), [table, rows, y, bias])
    assert np.allclose(y, table[rows] + bias, atol=0.1)
    y[:] = 0
    interpret(tile_function(call), [table, rows, y, bias])
    assert np.array_equal(y, table[rows] + bias)


def test_a_kernel_without_an_optional_argument(tmp_path: Path) -> None:
    table, y = np.ones((4, 32), np.float32), np.zeros((2, 32), np.float32)
    path = tmp_path / "rows.dure"
    dure.save(path, add_rows, table, np.array([0, 3], np.int32), y, None, bt=1, chips=())
    (call,) = launches(dure.load(path))
    assert call.types[3] is None
    assert call.specialize().params[-1].value.name == "y"


def test_a_step_comes_back() -> None:
    step = chip_step(SMALL, Batch("decode", 2, 40), "bf16", "small")
    assert step.calls[-1].layers is None and step.calls[1].layers is not None
    found = loaded(packed(step, ()))
    assert isinstance(found, ChipStep) and found.config is None
    assert (found.name, found.batch, found.dtype) == ("small", step.batch, "bf16")
    assert (found.flops, found.bytes) == (step.flops, step.bytes)
    assert (found.weight_bytes, found.kv_bytes) == (step.weight_bytes, step.kv_bytes)
    counted = [(c.part.name, c.count, len(c.part.calls)) for c in found.calls]
    assert counted == [(c.part.name, c.count, len(c.part.calls)) for c in step.calls]
    assert packed(found, ()) == packed(step, ())
    assert found.program is None and set(found.outputs) == set(step.outputs) == {"logits"}
    for name, values in step.inputs.items():
        assert np.array_equal(found.inputs[name], values)


def numbered(function: Function) -> str:
    """The text of a function whose values are named in the order in which they occur."""
    names: dict[str, str] = {}
    return re.sub(
        r"%[\w.]+", lambda m: names.setdefault(m[0], f"%{len(names)}"), print_function(function)
    )


@pytest.mark.parametrize(
    ("weights", "kv", "rows"), [("", "", ""), ("int4", "int8", ""), ("fp8", "fp8", "fp8")]
)
def test_a_loaded_step_is_the_same_program(weights: str, kv: str, rows: str) -> None:
    """With the same tile sizes, to the byte but for names of buffers."""
    target = chip("rngd")
    types = {"weights": weights, "kv": kv, "activations": rows}
    step = chip_step(SMALL, Batch("decode", 2, 40), "bf16", "small", **types)
    found = loaded(packed(step, ()))
    assert isinstance(found, ChipStep)
    assert found.types == step.types
    programs: list[StepProgram] = []
    # Loading ahead takes larger tiles where there are any; a stored kernel has only its own.
    for which in (step, found):
        options = options_for(which, target, strict=False, prefetch=False)
        chosen: list[Chosen] = []
        for entry, own in zip(which.calls, step.calls, strict=True):
            tiles = dict(own.part.calls[0].tiles)
            call, operands = entry.part.ways(target)[0][0]
            chosen.append(Chosen(entry, operands, build(call, target, tiles=tiles, base=options)))
        programs.append(step_program(which, target, chosen, prefetch=False))
    live, again = programs
    assert numbered(again.function) == numbered(live.function)
    assert set(again.indices) == set(live.indices)
    for name, allocation in live.tensors.items():
        other = again.tensors[name]
        assert (other.type, other.stored.form) == (allocation.type, allocation.stored.form)
        kinds = [s.stored.weights for s in (allocation, other)]
        assert kinds[0] is None or (kinds[1] is not None and kinds[0].code is kinds[1].code)


@pytest.mark.long
def test_a_step_is_timed_as_it_was() -> None:
    target = chip("rngd")
    step = chip_step(SMALL, Batch("decode", 2, 40), "bf16", "small")
    found = loaded(packed(step, [target]))
    assert isinstance(found, ChipStep)
    assert step_answer(found, target).ps <= 1.1 * step_answer(step, target).ps


def test_a_stored_kernel_has_the_sizes_it_has() -> None:
    (call,) = launches(loaded(small()))
    assert {"bm", "bd"} == set(call.open) and len(call.variants) >= 3
    with pytest.raises(KernelError, match="stored kernel 'softmax'") as error:
        call.specialize({"bm": 3, "bd": 5})
    assert "bm=8 bd=64" in error.value.fix
    other = replace(call, types=(tensor(float32, 8, 64), *call.types[1:]))
    with pytest.raises(KernelError):
        other.specialize()


def test_what_is_not_saved(tmp_path: Path) -> None:
    work = operator_work("softmax", "8x64", "bf16")
    with pytest.raises(UsageError, match="arguments beside Work"):
        dure.save(tmp_path / "a.dure", work, np.zeros(3))
    with pytest.raises(DureError, match="can't be written"):
        dure.save(tmp_path / "no" / "a.dure", work, chips=())
    with pytest.raises(DureError):
        dure.save(tmp_path / "a.dure", add_rows, np.zeros((4, 32), np.float32), bt=1)
    assert not (tmp_path / "a.dure").exists()


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_index_values_as_text(values: list[int]) -> None:
    array = np.array(values, np.int32)
    assert np.array_equal(lists.decode(lists.encode(array), array.shape, "a"), array)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-2, 2), st.integers(1, 9)), max_size=8))
def test_runs_of_index_values(runs: list[tuple[int, int, int]]) -> None:
    parts = [first + step * np.arange(count) for first, step, count in runs]
    array = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int32)
    assert np.array_equal(lists.decode(lists.encode(array), array.shape, "a"), array)


def test_long_runs_are_short() -> None:
    array = np.concatenate([np.arange(1000), np.full(500, 7), np.arange(0, 4000, 16)])
    assert len(lists.encode(array.astype(np.int32))) < 40


# --- bad files -----------------------------------------------------------------------------------


def sealed(data: bytes, change: Callable[[dict[str, str]], None]) -> bytes:
    """The file with other sections, under hashes that are right."""
    found = container.read(data, "a.dure")
    sections = dict(found.sections)
    change(sections)
    return container.write(found.name, found.release, sections)


def replaced(old: str, new: str, section: str = "manifest", data: bytes | None = None) -> bytes:
    def change(sections: dict[str, str]) -> None:
        assert old in sections[section]
        sections[section] = sections[section].replace(old, new)

    return sealed(data or small(), change)


def header(data: bytes, old: bytes, new: bytes) -> bytes:
    """The file with another header, under a hash that is right."""
    at = data.index(b"\nsha256 ") + 1
    head = data[:at].replace(old, new)
    return head + b"sha256 " + hashlib.sha256(head).hexdigest().encode() + data[at + 71 :]


SIZE = b"section kernel.0 " + small().split(b"section kernel.0 ")[1].split(b" ")[0]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no artefact of dure"),
        (b"dure artefact", "no artefact of dure"),
        (b"dure artefact x\n", "no artefact of dure"),
        (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 9, "no artefact of dure"),
        (b"tile function f\n{\n}\n", "no artefact of dure"),
        (small().replace(b"artefact 1\n", b"artefact 2\n"), "an artefact of format 2"),
        (small().replace(b"artefact 1\n", b"artefact 0\n"), "an artefact of format 0"),
        (small().replace(b"artefact 1\n", b"artefact 999999999\n"), "format 999999999"),
        (b"dure artefact 1\n" * 1000, "its header has no end"),
        (small()[:200], "its header has no end"),
        (small()[:-1], "section 'kernel.0' isn't there in full"),
        (small() + b"\n", "goes on for 1 bytes"),
        (small().replace(b"exp(", b"log("), "another hash"),
        (small().replace(b"\n", b"\r\n"), "no artefact of dure"),
        (header(small(), b"release 0.1.0", b"release 0 1 0"), "no release"),
        (header(small(), b"section manifest", b"section kernel.0"), "its section"),
        (header(small(), b"section ", b"sektion "), "its header has the line"),
        (header(small(), SIZE, b"section kernel.0 999999999999"),
         "isn't there in full"),
        (sealed(small(), lambda s: s.pop("manifest")), "has no manifest"),
        (sealed(small(), lambda s: s.pop("kernel.0")), "no section 'kernel.0'"),
        (replaced("{", "["), "its manifest"),
        (replaced('"bytes"', '"octets"'), "its manifest: work.bytes"),
        (replaced('"bytes": ', '"bytes": -'), "its manifest: work.bytes"),
        (replaced('"bytes": ', '"bytes": ' + "9" * 5000), "its manifest"),
        (replaced('"work"', '"step"'), "its manifest: step"),
        (replaced('"work"', '"wurk"'), "neither one work nor one step"),
        (replaced('"exp"', '"exp2_of_1999"'), "the op 'exp2_of_1999', which this release"),
        (replaced("tensor<8 x 64", "tensor<9999999999999 x 64"), "can't read the type"),
        (replaced("tensor<8 x 64", "tensor<0 x 64"), "an extent below 1"),
        (replaced("tensor<8 x 64", "tile<8 x 64"), "is no tensor's type"),
        (replaced("bfloat16>", "float6_of_1999>"), "can't read the type"),
        (replaced("tensor<8 x 64 x bfloat16>", "tensor<8 x int32, index=[0, 3]>"),
         "without its index values"),
        (replaced("-- bm=8", "-- bn=8", "kernel.0"), "the sizes"),
        (replaced("-- bm=", "-+ bm=", "kernel.0"), "without its tile functions"),
        (sealed(small(), lambda s: s.update({"manifest": "[" * 100_000})), "its manifest"),
    ],
)  # fmt: skip
def test_a_bad_file(data: bytes, what: str) -> None:
    with pytest.raises(ArtefactError) as error:
        loaded(data)
    assert what in str(error.value)
    assert error.value.where.startswith("a.dure")
    assert error.value.rule and error.value.fix


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("exp(", "exponential_of_1999("),
        ("exp(", "dot("),
        ("bfloat16", "float6_of_1999"),
        ("tile function softmax", "machine function softmax"),
        ("tile<8 x 16 x", "tile<4611686018427387904 x 16 x"),
        ("%x: tensor<8 x 64", "%x: tensor<8 x 63"),
        ("yield", "yields"),
    ],
)
def test_a_kernel_that_this_release_does_not_read(old: str, new: str) -> None:
    (call, *_) = launches(loaded(replaced(old, new, "kernel.0")))
    with pytest.raises(ArtefactError) as error:
        for sizes in call.variants:
            call.specialize(sizes)
    assert error.value.what and error.value.rule and error.value.fix


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"phase": "decode"', '"phase": "encode"'),
        ('"dtype": "bf16"', '"dtype": "bf17"'),
        ('"sequences": 3', '"sequences": 9000000'),
        ('"form": "columns"', '"form": "pillars"'),
        ('"values": [0]', '"values": [99999]'),
        ('"values": [5, 6, 7]', '"values": [5, 6, 4]'),
        ('"values": [5, 6, 7]', '"values": [5, 6]'),
        ('"window": [1, 0, 4]', '"window": [1, 4, 4]'),
        ('"window": [1, 0, 4]', '"window": [3, 0, 4]'),
        ('"window": [1, 0, 4]', '"window": [1, 6, 10]'),
        ('"shape": [3, 8, 16]', '"shape": [3, 9, 16]'),
        ('"kernels": [0]', '"kernels": [77]'),
        ('"kernels": [0]', '"kernels": [0, 0]'),
        ('"layers": 0', '"layers": 1'),
        ('{"count": 2,', '{"count": 3,'),
        ('["tokens", 0]', '["tokens", 99]'),
        ('["logits", 39]', '["logits", 9999]'),
        ('["embedding", "tensor<256 x 64', '["embedding", "tensor<256 x 65'),
        ('["embedding", "tensor<256 x 64', '["embedding", "tensor<256 x n'),
    ],
)
def test_a_step_that_can_not_be(old: str, new: str) -> None:
    data = (FOLDER / "0.1.0" / "decode_step.dure").read_bytes()
    with pytest.raises(ArtefactError) as error:
        loaded(replaced(old, new, data=data))
    assert error.value.what and error.value.rule and error.value.fix


def test_index_values_that_are_wrong() -> None:
    data = (FOLDER / "0.1.0" / "grouped_attention.dure").read_bytes()
    for text in (
        "",
        "1 2",
        "0*1000000000",
        "0*99999999999",
        "4294967296",
        "x",
        "1e3",
        "0:1*3 999999",
    ):
        with pytest.raises(ArtefactError) as error:
            loaded(sealed(data, lambda s, text=text: s.update({"list.0": text})))
        assert "damaged" in str(error.value)


@pytest.mark.parametrize("shape", ["[4611686018427387904]", "[1048576, 1048576]", "[0]", "[3, 1]"])
def test_index_values_of_an_absurd_shape(shape: str) -> None:
    data = (FOLDER / "0.1.0" / "grouped_attention.dure").read_bytes()

    def change(sections: dict[str, str]) -> None:
        text = sections["manifest"]
        at = text.index('"lists": [\n  [')
        sections["manifest"] = text[: at + 12] + shape + text[text.index("]", at) + 1 :]

    with pytest.raises(ArtefactError):
        loaded(sealed(data, change))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.dure", tmp_path, "a\0b.dure"):
        with pytest.raises(ArtefactError, match="can't be read"):
            dure.load(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    good = small()
    place = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != good[place]))
    with pytest.raises(ArtefactError):
        loaded(good[:place] + bytes([byte]) + good[place + 1 :])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_cut_is_found(data: st.DataObject) -> None:
    good = small()
    start = data.draw(st.integers(0, len(good) - 1))
    stop = data.draw(st.integers(start + 1, len(good)))
    with pytest.raises(ArtefactError):
        loaded(good[:start] + good[stop:])


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_text_under_right_hashes_is_read_or_refused(data: st.DataObject) -> None:
    """Hashes keep accidents away; what was written on purpose meets the readers behind them."""
    files = (small(), (FOLDER / "0.1.0" / "decode_step.dure").read_bytes())
    good = container.read(data.draw(st.sampled_from(files)), "a.dure")
    name = data.draw(st.sampled_from(sorted(good.sections)))
    text = good.sections[name]
    if name.startswith("kernel.") and "\n-- " in text:  # one tile function is enough to change
        text = text[: text.index("\n-- ") + 1]
    place = data.draw(st.integers(0, len(text) - 1))
    width = data.draw(st.integers(0, 6))
    put = data.draw(st.one_of(
        st.text(max_size=3),
        st.sampled_from(["9", "0", "-1", "99999999999999", "[", "{", "(", '"', "null", "%x", "\n"]),
    ))  # fmt: skip
    changed = dict(good.sections) | {name: text[:place] + put + text[place + width :]}
    try:
        found = loaded(container.write(good.name, good.release, changed))
        for call in launches(found)[:3]:
            call.specialize(call.variants[0] if call.variants else {})
    except UnicodeEncodeError:
        assert any(0xD800 <= ord(c) < 0xE000 for c in put)
    except DureError as error:
        assert error.what
