"""A model's step as launches on a chip: what runs how often, and what it must move.

The step program of :mod:`dure.models.decoder` is built for one batch, fused, and lowered op by op
(:mod:`dure.library.chip_lowering`); the layers of a repeat are lowered once and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from dure.compiler.fuse import fuse
from dure.errors import TargetError, UsageError
from dure.ir.core import Function, Region
from dure.ir.dtypes import DType
from dure.library import chip_lowering_collectives as _registers_the_collectives
from dure.library import chip_lowering_moe as _registers_the_experts
from dure.library.chip_lowering import ChipCall, ChipLowering
from dure.library.operators_common import DTYPES
from dure.machine.chip import Chip
from dure.models.batch import PAGE, QUERY_ROWS, Batch
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
    device_elements,
    shard_config,
    tensor_parallel_counts,
)
from dure.models.weights import layer_shapes

assert _registers_the_experts and _registers_the_collectives


@dataclass(frozen=True)
class StepCall:
    """A launch that the step makes ``count`` times, once a layer."""

    part: ChipCall
    count: int


@dataclass(frozen=True)
class ChipStep:
    """A step: its launches in order, each with how often it runs, and bytes of memory.

    ``flops`` are those of the tensor program, ``bytes`` what must cross the memory's edge: every
    weight that the step uses once, the keys and values that it reads and writes.
    ``weight_bytes`` and ``kv_bytes`` are what the model and the cache take.

    Of several ``shards`` the launches are one device's, and all devices make them together; ``own``
    is what a device holds of weights and cache.  Work and bytes are still the model's: ``whole`` is
    the step on one device.
    """

    name: str
    config: ModelConfig | EncoderConfig
    batch: Batch
    dtype: str
    calls: tuple[StepCall, ...]
    weight_bytes: int
    kv_bytes: int
    shards: Shards = field(default_factory=Shards)
    whole: ChipStep | None = None
    own: tuple[int, int] | None = None

    @property
    def chips(self) -> int:
        """The devices that make the step together."""
        return self.shards.devices

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Bytes of weights, and of the cache, on a device."""
        return self.own or (self.weight_bytes, self.kv_bytes)

    @property
    def flops(self) -> int:
        """Operations."""
        if self.whole is not None:
            return self.whole.flops
        return sum(c.count * c.part.flops for c in self.calls)

    @property
    def bytes(self) -> int:
        """Compulsory bytes."""
        if self.whole is not None:
            return self.whole.bytes
        return sum(c.count * (c.part.weight_bytes + c.part.kv_bytes) for c in self.calls)

    def check_fits(self, chip: Chip) -> None:
        """Raise :class:`TargetError` where a device's weights and KV cache don't fit it."""
        size = chip.memories[chip.home].size.base
        weights, kept = self.device_bytes
        if weights + kept <= size:
            return
        count = None
        if isinstance(self.config, ModelConfig):
            count = fewest_devices(self.config, self.batch, self.dtype, size)
        where = f"{chip.name}: {chip.home} holds {_gib(size)}"
        of = "" if self.chips == 1 else f" of each of {self.chips} devices"
        raise TargetError(
            f"the weights ({_gib(weights)}) and the KV cache ({_gib(kept)}){of}",
            where=where,
            rule=f"they lie in {chip.home} together; "
            + (f"{count} devices would hold them" if count else "no number of devices holds them"),
            fix=f"--chips {count}"
            if count and chip.links
            else "give a smaller --batch or --context, or narrower --dtype",
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.4g} GiB"


def chip_step(
    config: ModelConfig | EncoderConfig,
    batch: Batch,
    dtype: str = "bf16",
    name: str = "",
    shards: Shards | None = None,
) -> ChipStep:
    """The step of a batch; ``dtype`` is that of weights, KV cache and the values between ops, and
    ``name`` what the model is called.  An encoder's step is a prefill that keeps nothing.

    Raises :class:`~dure.errors.DureError` for a batch or a model that doesn't go.
    """
    batch.check(config)
    kind, shards = DTYPES[dtype], shards or Shards()
    if isinstance(config, EncoderConfig):
        return _encoder_step(config, batch, dtype, name, shards)
    check_shards(config, shards)
    program = _program(config, batch, kind, shards)
    inputs = batch.inputs(config)
    sizes = {"T": batch.tokens, "W": len(inputs["work_start"]), "L": batch.sequences}
    calls = tuple(_calls(fuse(program).body, ChipLowering(sizes, inputs, kind), 1))
    weights, kept = held_bytes(config, batch, dtype, Shards())
    name = name or config.family
    if shards.devices == 1:
        return ChipStep(name, config, batch, dtype, calls, weights, kept)
    whole, own = chip_step(config, batch, dtype, name), held_bytes(config, batch, dtype, shards)
    return ChipStep(name, config, batch, dtype, calls, weights, kept, shards, whole, own)


