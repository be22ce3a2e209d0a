"""What a BERT encoder is, and its record from a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dure.errors import ModelFileError
from dure.models.config import LIMITS

#: ``model_type`` of the encoders that dure knows, as published files name it.
ENCODER_TYPES = ("bert",)
_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
    "token_types": "type_vocab_size",
}
_LIMITS = {**LIMITS, "token_types": LIMITS["context"]}


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder of BERT's kind: learned positions, norms after each sum, biases everywhere.

    ``context`` is the number of learned positions, ``token_types`` that of segments.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    token_types: int = 2
    epsilon: float = 1e-12
    activation: Literal["gelu_erf", "gelu_tanh"] = "gelu_erf"
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in _KEYS:
            low, high = _LIMITS[name]
            value: int = getattr(self, name)
            if not low <= value <= high:
                raise self._fail(f"{name} is {value}", f"{name} lies between {low} and {high}")
        if self.hidden % self.heads:
            raise self._fail(
                f"{self.heads} attention heads share {self.hidden} columns",
                "the number of columns is a multiple of the number of heads",
            )
        if not (math.isfinite(self.epsilon) and 0 < self.epsilon <= 1):
            raise self._fail(f"the layer norm's epsilon is {self.epsilon}", "0 < epsilon <= 1")

    @property
    def head_dim(self) -> int:
        """The size of one head."""
        return self.hidden // self.heads

    def _fail(self, what: str, rule: str) -> ModelFileError:
        return ModelFileError(what, where=self.where, rule=rule, fix="check the model's file")


def encoder_from_hf(values: Mapping[str, Any], where: str = "") -> EncoderConfig:
    """The encoder in the parsed object of a ``config.json`` of one of :data:`ENCODER_TYPES`.

    Raises :class:`ModelFileError` for what is missing, of the wrong type, or not BERT's: relative
    positions, a decoder, another activation.
    """

    def fail(what: str, rule: str) -> ModelFileError:
        fix = "download the model's config.json again"
        return ModelFileError(what, where=where, rule=rule, fix=fix)

    if values.get("model_type") not in ENCODER_TYPES:
        raise fail(
            f"unknown model_type {values.get('model_type')!r}",
            f"dure runs encoders of the types {', '.join(ENCODER_TYPES)}",
        )
    sizes: dict[str, int] = {}
    for name, key in _KEYS.items():
        if key not in values:
            raise fail(f"there is no {key}", "an encoder's config.json has one")
        value: object = values[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise fail(f"{key} is {value!r}", f"{key} is an integer")
        sizes[name] = value
    activations: dict[object, Literal["gelu_erf", "gelu_tanh"]] = {
        "gelu": "gelu_erf",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
    }
    activation: object = values.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in activations:
        raise fail(f"activation {activation!r}", f"it is one of {', '.join(map(str, activations))}")
    if values.get("position_embedding_type", "absolute") != "absolute" or values.get("is_decoder"):
        raise fail(
            "an encoder with relative positions, or a decoder",
            "dure's encoders have absolute positions and see every position",
        )
    epsilon: object = values.get("layer_norm_eps", 1e-12)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
        raise fail(f"layer_norm_eps is {epsilon!r}", "layer_norm_eps is a number")
    return EncoderConfig(
        **sizes, epsilon=float(epsilon), activation=activations[activation], where=where
    )
