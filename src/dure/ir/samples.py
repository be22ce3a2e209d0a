"""Arguments for a program, drawn from a seed: sizes in their bounds, indices in their ranges.

What binds the values of several arguments together (that ragged sequences don't overlap, say) isn't
in a program's types; a caller who needs such arguments brings them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dure.errors import IRError
from dure.ir.blocks import Blocks, quantize
from dure.ir.core import Function
from dure.ir.dtypes import Array, BlockFormat, DType
from dure.ir.expr import Expr, Symbol, evaluate, symbols
from dure.ir.interpret import RuntimeValue, empty_value
from dure.ir.types import TensorType

#: Sizes are drawn up to this, or to their lower bound where that is higher.
LARGEST = 12


@dataclass(frozen=True, slots=True)
class Sample:
    """Arguments for a function, and its sizes by name."""

    arguments: tuple[RuntimeValue, ...]
    sizes: Mapping[str, int]

    def copied(self) -> list[RuntimeValue]:
        """The arguments, safe to write into."""
        return [copied(a) for a in self.arguments]


def copied(value: RuntimeValue) -> RuntimeValue:
    """A copy of an array or of Blocks."""
    if isinstance(value, Blocks):
        planes = {name: plane.copy() for name, plane in value.planes.items()}
        return Blocks(value.format, value.axis, value.shape, planes)
    assert isinstance(value, np.ndarray)
    return value.copy()


def draw(
    function: Function,
    seed: int,
    sizes: Mapping[str, int] | None = None,
    *,
    largest: int = LARGEST,
) -> Sample:
    """Arguments for ``function``; ``sizes`` fixes some of its symbols, ``largest`` bounds others.

    Raises :class:`IRError` where bounds leave nothing to choose.
    """
    rng = np.random.default_rng(seed)
    chosen = dict(sizes or {})
    for entry in function.symbols:
        if entry.kind == "size" and entry.name not in chosen:
            chosen[entry.name] = _size(entry, chosen, rng, largest)
    arguments = tuple(
        _argument(p.value.tensor, p.value.name, p.access == "out", chosen, rng)
        for p in function.params
    )
    return Sample(arguments, chosen)


def _size(entry: Symbol, chosen: Mapping[str, int], rng: np.random.Generator, largest: int) -> int:
    low = _end(entry.low, chosen)
    high = None if entry.high is None else _end(entry.high, chosen)
    low = 0 if low is None else low
    top = max(low, largest) if high is None else min(high, max(low, largest))
    if top < low:
        raise IRError(
            f"no number for size '{entry.name}' in [{entry.low}, {entry.high}]",
            rule="a size's bounds leave something between them",
        )
    return int(rng.integers(low, top + 1))


def _end(expr: Expr, chosen: Mapping[str, int]) -> int | None:
    known = all(s.name in chosen for s in symbols(expr))
    return evaluate(expr, chosen) if known else None


def _argument(
    kind: TensorType, name: str, output: bool, sizes: Mapping[str, int], rng: np.random.Generator
) -> RuntimeValue:
    value = empty_value(kind, sizes)
    if output:
        return value
    if kind.index is not None:
        assert isinstance(value, np.ndarray)
        return _indices(kind, name, value.shape, sizes, rng)
    if isinstance(value, Blocks):
        return random_blocks(value.format, value.shape, value.axis, rng)
    assert isinstance(kind.dtype, DType)
    return random_array(kind.dtype, value.shape, rng)


def random_array(dtype: DType, shape: Sequence[int], rng: np.random.Generator) -> Array:
    """Standard normal floats, small integers, or truth values."""
    if dtype.is_float:
        return rng.standard_normal(shape).astype(np.float32).astype(dtype.numpy)
    if dtype.kind == "bool":
        return rng.integers(0, 2, shape).astype(np.bool_)
    low = 0 if dtype.kind == "uint" else -min(8, 1 << (dtype.bits - 1))
    return rng.integers(low, min(8, 1 << (dtype.bits - 1)), shape).astype(dtype.numpy)


def random_blocks(
    format: BlockFormat, shape: Sequence[int], axis: int, rng: np.random.Generator
) -> Blocks:
    """Random codes under small positive scales, or random numbers where planes must fit others."""
    if any(plane.role == "value" for plane in format.planes):
        order = [*(a for a in range(len(shape)) if a != axis), axis]
        values = rng.standard_normal([shape[a] for a in order]).astype(np.float32)
        return quantize(values, format).transposed(tuple(int(a) for a in np.argsort(order)))
    planes: dict[str, Array] = {}
    for plane in format.planes:
        entries = tuple(e // plane.per if a == axis else e for a, e in enumerate(shape))
        if plane.dtype.is_float:
            scale = rng.uniform(0.001, 0.01, entries).astype(np.float32)
            planes[plane.name] = scale.astype(plane.dtype.numpy)
        elif plane.role != "sum":
            low = 0 if plane.dtype.kind == "uint" else -(1 << (plane.dtype.bits - 1)) + 1
            high = 1 << (plane.dtype.bits - (plane.dtype.kind != "uint"))
            planes[plane.name] = rng.integers(low, high, entries).astype(plane.dtype.numpy)
    found = Blocks(format, axis, tuple(shape), planes)
    for plane in format.planes:
        if plane.role == "sum":
            planes[plane.name] = _sums(found, plane.per).astype(plane.dtype.numpy)
    return found


def _sums(blocks: Blocks, per: int) -> Array:
    codes = np.moveaxis(blocks.codes(), blocks.axis, -1)
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per, per)
    return np.moveaxis(parts.sum(axis=-1), -1, blocks.axis)


def _indices(
    kind: TensorType,
    name: str,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rng: np.random.Generator,
) -> Array:
    assert kind.index is not None
    low, high = (evaluate(end, sizes) for end in kind.index)
    count = int(np.prod(shape))
    choices = high - max(low, 0) + 1 if kind.unique else high - low + 1
    enough = count <= choices or low < 0 if kind.unique else choices > 0
    if count and not enough:
        raise IRError(
            f"no values for index argument '{name}' of {count} elements in [{low}, {high}]",
            rule="an index argument's range holds its elements",
        )
    if not kind.unique:
        return rng.integers(low, high + 1, shape).astype(np.int32) if count else _none(shape)
    present = rng.choice(max(choices, 0), min(count, max(choices, 0)), replace=False)
    values = np.full(count, -1, np.int64)
    values[: len(present)] = present + max(low, 0)
    return rng.permutation(values).reshape(shape).astype(np.int32)


def _none(shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, np.int32)