def _encoder_step(
    config: EncoderConfig, batch: Batch, dtype: str, name: str, shards: Shards
) -> ChipStep:
    if shards.devices > 1:
        raise UsageError(
            f"an encoder over {shards.devices} devices",
            where=config.where,
            rule="decoders are cut over devices; an encoder is small, and runs on each by itself",
            fix="--chips 1, with a part of the batch",
        )
    kind = DTYPES[dtype]
    program, lowering = _encoder(config, batch, kind)
    calls = tuple(_calls(fuse(program).body, lowering, 1))
    weights = sum(prod(spec.shape) for spec in encoder_specs(config)) * kind.bits // 8
    return ChipStep(name or "encoder", config, batch, dtype, calls, weights, 0)


def held_bytes(config: ModelConfig, batch: Batch, dtype: str, shards: Shards) -> tuple[int, int]:
    """Bytes of weights, and of the cache of a batch, on a device."""
    bits, slots = DTYPES[dtype].bits, batch.sequences * batch.pages * PAGE
    kept = 2 * config.layers * slots * shard_config(config, shards).kv_size
    return device_elements(config, shards) * bits // 8, kept * bits // 8


def fewest_devices(
    config: ModelConfig, batch: Batch, dtype: str, size: float, least: int = 1
) -> int | None:
    """The fewest devices, at least so many, over which the model can be cut and whose memories of
    this size hold it; None where there are none.
    """
    for count in tensor_parallel_counts(config):
        if count >= least and sum(held_bytes(config, batch, dtype, Shards(count))) <= size:
            return count
    return None


def _encoder(config: EncoderConfig, batch: Batch, kind: DType) -> tuple[Function, ChipLowering]:
    if batch.phase != "prefill":
        raise UsageError(
            "a decode step of an encoder",
            where=config.where,
            rule="an encoder takes whole sequences",
            fix="--phase prefill",
        )
    pages = batch.sequences * batch.pages
    limits = EncoderLimits(pages, batch.sequences, PAGE, QUERY_ROWS)
    sequences = [[0] * batch.context] * batch.sequences
    made = encoder_batch(config, limits, sequences)
    program = encoder_program(config, encoder_types(config, kind.name), limits)
    return program, ChipLowering(made.sizes, made.inputs, kind)


def _program(config: ModelConfig, batch: Batch, kind: DType, shards: Shards) -> Function:
    names: Mapping[str, str] = dict.fromkeys(("embedding", "final_norm", "head"), kind.name)
    layer = dict.fromkeys(layer_shapes(config), kind.name)
    types = WeightTypes(names, (layer,) * config.layers)
    limits = StepLimits(
        tokens=batch.tokens,
        sequences=batch.sequences,
        pages=batch.pages,
        pool_pages=batch.sequences * batch.pages,
        logit_rows=batch.sequences,
        positions=batch.context,
        page_size=PAGE,
        query_rows=QUERY_ROWS,
    )
    return step_program(config, types, limits, kind.name, shards)


def _calls(region: Region, lowering: ChipLowering, count: int) -> list[StepCall]:
    """The launches of a body: between two repeats its ops are lowered together."""
    found: list[StepCall] = []
    run = list(region.ops)
    while run:
        place = next((n for n, op in enumerate(run) if op.name == "repeat"), len(run))
        found += [StepCall(part, count) for part in lowering.region(run[:place])]
        for op in run[place : place + 1]:
            found += _calls(op.regions[0], lowering, count * int(op.attr("count")))
        run = run[place + 1 :]
    return found
