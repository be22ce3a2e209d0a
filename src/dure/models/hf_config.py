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
from typing import Any, cast

from dure.errors import ModelFileError
from dure.models.config import (
    LIMITS,
    Activation,
    ExpertsConfig,
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
    "exaone4": "exaone4",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "gpt_oss": "gpt_oss",
}
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
#: What the files of Gemma 3 leave out where it is as in ``Gemma3TextConfig``.
_GEMMA_DEFAULTS: dict[str, int] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
}
_SCALINGS: dict[str, ScalingKind] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}


def read_hf_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration in a ``config.json``; raises :class:`ModelFileError` if damaged."""
    return config_from_hf(read_json(path), os.fspath(path))


def read_json(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The object in a ``config.json``; raises :class:`ModelFileError` if there is none."""
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
    return cast("dict[str, Any]", found)


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
    if kind == "gemma3" and "text_config" in values:
        inner = _mapping(values["text_config"])
        if inner is None:
            raise ModelFileError(
                f"text_config is {values['text_config']!r}",
                where=where,
                rule="text_config is an object",
                fix="download the model's config.json again",
            )
        return config_from_hf({**inner, "model_type": "gemma3_text"}, where)
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
        if self.gemma:
            default = _GEMMA_DEFAULTS.get(key, default)
        if key not in self.values and default is None:
            raise self.fail(f"there is no {key}", f"a {self.family} model's config.json has one")
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

    def flag(self, key: str, default: bool, source: Mapping[str, Any] | None = None) -> bool:
        value = (self.values if source is None else source).get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}", f"{key} is true or false")
        return value

    def config(self) -> ModelConfig:
        hidden = self.size("hidden_size", "hidden")
        heads = self.size("num_attention_heads", "heads")
        layers = self.size("num_hidden_layers", "layers")
        explicit = self.values.get("head_dim") is not None or self.gemma
        head_dim = self.size("head_dim", "head_dim") if explicit else hidden // heads
        windows = self.windows(layers)
        gpt_oss = self.family == "gpt_oss"
        scale = self.number(self.values, "query_pre_attn_scalar", 256.0 if self.gemma else head_dim)
        rope, local_rope = self.ropes()
        return ModelConfig(
            family=self.family,
            hidden=hidden,
            intermediate=self.size(self.intermediate_key(), "intermediate"),
            layers=layers,
            heads=heads,
            kv_heads=self.size("num_key_value_heads", "kv_heads", heads),
            head_dim=head_dim,
            vocabulary=self.size("vocab_size", "vocabulary"),
            context=self.size("max_position_embeddings", "context"),
            rms_epsilon=self.number(self.values, "rms_norm_eps", 1e-5 if gpt_oss else 1e-6),
            rope=rope,
            local_rope=local_rope,
            windows=windows,
            rotated=self.rotated(windows),
            tied=self.flag("tie_word_embeddings", self.gemma),
            qk_norm=self.family in ("qwen3", "qwen3_moe", "gemma3", "exaone4"),
            pre_norms=self.family != "exaone4",
            post_norms=self.family in ("gemma3", "exaone4"),
            sinks=gpt_oss,
            experts=self.experts(),
            activation=self.activation(),
            swiglu_limit=self.number(self.values, "swiglu_limit", 7.0),
            swiglu_alpha=self.number(self.values, "swiglu_alpha", 1.702),
            embedding_scale=math.sqrt(hidden) if self.gemma else 1.0,
            attention_scale=1.0 / math.sqrt(scale) if scale > 0 else math.nan,
            attention_softcap=self.number(self.values, "attn_logit_softcapping", 0.0),
            final_softcap=self.number(self.values, "final_logit_softcapping", 0.0),
            norm_offset=1.0 if self.gemma else 0.0,
            biases=self.biases(),
            where=self.where,
        )

    def mapping(self, source: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
        """An object, or None where the key is absent or null."""
        value: object = source.get(key)
        found = _mapping(value)
        if value is not None and found is None:
            raise self.fail(f"{key} is {value!r}", f"{key} is an object")
        return found

    def activation(self) -> Activation:
        """The activation of the gate."""
        if self.gemma:
            name = self.values.get("hidden_activation", "gelu_pytorch_tanh")
        else:
            name = self.values.get("hidden_act", "silu")
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise self.fail(f"activation {name!r}", f"an activation is one of {known}")
        # gpt-oss' files say silu and mean the clamped gate of the model's own code.
        return "clamped_swiglu" if self.family == "gpt_oss" else _ACTIVATIONS[name]

    def intermediate_key(self) -> str:
        """What says how wide the MLP, or one expert, is."""
        return "moe_intermediate_size" if self.family == "qwen3_moe" else "intermediate_size"

    def experts(self) -> ExpertsConfig | None:
        """The mixture of experts, in the families that have one."""
        if self.family not in ("mixtral", "qwen3_moe", "gpt_oss"):
            return None
        if self.values.get("mlp_only_layers") or self.values.get("decoder_sparse_step", 1) != 1:
            raise self.fail(
                "some layers have experts and others don't",
                "all layers of a mixture of experts have experts",
            )
        # Qwen3's class calls num_local_experts what its published files call num_experts.
        key = "num_experts" if "num_experts" in self.values else "num_local_experts"
        return ExpertsConfig(
            self.size(key, "experts"),
            self.size("num_experts_per_tok", "experts"),
            # Qwen3MoeConfig's default; the others always divide by the sum.
            self.flag("norm_topk_prob", self.family != "qwen3_moe"),
        )

    def biases(self) -> frozenset[str]:
        """Which projections have a bias."""
        if self.family == "qwen2":
            return frozenset("qkv")
        gpt_oss = self.family == "gpt_oss"
        found = set("qkvo") if self.flag("attention_bias", gpt_oss) else set[str]()
        if gpt_oss:
            found |= {"router", "gate", "up", "down"}
        elif self.family == "llama" and self.flag("mlp_bias", False):
            found |= {"gate", "up", "down"}
        return frozenset(found)

    def windows(self, layers: int) -> tuple[int, ...]:
        """One window a layer, from ``layer_types`` or the older keys."""
        window = self.values.get("sliding_window")
        optional = self.family in ("qwen2", "qwen3", "qwen3_moe")
        if window is None or (optional and not self.sliding()):
            return (0,) * layers
        window = self.size("sliding_window", "context")
        types = self.values.get("layer_types")
        if types is not None:
            if isinstance(types, str) or not isinstance(types, Sequence):
                raise self.fail(f"layer_types is {types!r}", "layer_types is a list")
            kinds = cast("Sequence[object]", types)
            if len(kinds) != layers:
                raise self.fail(f"layer_types has other than {layers} entries", "one a layer")
            wrong = [k for k in kinds if k not in ("sliding_attention", "full_attention")]
            if wrong:
                raise self.fail(
                    f"a layer of type {wrong[0]!r}",
                    "a layer is sliding_attention or full_attention",
                )
            return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
        pattern = self.pattern()
        if pattern:
            return tuple(window if pattern[i % len(pattern)] else 0 for i in range(layers))
        first = self.size("max_window_layers", "layers", 0) if self.sliding() else 0
        return tuple(window if i >= first else 0 for i in range(layers))

    def pattern(self) -> list[bool]:
        """Which layers of a period have a window, in the families with such a period."""
        periods = {"gemma3": 6, "exaone4": 4, "gpt_oss": 2}
        if self.family not in periods:
            return []
        written = self.values.get("sliding_window_pattern", periods[self.family])
        if isinstance(written, str) and written and set(written) <= {"L", "G"}:
            return [letter == "L" for letter in written]
        if isinstance(written, str):
            raise self.fail(
                f"sliding_window_pattern is {written!r}",
                "it is a number of layers, or an L (local) or G (global) for each of a period",
            )
        period = self.size("sliding_window_pattern", "layers", periods[self.family])
        return [True] * (period - 1) + [False]

    def rotated(self, windows: tuple[int, ...]) -> tuple[bool, ...]:
        """Which layers have rope: in EXAONE 4's hybrids, those with a window."""
        hybrid = self.family == "exaone4" and self.values.get("sliding_window") is not None
        return tuple(bool(window) or not hybrid for window in windows)

    def sliding(self) -> bool:
        return self.flag("use_sliding_window", False)

    def ropes(self) -> tuple[RopeConfig, RopeConfig | None]:
        """Global and local rope, from ``rope_parameters`` or the older keys."""
        base = self.number(self.values, "rope_theta", 1000000.0 if self.gemma else 10000.0)
        nested = self.mapping(self.values, "rope_parameters")
        if nested is not None:
            whole = "full_attention" not in nested
            rope = self.rope(nested if whole else self.mapping(nested, "full_attention"), base)
            if not self.gemma:
                return rope, None
            return rope, self.rope(self.mapping(nested, "sliding_attention"), 10000.0)
        rope = self.rope(self.mapping(self.values, "rope_scaling"), base)
        if not self.gemma:
            return rope, None
        return rope, RopeConfig(self.number(self.values, "rope_local_base_freq", 10000.0))

    def rope(self, source: Mapping[str, Any] | None, base: float) -> RopeConfig:
        source = {} if source is None else source
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
            truncate=self.flag("truncate", True, source),
        )
        return RopeConfig(self.number(source, "rope_theta", base), scaling)

    def original_context(self, source: Mapping[str, Any], context: int) -> int:
        """The context that the model was first trained with."""
        value = self.number(source, "original_max_position_embeddings", float(context))
        if not 1 <= value <= LIMITS["context"][1]:
            raise self.fail(f"original_max_position_embeddings is {value}", "it is a length")
        return int(value)


def _mapping(value: object) -> Mapping[str, Any] | None:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else None
