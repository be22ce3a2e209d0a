"""What a decoder-only language model is: sizes, norms, rope, windows; one record for all families.

The record is filled from a GGUF file's metadata (:mod:`dure.models.gguf_config`) or from a Hugging
Face ``config.json`` (:mod:`dure.models.hf_config`), and checked here: a size that no model has, or
two sizes that contradict each other, is a :class:`ModelFileError` before anything is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from dure.errors import ModelFileError

Family: TypeAlias = Literal[
    "llama", "qwen2", "qwen3", "gemma3", "exaone4", "mixtral", "qwen3_moe", "gpt_oss"
]
Activation: TypeAlias = Literal["silu", "gelu_tanh", "clamped_swiglu"]
ScalingKind: TypeAlias = Literal["none", "linear", "llama3", "yarn"]

#: (smallest, largest) value that a size may have; the largest are far above any published model's.
LIMITS: dict[str, tuple[int, int]] = {
    "hidden": (1, 1 << 17),
    "intermediate": (1, 1 << 19),
    "layers": (1, 1 << 12),
    "heads": (1, 1 << 12),
    "kv_heads": (1, 1 << 12),
    "head_dim": (2, 1 << 12),
    "vocabulary": (1, 1 << 24),
    "context": (1, 1 << 24),
    "experts": (1, 1 << 14),
}
#: What may have a bias.
BIASED = ("q", "k", "v", "o", "router", "gate", "up", "down")


@dataclass(frozen=True)
class RopeScaling:
    """How rope frequencies are stretched for longer contexts.

    ``linear`` divides all by ``factor``.  ``llama3`` divides the slow ones, keeps the fast ones,
    blends between (Llama 3.1).  ``yarn`` blends by ramp and scales the result by
    ``attention_factor`` (arXiv:2309.00071).  ``original_context`` is the length that the model was
    first trained with.
    """

    kind: ScalingKind = "none"
    factor: float = 1.0
    original_context: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer: base of the frequencies, and their scaling."""

    base: float
    scaling: RopeScaling = field(default_factory=RopeScaling)


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of each layer's MLP.

    A token goes to the ``chosen`` of ``count`` experts with the largest probability, a softmax over
    all of the router's logits.  ``normalized`` divides the chosen probabilities by their sum, which
    is the same as a softmax over the chosen logits.
    """

    count: int
    chosen: int
    normalized: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model.

    ``head_dim`` is the size of one head (heads * head_dim need not be ``hidden``).
    ``intermediate`` is the width of the MLP, of one expert's where there are ``experts``.
    ``windows`` has one entry a layer: how many positions, its own included, a token of that layer
    sees; 0 is all of them. Layers with a window use ``local_rope`` where there is one.  ``rotated``
    has one entry a layer: whether it has rope.  ``interleaved`` says that a rotation pairs
    neighbours (the order of Llama's GGUF files) and not halves.
    ``qk_norm``: an RMS norm of each head of q and k before rope; ``pre_norms`` and ``post_norms``:
    RMS norms before, and after, attention and MLP.  ``norm_offset`` is added to norm weights when
    they are loaded (1 for Gemma's own files, 0 where it is in the file). ``biases`` names the
    projections that have one (of :data:`BIASED`).  ``attention_scale`` multiplies q.  ``sinks``:
    each head has a learned logit that takes part in the softmax and has no value.
    ``activation`` is of the gate; ``clamped_swiglu`` has ``swiglu_limit`` and ``swiglu_alpha``
    (see the tensor op of this name).
    """

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    rms_epsilon: float
    rope: RopeConfig
    local_rope: RopeConfig | None = None
    windows: tuple[int, ...] = ()
    rotated: tuple[bool, ...] = ()
    interleaved: bool = False
    tied: bool = True
    qk_norm: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    sinks: bool = False
    experts: ExpertsConfig | None = None
    activation: Activation = "silu"
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    norm_offset: float = 0.0
    biases: frozenset[str] = frozenset()
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * min(self.layers, LIMITS["layers"][1]))
        if not self.rotated:
            object.__setattr__(self, "rotated", (True,) * min(self.layers, LIMITS["layers"][1]))
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", 1.0 / math.sqrt(max(self.head_dim, 1)))
        self._check_sizes()
        self._check_relations()
        self._check_numbers()

    @property
    def query_size(self) -> int:
        """Columns of q: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of k, and of v: kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def rope_of(self, layer: int) -> RopeConfig:
        """The rope of a layer."""
        local = self.local_rope
        return local if local is not None and self.windows[layer] else self.rope

    def _fail(self, what: str, rule: str) -> ModelFileError:
        fix = "check the file: it is damaged, or was converted for another architecture"
        return ModelFileError(what, where=self.where, rule=rule, fix=fix)

    def _check_sizes(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = self._size(name)
            if value is not None and not low <= value <= high:
                raise self._fail(f"{name} is {value}", f"{name} lies between {low} and {high}")

    def _size(self, name: str) -> int | None:
        if name == "experts":
            return None if self.experts is None else self.experts.count
        value: int = getattr(self, name)
        return value

    def _check_relations(self) -> None:
        if self.heads % self.kv_heads:
            raise self._fail(
                f"{self.heads} attention heads share {self.kv_heads} KV heads",
                "the number of heads is a multiple of the number of KV heads",
            )
        if self.head_dim % 2:
            raise self._fail(f"head_dim is {self.head_dim}", "rope turns pairs: head_dim is even")
        if len(self.windows) != self.layers:
            raise self._fail(
                f"{len(self.windows)} window sizes for {self.layers} layers", "one entry a layer"
            )
        if len(self.rotated) != self.layers:
            raise self._fail(
                f"{len(self.rotated)} flags of rope for {self.layers} layers", "one entry a layer"
            )
        if self.experts is not None and not 1 <= self.experts.chosen <= self.experts.count:
            raise self._fail(
                f"{self.experts.chosen} of {self.experts.count} experts are chosen",
                "a token goes to at least one expert, and to no more than there are",
            )
        if not self.biases <= set(BIASED):
            raise self._fail(
                f"biases of {', '.join(sorted(self.biases - set(BIASED)))}",
                f"what has a bias is one of {', '.join(BIASED)}",
            )
        if any(not 0 <= window <= LIMITS["context"][1] for window in self.windows):
            raise self._fail(
                f"a sliding window of {max(self.windows)}", "a window is 0 or a length"
            )

    def _check_numbers(self) -> None:
        ropes = [self.rope] + ([self.local_rope] if self.local_rope is not None else [])
        numbers = {
            "the epsilon of the RMS norm": (self.rms_epsilon, 1e-12, 1.0),
            "the embedding's scale": (self.embedding_scale, 1e-6, 1e6),
            "the attention's scale": (self.attention_scale, 1e-6, 1e6),
            "the limit of the clamped SwiGLU": (self.swiglu_limit, 1e-3, 1e6),
            "the alpha of the clamped SwiGLU": (self.swiglu_alpha, 1e-3, 1e6),
        }
        for rope in ropes:
            numbers["the rope's base"] = (rope.base, 1.0, 1e12)
            numbers["the rope's scaling factor"] = (rope.scaling.factor, 1e-3, 1e6)
            if rope.scaling.kind in ("llama3", "yarn"):
                original = float(rope.scaling.original_context)
                numbers["the rope's original context"] = (original, 1, LIMITS["context"][1])
        for name, (value, low, high) in numbers.items():
            if not (math.isfinite(value) and low <= value <= high):
                raise self._fail(f"{name} is {value}", f"it lies between {low:g} and {high:g}")
