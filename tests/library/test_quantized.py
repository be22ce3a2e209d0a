"""Rows of eight-bit codes: what the kernels make, and products of codes, on chips' bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dure.errors import UsageError
from dure.ir.dtypes import bfloat16, float32
from dure.library.build import build
from dure.library.call import KernelCall, tensor
from dure.library.matmul_scaled import gated_linear_scaled, matmul_scaled
from dure.library.operators_common import call, power_of_two
from dure.library.quantized import quantize_rows, quantize_whole_rows
from dure.library.weight_types import ACTIVATION_TYPES, WeightType, activation_type
from dure.sim.values import run_values
from dure.targets import chip

Array = npt.NDArray[Any]
#: Chips with an engine for the type, and, last of each, one that converts it.
PAIRS = [
    *(("int8", name) for name in ("atom", "rngd", "tpu-v6e", "h100", "trainium2")),
    *(("fp8", name) for name in ("rngd", "h100", "maia-100")),
]
_EVERYWHERE = pytest.mark.parametrize(("kind", "name"), PAIRS)


def run(made: KernelCall, name: str, arrays: list[Array]) -> None:
    """Compile for a chip with the call's own tiles, prove, and run on bytes."""
    function = build(made, chip(name), tiles=made.tiles).compiled.function
    turned = function.attrs.get("transposed") or ()
    params = [p.value.name for p in function.params]
    given = [a.T.copy() if p in turned else a for p, a in zip(params, arrays, strict=True)]
    run_values(function, chip(name), given, seed=1)
    for param, mine, array in zip(params, given, arrays, strict=True):
        if param in turned:
            array[...] = mine.T


# --- rows ----------------------------------------------------------------------------------------


def numbers(m: int, k: int) -> Array:
    """Rows of 7-bit numbers times a power of two each, which every chip's 16-bit format holds."""
    rng = np.random.default_rng((m, k))
    wide = rng.integers(-63, 64, (m, k)) * 2.0 ** rng.integers(-6, 3, (m, 1))
    return wide.astype(bfloat16.numpy)


def expected(scheme: WeightType, x: Array) -> tuple[Array, Array]:
    """Codes and scales, in float32 as the kernels compute them."""
    wide, one = x.astype(np.float32), np.float32(1)
    largest = np.abs(wide).max(1, keepdims=True)
    scale = np.where(largest > 1e-30, largest * np.float32(1 / scheme.top), one)
    codes = wide * (one / scale)
    return (np.rint(codes) if scheme.code.is_integer else codes).astype(scheme.code.numpy), scale


@_EVERYWHERE
@pytest.mark.parametrize("kernel", [quantize_rows, quantize_whole_rows])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 37), (3, 300)])
def test_rows_that_are_quantized(kernel: Any, kind: str, name: str, m: int, k: int) -> None:
    """Edges in both axes, a row of zeros, one so small that it counts as that, largest numbers."""
    scheme, x = ACTIVATION_TYPES[kind], numbers(m, k)
    if m > 2:
        x[1], x[2] = 0, x[2] * 2.0**-120
    codes, scales = np.full((m, k), 1, scheme.code.numpy), np.full((m, 1), 77, np.float32)
    arrays, whole = [x, codes, scales], kernel is quantize_whole_rows
    kinds = bfloat16, scheme.code, scheme.scale
    types = [tensor(t, *a.shape) for t, a in zip(kinds, arrays, strict=True)]
    sizes, consts = {"bm": 2, "bd": 64}, {"top": scheme.top}
    if whole:
        sizes, consts = {"bm": 2}, {"bd": power_of_two(k), **consts}
    run(call(kernel, types, sizes, consts), name, arrays)
    want, factors = expected(scheme, x)
    np.testing.assert_allclose(scales, factors, rtol=1e-6)
    # A number next to the middle of two codes may fall to either side.
    off = codes.astype(np.float32) != want.astype(np.float32)
    assert off.mean() < 0.02
    step = 1 if scheme.code.is_integer else 32
    assert np.abs(codes.astype(np.float32) - want.astype(np.float32)).max() <= step
    assert (np.abs(codes.astype(np.float32)).max(1) == scheme.top * (factors[:, 0] != 1)).all()
    if m > 2:
        assert not codes[1:3].astype(np.float32).any() and (scales[1:3] == 1).all()


# --- products of codes ---------------------------------------------------------------------------


