"""A KV cache of eight bits: what is written, and attention to it, on chips' bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dure.errors import UsageError
from dure.ir.dtypes import bfloat16, float32
from dure.library.attention_grouped import grouped_attention, quantized_attention
from dure.library.build import build
from dure.library.call import KernelCall, indices, tensor
from dure.library.kv_quantized import kv_write_quantized, rope_kv_write_quantized
from dure.library.operators_common import call
from dure.library.rope import kv_write
from dure.library.weight_types import KV_TYPES, kv_type
from dure.sim.values import run_values
from dure.targets import chip, chip_names

CHIPS = chip_names()
Array = npt.NDArray[Any]
TOKENS, HEADS, SIZE, SLOTS = 5, 3, 16, 12
PLACES = indices([3, 0, -1, 11, 7])


def run(made: KernelCall, name: str, arrays: list[Array]) -> None:
    function = build(made, chip(name), tiles=made.tiles).compiled.function
    assert not function.attrs.get("transposed")
    run_values(function, chip(name), arrays, seed=1)


def numbers(*shape: int) -> Array:
    """Numbers of 7 bits times powers of two, which every chip's 16-bit format holds."""
    rng = np.random.default_rng(shape)
    return (
        rng.integers(-63, 64, shape) * 2.0 ** rng.integers(-6, 2, shape[:-1])[..., None]
    ).astype(bfloat16.numpy)


def expected(x: Array) -> tuple[Array, Array]:
    """Codes and scales (tokens, heads, ...), in float32 as the kernel computes them."""
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest * np.float32(1 / 127), np.float32(1))
    return np.rint(wide / scale).astype(np.int8), scale


@pytest.mark.parametrize("name", CHIPS)
def test_codes_and_scales_that_are_written(name: str) -> None:
    x = numbers(TOKENS, HEADS, SIZE)
    x[1, 1] = 0
    codes = np.full((HEADS, SLOTS, SIZE), 55, np.int8)
    scales = np.full((HEADS, SLOTS, 1), 55, np.float32)
    kinds = [KV_TYPES["int8"].code, KV_TYPES["int8"].scale, bfloat16]
    types = [tensor(k, *a.shape) for k, a in zip(kinds, (codes, scales, x), strict=True)]
    lists = {3: (PLACES, -1, SLOTS - 1)}
    tiles = {"bt": 1, "bh": 4}
    made = call(kv_write_quantized, [*types, None], tiles, {"bd": SIZE}, lists,
                unique=(3,), updates=(0, 1))  # fmt: skip
    run(made, name, [codes, scales, x, PLACES])
    want_codes, want_scales = expected(x)
    for token, place in enumerate(PLACES):
        if place >= 0:
            np.testing.assert_allclose(scales[:, place], want_scales[token], rtol=1e-6)
            # A quotient next to a half may fall to either side.
            near = np.abs(codes[:, place].astype(int) - want_codes[token])
            assert near.max() <= 1 and near.mean() < 0.05
    untouched = [s for s in range(SLOTS) if s not in PLACES]
    assert (codes[:, untouched] == 55).all() and (scales[:, untouched] == 55).all()


def test_what_an_8_bit_float_does_not_reach_is_its_largest() -> None:
    x = numbers(TOKENS, HEADS, SIZE)
    x[0, 0, :3] = [1000, -1000, 448]
    pool = np.zeros((HEADS, SLOTS, SIZE), KV_TYPES["fp8"].code.numpy)
    types = [tensor(KV_TYPES["fp8"].code, *pool.shape), tensor(bfloat16, *x.shape), None]
    tiles, lists = {"bt": 1, "bh": 4, "bd": 16}, {2: (PLACES, -1, SLOTS - 1)}
    made = call(kv_write, types, tiles, {"heads_first": True}, lists, unique=(2,), updates=(0,))
    run(made, "rngd", [pool, x, PLACES])
    want = np.clip(x.astype(np.float32), -448, 448).astype(pool.dtype)
    np.testing.assert_array_equal(pool[:, PLACES[0]], want[0])
    assert pool[0, PLACES[0], :3].astype(float).tolist() == [448, -448, 448]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_into_codes(interleaved: bool) -> None:
    """Three quarters of a head turn; the scale is of all of it."""
    x, half = numbers(TOKENS, HEADS, SIZE), 6
    rng = np.random.default_rng(3)
    angles = rng.uniform(-3, 3, (20, half))
    tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
    positions = indices([4, 9, 0, 19, 2])
    codes = np.zeros((HEADS, SLOTS, SIZE), np.int8)
    scales = np.zeros((HEADS, SLOTS, 1), np.float32)
    kinds = (KV_TYPES["int8"].code, float32, bfloat16, float32, float32)
    arrays = [codes, scales, x, *tables]
    types: list[Any] = [tensor(k, *a.shape) for k, a in zip(kinds, arrays, strict=True)]
    types = [*types[:3], None, *types[3:], None, None]
    lists = {3: (PLACES, -1, SLOTS - 1), 6: (positions, 0, 19)}
    consts = {"half": 8, "rest": 4, "interleaved": interleaved}
    made = call(rope_kv_write_quantized, types, {"bt": 1, "bh": 4}, consts, lists,
                unique=(3,), updates=(0, 1))  # fmt: skip
    run(made, "rngd", [codes, scales, x, PLACES, *tables, positions])
    turned = x.astype(np.float32).copy()
    first = slice(0, 12, 2) if interleaved else slice(0, 6)
    second = slice(1, 12, 2) if interleaved else slice(6, 12)
    cosine, sine = (t[positions][:, None, :] for t in tables)
    turned[..., first] = x[..., first] * cosine - x[..., second] * sine
    turned[..., second] = x[..., second] * cosine + x[..., first] * sine
    want_codes, want_scales = expected(turned)
    for token, place in enumerate(PLACES):
        if place >= 0:
            np.testing.assert_allclose(scales[:, place], want_scales[token], rtol=1e-5)
            assert np.abs(codes[:, place].astype(int) - want_codes[token]).max() <= 1


