"""A model's step as launches on a chip: what runs how often, and what it must move.

The step program of :mod:`dure.models.decoder` is built for one batch, fused, and lowered op by op
(:mod:`dure.library.chip_lowering`); the layers of a repeat are lowered once and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

from dure.compiler.fuse import fuse
from dure.errors import TargetError, UsageError
from dure.ir.core import Function, Op, Region, Value
from dure.ir.dtypes import DType
from dure.ir.tensor.program import repeat_tables
from dure.library import chip_lowering_attention as _registers_attention
from dure.library import chip_lowering_collectives as _registers_the_collectives
from dure.library import chip_lowering_moe as _registers_the_experts
from dure.library.call import IndexArray, stored_bytes, tensor
from dure.library.chip_lowering import ChipCall, ChipLowering
from dure.library.operators_common import DTYPES
from dure.library.weight_types import WeightType, activation_type, kv_type, weight_type
from dure.machine.chip import Chip
from dure.models.batch import PAGE, Batch
from dure.models.config import ModelConfig
from dure.models.decoder import StepLimits, WeightTypes, step_program
from dure.models.encoder import (
    EncoderLimits,
    encoder_batch,
    encoder_program,
    encoder_specs,
    encoder_types,
)
from dure.models.encoder_config import EncoderConfig
from dure.models.shards import (
    Shards,
    check_shards,
    shard_config,
    shard_specs,
    tensor_parallel_counts,
)
from dure.models.weights import WeightSpec, layer_shapes

assert _registers_attention and _registers_the_experts and _registers_the_collectives

#: Matrices of a layer: what is quantized where weights are.
_MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down"})

#: The names of a step's types: of values between ops, weights, KV cache, and quantized rows.
_Types: TypeAlias = tuple[str, str, str, str]


@dataclass(frozen=True)
class Layers:
    """Equal layers: ``count`` turns of the same launches.  ``tables`` are the tensors that a value
    of the launches stands for, one a turn.
    """

    count: int
    tables: Mapping[Value, tuple[Value, ...]]


@dataclass(frozen=True)
class StepCall:
    """A launch that the step makes once, or once in each turn of ``layers``."""

    part: ChipCall
    layers: Layers | None = None

    @property
    def count(self) -> int:
        """How often it is made."""
        return 1 if self.layers is None else self.layers.count


@dataclass(frozen=True)
class ChipStep:
    """A step: its launches in order, each with how often it runs, and bytes of memory.

    ``flops`` are those of the tensor program, ``bytes`` what must cross the memory's edge: every
    weight that the step uses once, the keys and values that it reads and writes.
    ``weight_bytes`` and ``kv_bytes`` are what the model and the cache take.  ``dtype`` is the type
    of values between ops, ``weights`` and ``kv`` those of weights and KV cache, where they have
    others, and ``activations`` that of the rows that meet quantized weights.  A step that was read
    from a file has neither ``config`` nor ``program``.

    Of several ``shards`` the launches are one device's, and all devices make them together;
    ``held`` is what a device holds of weights and cache.  Operations and bytes are still the
    model's, ``work``.
    """

    name: str
    config: ModelConfig | EncoderConfig | None
    batch: Batch
    dtype: str
    calls: tuple[StepCall, ...]
    weight_bytes: int
    kv_bytes: int
    #: The tensor program, the sizes of its symbols, and index arguments by name.
    program: Function | None
    sizes: Mapping[str, int]
    inputs: Mapping[str, IndexArray]
    #: What the program gives, as it lies on the chip, and index lists that it makes.
    outputs: Mapping[str, Value]
    made: Mapping[Value, IndexArray]
    weights: str = ""
    kv: str = ""
    activations: str = ""
    shards: Shards = field(default_factory=Shards)
    held: tuple[int, int] | None = None
    work: tuple[int, int] | None = None

    @property
    def types(self) -> _Types:
        """The types by the names of :func:`chip_step`: dtype, weights, KV and activations."""
        return self.dtype, self.weights, self.kv, self.activations

    def multiplied(self, chip: Chip) -> str:
        """The type whose published peak bounds the step: that of quantized activations, where the
        chip has one, else that of values between ops.
        """
        own = self.activations
        return own if own in DTYPES and DTYPES[own].name in chip.peaks.compute else self.dtype

    @property
    def chips(self) -> int:
        """The devices that make the step together."""
        return self.shards.devices

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Bytes of weights, and of the cache, on a device."""
        return self.held or (self.weight_bytes, self.kv_bytes)

    @property
    def flops(self) -> int:
        """Operations."""
        if self.work is not None:
            return self.work[0]
        return sum(c.count * c.part.flops for c in self.calls)

    @property
    def bytes(self) -> int:
        """Compulsory bytes."""
        if self.work is not None:
            return self.work[1]
        return sum(c.count * (c.part.weight_bytes + c.part.kv_bytes) for c in self.calls)

    def cut(self, chip: Chip) -> ChipStep:
        """The step with attention's work cut for a chip: in long items where instructions are
        bundles, which several tiles fill, and where engines do several ops in one pass, for tiles
        that follow one another in an item are prepared ahead; else in short ones where there
        aren't enough for its cores, for keys that nobody sees are skipped by whole items.
        """
        config = self.config
        if not isinstance(config, ModelConfig):
            return self
        heads, cores = shard_config(config, self.shards).kv_heads, int(chip.cores.base)
        if chip.bundles or chip.passes:
            batch = self.batch.cut(cores, heads, chip.passes)
        else:
            batch = self.batch.shared(cores, heads)
        if batch == self.batch:
            return self
        found = _step(config, batch, self.types, self.name, self.shards)
        return replace(found, shards=self.shards, held=self.held, work=self.work)

    def check_fits(self, chip: Chip) -> None:
        """Raise :class:`TargetError` where a device's weights and KV cache don't fit it."""
        size = chip.memories[chip.home].size.base
        weights, kept = self.device_bytes
        if weights + kept <= size:
            return
        count = fewest_devices(self, size)
        of = "" if self.chips == 1 else f" of each of {self.chips} devices"
        raise TargetError(
            f"the weights ({_gib(weights)}) and the KV cache ({_gib(kept)}){of}",
            where=f"{chip.name}: {chip.home} holds {_gib(size)}",
            rule=f"they lie in {chip.home} together; "
            + (f"{count} devices would hold them" if count else "no number of devices holds them"),
            fix=(f"--chips {count}, or" if count and chip.links else "give")
            + " a smaller --batch or --context, or narrower --weights or --kv",
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.4g} GiB"


