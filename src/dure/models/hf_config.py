"""A model's configuration from a Hugging Face ``config.json``.

The defaults of absent keys are those of the model's own configuration class in ``transformers``,
named here, and only where published files do leave the key out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dure.errors import ModelFileError
from dure.models.config import (
    LIMITS,
    Family,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    ScalingKind,
)

#: ``model_type`` as published files name it.
MODEL_TYPES: dict[str, Family] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALINGS: dict[str, ScalingKind] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}


def read_hf_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration in a ``config.json``; raises :class:`ModelFileError` if damaged."""
    where = os.fspath(path)
    try:
        found: object = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(
            "there is no config.json", where=where, fix="give the folder of a downloaded model"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"config.json cannot be read: {error}", where=where, fix="download the model again"
        ) from error
    if not isinstance(found, dict):
        raise ModelFileError(
            "config.json is not an object", where=where, fix="download the model again"
        )
    return config_from_hf(found, where)  # pyright: ignore[reportUnknownArgumentType]


def config_from_hf(values: Mapping[str, Any], where: str = "") -> ModelConfig:
    """The configuration in the parsed object of a ``config.json``."""
    kind = values.get("model_type")
    family = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ModelFileError(
            f"unknown model_type {kind!r}",
            where=where,
            rule=f"dure runs {', '.join(MODEL_TYPES)}",
            fix="use a model of one of these types",
        )
    inner = values.get("text_config")
    if kind == "gemma3" and isinstance(inner, Mapping):
        return config_from_hf({**inner, "model_type": "gemma3_text"}, where)  # pyright: ignore
    return _Reader(values, family, where).config()


