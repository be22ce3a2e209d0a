"""Tensor ops against plain NumPy formulas, and what their typing refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensor_programs import random_value

from dure.errors import IRError
from dure.ir import tensor as tensor_ops
from dure.ir.blocks import quantize
from dure.ir.core import Value, infer, op_definition
from dure.ir.dtypes import element_type, float32, int8_block32, int32
from dure.ir.expr import const, symbol
from dure.ir.types import TensorType

assert tensor_ops
RNG = np.random.default_rng(0)


def apply(name, attrs, *operands):
    definition = op_definition(name)
    return definition.semantics({**definition.defaults, **attrs}, *operands)


def value(*shape, dtype=float32, index=None):
    kind = TensorType(tuple(const(e) if isinstance(e, int) else e for e in shape), dtype)
    if index is not None:
        low, high = index
        kind = TensorType(kind.shape, int32, index=(const(low), const(high)))
    return Value(kind)


def blocks_value(*shape, format):
    return Value(TensorType(tuple(map(const, shape)), format, quantized_axis=len(shape) - 1))


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_linear_epilogue_has_its_declared_order():
    x, w, bias, residual = floats(5, 16), floats(7, 16), floats(7), floats(5, 7)
    attrs = {
        "bias": True,
        "residual": True,
        "activation": "gelu_tanh",
        "scale": 0.5,
        "softcap": 3.0,
    }
    found = apply("linear", attrs, x, w, bias, residual)
    y = x.astype(float) @ w.T.astype(float) * 0.5 + bias
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    np.testing.assert_allclose(found, 3 * np.tanh(y / 3) + residual, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", ["q8_0", "q4_1", "q4_k", "q6_k"])
def test_linear_of_quantized_activations_is_close_to_the_decoded_product(format):
    w = random_value(RNG, element_type(format), (6, 512))
    x = quantize(floats(3, 512), int8_block32)
    found = apply("linear", {}, x, w)
    expected = x.decode().astype(float) @ w.decode().astype(float).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_gated_linear_is_the_product_of_both():
    x, gate, up = floats(4, 8), floats(6, 8), floats(6, 8)
    a, b = x.astype(float) @ gate.T, x.astype(float) @ up.T
    found = apply("gated_linear", {"activation": "silu"}, x, gate, up)
    np.testing.assert_allclose(found, a / (1 + np.exp(-a)) * b, rtol=1e-5, atol=1e-6)


def test_norms_along_the_last_axis():
    x, w, b, r = floats(3, 20), floats(20), floats(20), floats(3, 20)
    rms = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(apply("rms_norm", {"eps": 1e-5}, x, w), rms, rtol=1e-5)
    found = apply("rms_norm", {"eps": 1e-5, "residual": True}, x, w, r)
    np.testing.assert_allclose(found, rms + r, rtol=1e-5, atol=1e-6)
    centred = x - x.astype(float).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b
    found = apply("layer_norm", {"eps": 1e-5}, x, w, b)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_quantized_results_are_the_quantized_float_results():
    x, w = floats(3, 64), floats(64)
    plain = apply("rms_norm", {"eps": 1e-5}, x, w)
    found = apply("rms_norm", {"eps": 1e-5, "quantize": "int8_block32"}, x, w)
    expected = quantize(plain, int8_block32)
    for name, plane in expected.planes.items():
        np.testing.assert_array_equal(found.planes[name], plane)


@pytest.mark.parametrize("order", ["neox", "llama"])
@given(rows=st.integers(0, 4), extra=st.sampled_from([0, 4]), seed=st.integers(0, 99))
def test_rope_is_a_rotation_of_pairs(order, rows, extra, seed):
    rng = np.random.default_rng(seed)
    half, size = 4, 8 + extra
    x = rng.standard_normal((rows, 3, size)).astype(np.float32)
    angles = rng.random((16, half))
    positions = rng.integers(0, 16, rows).astype(np.int32)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    found = apply("rope", {"order": order}, x, cos, sin, positions)
    pairs = [(i, i + half) if order == "neox" else (2 * i, 2 * i + 1) for i in range(half)]
    expected = x.astype(complex).real.copy()
    for i, (a, b) in enumerate(pairs):
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angles[positions, i])[:, None]
        expected[..., a], expected[..., b] = turned.real, turned.imag
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attention_over_pages_is_dense_causal_attention(window, softcap):
    heads, groups, size, page = 4, 2, 8, 4
    lengths, fresh = [6, 9], [6, 2]
    table = np.array([[3, 0, 0], [5, 1, 2]], np.int32)
    keys, values = floats(24, groups, size), floats(24, groups, size)
    q = floats(sum(fresh), heads, size)
    positions = np.array([*range(6), 7, 8], np.int32)
    work = ([0, 0, 1], [0, 4, 6], [4, 2, 2])
    attrs = {"scale": 0.3, "window": window, "softcap": softcap, "page_size": page}
    context = np.array(lengths, np.int32)
    lists = [np.array(w, np.int32) for w in work]
    found = apply("attention", attrs, q, keys, values, positions, table, context, *lists)
    row = 0
    for sequence, (length, count) in enumerate(zip(lengths, fresh, strict=True)):
        slots = [table[sequence, p // page] * page + p % page for p in range(length)]
        for position in range(length - count, length):
            for head in range(heads):
                k, v = keys[slots, head // 2], values[slots, head // 2]
                scores = k.astype(float) @ q[row, head] * 0.3
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                seen = np.arange(length)
                hidden = (seen > position) | ((seen <= position - window) & (window > 0))
                weights = np.where(hidden, 0, np.exp(scores))
                expected = weights / weights.sum() @ v
                part = found[row, head * size : (head + 1) * size]
                np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)
            row += 1


def test_kv_write_skips_absent_slots_and_rounds_to_the_pool():
    pool = np.zeros((8, 1, 2), np.float16)
    x = floats(3, 1, 2)
    found = apply("kv_write", {}, pool, x, np.array([4, -1, 0], np.int32))
    assert not pool.any()
    np.testing.assert_array_equal(found[4], x[0].astype(np.float16))
    np.testing.assert_array_equal(found[0], x[2].astype(np.float16))
    assert not found[[1, 2, 3, 5, 6, 7]].any()


def test_embedding_of_blocks_reads_rows():
    table = random_value(RNG, element_type("q8_0"), (10, 64))
    found = apply("embedding", {"scale": 3.0}, table, np.array([7, 0], np.int32))
    np.testing.assert_allclose(found, table.decode()[[7, 0]] * 3, rtol=1e-6)


@given(st.data())
def test_conv2d_is_a_sum_over_taps(data):
    draw = data.draw
    stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 2))
    dilation, taps = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    size = draw(st.integers(dilation * (taps - 1) + 1, 7))
    x, w, b = floats(2, size, size, 3), floats(4, taps, taps, 3), floats(4)
    attrs = {
        "stride": (stride, stride),
        "padding": (padding, padding),
        "dilation": (dilation, dilation),
        "bias": True,
    }
    found = apply("conv2d", attrs, x, w, b)
    operands = value(2, size, size, 3), value(4, taps, taps, 3), value(4)
    assert infer("conv2d", operands, attrs).result.tensor.shape == tuple(map(const, found.shape))
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    image = np.pad(x, around).astype(float)
    for i in range(found.shape[1]):
        for j in range(found.shape[2]):
            place = np.arange(taps) * dilation
            part = image[:, i * stride + place][:, :, j * stride + place]
            expected = np.einsum("bhwc,ohwc->bo", part, w.astype(float)) + b
            np.testing.assert_allclose(found[:, i, j], expected, rtol=1e-4, atol=1e-4)


def test_argmax_and_top_k_take_the_lowest_index_first():
    x = np.array([[1, 5, 5, 2]], np.float32)
    assert apply("argmax", {}, x).tolist() == [1]
    best, where = apply("top_k", {"k": 3}, x)
    assert best.tolist() == [[5, 5, 2]]
    assert where.tolist() == [[1, 2, 3]]


def test_reshape_of_symbolic_rows():
    rows = symbol("T", "size", 0, 9)
    made = infer("reshape_tensor", [value(rows, 12)], {"shape": (-1, 3, 4)})
    assert made.result.tensor.shape == (rows, const(3), const(4))
    assert apply("reshape_tensor", {"shape": (-1, 3, 4)}, floats(0, 12)).shape == (0, 3, 4)


TABLES = value(9, 4), value(9, 4)
POSITIONS = value(5, index=(0, 8))
REFUSED = {
    "K differs": ("linear", [value(5, 8), value(4, 9)], {}, "K of the weight"),
    "bias of another extent": (
        "linear",
        [value(5, 8), value(4, 8), value(5)],
        {"bias": True},
        "bias",
    ),
    "missing residual": ("linear", [value(5, 8), value(4, 8)], {"residual": True}, "takes 3"),
    "unknown activation": ("linear", [value(5, 8), value(4, 8)], {"activation": "x"}, "activation"),
    "int weight": ("linear", [value(5, 8), value(4, 8, dtype=int32)], {}, "int32"),
    "blocks and floats": (
        "linear",
        [blocks_value(5, 64, format=int8_block32), value(4, 64)],
        {},
        "quantized activations",
    ),
    "ragged blocks": ("quantize_rows", [value(5, 40)], {}, "blocks of 32"),
    "tokens without a range": ("embedding", [value(9, 8), value(5, dtype=int32)], {}, "range"),
    "rope order": ("rope", [value(5, 2, 8), *TABLES, POSITIONS], {"order": "x"}, "order"),
    "rope wider than a head": ("rope", [value(5, 2, 6), *TABLES, POSITIONS], {}, "heads of 6"),
    "reshape changes the size": ("reshape_tensor", [value(5, 8)], {"shape": (3, -1)}, "number"),
    "norm of another extent": ("rms_norm", [value(5, 8), value(9)], {}, "weight"),
    "shapes that do not broadcast": (
        "elementwise",
        [value(5, 8), value(5, 9)],
        {"function": "add"},
        "extents",
    ),
    "unknown function": ("elementwise", [value(5)], {"function": "x"}, "function"),
    "pool of another head": (
        "kv_write",
        [value(16, 2, 8), value(5, 2, 4), value(5, index=(-1, 15))],
        {},
        "extent 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_typing_refuses(case):
    name, operands, attrs, said = REFUSED[case]
    with pytest.raises(IRError) as caught:
        infer(name, operands, attrs)
    assert said in str(caught.value)
    assert caught.value.rule
