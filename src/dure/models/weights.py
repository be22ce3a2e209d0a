"""The weights of a model: logical names, shapes, and what they are called in files.

Matrices are (outputs, inputs), as GGUF and PyTorch keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dure.errors import ModelFileError
from dure.models.config import ModelConfig

#: Logical name -> name in a GGUF file; ``{}`` is the layer.
GGUF_NAMES: dict[str, str] = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "o_bias": "blk.{}.attn_output.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "attention_post_norm": "blk.{}.post_attention_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "mlp_post_norm": "blk.{}.post_ffw_norm.weight",
}
_HF: dict[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    **{n: f"model.layers.{{}}.self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"{n}_bias": f"model.layers.{{}}.self_attn.{n}_proj.bias" for n in "qkvo"},
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    **{n: f"model.layers.{{}}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{f"{n}_bias": f"model.layers.{{}}.mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
}
_HF_PRE = {**_HF, "mlp_norm": "model.layers.{}.post_attention_layernorm.weight"}
_HF_POST = {
    **_HF,
    "attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Logical name -> name in a Hugging Face checkpoint, of all but experts and their router.

    Checkpoints keep each expert apart, or all in one tensor, by family.
    """
    names = _HF_POST if config.post_norms else _HF_PRE
    return {**names, "sinks": "model.layers.{}.self_attn.sinks"}


@dataclass(frozen=True)
class WeightSpec:
    """One weight: its logical name, layer (None for the whole model's) and shape."""

    name: str
    layer: int | None
    shape: tuple[int, ...]

    def in_file(self, names: Mapping[str, str]) -> str:
        """What a file calls it."""
        return names[self.name].format(self.layer)


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The weights of one layer: logical name -> shape, in the order in which a step uses them.

    Experts are along the first axis of gate, up and down, and of their biases.
    """
    c = config
    shapes: dict[str, tuple[int, ...]] = {}
    if c.pre_norms:
        shapes["attention_norm"] = (c.hidden,)
    shapes |= {
        "q": (c.query_size, c.hidden),
        "k": (c.kv_size, c.hidden),
        "v": (c.kv_size, c.hidden),
        "o": (c.hidden, c.query_size),
    }
    shapes |= _bias_shapes(c, shapes, "qkvo")
    if c.qk_norm:
        shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    if c.sinks:
        shapes["sinks"] = (c.heads,)
    if c.post_norms:
        shapes["attention_post_norm"] = (c.hidden,)
    if c.pre_norms:
        shapes["mlp_norm"] = (c.hidden,)
    experts = () if c.experts is None else (c.experts.count,)
    if c.experts is not None:
        shapes["router"] = (c.experts.count, c.hidden)
    shapes |= dict.fromkeys(("gate", "up"), (*experts, c.intermediate, c.hidden))
    shapes["down"] = (*experts, c.hidden, c.intermediate)
    shapes |= _bias_shapes(c, shapes, ("router", "gate", "up", "down"))
    if c.post_norms:
        shapes["mlp_post_norm"] = (c.hidden,)
    return shapes


def _bias_shapes(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """A bias has the shape of its weight without the last axis."""
    found = [n for n in names if n in config.biases and n in shapes]
    return {f"{name}_bias": shapes[name][:-1] for name in found}


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """Every weight of the model; the head is absent where it is tied to the embedding."""
    c = config
    specs = [WeightSpec("embedding", None, (c.vocabulary, c.hidden))]
    shapes = layer_shapes(config)
    for layer in range(c.layers):
        specs += [WeightSpec(name, layer, shape) for name, shape in shapes.items()]
    specs.append(WeightSpec("final_norm", None, (c.hidden,)))
    if not c.tied:
        specs.append(WeightSpec("head", None, (c.vocabulary, c.hidden)))
    return specs


def check_weights(
    config: ModelConfig, names: Mapping[str, str], shape_of: Callable[[str], tuple[int, ...] | None]
) -> None:
    """Raise :class:`ModelFileError` for the first weight that a file lacks or has in another shape.

    ``shape_of`` gives the shape of a file's tensor, or None where there is none.
    """
    for spec in weight_specs(config):
        name = spec.in_file(names)
        found = shape_of(name)
        if found is None:
            raise ModelFileError(
                f"the file has no tensor {name!r}",
                where=config.where,
                rule=f"a {config.family} model of {config.layers} layers has one",
                fix="use a file that holds all of the model",
            )
        if found != spec.shape:
            raise ModelFileError(
                f"tensor {name!r} has the shape {found}",
                where=config.where,
                rule=f"the model's sizes make it {spec.shape}",
                fix="the file is damaged or was converted wrongly: fetch or convert it again",
            )
