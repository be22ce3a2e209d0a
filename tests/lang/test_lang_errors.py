"""Bad kernels and bad launches: the author's line with a caret, the rule, what was found, a fix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_kernels as bad
import numpy as np
import pytest

import dure
import dure.lang as dl
from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.expr import symbol
from dure.ir.types import TensorType

GOLDEN = Path(__file__).parent / "golden"


def compiled(name: str, **consts: Any) -> str:
    """The error of specialising ``bad_kernels.<name>`` to two matrices (and an index argument)."""
    kernel = getattr(bad, name)
    types: list[TensorType | None] = []
    for parameter in kernel.signature.tensors:
        rank = 1 if parameter.kind == "index" else 2
        dtype = dtypes.int32 if parameter.kind == "index" else dtypes.float32
        shape = tuple(symbol(f"{parameter.name}_{a}") for a in range(rank))
        types.append(TensorType(shape, dtype))
    with pytest.raises(KernelError) as caught:
        kernel.specialize(types, consts)
    return str(caught.value)


COMPILE_ERRORS = {
    "while_loop": ("while", "a while loop"),
    "try_block": ("try", "try in a kernel"),
    "with_block": ("with", "with in a kernel"),
    "imports": ("import", "import in a kernel"),
    "breaks": ("break", "break in a kernel"),
    "element_assignment": ("tile[0]", "assignment to an element"),
    "loop_else": ("for k", "else after a for loop"),
    "truth_of_a_tile": ("tile > 0", "the truth of"),
    "chained_comparison": ("0 < tile < 1", "chain of comparisons"),
    "and_of_tiles": ("tile > 0 and", "the truth of"),
    "shape_mismatch": ("+ dl.load", "tiles of"),
    "dot_mismatch": ("left @ left", "dot of"),
    "dot_of_floats_and_integers": ("left @ right", "dot of"),
    "store_dtype": ("dl.store", "float16"),
    "store_rank": ("dl.store", "the index of dl.store has 1 entries"),
    "load_rank": ("dl.load(x, (0, 0), (4,))", "a tile of 1 axes"),
    "unknown_name": ("undefined_name", "is not defined"),
    "read_before_write": ("total", "read before it is written"),
    "bound_in_loop_only": ("last", "may run zero times"),
    "bound_in_one_branch": ("value", "every way"),
    "loop_changes_dtype": ("acc = acc.to", "before the loop"),
    "loop_changes_shape": ("acc = acc[", "before the loop"),
    "loop_carries_a_number": ("count = count + 1", "before the loop"),
    "loop_carries_number_to_tile": ("best = dl.maximum", "dl.full(shape, 0.0"),
    "branches_disagree": ("if", "in one branch"),
    "negative_index": ("dl.load(x, (-1, 0)", "negative"),
    "computed_index": ("dl.load(x, (rows, 0)", "computed"),
    "element_of_a_tensor": ("x[0, 0]", "index scalar"),
    "tensor_arithmetic": ("x + 1", "stays in memory"),
    "dynamic_shape": ("dl.zeros((x.shape[0]", "known when the kernel is compiled"),
    "negative_step": ("dl.range(8, 0, -1)", "step"),
    "float_range": ("dl.range(2.5)", "bounded by"),
    "return_in_loop": ("return", "return inside"),
    "returns_a_value": ("def returns_a_value", "returns a value"),
    "recursion": ("forever(x)", "calls 64 deep"),
    "wrong_arguments": ("dl.exp(tile, tile)", "too many positional"),
    "unknown_attribute": ("tile.sqrt", "'.sqrt' of"),
    "unknown_function": ("dl.expp", "did you mean"),
    "numpy_call": ("np.exp(tile)", "a call of"),
    "tile_slice": ("tile[0:2]", "its elements aren't addressed"),
    "dynamic_view_step": ("x[::2]", "with a step"),
    "store_into_index": ("dl.store(rows", "read only"),
    "bad_quantize": ("dl.quantize", "multiple of 32"),
    "static_failure": ("dl.static_assert", "four or more"),
    "refuses": ("raise ValueError", "only even"),
    "static_division": ("n // 0", "ZeroDivisionError"),
    "too_many_names": ("a, b, c = ", "2 values"),
    "number_too_large": ("+ 300", "holds numbers from"),
    "huge_tile": ("dl.zeros", "elements"),
    "combine_number": ("dl.reduce", "dl.reduce with 3"),
    "quantize_to_text": ("dl.quantize", "dl.quantize to str"),
    "combine_function": ("dl.reduce", "combine function"),
    "runtime_division": ("i // (i - 1)", "zero or negative"),
    "unordered_name_in_helper": ("tile + missing", "'missing' is not defined"),
}


@pytest.mark.parametrize("name", COMPILE_ERRORS)
def test_a_kernel_that_cannot_be_compiled(name: str) -> None:
    where, what = COMPILE_ERRORS[name]
    consts = {"n": 4} if "n" in getattr(bad, name).signature.python.parameters else {}
    text = compiled(name, **consts)
    lines = text.split("\n")
    assert what in text, text
    caret = next(i for i, line in enumerate(lines) if set(line.strip()) == {"^"})
    assert where in lines[caret - 1], text
    assert "bad_kernels.py:" in lines[caret - 2], text
    assert "  rule: " in text and "  fix: " in text, text


GOLDEN_ERRORS = ("while_loop", "dot_mismatch", "loop_changes_dtype", "unordered_name_in_helper")


@pytest.mark.parametrize("name", GOLDEN_ERRORS)
def test_golden(name: str) -> None:
    """The whole text; DURE_UPDATE_GOLDEN=1 writes it anew."""
    consts = {"n": 4} if "n" in getattr(bad, name).signature.python.parameters else {}
    folder = str(Path(bad.__file__).parent)
    text = compiled(name, **consts).replace(folder + os.sep, "").replace("tests/lang/", "") + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("DURE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


# --- launches -----------------------------------------------------------------------------------


@dure.kernel
def matmul(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor, bm: dl.const, bn: dl.const, bk: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bm, bn), dl.float32)
    for k in dl.range(dl.cdiv(a.shape[1], bk)):
        acc += dl.load(a, (i, k), (bm, bk)) @ dl.load(b, (k, j), (bk, bn))
    dl.store(c, (i, j), acc.to(c.dtype))


@dure.kernel
def gather(table: dl.Tensor, rows: dl.Index(0, None, unique=True), y: dl.Tensor):
    i = dl.program_id(0)
    dl.store(y, (i, 0), dl.load(table, (rows[i], 0), (1, 4)))


@dure.kernel
def shifted(x: dl.Tensor, y: dl.Tensor):
    i = dl.program_id(0)
    dl.store(y, (i,), dl.load(x, (i + 1,), (4,)))


@dure.kernel
def below(x: dl.Tensor, y: dl.Tensor):
    i = dl.program_id(0)
    dl.store(y, (i,), dl.load(x, (i - 1,), (4,)))


@dure.kernel
def no_grid(x: dl.Tensor, y: dl.Tensor):
    i = dl.program_id(0) * 2
    dl.store(y, (i,), dl.load(x, (i,), (4,)))


@dure.kernel
def racing(x: dl.Tensor, y: dl.Tensor):
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i,), dl.load(x, (i, j), (4, 4)).sum(1))


def floats(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def read_only(*shape: int) -> Any:
    array = floats(*shape)
    array.flags.writeable = False
    return array


A, B, C = floats(8, 8), floats(8, 8), floats(8, 8)
SIZES = {"bm": 4, "bn": 4, "bk": 4}
NAN = float("nan")


class OnAnotherDevice:
    """Speaks DLPack for memory that isn't the host's."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: object) -> object:
        raise RuntimeError("not exportable")


