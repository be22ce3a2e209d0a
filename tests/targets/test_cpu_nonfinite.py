"""NaN, infinity and the smallest numbers: what native code makes of them is what NumPy does.

A NaN that gets lost is worse than one that shows: nothing that it goes into may be finite, and
nothing else may change by a bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from cpu_kernels import check

import dure
import dure.lang as dl
import dure.library
from dure.compiler.pipeline import compile_program
from dure.ir.builder import ProgramBuilder
from dure.library.norm import layer_norm, rms_norm, softmax
from dure.runtime.host import host_levels
from dure.targets.cpu.program import CompiledProgram

pytestmark = pytest.mark.usefixtures("guarded_buffers")

NAN, INF = np.nan, np.inf
COLUMNS, DEPTH = 48, 64
RNG = np.random.default_rng(3)
WEIGHT = RNG.standard_normal((COLUMNS, DEPTH)).astype(np.float32)
PLAIN = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BLOCKS = ("q8_0", "q4_0", "q4_1", "q4_k", "q6_k")


@pytest.fixture(params=host_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DURE_CPU_LEVEL", request.param)
    return request.param


@cache
def stored(kind: str, depth: int) -> tuple[bytes, np.ndarray]:
    """A weight's bytes and its values."""
    weight = np.tile(WEIGHT, (1, depth // DEPTH))
    if kind in PLAIN:
        values = weight.astype(PLAIN[kind])
        return values.tobytes(), values.astype(np.float32)
    format = gguf.GGMLQuantizationType[kind.upper()]
    raw = _k_quant(kind, depth) if kind.endswith("_k") else gguf.quantize(weight, format)
    return raw.tobytes(), gguf.dequantize(raw, format)


def _k_quant(kind: str, depth: int) -> np.ndarray:
    """Random codes under scales of 0.01: gguf doesn't quantize to these formats."""
    format = gguf.GGMLQuantizationType[kind.upper()]
    _, size = gguf.GGML_QUANT_SIZES[format]
    raw = RNG.integers(0, 256, (COLUMNS, depth // 256, size), np.uint8)
    scale = np.array([0.01], np.float16).view(np.uint8)
    for start in (0, 2) if kind == "q4_k" else (size - 2,):
        raw[..., start : start + 2] = scale
    return raw.reshape(COLUMNS, -1)


def product(kind: str, rows: int, depth: int, raw: bytes) -> CompiledProgram:
    """``y = x @ w.T`` with its weight loaded."""
    assert dure.library
    builder = ProgramBuilder("product")
    x = builder.input("x", (rows, depth))
    builder.output("y", builder.linear(x, builder.weight("w", (COLUMNS, depth), kind)))
    program = compile_program(builder.build(), workers=2)
    program.load({"w": np.frombuffer(raw, np.uint8)})
    return program


def multiplied(program: CompiledProgram, x: np.ndarray) -> np.ndarray:
    return program.run({"x": x})["y"].copy()


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("kind", [*PLAIN, *BLOCKS])
def test_activations_that_are_no_numbers(level: str, kind: str, rows: int) -> None:
    depth = 256 if kind.endswith("_k") else DEPTH
    raw, values = stored(kind, depth)
    program = product(kind, rows, depth, raw)
    x = RNG.standard_normal((rows, depth)).astype(np.float32)
    clean, place = multiplied(program, x), rows // 2
    others = [row for row in range(rows) if row != place]
    for number in (NAN, INF, -INF):
        for column in (0, 5, depth - 1):
            damaged = x.copy()
            damaged[place, column] = number
            found = multiplied(program, damaged)
            np.testing.assert_array_equal(found[others], clean[others])
            if kind in PLAIN:
                with np.errstate(invalid="ignore"):
                    np.testing.assert_array_equal(found[place], (damaged @ values.T)[place])
            else:
                # A block of codes with an infinite scale has no finite number, and no sign.
                assert np.isnan(found[place]).all(), (number, column)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q8_0", "q4_1"])
def test_weights_that_are_no_numbers(level: str, kind: str) -> None:
    """A NaN scale is the block's; the row's results are NaN, and no others."""
    raw, _ = stored(kind, DEPTH)
    program = product(kind, 4, DEPTH, raw)
    x = RNG.standard_normal((4, DEPTH)).astype(np.float32)
    clean = multiplied(program, x)
    nan = np.array([NAN], PLAIN.get(kind, np.float16)).view(np.uint8)
    rows = np.frombuffer(raw, np.uint8).copy().reshape(COLUMNS, -1)
    rows[17, : len(nan)] = nan
    program.load({"w": rows.reshape(-1)})
    found = multiplied(program, x)
    assert np.isnan(found[:, 17]).all()
    np.testing.assert_array_equal(np.delete(found, 17, 1), np.delete(clean, 17, 1))


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_products_of_the_smallest_numbers(level: str, kind: str) -> None:
    """They aren't flushed to zero: a product and a sum of subnormals is what NumPy has."""
    raw, values = stored(kind, DEPTH)
    x = np.zeros((3, DEPTH), np.float32)
    x[:, 7] = [1e-40, 5e-45, -3e-39]
    found = multiplied(product(kind, 3, DEPTH, raw), x)
    np.testing.assert_array_equal(found, x @ values.T)
    assert (found != 0).any(1).all()


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_blocks_of_the_smallest_numbers_are_zeros(level: str, kind: str) -> None:
    """Codes have no reciprocal of such a scale: the block is zero, not whatever codes there are."""
    raw, values = stored(kind, DEPTH)
    x = np.full((3, DEPTH), 1e-40, np.float32)
    x[1] = 1e-30
    x[2, :32] = 1.0
    found = multiplied(product(kind, 3, DEPTH, raw), x)
    assert (found[0] == 0).all()
    np.testing.assert_allclose(found[1], x[1] @ values.T, rtol=0.02, atol=1e-31)
    np.testing.assert_allclose(found[2], values[:, :32].sum(1), rtol=0.02, atol=0.05)


@dure.kernel
def pairs(x: dl.Tensor, z: dl.Tensor, y: dl.Tensor, function: dl.const, bn: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i,), function(dl.load(x, (i,), (bn,)), dl.load(z, (i,), (bn,))).to(y.dtype))


def _add(a: Any, b: Any) -> Any:
    return a + b


def _mul(a: Any, b: Any) -> Any:
    return a * b


def _div(a: Any, b: Any) -> Any:
    return a / b


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("function", [_add, _mul, _div, dl.maximum, dl.minimum])
def test_pairs_of_extremes(level: str, function: Any, dtype: str) -> None:
    """Against the interpreter, which is NumPy; both orders, whole vectors and a rest."""
    numbers = [NAN, INF, -INF, 0.0, -0.0, 1.0, -2.5, 1e-40, -6e-8, 65504.0]
    first, second = np.meshgrid(numbers, numbers)
    with np.errstate(over="ignore"):
        x, z = (a.reshape(-1).astype(PLAIN[dtype]) for a in (first, second))
    with np.errstate(all="ignore"):
        # As float64, in which NaN of any type is NaN; exactly, but for that.
        arrays, consts = [x, z, np.zeros_like(x)], {"function": function, "bn": 32}
        check(pairs, arrays, consts, tolerance=1e-300)


@dure.kernel
def rows_of(x: dl.Tensor, y: dl.Tensor, function: dl.const, bn: dl.const):
    i = dl.program_id(0)
    dl.store(y, (i, 0), function(dl.load(x, (i, 0), (1, bn)), 1, keepdims=True))


@pytest.mark.parametrize("name", ["sum", "max", "min"])
@pytest.mark.parametrize("place", [0, 3, 16, 63])
def test_reductions_keep_what_is_no_number(level: str, name: str, place: int) -> None:
    """Wherever it stands, whatever comes before and after it."""
    x = RNG.standard_normal((6, 64)).astype(np.float32)
    x[0, place] = NAN
    x[1, place], x[1, (place + 9) % 64] = NAN, INF
    x[2, place], x[3, place] = INF, -INF
    x[4, place], x[4, (place + 9) % 64] = INF, -INF
    x[5] = 1e-40
    consts = {"function": getattr(dl, name), "bn": 64}
    with np.errstate(invalid="ignore"):
        check(rows_of, [x, np.zeros((6, 1), np.float32)], consts, tolerance=1e-5)


@pytest.mark.parametrize("kernel", [softmax, rms_norm, layer_norm])
def test_a_row_that_holds_no_number_spoils_no_other(level: str, kernel: Any) -> None:
    x = RNG.standard_normal((5, 40)).astype(np.float32)
    weight = np.ones(40, np.float32)
    weights = {"softmax": [], "rms_norm": [weight, None], "layer_norm": [weight, weight, None]}
    consts = {} if kernel is softmax else {"epsilon": 1e-5}

    def run(values: np.ndarray) -> np.ndarray:
        y = np.zeros_like(values)
        kernel(values, *weights[kernel.__name__], y, bm=4, bd=32, **consts)
        return y

    clean = run(x)
    for number in (NAN, INF):
        damaged = x.copy()
        damaged[2, 33] = number
        found = run(damaged)
        np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(clean, 2, 0))
        assert np.isnan(found[2]).any()
        assert number is not NAN or np.isnan(found[2]).all()
