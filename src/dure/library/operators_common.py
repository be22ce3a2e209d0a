"""What the tables of operators share: dtypes, tile sizes, limits, and the plan of an operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

from dure.errors import UsageError
from dure.ir.dtypes import (
    DType,
    bfloat16,
    float8_e4m3fn,
    float16,
    float32,
    int4,
    int8,
    int32,
)
from dure.ir.types import TensorType, static_extent
from dure.library.call import IndexArray, KernelCall, index_tensor, stored_bytes

Shape: TypeAlias = tuple[int, ...]

#: The names of the command line.  mxfp4 is a type of weights: codes and scales.
DTYPES: dict[str, DType] = {
    "f32": float32,
    "f16": float16,
    "bf16": bfloat16,
    "fp8": float8_e4m3fn,
    "int8": int8,
    "int4": int4,
    "mxfp4": bfloat16,
}
FLOATS = ("f32", "f16", "bf16", "fp8")
NUMBERS = (*FLOATS, "int8")
ALL = tuple(DTYPES)

#: The most elements of a tensor: 2^40 of them don't fit any device.
MOST_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class Plan:
    """The launches of an operator, its floating-point operations and its compulsory bytes."""

    calls: tuple[KernelCall, ...]
    flops: int
    bytes: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def tile(extent: int, most: int = 64) -> int:
    """A legal tile size along an axis of this extent."""
    return min(power_of_two(extent), most)


def result_of(dtype: str) -> str:
    """The dtype of an operator's result."""
    return "int8" if dtype == "int4" else dtype


def integer(dtype: str) -> bool:
    """Whether products are added in int32."""
    return dtype in ("int8", "int4")


def accumulation(dtype: str) -> dict[str, object]:
    """The const of a matmul kernel that says in what it adds."""
    return {"accumulator": int32} if integer(dtype) else {}


def bytes_of(types: Iterable[TensorType | None]) -> int:
    """The bytes of these tensors together."""
    return sum(stored_bytes(t) for t in types if t is not None)


def balanced(ascending: list[int]) -> list[int]:
    """Short and long items in turns, so that neighbours together are as much work everywhere."""
    half = -(-len(ascending) // 2)
    pairs = zip_longest(ascending[:half], reversed(ascending[half:]))
    return [item for pair in pairs for item in pair if item is not None]


def check_size(kind: TensorType) -> TensorType:
    """The type, or a :class:`UsageError` where no memory holds such a tensor."""
    elements = 1
    for extent in kind.shape:
        known = static_extent(extent)
        assert known is not None
        elements *= known
    if elements > MOST_ELEMENTS:
        shape = " x ".join(map(str, kind.shape))
        raise UsageError(
            f"a tensor of {shape} elements",
            rule=f"a tensor has at most 2^40 = {MOST_ELEMENTS} elements",
            fix="give smaller dims",
        )
    return kind


def call(
    kernel: Any,
    types: Sequence[TensorType | None],
    tiles: Mapping[str, int],
    consts: Mapping[str, object] | None = None,
    lists: Mapping[int, tuple[IndexArray, int, int]] | None = None,
    *,
    unique: tuple[int, ...] = (),
    updates: tuple[int, ...] = (),
) -> KernelCall:
    """A launch; ``lists`` are index arguments: position, then values and declared range.

    Their types are made from these, and ``types`` has None there; ``unique`` are the positions of
    those whose elements differ.
    """
    kinds = list(types)
    values: dict[int, IndexArray] = {}
    for place, (array, low, high) in (lists or {}).items():
        kinds[place] = index_tensor(array, low, high, unique=place in unique)
        values[place] = array
    for kind in kinds:
        if kind is not None:
            check_size(kind)
    return KernelCall(kernel, tuple(kinds), dict(consts or {}), dict(tiles), values, updates)


def single(launch: KernelCall, flops: int, moved: int | None = None) -> Plan:
    """The plan of one launch; its bytes are all of its arguments, unless fewer are moved."""
    return Plan((launch,), flops, bytes_of(launch.types) if moved is None else moved)