def chip_step(
    config: ModelConfig | EncoderConfig,
    batch: Batch,
    dtype: str = "bf16",
    name: str = "",
    *,
    weights: str = "",
    kv: str = "",
    activations: str = "",
) -> ChipStep:
    """The step of a batch; ``dtype`` is that of values between ops, and of weights and KV cache
    unless ``weights`` (see :mod:`dure.library.weight_types`) and ``kv`` say otherwise; rows that
    meet weights in the type that ``activations`` names are quantized to it.  ``name`` is what the
    model is called.  An encoder's step is a prefill that keeps nothing.

    Raises :class:`~dure.errors.DureError` for a batch or a model that doesn't go.
    """
    return _step(config, batch, (dtype, weights, kv, activations), name, Shards())


def sharded(step: ChipStep, shards: Shards) -> ChipStep:
    """A step of one device as one that several make together: the launches are those of each.

    Raises :class:`UsageError` for a step that can't be cut so.
    """
    if shards.devices == 1:
        return step
    if step.config is None:
        raise UsageError(
            f"the stored step of {step.name} over {shards.devices} devices",
            rule="a step is stored as it was compiled, for one device",
            fix="--chips 1, or name the model",
        )
    found = _step(step.config, step.batch, step.types, step.name, shards)
    held = held_bytes(step, shards)
    return replace(found, shards=shards, held=held, work=(step.flops, step.bytes))


