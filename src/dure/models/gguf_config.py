"""A model's configuration from the metadata of its GGUF file.

Keys are those of the GGUF specification and of llama.cpp's converters; where a converter leaves
something out, the default is the one that the model's authors published, named here with its
source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol

from dure.errors import ModelFileError
from dure.models.config import LIMITS, Family, ModelConfig, RopeConfig, RopeScaling

#: Architectures as files name them.
ARCHITECTURES: dict[str, Family] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
_BIASES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
#: Gemma 3's report and config.json: five local layers, then a global one; local layers keep base
#: 10000.
_GEMMA3_PERIOD = 6
_GEMMA3_LOCAL_BASE = 10000.0
#: Gemma-3-27b's published query_pre_attn_scalar, 5376 / 32; the metadata has no key for it.  The
#: other sizes use head_dim.
_GEMMA3_27B = (62, 5376, 32)


class Metadata(Protocol):
    """What is asked of a file's metadata (:class:`dure.frontends.gguf.Metadata`)."""

    def __contains__(self, key: object) -> bool: ...
    def type_of(self, key: str) -> str: ...
    def require_int(self, key: str) -> int: ...
    def get_int(self, key: str, default: int) -> int: ...
    def require_float(self, key: str) -> float: ...
    def get_float(self, key: str, default: float) -> float: ...
    def get_bool(self, key: str, default: bool) -> bool: ...
    def get_str(self, key: str, default: str) -> str: ...
    def require_str(self, key: str) -> str: ...
    def per_layer_ints(self, key: str, layers: int) -> list[int]: ...


def config_from_gguf(
    metadata: Metadata, tensors: Mapping[str, tuple[int, ...]], where: str = ""
) -> ModelConfig:
    """The configuration; ``tensors`` are the shapes of the file's tensors by name.

    Raises :class:`ModelFileError` for an architecture that dure doesn't know, a missing key, or a
    value that no model has.
    """
    architecture = metadata.require_str("general.architecture")
    family = ARCHITECTURES.get(architecture)
    if family is None:
        raise ModelFileError(
            f"unknown architecture {architecture!r}",
            where=where,
            rule=f"dure runs {', '.join(ARCHITECTURES)}",
            fix="use a model of one of these architectures",
        )
    if metadata.get_int(f"{architecture}.expert_count", 0) > 0:
        raise ModelFileError(
            "the model is a mixture of experts",
            where=where,
            rule=f"dure runs dense models of the architectures {', '.join(ARCHITECTURES)}",
            fix="use a dense model",
        )
    return _Reader(metadata, tensors, architecture, family, where).config()


