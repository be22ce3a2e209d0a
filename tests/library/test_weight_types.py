"""Weights of few bits: what their schemes store, and products with them on every chip's bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.errors import DureError, UsageError
from dure.ir.dtypes import bfloat16, float8_e8m0fnu, float32
from dure.library.build import build
from dure.library.call import KernelCall, indices, tensor
from dure.library.matmul_scaled import gated_linear_scaled, grouped_matmul_scaled, matmul_scaled
from dure.library.operators_common import call
from dure.library.weight_types import WEIGHT_TYPES, WeightType, weight_type
from dure.sim.values import run_values
from dure.targets import chip, chip_names

CHIPS = chip_names()
SCHEMES = list(WEIGHT_TYPES)
Array = npt.NDArray[Any]


# --- what a scheme stores ------------------------------------------------------------------------


@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 300),
    st.integers(1, 5),
    st.integers(-20, 20),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_codes_stand_for_what_was_quantized(
    name: str, k: int, n: int, power: int, seed: int
) -> None:
    """Any K: the last group of a column may be shorter, and has a scale of its own."""
    scheme = WEIGHT_TYPES[name]
    weight = np.random.default_rng(seed).standard_normal((2, k, n)) * 2.0**power
    codes, scales = scheme.quantize(weight)
    kinds = scheme.types(k, n, 2)
    assert [tuple(a.shape) for a in (codes, scales)] == [
        tuple(int(str(e)) for e in kind.shape) for kind in kinds
    ]
    found = scheme.dequantize(codes, scales)
    spread = np.repeat(scales.astype(np.float64), scheme.group or k, axis=-2)[..., :k, :]
    # Half a step between codes; between the two largest floats of a scheme the step is wide.
    step = {"int8": 0.51, "int4": 0.53, "fp8": 17, "mxfp4": 2.01}[name]
    assert (np.abs(found - weight) <= step * spread).all()
    again = scheme.dequantize(*scheme.quantize(found))
    np.testing.assert_allclose(again, found, rtol=2e-2, atol=0.6 * float(spread.max()))


def test_zeros_have_a_scale() -> None:
    for scheme in WEIGHT_TYPES.values():
        codes, scales = scheme.quantize(np.zeros((40, 3)))
        assert not scheme.dequantize(codes, scales).any()
        assert np.isfinite(scales.astype(np.float64)).all()


def test_bytes_of_a_matrix() -> None:
    found = {name: WEIGHT_TYPES[name].bytes(4096, 1000) for name in SCHEMES}
    elements = 4096 * 1000
    assert found["int8"] == found["fp8"] == elements + 4 * 1000
    assert found["int4"] == elements // 2 + 2 * 32 * 1000
    assert found["mxfp4"] == elements // 2 + 128 * 1000
    # 300 codes are two groups of 128 and one of 44.
    assert WEIGHT_TYPES["int4"].bytes(300, 1, 7) == 7 * (150 + 2 * 3)


@pytest.mark.parametrize(
    ("weights", "activation"), [("int3", "bf16"), ("f16", "bf16"), ("", "bf16"), ("bf16", "f16")]
)
def test_weights_of_no_known_type(weights: str, activation: str) -> None:
    with pytest.raises(UsageError, match="weights in") as caught:
        weight_type(weights, activation)
    assert caught.value.fix == f"--weights {activation}"
    assert "int8, fp8, int4, mxfp4" in str(caught.value)


def test_codes_need_activations_that_hold_them() -> None:
    assert weight_type("fp8", "fp8") is None
    with pytest.raises(UsageError, match="int8 with activations in fp8") as caught:
        weight_type("int8", "fp8")
    assert caught.value.fix == "--dtype bf16"


# --- products on bytes ---------------------------------------------------------------------------


def draw(scheme: WeightType, k: int, n: int, *lead: int) -> tuple[Array, Array]:
    """Any codes, and powers of two for scales, so that sums of small integers are exact."""
    rng = np.random.default_rng([k, n])
    raw = rng.integers(0, 256, (*lead, k, n), np.uint8)
    if scheme.code.is_integer:
        codes = rng.integers(-scheme.top, scheme.top + 1, raw.shape).astype(scheme.code.numpy)
    elif scheme.code.bits < 8:
        codes = (raw & 15).view(scheme.code.numpy)
    else:
        codes = rng.integers(-15, 16, raw.shape).astype(scheme.code.numpy)
    power = rng.integers(-3, 3, (*lead, scheme.rows(k), n))
    return codes, np.exp2(power).astype(scheme.scale.numpy)


def integers(*shape: int) -> Array:
    return np.random.default_rng(shape).integers(-3, 4, shape).astype(bfloat16.numpy)


def run(made: KernelCall, name: str, arrays: list[Array]) -> None:
    """Compile for a chip with the call's own tiles, prove, and run on bytes."""
    function = build(made, chip(name), tiles=made.tiles).compiled.function
    turned = function.attrs.get("transposed") or ()
    params = [p.value.name for p in function.params]
    given = [a.T.copy() if p in turned else a for p, a in zip(params, arrays, strict=True)]
    run_values(function, chip(name), given, seed=1)