def indices(*values: int) -> Any:
    return np.array(values, np.int32)


LAUNCH_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "too few": (lambda: matmul(A, B, **SIZES), "missing c"),
    "too many": (lambda: matmul(A, B, C, 4, 4, 4, 4), "too many positional"),
    "unknown keyword": (lambda: matmul(A, B, C, bz=4), "bz"),
    "inner extents": (
        lambda: matmul(A, floats(9, 8), C, **SIZES),
        "axis 1 of 'a' has 8 elements and axis 0 of 'b' has 9",
    ),
    "outer extents": (
        lambda: matmul(A, floats(8, 7), C, **SIZES),
        "of 'b' has 7 elements and axis 1 of 'c' has 8",
    ),
    "result's extents": (lambda: matmul(A, B, floats(7, 8), **SIZES), "axis 0 of 'c' has 7"),
    "rank": (lambda: matmul(A, floats(8), C, **SIZES), "the index of dl.load has 2 entries"),
    "dtype": (lambda: matmul(A, B.astype(np.int32), C, **SIZES), "int32"),
    "infinite grid": (lambda: matmul[float("inf"), 2](A, B, C, **SIZES), "finite"),
    "nan grid": (lambda: matmul[NAN, 2](A, B, C, **SIZES), "finite"),
    "negative grid": (lambda: matmul[-1, 2](A, B, C, **SIZES), "0 .. 2"),
    "grid of text": (lambda: matmul["a"](A, B, C, **SIZES), "an extent is an integer"),
    "short grid": (lambda: matmul[2](A, B, C, **SIZES), "2 axes"),
    "long grid": (lambda: matmul[2, 2, 2](A, B, C, **SIZES), "2 axes"),
    "large grid": (lambda: matmul[3, 2](A, B, C, **SIZES), "can lie outside"),
    "list as const": (lambda: matmul(A, B, C, [4], 4, 4), "hashable"),
    "array as const": (lambda: matmul(A, B, C, A, 4, 4), "an array"),
    "float as size": (lambda: matmul(A, B, C, 4.0, 4, 4), "extent"),
    "negative size": (lambda: matmul(A, B, C, -4, 4, 4), "positive"),
    "no array": (lambda: matmul(A, B, "c", **SIZES), "no array"),
    "None": (lambda: matmul(A, B, None, **SIZES), "passed as None"),
    "other device": (lambda: matmul(A, OnAnotherDevice(), C, **SIZES), "cuda:0"),
    "read only": (lambda: matmul(A, B, read_only(8, 8), **SIZES), "read-only"),
    "overlap": (lambda: matmul(A, C, C, **SIZES), "share memory"),
    "partial overlap": (lambda: matmul(A, C[::-1], C, **SIZES), "share memory"),
    "index too large": (
        lambda: gather(floats(8, 4), indices(0, 8), floats(2, 4)),
        "holds 8 at (1,)",
    ),
    "index negative": (
        lambda: gather(floats(8, 4), indices(-1, 2), floats(2, 4)),
        "holds -1 at (0,)",
    ),
    "index twice": (lambda: gather(floats(8, 4), indices(2, 2), floats(2, 4)), "more than once"),
    "index of int64": (lambda: gather(floats(8, 4), np.arange(2), floats(2, 4)), "int64"),
    "beyond the end": (lambda: shifted(floats(8), floats(8)), "can lie outside"),
    "before the start": (lambda: below(floats(8), floats(8)), "can be negative"),
    "race": (lambda: racing[2, 2](A, floats(8)), "may touch the same elements of 'y'"),
    "no grid": (lambda: no_grid(floats(8), floats(8)), "doesn't follow"),
}
LAUNCH_ERRORS["shorter list"] = (
    lambda: gather(floats(8, 4), indices(0), floats(2, 4)),
    "is read at index",
)


