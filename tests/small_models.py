"""Published decoders, shrunk, with weights drawn at random: whole, and a device's part."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dure.ir.core import Function
from dure.ir.types import static_extent
from dure.models import shapes
from dure.models.config import ModelConfig
from dure.models.shards import Shards, shard_of
from dure.models.weights import weight_specs

DECODERS = [name for name in shapes.names() if name != "bert-large"]


def small(name: str, **changes: Any) -> ModelConfig:
    """The shape's family with two layers, each kind of layer that it has among them."""
    config = shapes.model_config(name)
    kinds = [0, next((i for i, w in enumerate(config.windows) if w != config.windows[0]), 1)]
    experts = config.experts
    if experts is not None:
        experts = replace(experts, count=8, chosen=3)
    values: dict[str, Any] = {
        "hidden": 256,
        "intermediate": 90,
        "layers": 2,
        "heads": 8,
        "kv_heads": 8 if config.heads == config.kv_heads else 2,
        "head_dim": 16,
        "vocabulary": 509,
        "context": 96,
        "windows": tuple(min(config.windows[i], 9) for i in kinds),
        "rotated": tuple(config.rotated[i] for i in kinds),
        "experts": experts,
    }
    return replace(config, **values | changes)


def random_weights(config: ModelConfig) -> dict[tuple[int | None, str], Any]:
    draw = np.random.default_rng(5)
    found: dict[tuple[int | None, str], Any] = {}
    for spec in weight_specs(config):
        values = draw.standard_normal(spec.shape).astype(np.float32) * spec.shape[-1] ** -0.5
        found[spec.layer, spec.name] = (1 + values if "norm" in spec.name else values).astype(
            np.float32
        )
    return found


def arguments(
    function: Function,
    config: ModelConfig,
    inputs: Mapping[str, Any],
    shards: Shards,
    device: int = 0,
) -> dict[str, Any]:
    """A device's arguments of a step program by name: its shards of weights and of a cache that are
    the same for all.
    """
    weights = random_weights(config)
    given: dict[str, Any] = dict(inputs)
    given["expert_part"] = np.array([shards.expert_part(device)], np.int32)
    found: dict[str, Any] = {}
    for param, name in zip(function.params, function.attrs["names"], strict=True):  # type: ignore[arg-type]
        shape = tuple(static_extent(e) or 0 for e in param.value.tensor.shape)
        _, _, rest = str(name).partition(".")
        if name in given:
            array = given[name]
        elif str(name).startswith("rope"):
            angles = np.random.default_rng(7).standard_normal(shape)
            array = (np.cos(angles) if "cos" in name else np.sin(angles)).astype(np.float32)
        elif "pool" in name:
            whole = (shape[0], config.kv_heads, shape[2])
            drawn = np.random.default_rng(zlib.crc32(str(name).encode())).standard_normal(whole)
            part = device * config.kv_heads // shards.devices
            array = drawn[:, part : part + shape[1]].astype(np.float32)
        else:
            layer, _, own = rest.partition(".")
            number = int(layer) if own else None
            own = own or str(name)
            mine = {n: w for (where, n), w in weights.items() if where == number}
            array = shard_of(config, shards, mine, own, device)
        assert array.shape == shape or name in given, (name, array.shape, shape)
        found[param.value.name] = array
    return found
