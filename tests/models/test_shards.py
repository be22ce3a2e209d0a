"""Decoders cut over devices: together they compute what one computes."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import DECODERS, arguments, small

from dure.compiler.fuse import fuse
from dure.errors import UsageError
from dure.ir.core import Function
from dure.ir.interpret import execute
from dure.ir.tensor.shards import run_shards
from dure.ir.verifier import verify
from dure.models import shapes
from dure.models.batch import PAGE, QUERY_ROWS, Batch
from dure.models.config import ModelConfig
from dure.models.decoder import StepLimits, WeightTypes, step_program
from dure.models.shards import (
    Shards,
    check_shards,
    shard_specs,
    tensor_parallel_counts,
)
from dure.models.weights import layer_shapes, weight_specs


def program_of(config: ModelConfig, batch: Batch, shards: Shards) -> Function:
    layer = dict.fromkeys(layer_shapes(config), "float32")
    types = WeightTypes(
        dict.fromkeys(("embedding", "final_norm", "head"), "float32"), (layer,) * config.layers
    )
    limits = StepLimits(
        batch.tokens,
        batch.sequences,
        batch.pages,
        batch.sequences * batch.pages,
        batch.sequences,
        batch.context,
        PAGE,
        QUERY_ROWS,
    )
    function = step_program(config, types, limits, "float32", shards)
    verify(function)
    return function


def check(config: ModelConfig, batch: Batch, shards: Shards, *, fused: bool = False) -> None:
    alone = program_of(config, batch, Shards())
    inputs = batch.inputs(config)
    whole = arguments(alone, config, inputs, Shards())
    expected = execute(alone, list(whole.values()))[0]
    function = program_of(config, batch, shards)
    if fused:
        function = fuse(function)
    rows = [
        list(arguments(function, config, inputs, shards, d).values()) for d in range(shards.devices)
    ]
    for found in run_shards(function, rows):
        logits = np.asarray(found[0])[:, : config.vocabulary]
        assert logits.shape == np.shape(expected)
        np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_four_devices_compute_what_one_does(name: str) -> None:
    """With fewer KV heads than devices, where the family groups heads."""
    check(small(name), Batch("prefill", 2, 13), Shards(4), fused=True)


@pytest.mark.parametrize(
    "shards", [Shards(2, 2), Shards(4, 4), Shards(8, 4), Shards(8, 8)], ids=str
)
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b"])
def test_experts_that_are_dealt_out(name: str, shards: Shards) -> None:
    check(small(name), Batch("prefill", 2, 7), shards)


@pytest.mark.parametrize("devices", [3, 6])
def test_other_numbers_of_devices(devices: int) -> None:
    config = small("llama-3.1-8b", heads=12, kv_heads=3, hidden=250)
    check(config, Batch("decode", 3, 9), Shards(devices))


def test_biases_are_added_once() -> None:
    config = small("qwen3-0.6b", biases=frozenset("qkvo") | {"gate", "up", "down"})
    check(config, Batch("decode", 2, 5), Shards(4))


def elements(config: ModelConfig, shards: Shards) -> int:
    return sum(int(np.prod(s.shape, dtype=np.int64)) for s in shard_specs(config, shards))


def test_devices_hold_less_each() -> None:
    config = shapes.model_config("llama-3.1-70b")
    whole = elements(config, Shards())
    assert whole == sum(int(np.prod(s.shape, dtype=np.int64)) for s in weight_specs(config))
    eighth = elements(config, Shards(8))
    assert whole / 8 < eighth < 1.001 * whole / 8


def test_heads_that_the_devices_do_not_divide() -> None:
    config = shapes.model_config("llama-3.1-8b")
    assert tensor_parallel_counts(config) == [1, 2, 4, 8, 16, 32]
    check_shards(config, Shards(32))
    with pytest.raises(UsageError, match="32 heads with 8 KV heads over 6 devices") as caught:
        check_shards(config, Shards(6))
    assert "--tp 4 (of 1, 2, 4, 8, 16, 32)" in str(caught.value)
    with pytest.raises(UsageError, match="over 64 devices"):
        check_shards(config, Shards(64))


def test_experts_that_the_parts_do_not_divide() -> None:
    config = shapes.model_config("mixtral-8x7b")
    check_shards(config, Shards(4, 2))
    with pytest.raises(UsageError, match="8 experts in 3 parts over 4 devices") as caught:
        check_shards(config, Shards(4, 3))
    assert "--ep 2" in str(caught.value)
    with pytest.raises(UsageError, match="no experts in 2 parts"):
        check_shards(shapes.model_config("llama-3.1-8b"), Shards(4, 2))