@pytest.mark.parametrize("name", LAUNCH_ERRORS)
def test_a_launch_that_breaks_the_contract(name: str) -> None:
    launch, what = LAUNCH_ERRORS[name]
    before = C.copy()
    with pytest.raises(KernelError) as caught:
        launch()
    text = str(caught.value)
    assert what in text, text
    assert "  rule: " in text and "  fix: " in text, text
    np.testing.assert_array_equal(before, C)


INTERPRETED = (
    *(
        "inner extents",
        "result's extents",
        "rank",
        "dtype",
        "large grid",
        "overlap",
        "other device",
    ),
    *("index too large", "index negative", "index twice", "beyond the end", "before the start"),
    *("infinite grid", "array as const", "too few", "read only", "None", "negative size"),
)


@pytest.mark.parametrize("name", INTERPRETED)
def test_plain_python_finds_the_same(name: str) -> None:
    with dl.interpret(), pytest.raises(KernelError) as caught:
        LAUNCH_ERRORS[name][0]()
    if name in ("inner extents", "rank", "dtype", "large grid", "None", "beyond the end"):
        assert "^^^^" in str(caught.value) and "test_lang_errors.py:" in str(caught.value)
    assert "  rule: " in str(caught.value) and "  fix: " in str(caught.value)


def test_a_kernels_line_is_shown_at_a_launch() -> None:
    with pytest.raises(KernelError) as caught:
        shifted(floats(8), floats(8))
    text = str(caught.value)
    assert "dl.load(x, (i + 1,), (4,))" in text
    assert "^^^^^^^^^^" in text


def test_language_outside_of_a_kernel() -> None:
    with pytest.raises(KernelError, match="outside of a kernel"):
        dl.zeros((4,), dl.float32)


DECORATIONS: dict[str, Callable[[], Any]] = {
    "no annotation": lambda: dure.kernel(lambda x: None),
    "a class": lambda: dure.kernel(int),
    "an unknown annotation": lambda: dure.kernel(bad.wrong_annotation),
    "keywords": lambda: dure.kernel(bad.takes_keywords),
}


@pytest.mark.parametrize("name", DECORATIONS)
def test_bad_declarations(name: str) -> None:
    with pytest.raises(KernelError) as caught:
        DECORATIONS[name]()
    assert "  rule: " in str(caught.value)


def test_source_that_python_does_not_have() -> None:
    space: dict[str, Any] = {"dure": dure, "dl": dl}
    exec("@dure.kernel\ndef k(x: dl.Tensor):\n    pass", space)
    with pytest.raises(KernelError, match="source of 'k' is not available"):
        space["k"][1](floats(4))