def drawn(scheme: WeightType, m: int, k: int) -> Array:
    """Codes whose products are exact on every chip, with a row of zeros and one of largest ones."""
    rng = np.random.default_rng((m, k))
    most = 127 if scheme.code.is_integer else 15
    codes = rng.integers(-most, most + 1, (m, k)).astype(scheme.code.numpy)
    codes[0], codes[-1] = 0, scheme.top
    return codes


def powers(*shape: int) -> Array:
    return np.exp2(np.random.default_rng(shape).integers(-9, 3, shape)).astype(np.float32)


@_EVERYWHERE
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 40, 24), (5, 140, 20), (2, 300, 3)])
def test_a_product_of_codes(kind: str, name: str, m: int, k: int, n: int) -> None:
    """Sums are exact below 2^24: in int32, and in the accumulators of float engines."""
    scheme = ACTIVATION_TYPES[kind]
    x, codes, rows, scales = drawn(scheme, m, k), drawn(scheme, k, n), powers(m, 1), powers(1, n)
    y = np.full((m, n), 77, np.float32)
    types = [tensor(scheme.code, m, k), *scheme.types(k, n)]
    types += [tensor(scheme.scale, m, 1), tensor(float32, m, n)]
    tiles = {"bm": 4, "bn": 16, "bk": 64}
    run(call(matmul_scaled, types, tiles), name, [x, codes, scales, rows, y])
    wanted = (x.astype(np.float64) * rows) @ (codes.astype(np.float64) * scales)
    np.testing.assert_array_equal(y, wanted)


def test_sums_of_largest_codes_are_exact() -> None:
    """Beyond 2^24, where float32 has gaps: int32 has none, and only the result is rounded."""
    scheme, k, n = ACTIVATION_TYPES["int8"], 1500, 16
    x, codes = np.full((2, k), 127, np.int8), np.full((k, n), 127, np.int8)
    x[1, 0] = 126
    y = np.full((2, n), 77, np.float32)
    types = [tensor(scheme.code, 2, k), *scheme.types(k, n)]
    types += [tensor(scheme.scale, 2, 1), tensor(float32, 2, n)]
    ones = np.ones((1, n), np.float32), np.ones((2, 1), np.float32)
    made = call(matmul_scaled, types, {"bm": 2, "bn": 16, "bk": 256})
    run(made, "atom", [x, codes, *ones, y])
    np.testing.assert_array_equal(y, (x.astype(np.int64) @ codes.astype(np.int64)).astype("f4"))


@pytest.mark.parametrize(("kind", "name"), [("int8", "atom"), ("fp8", "rngd"), ("int8", "h100")])
def test_a_gated_product_of_codes(kind: str, name: str) -> None:
    scheme, (m, k, n) = ACTIVATION_TYPES[kind], (3, 140, 20)
    x, codes = drawn(scheme, m, k), drawn(scheme, k, 2 * n)
    rows, scales = powers(m, 1), powers(1, 2 * n)
    y = np.full((m, n), 77, np.float32)
    types = [tensor(scheme.code, m, k), *scheme.types(k, 2 * n)]
    types += [tensor(scheme.scale, m, 1), tensor(float32, m, n)]
    tiles = {"bm": 4, "bn": 16, "bk": 64}
    made = call(gated_linear_scaled, types, tiles, {"activation": doubled})
    run(made, name, [x, codes, scales, rows, y])
    both = (x.astype(np.float64) * rows) @ (codes.astype(np.float64) * scales)
    np.testing.assert_allclose(y, 2 * both[:, :n] * both[:, n:], rtol=1e-6)


def doubled(tile: Any) -> Any:
    """An activation that is exact."""
    return tile + tile


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "rule", "fix"),
    [
        ("int4", "int4", "int8, fp8", "--activations bf16"),
        ("f16", "int8", "int8, fp8", "--activations bf16"),
        ("int8", "bf16", "their own type", "--weights int8 --activations int8"),
        ("int8", "fp8", "their own type", "--weights int8 --activations int8"),
        ("fp8", "int4", "their own type", "--weights fp8 --activations fp8"),
    ],
)
def test_activations_that_no_product_takes(name: str, weights: str, rule: str, fix: str) -> None:
    with pytest.raises(UsageError, match=f"activations in {name} with weights") as caught:
        activation_type(name, weights, "bf16")
    assert rule in caught.value.rule and caught.value.fix == fix


def test_activations_in_the_type_of_values() -> None:
    assert activation_type("bf16", "int8", "bf16") is None
    assert activation_type("fp8", "fp8", "fp8") is None
    assert activation_type("int8", "int8", "f32") is ACTIVATION_TYPES["int8"]
