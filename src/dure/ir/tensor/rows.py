"""Ops that pick, cut or mark rows: gathers, reshapes, quantization, argmax, top-k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.core import Cost, Op, OpDef, Region, declare
from dure.ir.dtypes import Array
from dure.ir.expr import Expr, as_expr, const
from dure.ir.rules import broken, free
from dure.ir.tensor.checks import (
    Indices,
    Operand,
    count,
    doubles,
    elements,
    extent,
    finish,
    floating,
    index,
    moves,
    per_element,
    plain_dtype,
    rank,
    stored,
    take,
    traffic,
)
from dure.ir.types import TensorType, Type


def _embedding_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    table, tokens = count(operands, 2, "embedding")
    rank(table, 2, "the table of embedding")
    index(tokens, "the tokens of embedding")
    if not table.dtype.is_float:
        raise broken(f"an embedding table of {table.dtype}", "a table holds floats or blocks")
    return [stored((tokens.shape[0], table.shape[1]), "")]


def _embedding(attrs: Mapping[str, Any], table: Operand, tokens: Array) -> Operand:
    if isinstance(table, Blocks):
        planes = {n: take(p, tokens) for n, p in table.planes.items()}
        table = Blocks(table.format, table.axis, (len(tokens), table.shape[1]), planes)
        rows = doubles(table)
    else:
        rows = take(doubles(table), tokens)
    return finish(rows * np.float64(np.float32(attrs["scale"])), attrs)


def _embedding_cost(op: Op) -> Cost:
    result = op.results[0].tensor
    row = op.operands[0].tensor.dtype.bits * extent(result.shape[1]) / 8
    return Cost(elements(result), int(extent(result.shape[0]) * row) + 4 * elements(result))


declare(
    OpDef(
        "embedding",
        "tensor",
        _embedding_typing,
        _embedding,
        _embedding_cost,
        defaults={"scale": 1.0},
        exact=False,
        error_bound=1.0,
        doc="embedding(table (V, N) of any format, tokens (T)) {scale}: rows of the table, float32",
    )
)


def _gather_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    x, rows = count(operands, 2, "gather_rows")
    plain_dtype(x, "the operand of gather_rows")
    index(rows, "the rows of gather_rows")
    return [TensorType((rows.shape[0], *x.shape[1:]), x.dtype)]


def _gather(attrs: Mapping[str, Any], x: Array, rows: Indices) -> Array:
    outside = rows[(rows < 0) | (rows >= len(x))]
    if outside.size:
        raise IRError(
            f"gather_rows of row {outside[0]} of {len(x)}",
            rule="the rows of gather_rows exist",
            fix="pass indices below the number of rows",
        )
    return take(x, rows)


def _gather_cost(op: Op) -> Cost:
    result = op.results[0].tensor
    return Cost(bytes=int(2 * elements(result) * result.dtype.bits) // 8)


declare(
    OpDef(
        "gather_rows",
        "tensor",
        _gather_typing,
        _gather,
        _gather_cost,
        doc="gather_rows(x (T, ...), rows (L)): x[rows]",
    )
)


def _product(extents: Sequence[Expr]) -> Expr:
    total = const(1)
    for value in extents:
        total = total * value
    return total


def _reshape_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (x,) = count(operands, 1, "reshape_tensor")
    plain_dtype(x, "the operand of reshape_tensor")
    shape: tuple[int, ...] = attrs["shape"]
    if shape.count(-1) > 1 or any(e < -1 for e in shape):
        raise broken(f"reshape_tensor to {shape}", "at most one extent is -1, the rest")
    known = 1
    for value in shape:
        known *= 1 if value == -1 else value
    total = _product(x.shape)
    rest = total // known if known else const(0)
    if (rest * known) is not total or (-1 not in shape and rest is not const(1)):
        raise broken(f"reshape_tensor of {x} to {shape}", "a reshape keeps the number of elements")
    return [TensorType(tuple(rest if e == -1 else as_expr(e) for e in shape), x.dtype)]


def _reshape(attrs: Mapping[str, Any], x: Array) -> Array:
    # NumPy cannot infer -1 where the array is empty.
    known = int(np.prod([e for e in attrs["shape"] if e != -1]))
    return x.reshape([x.size // max(1, known) if e == -1 else e for e in attrs["shape"]])


declare(
    OpDef(
        "reshape_tensor",
        "tensor",
        _reshape_typing,
        _reshape,
        free,
        doc="reshape_tensor(x) {shape}: the same bytes; one extent may be -1 (symbolic or not)",
    )
)


def _quantize_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (x,) = count(operands, 1, "quantize_rows")
    floating(x, "the operand of quantize_rows")
    return [stored(x.shape, attrs["quantize"])]


def _quantize(attrs: Mapping[str, Any], x: Array) -> Operand:
    return finish(doubles(x), attrs)


declare(
    OpDef(
        "quantize_rows",
        "tensor",
        _quantize_typing,
        _quantize,
        per_element(4),
        defaults={"quantize": "int8_block32"},
        doc="quantize_rows(x) {quantize}: activations in blocks along the last axis",
    )
)


def _argmax_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (x,) = count(operands, 1, "argmax")
    floating(x, "the operand of argmax")
    return [TensorType(x.shape[:-1], dtypes.int32)]


def _argmax(attrs: Mapping[str, Any], x: Array) -> Array:
    return np.argmax(x, axis=-1).astype(np.int32)


declare(
    OpDef(
        "argmax",
        "tensor",
        _argmax_typing,
        _argmax,
        lambda op: Cost(elements(op.operands[0].tensor), traffic(op)),
        doc="argmax(x): the lowest index of the largest element along the last axis, int32",
    )
)


def _top_k_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (x,) = count(operands, 1, "top_k")
    floating(x, "the operand of top_k")
    if attrs["k"] < 1:
        raise broken(f"top_k of {attrs['k']}", "k is at least 1")
    shape = (*x.shape[:-1], const(attrs["k"]))
    return [TensorType(shape, x.dtype), TensorType(shape, dtypes.int32)]


def _top_k(attrs: Mapping[str, Any], x: Array) -> tuple[Array, Array]:
    # A stable sort of the negated values keeps the lowest index first among equals.
    order = np.argsort(-doubles(x), axis=-1, kind="stable")[..., : attrs["k"]].astype(np.int32)
    return np.take_along_axis(x, order, axis=-1), order


declare(
    OpDef(
        "top_k",
        "tensor",
        _top_k_typing,
        _top_k,
        lambda op: Cost(op.attr("k") * elements(op.operands[0].tensor), traffic(op)),
        doc="top_k(x) {k}: the k largest along the last axis, descending, and their indices",
    )
)


def _relayout_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    (x,) = count(operands, 1, "relayout")
    return [replace(x, layout=attrs["layout"])]


def _relayout(attrs: Mapping[str, Any], x: Operand) -> Operand:
    return x


declare(
    OpDef(
        "relayout",
        "tensor",
        _relayout_typing,
        _relayout,
        moves,
        doc="relayout(x) {layout}: the same values elsewhere",
    )
)