def _step(
    config: ModelConfig | EncoderConfig,
    batch: Batch,
    types: _Types,
    name: str,
    shards: Shards,
) -> ChipStep:
    dtype, weights, kv, activations = types
    batch.check(config)
    kinds = _Kinds.of(types)
    if isinstance(config, EncoderConfig):
        _check_encoder(config, kinds, shards)
        program, lowering = _encoder(config, batch, kinds.activation)
        specs, name = encoder_specs(config), name or "encoder"
        taken, kept = kinds.weight_bytes(specs), 0
    else:
        check_shards(config, shards)
        program = _program(config, batch, kinds.activation, shards)
        inputs = batch.inputs(config)
        sizes = {"T": batch.tokens, "W": len(inputs["work_start"]), "L": batch.count}
        lowering = ChipLowering(sizes, inputs, kinds.activation)
        specs, name = shard_specs(config, shards), name or config.family
        taken, kept = _held(config, batch, kinds, Shards())
    lowering = replace(
        lowering,
        weights=kinds.weights,
        quantized=quantized_weights(specs, kinds.weights),
        kv=kinds.kv,
        rows=kinds.rows,
    )
    program = fuse(program)
    found = _calls(program.body, lowering)
    calls = (*(StepCall(part) for part, _ in lowering.first.values()), *found)
    names = cast("tuple[str, ...]", program.attrs["outputs"])
    outputs = {n: lowering.root(v) for n, v in zip(names, program.body.yields, strict=False)}
    more = program, lowering.sizes, lowering.inputs, outputs, lowering.made
    stored = weights or dtype, kv or dtype, activations or dtype
    return ChipStep(name, config, batch, dtype, calls, taken, kept, *more, *stored)


@dataclass(frozen=True)
class _Kinds:
    """The type of values between ops, and how weights, KV cache and rows that meet quantized
    weights are quantized, if they are.
    """

    activation: DType
    weights: WeightType | None
    kv: WeightType | None
    rows: WeightType | None

    @classmethod
    def of(cls, names: _Types) -> _Kinds:
        """The types by the names of :attr:`ChipStep.types`; an empty name is dtype's."""
        dtype, *others = names
        weights, kv, activations = (name or dtype for name in others)
        scheme, cache = weight_type(weights, dtype), kv_type(kv, dtype)
        return cls(DTYPES[dtype], scheme, cache, activation_type(activations, weights, dtype))

    def weight_bytes(self, specs: Sequence[WeightSpec]) -> int:
        """What weights take."""
        quantized = quantized_weights(specs, self.weights)
        return sum(
            _bytes(spec, self.activation, self.weights if spec.name in quantized else None)
            for spec in specs
        )


def _held(config: ModelConfig, batch: Batch, kinds: _Kinds, shards: Shards) -> tuple[int, int]:
    slots = batch.pool_pages * PAGE
    row = _row_bytes(shard_config(config, shards), kinds.activation, kinds.kv)
    return kinds.weight_bytes(shard_specs(config, shards)), 2 * config.layers * slots * row


def held_bytes(step: ChipStep, shards: Shards) -> tuple[int, int]:
    """Bytes of a decoder's weights, and of its cache, on each of several devices."""
    assert isinstance(step.config, ModelConfig)
    kinds = _Kinds.of(step.types)
    return _held(step.config, step.batch, kinds, shards)


def fewest_devices(step: ChipStep, size: float, least: int = 1) -> int | None:
    """The fewest devices, at least so many, over which a step of one can be cut and whose memories
    of this size hold it; None where there are none.
    """
    if not isinstance(step.config, ModelConfig):
        return 1 if least == 1 and step.weight_bytes + step.kv_bytes <= size else None
    for count in tensor_parallel_counts(step.config):
        if count >= least and sum(held_bytes(step, Shards(count))) <= size:
            return count
    return None


def _check_encoder(config: EncoderConfig, kinds: _Kinds, shards: Shards) -> None:
    """Raise :class:`UsageError` for what an encoder can't be asked."""
    if kinds.kv is not None:
        raise UsageError(
            f"a KV cache in {kinds.kv.name} of an encoder",
            where=config.where,
            rule="an encoder keeps no keys and values",
            fix="leave out --kv",
        )
    if shards.devices > 1:
        raise UsageError(
            f"an encoder over {shards.devices} devices",
            where=config.where,
            rule="decoders are cut over devices; an encoder is small, and runs on each by itself",
            fix="--chips 1, with a part of the batch",
        )


def quantized_weights(specs: Sequence[WeightSpec], scheme: WeightType | None) -> frozenset[str]:
    """The names of the weights that a scheme is for: the layers' matrices but for routers, and of
    a model with experts only these where the scheme is made for them.
    """
    if scheme is None:
        return frozenset()
    matrices = [s for s in specs if s.layer is not None and s.name in _MATRICES]
    experts = any(len(s.shape) == 3 for s in matrices)
    return frozenset(
        s.name for s in matrices if not (experts and scheme.experts) or len(s.shape) == 3
    )