class _Reader:
    """The keys of one object, with their types checked."""

    def __init__(self, values: Mapping[str, Any], family: Family, where: str) -> None:
        self.values = values
        self.family: Family = family
        self.where = where
        self.gemma = family == "gemma3"

    def fail(self, what: str, rule: str = "") -> ModelFileError:
        return ModelFileError(
            what, where=self.where, rule=rule, fix="download the model's config.json again"
        )

    def size(self, key: str, limit: str, default: int | None = None) -> int:
        """An integer within the limits of that size."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(f"{key} is {value!r}", f"{key} is an integer")
        low, high = LIMITS[limit]
        if not low <= value <= high:
            raise self.fail(f"{key} is {value}", f"{key} lies between {low} and {high}")
        return value

    def number(self, source: Mapping[str, Any], key: str, default: float | None = None) -> float:
        """A number, or the default where the key is absent or null."""
        value = source.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(f"{key} is {value!r}", f"{key} is a number")
        try:
            return float(value)
        except OverflowError as error:
            raise self.fail(f"{key} is too large a number") from error

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}", f"{key} is true or false")
        return value

    def config(self) -> ModelConfig:
        hidden = self.size("hidden_size", "hidden")
        heads = self.size("num_attention_heads", "heads")
        layers = self.size("num_hidden_layers", "layers")
        explicit = self.values.get("head_dim")
        head_dim = hidden // heads if explicit is None else self.size("head_dim", "head_dim")
        if self.gemma:
            activation = self.values.get("hidden_activation", "gelu_pytorch_tanh")
        else:
            activation = self.values.get("hidden_act", "silu")
        if activation not in _ACTIVATIONS:
            raise self.fail(
                f"activation {activation!r}", f"an activation is one of {', '.join(_ACTIVATIONS)}"
            )
        scale = self.number(self.values, "query_pre_attn_scalar", 256.0 if self.gemma else head_dim)
        rope, local_rope = self.ropes()
        return ModelConfig(
            family=self.family,
            hidden=hidden,
            intermediate=self.size("intermediate_size", "intermediate"),
            layers=layers,
            heads=heads,
            kv_heads=self.size("num_key_value_heads", "kv_heads", heads),
            head_dim=head_dim,
            vocabulary=self.size("vocab_size", "vocabulary"),
            context=self.size("max_position_embeddings", "context"),
            rms_epsilon=self.number(self.values, "rms_norm_eps", 1e-6),
            rope=rope,
            local_rope=local_rope,
            windows=self.windows(layers),
            tied=self.flag("tie_word_embeddings", self.gemma),
            qk_norm=self.family in ("qwen3", "gemma3"),
            sandwich=self.gemma,
            activation="gelu_tanh" if activation == "gelu_pytorch_tanh" else "silu",
            embedding_scale=math.sqrt(hidden) if self.gemma else 1.0,
            attention_scale=1.0 / math.sqrt(scale) if scale > 0 else math.nan,
            attention_softcap=self.number(self.values, "attn_logit_softcapping", 0.0),
            final_softcap=self.number(self.values, "final_logit_softcapping", 0.0),
            norm_offset=1.0 if self.gemma else 0.0,
            biases=self.biases(),
            where=self.where,
        )

    def biases(self) -> frozenset[str]:
        if self.family == "qwen2":
            return frozenset("qkv")
        return frozenset("qkvo") if self.flag("attention_bias", False) else frozenset()

    def windows(self, layers: int) -> tuple[int, ...]:
        """One window a layer, from ``layer_types`` or the older keys."""
        window = self.values.get("sliding_window")
        if window is None or (self.family in ("qwen2", "qwen3") and not self.sliding()):
            return (0,) * layers
        window = self.size("sliding_window", "context")
        types = self.values.get("layer_types")
        if isinstance(types, Sequence) and not isinstance(types, str):
            if len(types) != layers:  # pyright: ignore[reportUnknownArgumentType]
                raise self.fail(f"layer_types has other than {layers} entries", "one a layer")
            return tuple(window if kind == "sliding_attention" else 0 for kind in types)  # pyright: ignore
        if self.gemma:
            period = self.size("sliding_window_pattern", "layers", 6)
            return tuple(0 if i % period == period - 1 else window for i in range(layers))
        first = self.size("max_window_layers", "layers", 0) if self.sliding() else 0
        return tuple(window if i >= first else 0 for i in range(layers))

    def sliding(self) -> bool:
        return self.flag("use_sliding_window", False)

    def ropes(self) -> tuple[RopeConfig, RopeConfig | None]:
        """Global and local rope, from ``rope_parameters`` or the older keys."""
        base = self.number(self.values, "rope_theta", 1000000.0 if self.gemma else 10000.0)
        nested = self.values.get("rope_parameters")
        if isinstance(nested, Mapping):
            full = nested.get("full_attention", nested)  # pyright: ignore
            rope = self.rope(full, base)  # pyright: ignore[reportUnknownArgumentType]
            local = nested.get("sliding_attention")  # pyright: ignore
            if not self.gemma:
                return rope, None
            return rope, self.rope(local if isinstance(local, Mapping) else {}, 10000.0)  # pyright: ignore
        scaling = self.values.get("rope_scaling")
        rope = self.rope(scaling if isinstance(scaling, Mapping) else {}, base)  # pyright: ignore
        if not self.gemma:
            return rope, None
        return rope, RopeConfig(self.number(self.values, "rope_local_base_freq", 10000.0))

    def rope(self, source: Mapping[str, Any], base: float) -> RopeConfig:
        name = source.get("rope_type", source.get("type", "default"))
        kind = _SCALINGS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise self.fail(
                f"unknown rope scaling {name!r}", f"it is one of {', '.join(_SCALINGS)}"
            )
        context = self.size("max_position_embeddings", "context")
        attention = source.get("attention_factor")
        scaling = RopeScaling(
            kind,
            factor=self.number(source, "factor", 1.0),
            original_context=self.original_context(source, context),
            low_frequency_factor=self.number(source, "low_freq_factor", 1.0),
            high_frequency_factor=self.number(source, "high_freq_factor", 4.0),
            beta_fast=self.number(source, "beta_fast", 32.0),
            beta_slow=self.number(source, "beta_slow", 1.0),
            attention_factor=None if attention is None else self.number(source, "attention_factor"),
            truncate=bool(source.get("truncate", True)),
        )
        return RopeConfig(self.number(source, "rope_theta", base), scaling)

    def original_context(self, source: Mapping[str, Any], context: int) -> int:
        """The context that the model was first trained with."""
        value = self.number(source, "original_max_position_embeddings", float(context))
        if not 1 <= value <= LIMITS["context"][1]:
            raise self.fail(f"original_max_position_embeddings is {value}", "it is a length")
        return int(value)