class _Reader:
    """The keys of one architecture."""

    def __init__(
        self,
        metadata: Metadata,
        tensors: Mapping[str, tuple[int, ...]],
        architecture: str,
        family: Family,
        where: str,
    ) -> None:
        self.metadata = metadata
        self.tensors = tensors
        self.prefix = architecture + "."
        self.family: Family = family
        self.where = where
        self.layers = self.size("block_count", "layers")

    def size(self, key: str, limit: str) -> int:
        """A size, checked before anything is made of it."""
        value = self.metadata.require_int(self.prefix + key)
        low, high = LIMITS[limit]
        if not low <= value <= high:
            raise ModelFileError(
                f"metadata key {self.prefix + key!r} is {value}",
                where=self.where,
                rule=f"it lies between {low} and {high}",
                fix="the file is damaged: fetch or convert it again",
            )
        return value

    def uniform(self, key: str) -> int:
        """A value that may be given a layer, and must be the same for all."""
        values = set(self.metadata.per_layer_ints(self.prefix + key, self.layers))
        if len(values) != 1:
            raise ModelFileError(
                f"metadata key {self.prefix + key!r} differs from layer to layer",
                where=self.where,
                rule="all layers have the same sizes",
                fix="use a model whose layers are alike",
            )
        return values.pop()

    def config(self) -> ModelConfig:
        hidden = self.size("embedding_length", "hidden")
        heads = self.uniform("attention.head_count")
        has_kv = self.prefix + "attention.head_count_kv" in self.metadata
        kv_heads = self.uniform("attention.head_count_kv") if has_kv else heads
        if heads <= 0 or kv_heads <= 0:
            raise ModelFileError(
                f"{heads} attention heads and {kv_heads} KV heads",
                where=self.where,
                rule="a decoder has at least one of each",
                fix="use a model of plain attention layers",
            )
        head_dim = self.metadata.get_int(self.prefix + "attention.key_length", hidden // heads)
        self.check_heads(head_dim)
        gemma = self.family == "gemma3"
        rope, local_rope = self.ropes(head_dim)
        scale_of = hidden // heads if (self.layers, hidden, heads) == _GEMMA3_27B else head_dim
        return ModelConfig(
            family=self.family,
            hidden=hidden,
            intermediate=self.uniform("feed_forward_length"),
            layers=self.layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=self.vocabulary(),
            context=self.size("context_length", "context"),
            rms_epsilon=self.metadata.require_float(
                self.prefix + "attention.layer_norm_rms_epsilon"
            ),
            rope=rope,
            local_rope=local_rope,
            windows=self.windows(),
            interleaved=self.family == "llama",
            tied="output.weight" not in self.tensors,
            qk_norm=self.family in ("qwen3", "gemma3"),
            post_norms=gemma,
            activation="gelu_tanh" if gemma else "silu",
            embedding_scale=math.sqrt(hidden) if gemma else 1.0,
            attention_scale=1.0 / math.sqrt(max(scale_of if gemma else head_dim, 1)),
            attention_softcap=self.metadata.get_float(self.prefix + "attn_logit_softcapping", 0.0),
            final_softcap=self.metadata.get_float(self.prefix + "final_logit_softcapping", 0.0),
            biases=frozenset(
                name for name, key in _BIASES.items() if f"blk.0.{key}.bias" in self.tensors
            ),
            where=self.where,
        )

    def check_heads(self, head_dim: int) -> None:
        """Rope turns whole heads, and values are as wide as keys."""
        for key in ("attention.value_length", "rope.dimension_count"):
            value = self.metadata.get_int(self.prefix + key, head_dim)
            if value != head_dim:
                raise ModelFileError(
                    f"metadata key {self.prefix + key!r} is {value}, and a head has {head_dim}",
                    where=self.where,
                    rule="keys and values are equally wide, and rope turns all of a head",
                    fix="use a model without partial rotation",
                )

    def vocabulary(self) -> int:
        """Rows of the embedding, which must exist."""
        shape = self.tensors.get("token_embd.weight")
        if shape is None or len(shape) != 2:
            raise ModelFileError(
                "the file has no tensor 'token_embd.weight' of two axes",
                where=self.where,
                fix="use a file that holds all of the model",
            )
        return shape[0]

    def windows(self) -> tuple[int, ...]:
        window = self.metadata.get_int(self.prefix + "attention.sliding_window", 0)
        if self.family != "gemma3":
            return (max(window, 0),) * self.layers
        key = self.prefix + "attention.sliding_window_pattern"
        if key not in self.metadata:
            period = _GEMMA3_PERIOD
        elif self.metadata.type_of(key).startswith("ARRAY"):
            local = self.metadata.per_layer_ints(key, self.layers)
            return tuple(window if flag else 0 for flag in local)
        else:
            period = max(self.metadata.require_int(key), 1)
        return tuple(0 if layer % period == period - 1 else window for layer in range(self.layers))

    def ropes(self, head_dim: int) -> tuple[RopeConfig, RopeConfig | None]:
        """The rope of global layers, and of local ones where they have their own."""
        base = self.metadata.get_float(self.prefix + "rope.freq_base", 10000.0)
        rope = RopeConfig(base, self.scaling())
        if self.family != "gemma3":
            return rope, None
        key = self.prefix + "rope.freq_base_swa"
        return rope, RopeConfig(self.metadata.get_float(key, _GEMMA3_LOCAL_BASE))

    def scaling(self) -> RopeScaling:
        kinds: dict[str, Literal["none", "linear", "yarn"]] = {
            "none": "none",
            "linear": "linear",
            "yarn": "yarn",
        }
        name = self.metadata.get_str(self.prefix + "rope.scaling.type", "none")
        if name not in kinds:
            raise ModelFileError(
                f"unknown rope scaling {name!r}",
                where=self.where,
                rule=f"rope scaling is one of {', '.join(kinds)}",
                fix="use a model with one of these",
            )
        factor = self.metadata.get_float(self.prefix + "rope.scaling.factor", 1.0)
        return RopeScaling(
            kinds[name],
            factor=factor if factor else 1.0,
            original_context=self.metadata.get_int(
                self.prefix + "rope.scaling.original_context_length",
                self.metadata.get_int(self.prefix + "context_length", 0),
            ),
            attention_factor=_attention_factor(self.metadata, self.prefix, name, factor),
        )


def _attention_factor(metadata: Metadata, prefix: str, kind: str, factor: float) -> float | None:
    """YaRN's factor on cosines and sines, where the file brings one."""
    key = prefix + "rope.scaling.attn_factor"
    if kind != "yarn" or key not in metadata or factor <= 0:
        return None
    return metadata.require_float(key) * (0.1 * math.log(factor) + 1.0)