def cache_arrays(kind: str) -> tuple[list[Array], list[Array]]:
    """Pools with what is behind the sequences' ends unset, and the keys and values they hold."""
    rng, page = np.random.default_rng(5), 4
    shape = (2, 4 * page, SIZE)
    if kind == "int8":
        pools: list[Array] = [rng.integers(-127, 128, shape).astype(np.int8) for _ in range(2)]
        scales = [rng.uniform(0.005, 0.02, (*shape[:2], 1)).astype(np.float32) for _ in range(2)]
        held = [p.astype(np.float64) * s for p, s in zip(pools, scales, strict=True)]
        for array in scales:
            # The last page of the sequence has one token.
            array[:, 2 * page + 1 : 3 * page] = np.nan
        return [*pools, *scales], held
    pools = [rng.standard_normal(shape).astype(KV_TYPES[kind].code.numpy) for _ in range(2)]
    held = [p.astype(np.float64) for p in pools]
    for array in pools:
        array[:, 2 * page + 1 : 3 * page] = np.nan
    return pools, held


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("kind", list(KV_TYPES))
def test_attention_to_a_cache_of_eight_bits(name: str, kind: str) -> None:
    """The last three of nine tokens, whose pages lie in no order."""
    page, length, count, heads, group = 4, 9, 3, 2, 2
    caches, (keys, values) = cache_arrays(kind)
    table = indices([[3, 0, 2]])
    order = np.concatenate([np.arange(p * page, p * page + page) for p in table[0]])[:length]
    rng = np.random.default_rng(7)
    q = rng.standard_normal((count, heads, group, SIZE)).astype(bfloat16.numpy)
    y = np.zeros_like(q)
    # Positions 6, 7 and 8: items of aligned runs of four.
    lists = {
        "positions": (indices([6, 7, 8]), 0, 11), "table": (table, 0, 3),
        "context": (indices([length]), 0, 12), "sequence": (indices([0, 0]), 0, 0),
        "start": (indices([0, 2]), 0, 2), "rows": (indices([2, 1]), 1, 2),
    }  # fmt: skip
    consts = {"rows": 4, "bg": group, "bd": SIZE, "page": page, "scale": 0.3}
    if kind == "fp8":
        consts["heads_first"] = True
    kernel: Any = grouped_attention if kind == "fp8" else quantized_attention
    scheme = KV_TYPES[kind]
    pools = [tensor(k, *a.shape) for k, a in
             zip((scheme.code, scheme.code, float32, float32), caches, strict=False)]  # fmt: skip
    types = [tensor(bfloat16, *q.shape), *pools, *[None] * 7, tensor(bfloat16, *y.shape)]
    tiles = {"bq": 2, "bh": 1, "piece": 4}
    first = 1 + len(caches)
    found = {first + n: entry for n, entry in enumerate(lists.values())}
    made = call(kernel, types, tiles, consts, found)
    run(made, name, [q, *caches, *(entry[0] for entry in lists.values()), y])
    for token, position in enumerate((6, 7, 8)):
        seen = order[: position + 1]
        for head in range(heads):
            scores = q[token, head].astype(np.float64) @ keys[head, seen].T * 0.3
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            want = weights @ values[head, seen]
            np.testing.assert_allclose(y[token, head].astype(float), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("kv", "activation", "fix"), [("int4", "bf16", "--kv bf16"), ("int8", "fp8", "--dtype bf16")]
)
def test_a_cache_of_no_known_type(kv: str, activation: str, fix: str) -> None:
    with pytest.raises(UsageError, match="a KV cache in") as caught:
        kv_type(kv, activation)
    assert caught.value.fix == fix
