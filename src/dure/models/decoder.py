"""The step program of a decoder-only language model: one function for every family.

A step takes the tokens of a ragged batch (any mix of prefill chunks and single tokens, see
:mod:`dure.ir.tensor.attention` for the inputs), writes their keys and values into paged pools and
gives the logits of chosen rows.  The program computes in float32; activations in front of a
block-quantized weight become int8 blocks by a declared policy (:mod:`dure.compiler.quantize`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dure.ir.builder import Layer, ProgramBuilder, State
from dure.ir.core import Function, Value
from dure.ir.expr import Symbol, const
from dure.models.config import ModelConfig
from dure.models.shards import (
    Shards,
    embedding_shape,
    head_shape,
    shard_config,
    shard_shapes,
)

#: The weights of the whole program that are computed, not read: rope tables by kind of layer.
ROPE_TABLES = {"global": ("rope_cos", "rope_sin"), "local": ("rope_local_cos", "rope_local_sin")}


@dataclass(frozen=True)
class StepLimits:
    """The largest step: what the symbols are bounded by.

    ``tokens`` rows in a step, ``sequences`` in the block table, ``pages`` a sequence,
    ``pool_pages`` in all, ``logit_rows`` rows of logits, ``positions`` a sequence may reach.
    ``query_rows`` is the most rows of a work item of attention; ``aligned``: those of positions in
    one run that begins at a multiple of it.
    """

    tokens: int
    sequences: int
    pages: int
    pool_pages: int
    logit_rows: int
    positions: int
    page_size: int = 16
    query_rows: int = 32
    aligned: bool = False

    @property
    def work_items(self) -> int:
        """At most so many work items: each sequence ends in one that isn't full (and where they are
        aligned, starts in one), and full ones hold query_rows.
        """
        ends = 2 if self.aligned else 1
        return min(self.tokens, ends * self.sequences + self.tokens // self.query_rows)


@dataclass(frozen=True)
class WeightTypes:
    """Element types by logical name: of the model's own weights, and of each layer's."""

    model: Mapping[str, str]
    layers: tuple[Mapping[str, str], ...]


def step_program(
    config: ModelConfig,
    types: WeightTypes,
    limits: StepLimits,
    kv_dtype: str = "float16",
    shards: Shards | None = None,
) -> Function:
    """The step program; weights are named as in :mod:`dure.models.weights`, with ``layer.name``.

    Of several ``shards`` it is what each device runs, on its own weights; logits of a vocabulary
    that isn't cut evenly end with columns of no token.

    Raises :class:`IRError` where sizes don't fit together, :class:`ModelFileError` for a config
    that is no model (raised when the config is made).
    """
    return _Decoder(config, types, limits, kv_dtype, shards or Shards()).build()


def layer_weight(layer: int | str, name: str) -> str:
    """The program's name of a layer's weight or state."""
    return f"layer.{layer}.{name}"


class _Decoder:
    """Builds one step program."""

    def __init__(
        self,
        config: ModelConfig,
        types: WeightTypes,
        limits: StepLimits,
        kv_dtype: str,
        shards: Shards,
    ) -> None:
        self.whole, self.shards = config, shards
        self.config = shard_config(config, shards)
        self.types = types
        self.limits = limits
        self.kv_dtype = kv_dtype
        self.shapes = shard_shapes(config, shards)
        self.b = ProgramBuilder(config.family)
        self.tokens = self.b.symbol("T", 1, limits.tokens)
        self.declare_inputs()

    def declare_inputs(self) -> None:
        """The inputs of a ragged step, with the ranges of what addresses memory."""
        b, n = self.b, self.limits
        work = b.symbol("W", 1, n.work_items)
        rows = b.symbol("L", 0, n.logit_rows)

        def index(
            name: str, shape: tuple[int | Symbol, ...], low: int, high: int, unique: bool = False
        ) -> Value:
            return b.input(name, shape, "int32", index=(low, high), unique=unique)

        self.token_ids = index("tokens", (self.tokens,), 0, self.config.vocabulary - 1)
        self.positions = index("positions", (self.tokens,), 0, n.positions - 1)
        slots = n.pool_pages * n.page_size
        self.slots = index("slots", (self.tokens,), -1, slots - 1, unique=True)
        self.block_table = index("block_table", (n.sequences, n.pages), 0, n.pool_pages - 1)
        self.context = index("context", (n.sequences,), 0, n.positions)
        self.work = (
            index("work_sequence", (work,), 0, n.sequences - 1),
            index("work_start", (work,), 0, n.tokens - 1),
            index("work_rows", (work,), 1, n.query_rows),
        )
        self.out_rows = index("out_rows", (rows,), 0, n.tokens - 1)
        self.expert_part: Value | None = None
        if self.shards.experts > 1:
            self.expert_part = index("expert_part", (1,), 0, self.shards.experts - 1)
        self.pool_shape = (slots, self.config.kv_heads, self.config.head_dim)

    def build(self) -> Function:
        c = self.config
        table = self.model_weight("embedding", embedding_shape(self.whole, self.shards))
        x = self.b.embedding(table, self.token_ids, scale=c.embedding_scale)
        if table.tensor.shape[1] is not const(c.hidden):
            x = self.b.all_gather(x, self.shards.devices)
        signatures = [(c.windows[i], c.rotated[i], *self.layer_types(i)) for i in range(c.layers)]
        (x,) = self.b.layers(signatures, self.layer, x)
        x = self.b.gather_rows(x, self.out_rows)
        x = self.b.rms_norm(x, self.model_weight("final_norm", (c.hidden,)), c.rms_epsilon)
        alone = self.shards.devices == 1
        shape = head_shape(self.whole, self.shards)
        head = table if c.tied and alone else self.model_weight("head", shape)
        logits = self.b.linear(x, head, activation_bits=16)
        if c.final_softcap:
            logits = self.b.softcap(logits, c.final_softcap)
        if not alone:
            logits = self.b.all_gather(logits, self.shards.devices)
        self.b.output("logits", logits)
        return self.b.build()

    def meet(self, x: Value) -> Value:
        """What the devices' parts of a sum add up to."""
        return x if self.shards.devices == 1 else self.b.all_reduce(x, self.shards.devices)

    def model_weight(self, name: str, shape: tuple[int, ...]) -> Value:
        return self.b.weight(name, shape, self.types.model[name])

    def layer_types(self, layer: int) -> tuple[str, ...]:
        return tuple(self.types.layers[layer][name] for name in self.shapes)

    def layer(self, layer: Layer, *carried: Value) -> Value:
        """One decoder layer."""
        (x,) = carried
        weights = _LayerWeights(self, layer)
        mixed = self.attention(layer, weights, weights.norm(x, "attention_norm"))
        x = self.b.add(weights.norm(mixed, "attention_post_norm"), x)
        y = weights.norm(x, "mlp_norm")
        mixed = self.mlp(weights, y) if self.config.experts is None else self.experts(weights, y)
        return self.b.add(weights.norm(mixed, "mlp_post_norm"), x)

    def attention(self, layer: Layer, weights: _LayerWeights, x: Value) -> Value:
        """Projections, rope, the KV cache, attention, and the output projection."""
        c, b = self.config, self.b
        window = c.windows[layer.numbers[0]]
        # A score is an exponent: what goes into it is worth more bits than the rest of a layer.
        q, k, v = weights.linears(x, ("q", "k", "v"), activation_bits=9)
        q = b.reshape(q, -1, c.heads, c.head_dim)
        k = b.reshape(k, -1, c.kv_heads, c.head_dim)
        v = b.reshape(v, -1, c.kv_heads, c.head_dim)
        q, k = self.place(layer, weights, q, "q_norm"), self.place(layer, weights, k, "k_norm")
        k_pool, v_pool = self.pool(layer, "k_pool"), self.pool(layer, "v_pool")
        b.kv_write(k_pool, k, self.slots)
        b.kv_write(v_pool, v, self.slots)
        mixed = b.attention(
            q,
            k_pool,
            v_pool,
            self.positions,
            self.block_table,
            self.context,
            self.work,
            scale=c.attention_scale,
            page_size=self.limits.page_size,
            query_rows=self.limits.query_rows,
            window=window,
            softcap=c.attention_softcap,
            sinks=weights.find("sinks"),
        )
        return self.meet(weights.linears(mixed, ("o",))[0])

    def place(self, layer: Layer, weights: _LayerWeights, x: Value, norm: str) -> Value:
        """Heads (T, H, D) after their norm, if there is one, and rope, if the layer has it."""
        c, b = self.config, self.b
        number, weight = layer.numbers[0], weights.find(norm)
        if c.rotated[number]:
            order = "llama" if c.interleaved else "neox"
            tables = self.rope_tables(bool(c.windows[number]))
            return b.rope(x, tables, self.positions, order=order, norm=weight, eps=c.rms_epsilon)
        if weight is None:
            return x
        rows = b.rms_norm(b.reshape(x, -1, c.head_dim), weight, c.rms_epsilon)
        heads = c.heads if norm == "q_norm" else c.kv_heads
        return b.reshape(rows, -1, heads, c.head_dim)

    def mlp(self, weights: _LayerWeights, x: Value) -> Value:
        """The gated MLP."""
        gate, up = weights.linears(x, ("gate", "up"))
        return self.meet(weights.linears(self.gate(gate, up), ("down",))[0])

    def experts(self, weights: _LayerWeights, x: Value) -> Value:
        """The mixture of experts: each a gated MLP, of the tokens that are routed to it."""
        b, experts = self.b, self.config.experts
        assert experts is not None
        # Which experts a token goes to hangs on small differences of these few logits.
        (logits,) = weights.linears(x, ("router",), activation_bits=16)
        shares, chosen = b.route(logits, experts.chosen, normalized=experts.normalized)
        parts = self.shards.experts
        places, starts, stops = b.dispatch(chosen, experts.count, self.expert_part, parts)
        rows = b.expert_rows(x, places)

        def product(x: Value, name: str) -> Value:
            weight, bias = weights.get(name), weights.find(f"{name}_bias")
            return b.grouped_linear(x, weight, (starts, stops), bias)

        inner = self.gate(product(rows, "gate"), product(rows, "up"))
        return self.meet(b.expert_sum(product(inner, "down"), places, shares))

    def gate(self, gate: Value, up: Value) -> Value:
        """The gate's activation, times what it lets through."""
        c, b = self.config, self.b
        if c.activation == "clamped_swiglu":
            return b.clamped_swiglu(gate, up, c.swiglu_limit, c.swiglu_alpha)
        gate = b.gelu(gate) if c.activation == "gelu_tanh" else b.silu(gate)
        return b.mul(gate, up)

    def rope_tables(self, windowed: bool) -> tuple[Value, Value]:
        """The cosines and sines of a kind of layer."""
        local = windowed and self.config.local_rope is not None
        shape = (self.limits.positions, self.config.head_dim // 2)
        cosine, sine = ROPE_TABLES["local" if local else "global"]
        return self.b.weight(cosine, shape, "float32"), self.b.weight(sine, shape, "float32")

    def pool(self, layer: Layer, name: str) -> State:
        return layer.state(layer_weight("{}", name), self.pool_shape, self.kv_dtype)


class _LayerWeights:
    """The weights of the layer that is being built."""

    def __init__(self, decoder: _Decoder, layer: Layer) -> None:
        self.decoder = decoder
        self.layer = layer

    def get(self, name: str) -> Value:
        dtype = self.decoder.types.layers[self.layer.numbers[0]][name]
        shape = self.decoder.shapes[name]
        return self.layer.weight(layer_weight("{}", name), shape, dtype)

    def find(self, name: str) -> Value | None:
        """The weight, or None where the model's layers have none of this name."""
        return self.get(name) if name in self.decoder.shapes else None

    def norm(self, x: Value, name: str) -> Value:
        """``x`` after this norm, or ``x`` where the model's layers lack it."""
        weight = self.find(name)
        if weight is None:
            return x
        return self.decoder.b.rms_norm(x, weight, self.decoder.config.rms_epsilon)

    def linears(self, x: Value, names: tuple[str, ...], *, activation_bits: int = 8) -> list[Value]:
        """Linear layers of one input."""
        results: list[Value] = []
        for name in names:
            bias = self.find(f"{name}_bias")
            weight, b = self.get(name), self.decoder.b
            results.append(b.linear(x, weight, bias, activation_bits=activation_bits))
        return results
