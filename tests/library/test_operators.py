"""Operators by name and sizes: their launches, operations and bytes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.errors import UsageError
from dure.ir.samples import draw
from dure.ir.types import static_extent
from dure.library.operators import ALGORITHMS, forms, operator, parse_dims

SPECIAL = {"conv2d": "1x8x8x4x8x3x3", "moe_route": "64x64x8", "top_k": "64x64x8"}


def example(name: str) -> str:
    extent = "256" if name.startswith("matmul_q") else "64"
    return SPECIAL.get(name, "x".join(extent for _ in forms()[name].dims.split("x")))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", sorted(forms()))
def test_every_operator_compiles_in_every_dtype(name: str, algorithm: str) -> None:
    for dtype in forms(algorithm)[name].dtypes:
        found = operator(name, example(name), dtype, algorithm)
        assert found.flops >= 0 and found.bytes > 0 and found.calls
        for call in found.calls:
            function = call.specialize()
            assert all(static_extent(e) is not None for e in function.grid)
            for place, values in call.indices.items():
                kind = call.types[place]
                assert kind is not None and kind.index is not None
                low, high = (static_extent(e) for e in kind.index)
                assert low is not None and high is not None
                assert low <= values.min() and values.max() <= high


def test_operations_and_bytes() -> None:
    gemm = operator("gemm", "3x5x7")
    assert gemm.flops == 2 * 3 * 5 * 7
    assert gemm.bytes == 2 * (3 * 5 + 5 * 7 + 3 * 7)
    assert operator("gemm", "4x6x8", "f32").bytes == 4 * (24 + 48 + 32)
    assert operator("gemm", "4x6x8", "int4").bytes == 12 + 24 + 32
    assert operator("gemm", "4x64x8", "mxfp4").bytes == 2 * 256 + 256 + 16 + 2 * 32
    gated = operator("ffn_gated", "3x5x7")
    assert gated.flops == 6 * 3 * 5 * 7
    assert gated.bytes == 2 * (15 + 5 * 14 + 35 + 15)
    assert len(gated.calls) == 2
    gelu = operator("ffn_gelu", "3x5x7")
    assert gelu.flops == 4 * 3 * 5 * 7
    assert gelu.bytes == 2 * (15 + 35 + 7 + 35 + 5 + 15)
    attention = operator("attn", "32x8x1x512x128")
    assert attention.flops == 4 * 32 * 512 * 128
    assert attention.bytes == 2 * 128 * (2 * 32 + 2 * 8 * 512)
    assert operator("attn", "4x2x3x3x8").flops == 4 * 4 * 6 * 8
    encoder = operator("attn_enc", "2x3x4", algorithm="as-measured")
    assert encoder.flops == 4 * 2 * 3 * 3 * 4
    assert encoder.bytes == 4 * 2 * 24
    assert len(encoder.calls) == 3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_batch_is_multiplied_into_the_heads(algorithm: str) -> None:
    one = operator("attn", "32x8x1x2048x128", algorithm=algorithm)
    many = operator("attn", "2048x512x1x2048x128", algorithm=algorithm)
    assert many.flops == 64 * one.flops and many.bytes == 64 * one.bytes
    context = 5 if algorithm == "dure" else 3
    assert len(one.calls[0].indices[context]) == 1
    assert len(many.calls[0].indices[context]) == 64


def test_the_example_of_ragged_attention_covers_every_query() -> None:
    (call,) = operator("attn", "64x16x5x40x8", algorithm="as-measured").calls
    starts, first, end = (call.indices[n] for n in (5, 6, 7))
    assert list(starts) == [0, 5, 10]
    bq = call.consts["bq"]
    assert isinstance(bq, int)
    for block, (low, high) in enumerate(zip(first, end, strict=True)):
        tokens = range(block * bq, min((block + 1) * bq, 10))
        assert set(range(low, high)) == {t // 5 for t in tokens}


def test_rows_of_experts_lie_in_order() -> None:
    (call,) = operator("grouped_matmul", "40x6x8x8").calls
    starts, stops = call.indices[2], call.indices[3]
    assert starts[0] == 0 and stops[-1] == 40
    assert (starts[1:] == stops[:-1]).all()
    assert draw(call.specialize(), 0).arguments


@pytest.mark.parametrize(
    ("op", "dims", "dtype", "words"),
    [
        ("gemm", "1x2", "bf16", "MxKxN"),
        ("gemm", "", "bf16", "MxKxN"),
        ("gemm", "1x2x3x", "bf16", "MxKxN"),
        ("gemm", "-1x2x3", "bf16", "MxKxN"),
        ("gemm", "1.5x2x3", "bf16", "MxKxN"),
        ("gemm", "1 x2x3", "bf16", "MxKxN"),
        ("gemm", "\u0661x2x3", "bf16", "MxKxN"),
        ("gemm", "0x2x3", "bf16", "at least 1"),
        ("gemm", "9" * 400 + "x2x3", "bf16", "2^40"),
        ("gemm", "1048577x1048577x1", "bf16", "2^40"),
        ("attn", "8x8x1x1099511627776x1", "bf16", "1048576"),
        ("embedding", "99999999x8x8", "bf16", "1048576"),
        ("matmul_hoisted", "1x99999999x1", "f32", "256"),
        ("gem", "1x2x3", "bf16", "gemm"),
        ("gemm", "1x2x3", "f64", "f32, f16, bf16, fp8, int8, int4, mxfp4"),
        ("softmax", "2x3", "int8", "f32, f16, bf16, fp8"),
        ("gemm", "1x33x1", "mxfp4", "64"),
        ("matmul_q4_k", "1x33x1", "bf16", "256"),
        ("attn", "3x2x1x1x1", "bf16", "share"),
        ("attn", "4x2x9x1x8", "bf16", "Sq is at most Skv"),
        ("rope", "1x1x3", "bf16", "even"),
        ("conv2d", "1x8x8x4x8x2x3", "bf16", "odd"),
        ("moe_route", "1x2x3", "bf16", "K is at most E"),
    ],
)
def test_bad_requests_are_refused(op: str, dims: str, dtype: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        operator(op, dims, dtype)
    assert words in f"{caught.value}" and caught.value.fix


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(UsageError, match="no algorithm"):
        operator("gemm", "1x1x1", algorithm="fast")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789x -+_.e\u0660", max_size=30))
def test_dims_parse_or_are_refused(text: str) -> None:
    try:
        found = parse_dims("gemm", "MxKxN", text)
    except UsageError:
        return
    assert "x".join(map(str, found)) == "x".join(str(int(part)) for part in text.split("x"))
    assert np.all(np.array(found) > 0)