def _bytes(spec: WeightSpec, kind: DType, scheme: WeightType | None) -> int:
    """What a weight takes."""
    if scheme is None:
        return _elements(spec.shape) * kind.bits // 8
    *lead, columns, depth = spec.shape
    return scheme.bytes(depth, columns, *lead)


def _encoder(config: EncoderConfig, batch: Batch, kind: DType) -> tuple[Function, ChipLowering]:
    if batch.phase != "prefill" or batch.chunk or batch.contexts:
        raise UsageError(
            f"a {batch.text} of an encoder",
            where=config.where,
            rule="an encoder takes whole sequences, each as long",
            fix="--phase prefill with one --context",
        )
    pages = batch.sequences * batch.pages
    limits = EncoderLimits(pages, batch.sequences, PAGE, batch.query_rows)
    sequences = [[0] * batch.context] * batch.sequences
    made = encoder_batch(config, limits, sequences)
    program = encoder_program(config, encoder_types(config, kind.name), limits)
    return program, ChipLowering(made.sizes, made.inputs, kind)


def _row_bytes(config: ModelConfig, kind: DType, kv: WeightType | None) -> int:
    """What a token's keys, or values, take in a layer's cache."""
    code = kind if kv is None else kv.code
    row = stored_bytes(tensor(code, config.kv_size))
    if kv is not None and kv.code.is_integer:
        row += stored_bytes(tensor(kv.scale, config.kv_heads))
    return row


def _program(config: ModelConfig, batch: Batch, kind: DType, shards: Shards) -> Function:
    names: Mapping[str, str] = dict.fromkeys(("embedding", "final_norm", "head"), kind.name)
    layer = dict.fromkeys(layer_shapes(config), kind.name)
    types = WeightTypes(names, (layer,) * config.layers)
    limits = StepLimits(
        tokens=batch.tokens,
        sequences=batch.count,
        pages=batch.pages,
        pool_pages=batch.pool_pages,
        logit_rows=batch.count,
        positions=batch.context,
        page_size=PAGE,
        query_rows=batch.query_rows,
        aligned=True,
    )
    return step_program(config, types, limits, kind.name, shards)


def _calls(region: Region, lowering: ChipLowering, layers: Layers | None = None) -> list[StepCall]:
    """The launches of a body: between two repeats its ops are lowered together."""
    found: list[StepCall] = []
    run = list(region.ops)
    while run:
        place = next((n for n, op in enumerate(run) if op.name == "repeat"), len(run))
        found += [StepCall(part, layers) for part in lowering.region(run[:place])]
        for op in run[place : place + 1]:
            found += _repeated(op, lowering)
        run = run[place + 1 :]
    return found


def _repeated(op: Op, lowering: ChipLowering) -> list[StepCall]:
    """The launches of a repeat.  What it carries lies in one place, before, between and after."""
    region, count = op.regions[0], int(op.attr("carried"))
    tables = dict(zip(region.args[count:], repeat_tables(op), strict=True))
    for place, (initial, argument) in enumerate(
        zip(op.operands, region.args[:count], strict=False)
    ):
        lowering.same[argument] = initial
        _check_in_place(region, argument, region.yields[place])
        lowering.same[region.yields[place]] = argument
        lowering.same[op.results[place]] = argument
    return _calls(region, lowering, Layers(int(op.attr("count")), tables))


def _check_in_place(region: Region, argument: Value, last: Value) -> None:
    """Raise :class:`TargetError` where a turn still needs what it carries when that is renewed."""
    names = {argument}
    maker = next((n for n, op in enumerate(region.ops) if last in op.results), -1)
    for place, op in enumerate(region.ops):
        if names.isdisjoint(op.operands):
            continue
        if op.name == "reshape_tensor":
            names.add(op.result)
        elif place >= maker:
            raise TargetError(
                f"'{op.name}' reads what the layer's last result takes the place of",
                where="" if op.span is None else op.span.render(),
                rule="what equal layers hand on lies in one place on a chip",
                fix="add the layer's input before the op that makes its result",
            )


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
