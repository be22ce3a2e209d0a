"""Cases of matmul: epilogues, element types, quantized weights, batches, feed-forward, experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from dure.ir.blocks import Blocks, quantize
from dure.ir.dtypes import FORMATS, BlockFormat, int8_block32, int32
from dure.ir.pack import unpack
from dure.ir.stored import STORED_FORMATS, stored_bytes, stored_layout
from dure.library import epilogue
from dure.library.activation import gelu_tanh
from dure.library.activation import silu as silu_tile
from dure.library.ffn import gated_ffn, gated_linear_kn
from dure.library.matmul import batched_matmul, gated_linear, matmul, matmul_kn
from dure.library.matmul_nests import matmul_blocked, matmul_hoisted, matmul_tiled
from dure.library.matmul_packed import (
    e2m1_value,
    e8m0_scale,
    gated_linear_packed,
    int4_value,
    matmul_packed,
    plain_scale,
)
from dure.library.moe import grouped_matmul, moe_route
from dure.library.suite.case import (
    ABSOLUTE,
    TOLERANCES,
    Array,
    Case,
    Drawn,
    Shape,
    empty,
    normal,
    silu,
    values,
)

_SIZES: tuple[Shape, ...] = ((1, 1, 1), (3, 5, 7), (1, 64, 33), (33, 70, 65), (64, 128, 96))
_TILES = {"bm": 16, "bn": 32, "bk": 32}
#: What an integer product is multiplied by on its way to an int8 result.
_INTEGER_SCALE = 1.0 / 32

erf = np.vectorize(math.erf, otypes=[np.float64])


def added(z: Array, extra: Array) -> Array:
    """``z + extra``"""
    return z + extra


def gelu_erf(z: Array) -> Array:
    """GELU by the error function."""
    return 0.5 * z * (1 + erf(z / 2**0.5))


#: The stages of an epilogue and what they compute.
_EPILOGUES: dict[str, tuple[epilogue.Epilogue, Callable[..., Array]]] = {
    "bias": (epilogue.bias(0), added),
    "gelu": (epilogue.activated("gelu_erf"), gelu_erf),
    "silu": (epilogue.activated("silu"), silu),
    "residual": (epilogue.residual(0), added),
}


def draw_matmul(
    dtype: str, stage: str, transposed: bool, rng: np.random.Generator, size: Shape
) -> Drawn:
    """``epilogue(x @ w)``"""
    m, k, n = size
    x, w = normal(rng, dtype, m, k), normal(rng, dtype, *((n, k) if transposed else (k, n)))
    z = values(x) @ (values(w).T if transposed else values(w))
    consts: dict[str, object] = {}
    stages: list[epilogue.Epilogue] = []
    if dtype == "int8":
        consts["accumulator"] = int32
        stages.append(epilogue.scaled(_INTEGER_SCALE))
        z = z * _INTEGER_SCALE
    extras: list[Array] = []
    if stage in ("bias", "residual"):
        shape = (n,) if stage == "bias" else (m, n)
        extras.append(normal(rng, "f32" if dtype == "int8" else dtype, *shape))
    if stage:
        made, compute = _EPILOGUES[stage]
        stages.append(made)
        z = compute(z, *map(values, extras))
    if dtype == "int8":
        z = np.clip(np.trunc(z), -128, 127) + 0.0
    consts["epilogue"] = epilogue.compose(stages)
    return Drawn([x, w, empty(dtype, m, n), *extras], {2: z}, consts)


def matmul_cases() -> Iterable[Case]:
    """Every element type with every epilogue."""
    for dtype in ("f32", "f16", "bf16", "fp8", "int8"):
        tolerance, absolute = TOLERANCES[dtype], ABSOLUTE.get(dtype, 1e-6)
        for stage in ("", "bias", "gelu", "silu", "residual"):
            name = f"matmul {stage} {dtype}".replace("  ", " ")
            large = (f"gemm_{stage}" if stage else "gemm", "4096x4096x4096", dtype)
            draw = partial(draw_matmul, dtype, stage, False)
            yield Case(name, "matmul", matmul_kn, draw, _SIZES, _TILES, large, tolerance, absolute)
        draw = partial(draw_matmul, dtype, "bias", True)
        name = f"matmul of (N, K) weights {dtype}"
        large = ("matmul", "4096x4096x4096", dtype)
        yield Case(name, "matmul", matmul, draw, _SIZES[1:], _TILES, large, tolerance, absolute)


def random_blocks(rng: np.random.Generator, format: BlockFormat, n: int, k: int) -> Blocks:
    """A random block-quantized weight (n, k)."""
    raw = rng.integers(0, 256, stored_bytes((n, k), format), np.uint8)
    found = unpack(raw, stored_layout((n, k), format), format, (n, k), 1)
    assert isinstance(found, Blocks)
    for plane in format.planes:
        if plane.dtype.is_float:
            drawn = rng.uniform(0.001, 0.02, found.planes[plane.name].shape)
            found.planes[plane.name][...] = drawn.astype(plane.dtype.numpy)
    return found


def draw_blocks(name: str, dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """x times a block-quantized weight; ``dtype`` of int8 means x in blocks of int8."""
    m, blocks, n = size
    format = FORMATS[name]
    k = blocks * format.block
    w = random_blocks(rng, format, n, k)
    x: Array | Blocks = normal(rng, "f32" if dtype == "int8" else dtype, m, k)
    if dtype == "int8":
        x = quantize(x, int8_block32)
    y = empty("f32" if dtype == "int8" else dtype, m, n)
    return Drawn([x, w, y], {2: values(x) @ values(w).T})


def block_cases() -> Iterable[Case]:
    """Every block format of a weight, and blocks times blocks."""
    sizes = ((1, 1, 1), (3, 2, 33), (9, 3, 64))
    for format in STORED_FORMATS:
        tiles = {"bm": 8, "bn": 32, "bk": format.block}
        large = (f"matmul_{format.name}", "1x4096x4096", "bf16")
        for dtype in ("bf16", "int8"):
            draw = partial(draw_blocks, format.name, dtype)
            kind = "int8 blocks" if dtype == "int8" else dtype
            name = f"matmul {format.name} x {kind}"
            tolerance = 1e-3 if dtype == "int8" else 2e-2
            yield Case(name, "quantized weights", matmul, draw, sizes, tiles, large, tolerance)


#: The values of the 4-bit floats.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_E2M1 = np.concatenate([E2M1, -E2M1])


def packed_weight(
    rng: np.random.Generator, microscaling: bool, k: int, n: int
) -> tuple[Array, Array, Array]:
    """Codes and scales of a weight (k, n) of four bits, and its values."""
    codes = rng.integers(0, 16, (k, n))
    packed = (codes[: k // 2] | (codes[k // 2 :] << 4)).astype(np.uint8)
    if microscaling:
        scales = rng.integers(118, 128, (k // 32, n)).astype(np.uint8)
        numbers, factors = _E2M1[codes], 2.0 ** (scales.astype(np.float64) - 127)
    else:
        scales = rng.uniform(0.01, 0.1, (k // 32, n)).astype(np.float32)
        numbers, factors = np.where(codes > 7, codes - 16, codes), scales.astype(np.float64)
    return packed, scales, numbers * np.repeat(factors, 32, 0)


def draw_packed(
    microscaling: bool, gated: bool, dtype: str, rng: np.random.Generator, size: Shape
) -> Drawn:
    """x times weights of four bits, or the gated half of a feed-forward network."""
    m, k, n = size
    packed, scales, w = packed_weight(rng, microscaling, k, 2 * n if gated else n)
    x = normal(rng, dtype, m, k)
    z = values(x) @ w
    if gated:
        z = silu(z[:, :n]) * z[:, n:]
    value, scale = (e2m1_value, e8m0_scale) if microscaling else (int4_value, plain_scale)
    arguments = [x, packed, scales, empty(dtype, m, n)]
    return Drawn(arguments, {3: z}, {"value": value, "scale": scale})


def packed_cases() -> Iterable[Case]:
    """Weights of four bits."""
    sizes = ((1, 64, 1), (3, 192, 17), (16, 256, 64))
    for microscaling, item in ((False, "int4 weights"), (True, "mxfp4 weights")):
        form = "mxfp4" if microscaling else "int4"
        for dtype in ("bf16", "f32"):
            for gated in (False, True):
                kernel = gated_linear_packed if gated else matmul_packed
                name = f"{'gated ' if gated else 'matmul '}{form} x {dtype}"
                draw = partial(draw_packed, microscaling, gated, dtype)
                large = (f"matmul_{form}", "16x4096x4096", dtype)
                # Weights are rounded to x's type, and what is left of a sum may be small.
                near = (3e-2, 5e-2) if dtype == "bf16" else (1e-4, 1e-5)
                yield Case(name, item, kernel, draw, sizes, _TILES, large, *near)


def draw_batched(dtype: str, transposed: bool, rng: np.random.Generator, size: Shape) -> Drawn:
    """A product for each of a batch."""
    b, m, k, n = size
    x = normal(rng, dtype, b, m, k)
    w = normal(rng, dtype, *((b, n, k) if transposed else (b, k, n)))
    z = np.matmul(values(x), values(w).swapaxes(1, 2) if transposed else values(w))
    return Drawn([x, w, empty(dtype, b, m, n)], {2: z}, {"transposed": transposed})


def draw_nest(kernel: Any, rng: np.random.Generator, size: Shape) -> Drawn:
    """A pinned loop nest, with smaller tiles than where it is timed."""
    m, k, n = size
    x, w = normal(rng, "f32", k, m), normal(rng, "f32", k, n)
    consts: dict[str, object] = {"bm": 16, "bn": 32, "bk": 16}
    if kernel is matmul_hoisted:
        consts["depth"] = -(-k // 16)
    if kernel is matmul_blocked:
        consts["rows"] = -(-m // 16)
    return Drawn([x, w, empty("f32", m, n)], {2: values(x).T @ values(w)}, consts)


def draw_gated(form: str, dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """The gated half of a feed-forward network; ``form`` says how gate and up are kept."""
    m, k, n = size
    x = normal(rng, dtype, m, k)
    if form == "kn":
        w = normal(rng, dtype, k, 2 * n)
        gate, up = values(x) @ values(w)[:, :n], values(x) @ values(w)[:, n:]
        weights = [w]
        consts: dict[str, object] = {"activation": silu_tile}
    else:
        weights = [normal(rng, dtype, n, k), normal(rng, dtype, n, k)]
        gate, up = (values(x) @ values(w).T for w in weights)
        consts = {"activation": gelu_tanh}
    if dtype == "int8":
        consts |= {"accumulator": int32, "scale": _INTEGER_SCALE}
        gate, up = gate * _INTEGER_SCALE, up * _INTEGER_SCALE
    z = (silu(gate) if form == "kn" else gelu(gate)) * up
    if dtype == "int8":
        z = np.clip(np.trunc(z), -128, 127) + 0.0
    return Drawn([x, *weights, empty(dtype, m, n)], {1 + len(weights): z}, consts)


def gelu(x: Array) -> Array:
    """GELU by the tanh approximation."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def draw_ffn(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """A whole gated feed-forward network."""
    m, d, f, n = size
    x = normal(rng, dtype, m, d)
    gate, up, down = normal(rng, dtype, d, f), normal(rng, dtype, d, f), normal(rng, dtype, f, n)
    hidden = silu(values(x) @ values(gate)) * (values(x) @ values(up))
    arguments = [x, gate, up, down, empty(dtype, m, n)]
    return Drawn(arguments, {4: hidden @ values(down)})


def product_cases() -> Iterable[Case]:
    """Batches, pinned loop nests and feed-forward networks."""
    sizes: tuple[Shape, ...] = ((1, 1, 1, 1), (3, 1, 5, 7), (2, 17, 33, 40))
    for dtype in ("f32", "bf16"):
        for transposed in (False, True):
            name = f"batched matmul{' of (N, K)' if transposed else ''} {dtype}"
            draw = partial(draw_batched, dtype, transposed)
            large = ("batched_matmul", "32x512x128x512", dtype)
            item, tolerance = "batched matmul", TOLERANCES[dtype]
            yield Case(name, item, batched_matmul, draw, sizes, _TILES, large, tolerance)
    for kernel in (matmul_tiled, matmul_hoisted, matmul_blocked):
        name = kernel.__name__.replace("_", " ")
        large = (kernel.__name__, "4096x8192x8192", "f32")
        draw = partial(draw_nest, kernel)
        nest = ((1, 1, 1), (17, 33, 40), (32, 64, 64))
        yield Case(name, "pinned matmul", kernel, draw, nest, {}, large, pinned=True)
    for dtype in ("f32", "bf16", "int8"):
        tolerance, absolute = 2 * TOLERANCES[dtype], ABSOLUTE.get(dtype, 1e-6)
        large = ("gated_linear_kn", "128x4096x14336", dtype)
        draw = partial(draw_gated, "kn", dtype)
        name = f"gated linear {dtype}"
        yield Case(
            name, "gated FFN", gated_linear_kn, draw, _SIZES, _TILES, large, tolerance, absolute
        )
    draw = partial(draw_gated, "nk", "bf16")
    large = ("gated_linear", "128x4096x14336", "bf16")
    name = "gated linear of (N, K) weights bf16"
    yield Case(name, "gated FFN", gated_linear, draw, _SIZES, _TILES, large, 3e-2)
    sizes = ((1, 1, 1, 1), (3, 5, 7, 9), (1, 64, 40, 33), (33, 40, 70, 40))
    for dtype in ("f32", "bf16"):
        tiles = {**_TILES, "bf": 32}
        large = ("gated_ffn", "128x4096x14336", dtype)
        draw = partial(draw_ffn, dtype)
        tolerance = 1e-4 if dtype == "f32" else 2e-2
        name = f"gated FFN in one kernel {dtype}"
        yield Case(name, "gated FFN in one kernel", gated_ffn, draw, sizes, tiles, large, tolerance)


def draw_route(normalized: bool, rng: np.random.Generator, size: Shape) -> Drawn:
    """Logits a quarter apart, so that no rounding changes the order."""
    t, e, k = size
    x = (rng.permuted(np.tile(np.arange(e), (t, 1)), axis=1) * 0.25 - e / 8).astype(np.float32)
    odds = np.exp(values(x) - values(x).max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    order = np.argsort(-odds, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(odds, order, 1)
    if normalized:
        chosen = chosen / chosen.sum(1, keepdims=True)
    consts = {"be": _power(e), "bt": _power(k), "normalized": normalized}
    experts = np.full((t, k), 77, np.int32)
    return Drawn([x, empty("f32", t, k), experts], {1: chosen, 2: order}, consts)


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


def draw_grouped(dtype: str, rng: np.random.Generator, size: Shape) -> Drawn:
    """Rows sorted by expert; some experts have none."""
    t, e, k, n = size
    counts = rng.multinomial(t, rng.dirichlet(np.full(e, 0.5)))
    stops = np.cumsum(counts)
    x, w = normal(rng, dtype, t, k), normal(rng, dtype, e, k, n)
    owner = np.repeat(np.arange(e), counts)
    z = np.einsum("tk,tkn->tn", values(x), values(w)[owner])
    ends = [(stops - counts).astype(np.int32), stops.astype(np.int32)]
    return Drawn([x, w, *ends, None, empty(dtype, t, n)], {5: z})


def expert_cases() -> Iterable[Case]:
    """Mixture of experts."""
    sizes: tuple[Shape, ...] = ((1, 1, 1), (3, 5, 2), (40, 60, 6))
    for normalized in (True, False):
        name = f"MoE routing{'' if normalized else ' without normalization'}"
        large = ("moe_route", "4096x128x8", "f32")
        draw = partial(draw_route, normalized)
        yield Case(name, "MoE routing", moe_route, draw, sizes, {"bm": 8}, large, 1e-4)
    sizes = ((1, 1, 1, 1), (10, 4, 5, 7), (50, 8, 40, 33))
    for dtype in ("f32", "bf16"):
        large = ("grouped_matmul", "4096x8x2048x1024", dtype)
        draw = partial(draw_grouped, dtype)
        name = f"grouped matmul {dtype}"
        yield Case(
            name, "grouped matmul", grouped_matmul, draw, sizes, _TILES, large, TOLERANCES[dtype]
        )


def cases() -> list[Case]:
    """All of this module."""
    groups = (matmul_cases, block_cases, packed_cases, product_cases, expert_cases)
    return [case for group in groups for case in group()]
