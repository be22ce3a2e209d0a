"""A decoder cut over several devices: which part of each weight, of the heads and of the experts a
device holds.

Tensor parallel: a device has its share of the query heads with the KV heads that they read, of the
MLP's width, and of the vocabulary's logits.  Where devices are more than KV heads, several hold the
same one.  What a device gives of the output projection and of the MLP is a part of a sum: there
the devices meet (:mod:`dure.ir.tensor.collectives`).  Experts are cut by their width, or dealt out
whole (expert parallel), or both: ``experts`` parts, each on ``devices / experts`` devices.  Widths
and vocabularies that aren't multiples are filled up with zeros; heads and experts must go in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.models.config import ModelConfig
from dure.models.weights import WeightSpec, layer_shapes

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Shards:
    """How many devices share a model, and in how many parts its experts are dealt out."""

    devices: int = 1
    experts: int = 1

    @property
    def widths(self) -> int:
        """The devices that share each expert's width."""
        return self.devices // self.experts

    def expert_part(self, device: int) -> int:
        """Which part of the experts a device holds."""
        return device // self.widths


def tensor_parallel_counts(config: ModelConfig) -> list[int]:
    """The numbers of devices over which the heads can be cut, in ascending order."""
    return [n for n in range(1, config.heads + 1) if _divides(config, n)]


def _divides(config: ModelConfig, devices: int) -> bool:
    kv = config.kv_heads
    return config.heads % devices == 0 and (kv % devices == 0 or devices % kv == 0)


def check_shards(config: ModelConfig, shards: Shards) -> None:
    """Raise :class:`UsageError` for devices that the heads or the experts can't be cut over."""
    devices = shards.devices
    if not _divides(config, devices):
        fits = ", ".join(map(str, tensor_parallel_counts(config)))
        raise UsageError(
            f"{config.heads} heads with {config.kv_heads} KV heads over {devices} devices",
            where=config.where,
            rule="each device has as many heads, and KV heads are cut or repeated evenly",
            fix=f"--tp {_nearest(tensor_parallel_counts(config), devices)} (of {fits})",
        )
    if shards.experts == 1:
        return
    count = 0 if config.experts is None else config.experts.count
    fits = [n for n in range(2, devices + 1) if devices % n == 0 and count and count % n == 0]
    if shards.experts not in fits:
        raise UsageError(
            f"{count or 'no'} experts in {shards.experts} parts over {devices} devices",
            where=config.where,
            rule="the parts divide the experts, and the devices",
            fix=f"--ep {_nearest(fits, shards.experts)}" if fits else "leave out --ep",
        )


def _nearest(counts: list[int], wanted: int) -> int:
    return min(counts, key=lambda n: (abs(n - wanted), n))


def shard_config(config: ModelConfig, shards: Shards) -> ModelConfig:
    """A device's own heads and width; experts are still counted whole."""
    n = shards.devices
    if n == 1:
        return config
    parts = n if config.experts is None else shards.widths
    return replace(
        config,
        heads=config.heads // n,
        kv_heads=max(1, config.kv_heads // n),
        intermediate=-(-config.intermediate // parts),
    )


def shard_shapes(config: ModelConfig, shards: Shards) -> dict[str, tuple[int, ...]]:
    """The weights of one layer on a device, as :func:`~dure.models.weights.layer_shapes`."""
    shapes = layer_shapes(shard_config(config, shards))
    if config.experts is None:
        return shapes
    held = config.experts.count // shards.experts
    return {
        name: (held, *shape[1:]) if name in _BY_EXPERT else shape for name, shape in shapes.items()
    }


_BY_EXPERT = frozenset(("gate", "up", "down", "gate_bias", "up_bias", "down_bias"))


def embedding_shape(config: ModelConfig, shards: Shards) -> tuple[int, int]:
    """The embedding table on a device: part of its columns, which are gathered; all of it where it
    is the head too, or where the columns can't be cut.
    """
    columns = config.hidden
    if not config.tied and columns % shards.devices == 0:
        columns //= shards.devices
    return config.vocabulary, columns


def head_shape(config: ModelConfig, shards: Shards) -> tuple[int, int]:
    """The rows of the head on a device.  Of a tied one they are rows of the embedding table."""
    return -(-config.vocabulary // shards.devices), config.hidden


def shard_specs(config: ModelConfig, shards: Shards) -> list[WeightSpec]:
    """Every weight of a device, as :func:`~dure.models.weights.weight_specs`."""
    specs = [WeightSpec("embedding", None, embedding_shape(config, shards))]
    shapes = shard_shapes(config, shards)
    for layer in range(config.layers):
        specs += [WeightSpec(name, layer, shape) for name, shape in shapes.items()]
    specs.append(WeightSpec("final_norm", None, (config.hidden,)))
    if not config.tied:
        specs.append(WeightSpec("head", None, head_shape(config, shards)))
    return specs


def shard_of(
    config: ModelConfig, shards: Shards, weights: Mapping[str, Array], name: str, device: int
) -> Array:
    """A device's part of a weight of one layer, or of the model, given the whole ones by their
    logical names.
    """
    if name == "head" and config.tied:
        weights = {"head": weights["embedding"]}
    whole = weights[name]
    shape = _shape_of(config, shards, name)
    n, own = shards.devices, device
    if name in _BY_EXPERT and config.experts is not None:
        held = config.experts.count // shards.experts
        first = shards.expert_part(device) * held
        whole, n, own = whole[first : first + held], shards.widths, device % shards.widths
    base = name.removesuffix("_bias")
    if base in ("o", "down") and name.endswith("_bias"):
        # What is added to a sum is added on one of the devices.
        return whole if own == 0 else np.zeros_like(whole)
    if base in ("k", "v"):
        repeats = max(1, n // config.kv_heads)
        return _cut(whole, 0, own // repeats, shape)
    axis = _AXES.get(name)
    if axis is None or shape == whole.shape:
        return whole
    return _cut(whole, axis % whole.ndim, own, shape)


#: The axis along which a weight is cut; the others are whole on each device.
_AXES = {
    **dict.fromkeys(("q", "gate", "up"), -2),
    **dict.fromkeys(("o", "down", "embedding"), -1),
    **dict.fromkeys(("q_bias", "gate_bias", "up_bias", "sinks"), -1),
    "head": 0,
}


def _shape_of(config: ModelConfig, shards: Shards, name: str) -> tuple[int, ...]:
    if name == "embedding":
        return embedding_shape(config, shards)
    if name == "head":
        return head_shape(config, shards)
    return (config.hidden,) if name == "final_norm" else shard_shapes(config, shards)[name]


def _cut(whole: Array, axis: int, part: int, shape: tuple[int, ...]) -> Array:
    """A part of a weight along an axis, filled up with zeros."""
    size = shape[axis]
    found = np.zeros(shape, whole.dtype)
    own = np.take(whole, range(part * size, min((part + 1) * size, whole.shape[axis])), axis)
    found[tuple(slice(0, extent) for extent in own.shape)] = own
    return found
