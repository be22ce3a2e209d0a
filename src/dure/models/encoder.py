"""The program of a BERT encoder: whole sequences in, a vector (or logits) of every row out.

Rows are cut into pages.  A sequence starts with a page and its rows follow one another, so that
attention finds a sequence's keys and values by the pages of these rows: nothing is cached.  Rows
between the end of a sequence and the end of its last page are of no sequence; what comes out there
means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.ir.builder import Layer, ProgramBuilder
from dure.ir.core import Function, Value
from dure.ir.expr import Symbol
from dure.models.decoder import WeightTypes, layer_weight
from dure.models.encoder_config import EncoderConfig
from dure.models.weights import WeightSpec

#: Logical name -> name in a Hugging Face checkpoint; ``{}`` is the layer.
ENCODER_NAMES: dict[str, str] = {
    "embedding": "bert.embeddings.word_embeddings.weight",
    "position_embedding": "bert.embeddings.position_embeddings.weight",
    "type_embedding": "bert.embeddings.token_type_embeddings.weight",
    "embedding_norm": "bert.embeddings.LayerNorm.weight",
    "embedding_norm_bias": "bert.embeddings.LayerNorm.bias",
    **{
        f"{name}{suffix}": f"bert.encoder.layer.{{}}.{place}.{'bias' if suffix else 'weight'}"
        for name, place in {
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
            "o": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "mlp_norm": "output.LayerNorm",
        }.items()
        for suffix in ("", "_bias")
    },
    "head": "qa_outputs.weight",
    "head_bias": "qa_outputs.bias",
}


@dataclass(frozen=True)
class EncoderLimits:
    """The largest batch: ``pages`` of ``page_size`` rows in all, ``sequences``.

    ``query_rows`` is the most rows of a work item of attention.
    """

    pages: int
    sequences: int
    page_size: int = 16
    query_rows: int = 32

    @property
    def work_items(self) -> int:
        """At most so many work items."""
        return self.sequences + self.pages * self.page_size // self.query_rows


@dataclass(frozen=True)
class EncoderBatch:
    """A batch: the program's inputs and sizes by name, and each sequence's rows in its output."""

    inputs: Mapping[str, npt.NDArray[np.int32]]
    sizes: Mapping[str, int]
    places: tuple[slice, ...]


def encoder_layer_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """The weights of one layer: logical name -> shape, in the order in which it uses them."""
    d, inner = config.hidden, config.intermediate
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in (
        *((n, (d, d)) for n in "qkvo"),
        ("attention_norm", (d,)),
        ("up", (inner, d)),
        ("down", (d, inner)),
        ("mlp_norm", (d,)),
    ):
        shapes |= {name: shape, f"{name}_bias": shape[:1]}
    return shapes


def encoder_specs(config: EncoderConfig, labels: int = 0) -> list[WeightSpec]:
    """Every weight of the encoder, and of a head with so many ``labels``."""
    d = config.hidden
    specs = [
        WeightSpec("embedding", None, (config.vocabulary, d)),
        WeightSpec("position_embedding", None, (config.context, d)),
        WeightSpec("type_embedding", None, (config.token_types, d)),
        WeightSpec("embedding_norm", None, (d,)),
        WeightSpec("embedding_norm_bias", None, (d,)),
    ]
    shapes = encoder_layer_shapes(config)
    for layer in range(config.layers):
        specs += [WeightSpec(name, layer, shape) for name, shape in shapes.items()]
    if labels:
        specs += [WeightSpec("head", None, (labels, d)), WeightSpec("head_bias", None, (labels,))]
    return specs


def encoder_program(
    config: EncoderConfig, types: WeightTypes, limits: EncoderLimits, labels: int = 0
) -> Function:
    """The program; weights are named as in :func:`encoder_specs`, with ``layer.number.name``.

    Its output is ``hidden`` (rows, hidden), or with ``labels`` the ``logits`` (rows, labels) of a
    linear head on every row, of which BERT's for question answering has two.  Raises
    :class:`IRError` where sizes don't fit together.
    """
    return _Encoder(config, types, limits).build(labels)


class _Encoder:
    """Builds one program."""

    def __init__(self, config: EncoderConfig, types: WeightTypes, limits: EncoderLimits) -> None:
        self.config = config
        self.types = types
        self.limits = limits
        self.shapes = encoder_layer_shapes(config)
        self.b = ProgramBuilder("bert")
        self.declare_inputs()

    def declare_inputs(self) -> None:
        """Rows, where they are in their sequence, and attention's lists."""
        b, n, c = self.b, self.limits, self.config
        pages, work = b.symbol("P", 1, n.pages), b.symbol("W", 1, n.work_items)
        rows = pages * n.page_size

        def index(name: str, shape: tuple[Symbol, ...], low: int, high: int) -> Value:
            return b.input(name, shape, "int32", index=(low, high))

        def of_rows(name: str, most: int) -> Value:
            return b.input(name, (rows,), "int32", index=(0, most - 1))

        self.token_ids = of_rows("tokens", c.vocabulary)
        self.token_types = of_rows("token_types", c.token_types)
        self.positions = of_rows("positions", c.context)
        width = -(-c.context // n.page_size)
        table = (n.sequences, width)
        self.block_table = b.input("block_table", table, "int32", index=(0, pages - 1))
        self.context = b.input("context", (n.sequences,), "int32", index=(0, c.context))
        self.work = (
            index("work_sequence", (work,), 0, n.sequences - 1),
            b.input("work_start", (work,), "int32", index=(0, rows - 1)),
            index("work_rows", (work,), 1, n.query_rows),
        )

    def build(self, labels: int) -> Function:
        c, b = self.config, self.b
        x = self.table("embedding", c.vocabulary, self.token_ids)
        x = b.add(x, self.table("position_embedding", c.context, self.positions))
        x = b.add(x, self.table("type_embedding", c.token_types, self.token_types))
        weight, bias = (
            b.weight(name, (c.hidden,), self.types.model[name])
            for name in ("embedding_norm", "embedding_norm_bias")
        )
        x = b.layer_norm(x, weight, bias, c.epsilon)
        signatures = [tuple(self.types.layers[i][n] for n in self.shapes) for i in range(c.layers)]
        (x,) = b.layers(signatures, self.layer, x)
        if labels:
            head = b.weight("head", (labels, c.hidden), self.types.model["head"])
            bias = b.weight("head_bias", (labels,), self.types.model["head_bias"])
            b.output("logits", b.linear(x, head, bias, activation_bits=16))
        else:
            b.output("hidden", x)
        return b.build()

    def table(self, name: str, rows: int, index: Value) -> Value:
        """Rows of an embedding."""
        weight = self.b.weight(name, (rows, self.config.hidden), self.types.model[name])
        return self.b.embedding(weight, index)

    def layer(self, layer: Layer, *carried: Value) -> Value:
        """Attention over the whole sequence and an MLP, each added to its input and normed."""
        (x,) = carried
        c, b = self.config, self.b

        def weight(name: str) -> Value:
            dtype = self.types.layers[layer.numbers[0]][name]
            return layer.weight(layer_weight("{}", name), self.shapes[name], dtype)

        def linear(x: Value, name: str, bits: int = 8) -> Value:
            return b.linear(x, weight(name), weight(f"{name}_bias"), activation_bits=bits)

        def norm(x: Value, name: str) -> Value:
            return b.layer_norm(x, weight(name), weight(f"{name}_bias"), c.epsilon)

        q, k, v = (b.reshape(linear(x, n, 9), -1, c.heads, c.head_dim) for n in "qkv")
        mixed = b.attention(
            *(q, k, v, self.positions, self.block_table, self.context, self.work),
            scale=c.head_dim**-0.5,
            page_size=self.limits.page_size,
            query_rows=self.limits.query_rows,
            causal=False,
        )
        x = norm(b.add(linear(mixed, "o"), x), "attention_norm")
        inner = b.gelu(linear(x, "up"), "tanh" if c.activation == "gelu_tanh" else "none")
        return norm(b.add(linear(inner, "down"), x), "mlp_norm")


def encoder_batch(
    config: EncoderConfig,
    limits: EncoderLimits,
    sequences: Sequence[Sequence[int]],
    token_types: Sequence[Sequence[int]] | None = None,
) -> EncoderBatch:
    """Sequences of token ids, laid out for the program.

    ``token_types`` are zeros unless given, one list a sequence.  Raises :class:`UsageError` for an
    empty or too long sequence, and for a batch beyond the limits.
    """
    types = [[0] * len(s) for s in sequences] if token_types is None else token_types
    size, lengths = limits.page_size, [len(s) for s in sequences]
    pages = [-(-length // size) for length in lengths]
    if not lengths or len(lengths) > limits.sequences or sum(pages) > limits.pages:
        raise UsageError(
            f"a batch of {len(lengths)} sequences on {sum(pages)} pages of {size} rows",
            rule=f"a batch has 1 to {limits.sequences} sequences on at most {limits.pages} pages",
            fix="split the batch",
        )
    if not all(1 <= length <= config.context for length in lengths):
        raise UsageError(
            f"sequences of {min(lengths)} to {max(lengths)} tokens",
            rule=f"a sequence has 1 to {config.context} tokens",
            fix="cut it",
        )
    if [len(t) for t in types] != lengths:
        raise UsageError(
            "token types of other lengths than the sequences",
            rule="each token has a type",
            fix="give one type a token",
        )
    rows = sum(pages) * size
    found: dict[str, npt.NDArray[np.int32]] = {
        name: np.zeros(rows, np.int32) for name in ("tokens", "token_types", "positions")
    }
    table = np.zeros((limits.sequences, -(-config.context // size)), np.int32)
    context = np.zeros(limits.sequences, np.int32)
    work: list[tuple[int, int, int]] = []
    places: list[slice] = []
    page = 0
    for i, (ids, kinds) in enumerate(zip(sequences, types, strict=True)):
        first, length = page * size, lengths[i]
        place = slice(first, first + length)
        found["tokens"][place], found["token_types"][place] = ids, kinds
        found["positions"][place] = np.arange(length)
        table[i, : pages[i]] = np.arange(page, page + pages[i])
        context[i] = length
        work += [
            (i, first + start, min(limits.query_rows, length - start))
            for start in range(0, length, limits.query_rows)
        ]
        places.append(place)
        page += pages[i]
    lists = np.array(work, np.int32).T
    names = ("work_sequence", "work_start", "work_rows")
    found |= {"block_table": table, "context": context}
    found |= {name: np.ascontiguousarray(entry) for name, entry in zip(names, lists, strict=True)}
    return EncoderBatch(found, {"P": page, "W": len(work)}, tuple(places))


def encoder_types(config: EncoderConfig, dtype: str, labels: int = 0) -> WeightTypes:
    """The same element type for all weights of an encoder."""
    layer: Mapping[str, str] = dict.fromkeys(encoder_layer_shapes(config), dtype)
    model = {s.name: dtype for s in encoder_specs(config, labels) if s.layer is None}
    return WeightTypes(model, (layer,) * config.layers)