def tiles_of(scheme: WeightType, bm: int) -> dict[str, int]:
    return {"bm": bm, "bn": 16, "bk": max(64, scheme.group)}


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("kind", SCHEMES)
def test_a_product_is_exact(name: str, kind: str) -> None:
    """One row, K of several tiles of which the last holds part of a group, N that is cut."""
    scheme, (m, k, n) = WEIGHT_TYPES[kind], (1, 300, 24)
    x, (codes, scales) = integers(m, k), draw(scheme, k, n)
    y = np.full((m, n), 77, np.float32)
    types = [tensor(bfloat16, m, k), *scheme.types(k, n), None, tensor(float32, m, n)]
    consts = {"group": scheme.group}
    run(call(matmul_scaled, types, tiles_of(scheme, m), consts), name, [x, codes, scales, y])
    np.testing.assert_array_equal(y, x.astype(np.float64) @ scheme.dequantize(codes, scales))


@pytest.mark.parametrize(("name", "early"), [("rngd", False), ("rngd", True), ("atom", True)])
@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_a_product_of_many_rows(name: str, early: bool, kind: str) -> None:
    """Scales in the sums, or in the weights, which are exact here."""
    scheme, (m, k, n) = WEIGHT_TYPES[kind], (5, 140, 20)
    x, (codes, scales) = integers(m, k), draw(scheme, k, n)
    y = np.full((m, n), 77, np.float32)
    types = [tensor(bfloat16, m, k), *scheme.types(k, n), None, tensor(float32, m, n)]
    consts = {"group": scheme.group, "early": early}
    run(call(matmul_scaled, types, tiles_of(scheme, 4), consts), name, [x, codes, scales, y])
    np.testing.assert_array_equal(y, x.astype(np.float64) @ scheme.dequantize(codes, scales))


@pytest.mark.parametrize(("name", "kind"), [("atom", "int8"), ("rngd", "int4"), ("h100", "mxfp4")])
def test_a_gated_product(name: str, kind: str) -> None:
    scheme, (m, k, n) = WEIGHT_TYPES[kind], (3, 140, 20)
    x, (codes, scales) = integers(m, k), draw(scheme, k, 2 * n)
    y = np.full((m, n), 77, np.float32)
    types = [tensor(bfloat16, m, k), *scheme.types(k, 2 * n), None, tensor(float32, m, n)]
    consts = {"group": scheme.group, "activation": doubled}
    run(call(gated_linear_scaled, types, tiles_of(scheme, 4), consts), name, [x, codes, scales, y])
    both = x.astype(np.float64) @ scheme.dequantize(codes, scales)
    np.testing.assert_allclose(y, 2 * both[:, :n] * both[:, n:], rtol=1e-6)


def doubled(tile: Any) -> Any:
    """An activation that is exact."""
    return tile + tile


@pytest.mark.parametrize(("name", "kind"), [("atom", "mxfp4"), ("rngd", "mxfp4"), ("h100", "int8")])
@pytest.mark.parametrize("biased", [False, True])
def test_experts(name: str, kind: str, biased: bool) -> None:
    """Some experts have no rows."""
    scheme, (t, k, n) = WEIGHT_TYPES[kind], (6, 72, 20)
    stops = indices([0, 3, 3, 6])
    starts = indices([0, 0, 3, 3])
    x, (codes, scales) = integers(t, k), draw(scheme, k, n, 4)
    y, bias = np.full((t, n), 77, np.float32), integers(4, n)
    types = [tensor(bfloat16, t, k), *scheme.types(k, n, 4), None, None]
    types += [tensor(bfloat16, 4, n) if biased else None, tensor(float32, t, n)]
    lists = {3: (starts, 0, t), 4: (stops, 0, t)}
    consts = {"group": scheme.group}
    made = call(grouped_matmul_scaled, types, tiles_of(scheme, 2), consts, lists)
    arrays = [x, codes, scales, starts, stops, *([bias] if biased else []), y]
    run(made, name, arrays)
    weights = scheme.dequantize(codes, scales)[[1, 1, 1, 3, 3, 3]]
    expected = np.einsum("tk,tkn->tn", x.astype(np.float64), weights)
    np.testing.assert_array_equal(y, expected + biased * bias.astype(np.float64)[[1] * 3 + [3] * 3])


@pytest.mark.parametrize("bk", [96, 192])
def test_a_tile_holds_whole_groups(bk: int) -> None:
    scheme = WEIGHT_TYPES["int4"]
    types = [tensor(bfloat16, 1, 512), *scheme.types(512, 8), None, tensor(float32, 1, 8)]
    with pytest.raises(DureError):
        call(matmul_scaled, types, {"bm": 1, "bn": 8, "bk": bk}, {"group": 128}).specialize()


def test_powers_of_two_are_never_zero() -> None:
    """Why a scale beyond the edge is one: nought times what it is would not be nought."""
    assert np.isnan(np.zeros(1).astype(float8_e8m0fnu.numpy).astype(np.float32)).all()
