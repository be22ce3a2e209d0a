"""Small tensor programs and values for them, for tests of the tensor level and the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir.blocks import Blocks
from dure.ir.builder import Layer, ProgramBuilder
from dure.ir.core import Function, Value
from dure.ir.dtypes import BlockFormat, ElementType
from dure.ir.expr import evaluate
from dure.ir.types import TensorType

#: Sizes and index inputs of a ragged step: a prefill chunk of four rows and one decode.
SIZES: Mapping[str, int] = {"T": 5, "W": 3, "L": 2}
STEP: Mapping[str, Sequence[Any]] = {
    "tokens": [3, 9, 99, 0, 41],
    "positions": [0, 1, 2, 3, 7],
    "slots": [16, 17, 18, 19, 39],
    "block_table": [[1, 0, 0, 0], [2, 0, 0, 0], [0] * 4, [0] * 4],
    "context": [4, 8, 0, 0],
    "work_sequence": [0, 0, 1],
    "work_start": [0, 2, 4],
    "work_rows": [2, 2, 1],
    "out_rows": [3, 4],
}


def decoder(
    formats: Sequence[str] = ("q4_1", "q4_1", "q8_0", "q4_1"),
    *,
    order: str = "neox",
    window: int = 0,
    head_norm: bool = True,
    hidden: int = 64,
) -> Function:
    """A decoder of a few layers with everything that a step program has."""
    b = ProgramBuilder("tiny")
    rows, items, outs = b.symbol("T", 1, 64), b.symbol("W", 1, 64), b.symbol("L", 0, 8)
    vocabulary, heads, groups, size, inner = 100, 2, 1, 32, 96

    def index(name: str, shape: Sequence[Any], low: int, high: int) -> Value:
        return b.input(name, shape, "int32", index=(low, high))

    tokens = index("tokens", (rows,), 0, vocabulary - 1)
    positions, slots = index("positions", (rows,), 0, 63), index("slots", (rows,), -1, 63)
    table, context = index("block_table", (4, 4), 0, 3), index("context", (4,), 0, 64)
    work = (
        index("work_sequence", (items,), 0, 3),
        index("work_start", (items,), 0, 63),
        index("work_rows", (items,), 1, 16),
    )
    out_rows = index("out_rows", (outs,), 0, 63)
    rope = b.weight("cos", (64, size // 2), "float32"), b.weight("sin", (64, size // 2), "float32")
    embedding = b.weight("embedding", (vocabulary, hidden), "q8_0")

    def layer(layer: Layer, x: Value) -> Value:
        kind = str(layer.signature)

        def linear(x: Value, name: str, n: int, k: int, bias: Value | None = None) -> Value:
            return b.linear(x, layer.weight("layer.{}." + name, (n, k), kind), bias)

        def norm(x: Value, name: str) -> Value:
            return b.rms_norm(x, layer.weight("layer.{}." + name, (hidden,), "float32"), 1e-5)

        h = norm(x, "norm")
        bias = layer.weight("layer.{}.bias", (groups * size,), "float32")
        q = b.reshape(linear(h, "q", heads * size, hidden), -1, heads, size)
        k = b.reshape(linear(h, "k", groups * size, hidden), -1, groups, size)
        v = b.reshape(linear(h, "v", groups * size, hidden, bias), -1, groups, size)
        weight = layer.weight("layer.{}.k_norm", (size,), "float32") if head_norm else None
        q = b.rope(q, rope, positions, order=order)
        k = b.rope(k, rope, positions, order=order, norm=weight)
        keys = layer.state("layer.{}.keys", (64, groups, size))
        values = layer.state("layer.{}.values", (64, groups, size))
        b.kv_write(keys, k, slots)
        b.kv_write(values, v, slots)
        mixed = b.attention(
            *(q, keys, values, positions, table, context, work),
            scale=size**-0.5,
            page_size=16,
            window=window,
        )
        x = b.add(x, linear(mixed, "o", hidden, heads * size))
        h = norm(x, "mlp_norm")
        gate, up = linear(h, "gate", inner, hidden), linear(h, "up", inner, hidden)
        return b.add(x, linear(b.mul(b.silu(gate), up), "down", hidden, inner))

    x = b.scale(b.embedding(embedding, tokens), 2.0)
    (x,) = b.layers(list(formats), layer, x)
    x = b.rms_norm(b.gather_rows(x, out_rows), b.weight("final", (hidden,), "float32"), 1e-5)
    logits = b.linear(x, embedding)
    b.output("logits", logits)
    b.output("next", b.argmax(logits))
    return b.build()


def random_value(rng: np.random.Generator, dtype: ElementType, shape: tuple[int, ...]) -> Any:
    """Random numbers of any element type (blocks along the last axis)."""
    if not isinstance(dtype, BlockFormat):
        mean = 1.0 if len(shape) == 1 else 0.0
        return (rng.standard_normal(shape) * 0.3 + mean).astype(dtype.numpy)
    planes: dict[str, Any] = {}
    for plane in dtype.planes:
        entries = (*shape[:-1], shape[-1] // plane.per)
        if plane.dtype.is_float:
            values = rng.random(entries) * 0.02 + 0.001
        elif plane.dtype.bits < 8:
            values = rng.integers(0, 1 << plane.dtype.bits, entries)
        else:
            values = rng.integers(-127, 128, entries)
        wide = plane.dtype.numpy if plane.dtype.bits >= 8 else np.dtype(np.uint8)
        planes[plane.name] = values.astype(wide)
    return Blocks(dtype, len(shape) - 1, shape, planes)


def values_of(program: Function, seed: int = 0) -> list[Any]:
    """A value for each parameter: the step's index inputs, random numbers for the rest."""
    rng = np.random.default_rng(seed)
    found: list[Any] = []
    names = program.attrs["names"]
    assert isinstance(names, tuple)
    for name, param in zip(names, program.params, strict=True):
        kind = param.value.type
        assert isinstance(kind, TensorType)
        if str(name) in STEP:
            found.append(np.array(STEP[str(name)], np.int32))
        else:
            shape = tuple(evaluate(e, SIZES) for e in kind.shape)
            found.append(random_value(rng, kind.dtype, shape))
    return found
