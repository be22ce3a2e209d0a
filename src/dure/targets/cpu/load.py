"""The plan of a load program: which weights are laid out anew, and where in one buffer."""

from __future__ import annotations

from dataclasses import dataclass

from dure.ir.core import Function
from dure.ir.sizes import tensor_bytes
from dure.ir.types import TensorType

_ALIGNMENT = 128


@dataclass(frozen=True)
class LoadedWeight:
    """A weight that is laid out anew: its types before and after, and its place when packed."""

    name: str
    source: TensorType
    target: TensorType
    offset: int


@dataclass(frozen=True)
class LoadPlan:
    """The weights in the order of the load function's context, and the bytes they take together."""

    weights: tuple[LoadedWeight, ...]
    total_bytes: int


def plan_load(load: Function) -> LoadPlan:
    """Orders a load program's weights by their types, and gives each its place."""
    pairs = [
        (param.value.name, param.value.tensor, result.tensor)
        for param, result in zip(load.params, load.body.yields, strict=True)
    ]
    kinds = list(dict.fromkeys((source, target) for _, source, target in pairs))
    pairs.sort(key=lambda pair: kinds.index(pair[1:]))
    offset = 0
    weights: list[LoadedWeight] = []
    for name, source, target in pairs:
        weights.append(LoadedWeight(name, source, target, offset))
        offset += -(-tensor_bytes(target) // _ALIGNMENT) * _ALIGNMENT
    return LoadPlan(tuple(weights), offset)
