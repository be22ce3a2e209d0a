"""Cases of index arguments and of position: embedding, gather, cache writes, rope; convolution."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from dure.ir.dtypes import q8_0
from dure.library.conv import conv2d
from dure.library.embedding import embedding, gather_rows
from dure.library.rope import kv_write, rope, rope_kv_write
from dure.library.rope_whole import rope_whole, rope_whole_kv_write
from dure.library.suite.case import (
    TOLERANCES,
    Array,
    Case,
    Drawn,
    Shape,
    empty,
    normal,
    values,
)
from dure.library.suite.matmuls import random_blocks

_TOKENS: tuple[Shape, ...] = ((1, 1, 1), (3, 5, 7), (9, 40, 100))


def draw_embedding(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """Rows of a table, times a number."""
    t, v, d = size
    table = random_blocks(rng, q8_0, v, d) if dtype == "q8_0" else normal(rng, dtype, v, d)
    tokens = rng.integers(0, v, t).astype(np.int32)
    y = empty("f32" if dtype == "q8_0" else dtype, t, d)
    return Drawn([table, tokens, y], {2: values(table)[tokens] * 2.5}, {"scale": 2.5})


def draw_gather(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """Rows of a table; some are absent."""
    t, v, d = size
    table = normal(rng, dtype, v, d)
    rows = rng.integers(0, v, t).astype(np.int32)
    rows[::3] = -1
    expected = np.where((rows >= 0)[:, None], values(table)[rows], 0.0)
    return Drawn([table, rows, empty(dtype, t, d)], {2: expected})


def draw_kv_write(dtype: str, heads_first: bool, rng: np.random.Generator, size: Shape) -> Drawn:
    """Rows to slots of a pool; some are absent, and other slots stay as they are."""
    t, h, d = size
    pool, x = normal(rng, dtype, 2 * t + 3, h, d), normal(rng, "f32", t, h, d)
    slots = rng.permutation(2 * t + 3)[:t].astype(np.int32)
    slots[1::4] = -1
    expected = values(pool)
    expected[slots[slots >= 0]] = values(x)[slots >= 0]
    consts = {"bd": 1 << (d - 1).bit_length(), "heads_first": heads_first}
    if heads_first:
        pool, expected = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (pool, expected))
    return Drawn([pool, x, slots], {0: expected}, consts)


def rotated(x: Array, cosines: Array, sines: Array, interleaved: bool) -> Array:
    """The heads x (T, H, D) turned by (T, R / 2) angles."""
    turn = 2 * cosines.shape[1]
    result = x.copy()
    first = slice(0, turn, 2) if interleaved else slice(0, turn // 2)
    second = slice(1, turn, 2) if interleaved else slice(turn // 2, turn)
    a, b = x[..., first], x[..., second]
    result[..., first] = a * cosines[:, None] - b * sines[:, None]
    result[..., second] = b * cosines[:, None] + a * sines[:, None]
    return result


def draw_rope(
    interleaved: bool, norm: bool, write: bool, dtype: str, rng: np.random.Generator, size: Shape
) -> Drawn:
    """Heads of d elements, of which ``turn`` are turned; perhaps normed before, perhaps written to
    a pool, whose heads come first where halves turn.
    """
    t, h, d, turn = size
    x = normal(rng, dtype, t, h, d)
    places = rng.integers(0, 20, t).astype(np.int32)
    angle = np.arange(20)[:, None] * 0.2 ** np.arange(turn // 2)
    cosines, sines = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    weight = normal(rng, dtype, d) if norm else None
    wide = values(x)
    if weight is not None:
        wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * values(weight)
    turned = rotated(wide, values(cosines)[places], values(sines)[places], interleaved)
    rest = d - turn
    consts: dict[str, object] = {
        "half": 1 << (turn // 2 - 1).bit_length(),
        "rest": 1 << (rest - 1).bit_length() if rest else 0,
        "interleaved": interleaved,
        "epsilon": 1e-6,
    }
    if not write:
        arguments = [x, cosines, sines, places, weight, empty(dtype, t, h, d)]
        return Drawn(arguments, {5: turned}, consts)
    pool = normal(rng, dtype, 2 * t + 3, h, d)
    slots = rng.permutation(2 * t + 3)[:t].astype(np.int32)
    slots[1::4] = -1
    expected = values(pool)
    expected[slots[slots >= 0]] = turned[slots >= 0]
    if not interleaved:
        pool, expected = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (pool, expected))
        consts["heads_first"] = True
    return Drawn([pool, x, slots, cosines, sines, places, weight], {0: expected}, consts)


def draw_rope_whole(
    norm: bool, write: bool, joined: int, rng: np.random.Generator, size: Shape
) -> Drawn:
    """The same of whole heads, ``joined`` in a row of the product."""
    drawn = draw_rope(False, norm, write, "bf16", rng, (*size, size[-1]))
    consts = {name: drawn.consts[name] for name in ("half", "epsilon")} | {"joined": joined}
    if write:
        consts["heads_first"] = True
    return Drawn(drawn.arguments, drawn.expected, consts)


def index_cases() -> Iterable[Case]:
    """Embedding, gather and cache writes."""
    for dtype in ("f32", "bf16", "q8_0"):
        sizes = ((1, 1, 32), (5, 9, 64)) if dtype == "q8_0" else _TOKENS
        large = ("embedding", "512x128256x4096", "bf16" if dtype == "q8_0" else dtype)
        draw = partial(draw_embedding, dtype)
        name = f"embedding {dtype}"
        tolerance = TOLERANCES.get(dtype, 1e-5)
        yield Case(name, "embedding", embedding, draw, sizes, {"bd": 32}, large, tolerance)
    for dtype in ("f32", "bf16", "int8"):
        large = ("gather_rows", "512x32768x4096", dtype)
        draw = partial(draw_gather, dtype)
        tiles = {"bt": 4, "bd": 32}
        yield Case(f"gather {dtype}", "embedding", gather_rows, draw, _TOKENS, tiles, large)
    for dtype, heads_first in (("f32", False), ("f16", False), ("bf16", False), ("bf16", True)):
        large = ("kv_write", "512x8x128", dtype)
        draw = partial(draw_kv_write, dtype, heads_first)
        tiles = {"bt": 4, "bh": 2}
        yield Case(
            f"KV-cache write{' heads first' if heads_first else ''} {dtype}",
            "KV-cache write",
            kv_write,
            draw,
            ((1, 1, 1), (3, 5, 7), (9, 4, 100)),
            tiles,
            large,
            TOLERANCES[dtype],
            updates=(0,),
        )


def rope_cases() -> Iterable[Case]:
    """Both orders, part of a head, a norm before, and the write to a cache."""
    sizes: tuple[Shape, ...] = ((1, 1, 2, 2), (3, 5, 12, 12), (7, 3, 24, 16))
    tiles = {"bt": 4, "bh": 2}
    for interleaved in (False, True):
        order = "interleaved" if interleaved else "in halves"
        large = (f"rope{'_interleaved' if interleaved else ''}", "512x32x128", "bf16")
        for norm in (False, True):
            name = f"rope {order}{' after a norm' if norm else ''}"
            draw = partial(draw_rope, interleaved, norm, False, "f32")
            yield Case(name, "rope", rope, draw, sizes, tiles, large, 1e-4)
        draw = partial(draw_rope, interleaved, False, False, "bf16")
        yield Case(f"rope {order} bf16", "rope", rope, draw, sizes, tiles, large, 2e-2)
        draw = partial(draw_rope, interleaved, True, True, "f32")
        name = f"rope {order} to the cache"
        large = ("rope_kv_write", "512x8x128", "bf16")
        yield Case(name, "rope", rope_kv_write, draw, sizes, tiles, large, 1e-4, updates=(0,))
    whole: tuple[Shape, ...] = ((1, 1, 2), (5, 3, 16), (7, 4, 32))
    for joined in (1, 2):
        draw = partial(draw_rope_whole, joined == 1, False, joined)
        name, large = f"rope of whole heads, {joined} in a row", ("rope", "512x32x128", "bf16")
        yield Case(name, "rope", rope_whole, draw, whole, tiles, large, 2e-2)
    draw = partial(draw_rope_whole, True, True, 1)
    name, large = "rope of whole heads to the cache", ("rope_kv_write", "512x8x128", "bf16")
    yield Case(name, "rope", rope_whole_kv_write, draw, whole, tiles, large, 2e-2, updates=(0,))


def draw_conv(
    dtype: str, stride: int, pad: int, biased: bool, rng: np.random.Generator, size: Shape
) -> Drawn:
    """A convolution as a sum over taps."""
    n, h, w, c, o, kh, kw = size
    x, f = normal(rng, dtype, n, h, w, c), normal(rng, dtype, o, kh, kw, c)
    bias = normal(rng, dtype, o) if biased else None
    padded = np.pad(values(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    oh, ow = (h + 2 * pad - kh) // stride + 1, (w + 2 * pad - kw) // stride + 1
    expected = np.zeros((n, oh, ow, o)) if bias is None else np.zeros((n, oh, ow, o)) + values(bias)
    for i in range(kh):
        for j in range(kw):
            part = padded[:, i::stride, j::stride][:, :oh, :ow]
            expected += part @ values(f)[:, i, j].T
    consts = {"stride_h": stride, "stride_w": stride, "pad_h": pad, "pad_w": pad}
    return Drawn([x, f, bias, empty(dtype, *expected.shape)], {3: expected}, consts)


def conv_cases() -> Iterable[Case]:
    """Strides, padding and element types."""
    sizes: tuple[Shape, ...] = (
        (1, 3, 3, 1, 1, 1, 1),
        (1, 5, 7, 3, 5, 3, 2),
        (2, 9, 8, 17, 20, 3, 3),
    )
    large = ("conv2d", "1x56x56x64x64x3x3", "bf16")
    tiles = {"bh": 1, "bw": 4, "bo": 16, "bc": 16}
    forms = (("f32", 1, 1, True), ("f32", 2, 1, False), ("bf16", 1, 0, True), ("bf16", 2, 2, True))
    for dtype, stride, pad, biased in forms:
        name = f"conv2d stride {stride} pad {pad}{' with bias' if biased else ''} {dtype}"
        draw = partial(draw_conv, dtype, stride, pad, biased)
        yield Case(name, "conv2d", conv2d, draw, sizes, tiles, large, TOLERANCES[dtype])


def cases() -> list[Case]:
    """All of this module."""
    return [case for group in (index_cases, rope_cases, conv_cases) for case in group()]
