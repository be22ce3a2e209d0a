"""A model's step on chips: what it launches and moves, how its time adds up, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dure.errors import TargetError, UnprovedError, UsageError
from dure.ir.core import Value
from dure.ir.dtypes import bfloat16, int8
from dure.library.build import Built, build
from dure.library.call import KernelCall, tensor
from dure.library.chip_tensors import Stored
from dure.library.embedding import gather_rows
from dure.library.norm import rms_norm_folded
from dure.library.operators_common import call
from dure.library.weight_types import KV_TYPES, WEIGHT_TYPES
from dure.machine.chip import Chip
from dure.models import chip_answer
from dure.models.batch import Batch, Phase
from dure.models.chip_answer import step_answer
from dure.models.chip_step import chip_step, sharded
from dure.models.config import BIASED, ExpertsConfig, ModelConfig, RopeConfig
from dure.models.encoder_config import EncoderConfig
from dure.models.micro_batches import micro_batch
from dure.models.shapes import any_config
from dure.models.shards import Shards
from dure.models.weights import weight_specs
from dure.sim.cost import duration
from dure.sim.recurrence import Recurrence
from dure.sim.timing import simulate
from dure.sim.values import run_values
from dure.targets import chip, chip_names

CHIPS = chip_names()
TINY = ModelConfig(
    "qwen3", 64, 96, 4, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), tied=False, qk_norm=True
)
WINDOWED = ModelConfig(
    "gemma3", 64, 96, 4, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), local_rope=RopeConfig(1e4),
    windows=(16, 0, 16, 0), post_norms=True, qk_norm=True, activation="gelu_tanh",
    embedding_scale=8.0,
)  # fmt: skip


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_what_a_step_counts(phase: Phase) -> None:
    batch = Batch(phase, 3, 40)
    step = chip_step(TINY, batch)
    names = [(c.part.name, c.count) for c in step.calls]
    assert names[0] == ("embedding", 1) and names[-1] == ("head", 1)
    assert ("q+k+v", 4) in names and ("gate+up", 4) in names and ("attention", 4) in names
    elements = sum(int(np.prod(s.shape)) for s in weight_specs(TINY))
    assert step.weight_bytes == 2 * elements
    # Every weight once but for the table, of which only the tokens' rows are read.
    table = 2 * TINY.vocabulary * TINY.hidden
    rows = 2 * batch.tokens * TINY.hidden
    read = 2 * TINY.layers * batch.sequences * batch.context * TINY.kv_size * 2
    written = 2 * TINY.layers * batch.tokens * TINY.kv_size * 2
    # The norms of heads are read by the rope kernels, which count no weight of their own.
    heads = 2 * TINY.layers * TINY.head_dim * 2
    assert step.bytes == step.weight_bytes - table + rows - heads + read + written
    layers = [s.shape for s in weight_specs(TINY) if s.layer is not None]
    linear = sum(int(np.prod(shape)) for shape in layers if len(shape) == 2)
    least = 2 * batch.tokens * linear + 2 * batch.sequences * TINY.vocabulary * TINY.hidden
    assert least < step.flops < 2 * least


@pytest.mark.parametrize(
    ("name", "config"), [*((name, TINY) for name in CHIPS), ("rngd", WINDOWED)]
)
def test_a_decode_step_is_one_program(name: str, config: ModelConfig) -> None:
    target = chip(name)
    found = step_answer(chip_step(config, Batch("decode", 2, 40)), target)
    launch = duration(target, target.launch)
    assert found.verdict.ok
    assert found.ps == launch + sum(part.total_ps for part in found.parts)
    answer = found.json()
    for key in ("ns", "step_tok_s", "bound", "fraction_of_roofline", "confidence", "compile_s"):
        assert key in answer
    assert 0 < found.fraction_of_roofline < 1
    assert answer["step_tok_s"] == pytest.approx(2e9 / (found.ps / 1e3))


def test_experts_on_a_chip() -> None:
    """Only the experts that a token goes to are read."""
    config = ModelConfig(
        "gpt_oss", 64, 32, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e4), windows=(16, 0),
        sinks=True, activation="clamped_swiglu", experts=ExpertsConfig(8, 2),
        biases=frozenset(BIASED),
    )  # fmt: skip
    step = chip_step(config, Batch("decode", 1, 40))
    parts = {c.part.name: c.part for c in step.calls}
    assert parts["experts' gate+up"].weight_bytes == 2 * (2 * 2 * 32 * 64)
    found = step_answer(step, chip("rngd"))
    assert all(part.built.verdict is not None and part.built.verdict.ok for part in found.parts)


@pytest.mark.parametrize("name", ["rngd", "mtia-v2"])
def test_turns_of_the_second_loop_of_layers_are_skipped_too(
    name: str, jumps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of one kind, then many pairs of others: what is watched goes over to these."""
    windows = (16, 16, *(0, 16) * 10)
    layers = len(windows)
    config = replace(WINDOWED, layers=layers, windows=windows, rotated=(True,) * layers)
    # Of a program as small as this one, states are equal within a kernel, too.
    monkeypatch.setattr(Recurrence, "look", lambda self, now: now)
    step = chip_step(config, Batch("decode", 1, 40))
    built: dict[object, Built] = {}
    step_answer(step, chip(name), made=built)
    jumps.clear()
    answer = step_answer(step, chip(name), made=built)
    assert {1, 2, 10} <= {part.count for part in answer.parts}
    assert max(jumps) > 3
    program = answer.program
    replayed = simulate(program.function, chip(name), indices=program.indices, record=True)
    assert (answer.timing.ps, answer.timing.events) == (replayed.ps, replayed.events)
    assert answer.timing.phases == replayed.phases


def test_an_encoder_on_a_chip() -> None:
    config = EncoderConfig(64, 96, 2, 4, 256, 64)
    found = step_answer(chip_step(config, Batch("prefill", 3, 40)), chip("rngd"))
    assert found.json()["kv_bytes"] == 0
    names = {(p.step.part.name, p.step.count) for p in found.parts}
    assert {("q+k+v", 2), ("attention", 2), ("mlp_norm", 2)} <= names
    with pytest.raises(UsageError, match="decode"):
        chip_step(config, Batch("decode", 3, 40))


def test_prefill_on_a_chip() -> None:
    found = step_answer(chip_step(TINY, Batch("prefill", 2, 100)), chip("rngd"))
    assert found.tokens_a_second == pytest.approx(200 / (found.ps / 1e12))


def _run(kernel_call: KernelCall, name: str, arrays: list[np.ndarray]) -> None:
    function = build(kernel_call, chip(name)).compiled.function
    assert not function.attrs.get("transposed")
    run_values(function, chip(name), arrays, seed=1)


@pytest.mark.parametrize("name", CHIPS)
def test_a_norm_over_the_lanes(name: str) -> None:
    rng = np.random.default_rng(0)
    m, parts, columns = 3, 128, 5
    x = rng.standard_normal((m, parts, columns)).astype(bfloat16.numpy)
    weight = rng.standard_normal((parts, columns)).astype(bfloat16.numpy)
    y = np.zeros_like(x)
    kinds = [tensor(bfloat16, *a.shape) for a in (x, weight, y)]
    consts = {"parts": parts, "columns": columns, "epsilon": 1e-5}
    _run(call(rms_norm_folded, kinds, {}, consts), name, [x, weight, y])
    wide = x.astype(np.float64)
    mean = (wide**2).mean((1, 2), keepdims=True)
    expected = wide / np.sqrt(mean + 1e-5) * weight.astype(np.float64)
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", CHIPS)
def test_rows_of_a_table_with_a_scale(name: str) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((50, 40)).astype(bfloat16.numpy)
    rows = rng.integers(0, 50, 7).astype(np.int32)
    y = np.zeros((7, 40), bfloat16.numpy)
    kinds = [tensor(bfloat16, 50, 40), None, tensor(bfloat16, 7, 40)]
    launch = call(gather_rows, kinds, {"bt": 4, "bd": 32}, {"scale": 3.0}, {1: (rows, 0, 49)})
    _run(launch, name, [table, rows, y])
    expected = 3.0 * table.astype(np.float64)[rows]
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=1e-2)


@pytest.mark.parametrize(("batch", "context"), [(0, 8), (-1, 8), (8, 0), (1 << 19, 1 << 12)])
def test_batches_that_are_none(batch: int, context: int) -> None:
    with pytest.raises(UsageError):
        Batch("decode", batch, context)


def test_more_positions_than_the_model_knows() -> None:
    with pytest.raises(UsageError, match="513") as caught:
        chip_step(TINY, Batch("decode", 1, 513))
    assert caught.value.fix == "--context 512"


def test_a_model_that_does_not_fit() -> None:
    huge = ModelConfig("llama", 16384, 53248, 126, 128, 8, 128, 128256, 4096, 1e-5, RopeConfig(5e5))
    with pytest.raises(TargetError, match="weights") as caught:
        step_answer(chip_step(huge, Batch("decode", 1, 16)), chip("h100"))
    assert "devices would hold them" in str(caught.value)


# --- weights of few bits -------------------------------------------------------------------------

EXPERTS = ModelConfig(
    "gpt_oss", 64, 32, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e4), windows=(16, 0),
    sinks=True, activation="clamped_swiglu", experts=ExpertsConfig(8, 2),
    biases=frozenset(BIASED),
)  # fmt: skip


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4", "mxfp4"])
@pytest.mark.parametrize("config", [TINY, EXPERTS], ids=["dense", "experts"])
def test_what_quantized_weights_take(config: ModelConfig, weights: str) -> None:
    """The layers' matrices are quantized, but for routers; in mxfp4 a model's experts alone are."""
    batch, scheme = Batch("decode", 1, 40), WEIGHT_TYPES[weights]
    plain, step = chip_step(config, batch), chip_step(config, batch, weights=weights)
    names = {"gate", "up", "down"}
    if config is TINY or weights != "mxfp4":
        names |= {"q", "k", "v", "o"}
    expected = plain.weight_bytes
    for spec in weight_specs(config):
        if spec.name in names:
            *lead, columns, depth = spec.shape
            expected -= 2 * int(np.prod(spec.shape))
            expected += scheme.bytes(depth, columns, *lead)
    assert step.weight_bytes == expected
    assert (step.weights, step.kv, step.dtype) == (weights, "bf16", "bf16")
    assert step.flops == plain.flops and step.kv_bytes == plain.kv_bytes
    parts = {c.part.name: c.part for c in step.calls}
    assert parts["head"].weight_bytes == 2 * config.vocabulary * config.hidden
    if config is TINY:
        assert plain.bytes - step.bytes == plain.weight_bytes - step.weight_bytes
    else:
        # Only the experts that a token goes to are read.
        assert parts["experts' gate+up"].weight_bytes == 2 * scheme.bytes(64, 32, 2)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("atom", "int4"),
        pytest.param("rngd", "int8", marks=pytest.mark.long),
        pytest.param("h100", "fp8", marks=pytest.mark.long),
    ],
)
def test_a_step_with_quantized_weights(name: str, weights: str) -> None:
    found = step_answer(chip_step(TINY, Batch("decode", 2, 40), weights=weights), chip(name))
    assert all(part.built.verdict is not None and part.built.verdict.ok for part in found.parts)
    answer = found.json()
    assert (answer["weights"], answer["kv"], answer["dtype"]) == (weights, "bf16", "bf16")
    kernels = {p.step.part.name: p.built.call.kernel.__name__ for p in found.parts}
    assert kernels["q+k+v"] == "matmul_scaled" and kernels["gate+up"] == "gated_linear_scaled"
    assert kernels["head"] == "matmul_kn"


def test_many_rows_take_the_scales_into_the_weights() -> None:
    def early(batch: Batch) -> object:
        step = chip_step(TINY, batch, weights="int4")
        return next(c.part.calls[0].consts["early"] for c in step.calls if c.part.name == "o")

    assert not early(Batch("decode", 1, 40))
    assert early(Batch("prefill", 2, 100))


def test_an_encoder_with_quantized_weights() -> None:
    config, batch = EncoderConfig(64, 96, 2, 4, 256, 64), Batch("prefill", 3, 40)
    step = chip_step(config, batch, weights="int8")
    assert step.weight_bytes < chip_step(config, batch).weight_bytes
    assert {
        c.part.calls[0].kernel.__name__ for c in step.calls if c.part.name in ("q+k+v", "up")
    } == {"matmul_scaled"}


def test_rows_are_quantized_once_for_all_that_take_them() -> None:
    """Where they meet codes: the head and other numbers take the values themselves."""
    step = chip_step(TINY, Batch("decode", 2, 40), weights="int8", activations="int8")
    names = [c.part.name for c in step.calls if c.layers is not None]
    wanted = ["int8 rows", "q+k+v", "int8 rows", "o", "int8 rows", "gate+up", "int8 rows", "down"]
    assert [n for n in names if n in wanted] == wanted
    plain = chip_step(TINY, Batch("decode", 2, 40), weights="int8")
    assert (step.flops, step.bytes, step.weight_bytes) == (
        plain.flops,
        plain.bytes,
        plain.weight_bytes,
    )
    sparse = replace(TINY, experts=ExpertsConfig(4, 2))
    step = chip_step(sparse, Batch("decode", 2, 40), weights="int8", activations="int8")
    rows = {
        call.kernel.__name__: call.types[0].dtype
        for c in step.calls
        for call in c.part.calls
        if call.types[0] is not None
    }
    assert rows["matmul_scaled"] is int8 and rows["grouped_gated_scaled"] is bfloat16


def test_the_peak_of_quantized_rows_bounds_a_step() -> None:
    """Where the chip publishes one; else that of the values between ops."""
    step = chip_step(TINY, Batch("prefill", 2, 40), weights="fp8", activations="fp8")
    assert step.multiplied(chip("rngd")) == "fp8" and step.multiplied(chip("atom")) == "bf16"
    plain = chip_step(TINY, Batch("prefill", 2, 40), weights="fp8")
    assert plain.multiplied(chip("rngd")) == "bf16"
    assert step.cut(chip("rngd")).types == step.types == ("bf16", "fp8", "bf16", "fp8")
    assert micro_batch(step, 2).types == step.types
    assert sharded(step, Shards(2)).types == step.types


def test_activations_without_weights_of_their_type() -> None:
    with pytest.raises(UsageError, match="activations in int8 with weights in bf16") as caught:
        chip_step(TINY, Batch("decode", 1, 40), activations="int8")
    assert caught.value.fix == "--weights int8 --activations int8"


def test_narrow_weights_fit_where_wide_ones_do_not() -> None:
    """Llama 3.1 8B on ATOM's 16 GB."""
    config = any_config("llama-3.1-8b")
    batch, atom = Batch("decode", 1, 1024), chip("atom")
    with pytest.raises(TargetError, match="weights") as caught:
        chip_step(config, batch).check_fits(atom)
    assert "--weights" in caught.value.fix
    chip_step(config, batch, weights="int8").check_fits(atom)


def test_weights_of_an_unknown_type() -> None:
    with pytest.raises(UsageError, match="weights in int3"):
        chip_step(TINY, Batch("decode", 1, 40), weights="int3")


# --- a KV cache of eight bits --------------------------------------------------------------------


@pytest.mark.parametrize(("kv", "row"), [("fp8", 16), ("int8", 16 + 4)])
def test_what_a_cache_of_eight_bits_takes(kv: str, row: int) -> None:
    """A head has 16 numbers, and in int8 a float32 scale."""
    batch = Batch("decode", 3, 40)
    plain, step = chip_step(TINY, batch), chip_step(TINY, batch, kv=kv)
    assert step.kv_bytes * 32 == plain.kv_bytes * row
    found, expected = ({c.part.name: c.part for c in s.calls} for s in (step, plain))
    for name in ("attention", "kv write", "rope, kv write"):
        assert found[name].kv_bytes * 32 == expected[name].kv_bytes * row
    kernels = {c.part.calls[0].kernel.__name__ for c in step.calls}
    assert ("quantized_attention" in kernels) == (kv == "int8")


@pytest.mark.parametrize(
    ("name", "kv"), [("atom", "int8"), pytest.param("rngd", "fp8", marks=pytest.mark.long)]
)
def test_a_step_with_a_cache_of_eight_bits(name: str, kv: str) -> None:
    found = step_answer(chip_step(TINY, Batch("decode", 2, 40), kv=kv), chip(name))
    assert all(part.built.verdict is not None and part.built.verdict.ok for part in found.parts)
    answer = found.json()
    assert (answer["weights"], answer["kv"], answer["dtype"]) == ("bf16", kv, "bf16")


def test_caches_that_do_not_go() -> None:
    with pytest.raises(UsageError, match="a KV cache in int4"):
        chip_step(TINY, Batch("decode", 1, 40), kv="int4")
    encoder = EncoderConfig(64, 96, 2, 4, 256, 64)
    with pytest.raises(UsageError, match="of an encoder"):
        chip_step(encoder, Batch("prefill", 1, 40), kv="fp8")


def test_what_is_stored() -> None:
    """Weights side by side, pools with heads first: codes and scales stand for what was given."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((n, 70)).astype(np.float32) for n in (6, 4))
    values = tuple(Value(tensor(bfloat16, *a.shape), "w") for a in (q, k))
    for scheme in WEIGHT_TYPES.values():
        codes, scales = (
            Stored(values, form, scheme).placed([q, k]) for form in ("codes", "scales")
        )
        want = np.concatenate([q, k]).T
        assert np.abs(scheme.dequantize(codes, scales) - want).max() < 1
        shape = [10, 70]
        Stored(values, "scales", scheme).turn(shape)
        assert tuple(shape) == scales.shape
    pool = rng.standard_normal((12, 3, 8)).astype(np.float32)
    value = Value(tensor(bfloat16, 12, 3, 8), "pool")
    codes, scales = (
        Stored((value,), form, KV_TYPES["int8"]).placed([pool])
        for form in ("pool_codes", "pool_scales")
    )
    assert (codes.shape, scales.shape) == ((3, 12, 8), (3, 12, 1))
    np.testing.assert_allclose(codes * scales, pool.swapaxes(0, 1), atol=0.02)
    shape = [12, 3, 8]
    Stored((value,), "pool_scales", KV_TYPES["int8"]).turn(shape)
    assert tuple(shape) == scales.shape
    floats = Stored((value,), "pool_codes", KV_TYPES["fp8"]).placed([1000 * pool])
    assert np.isfinite(floats.astype(np.float32)).all()


def test_attention_is_cut_in_long_items_where_instructions_are_bundles() -> None:
    step = chip_step(TINY, Batch("prefill", 1, 500))
    assert step.cut(chip("rngd")) is step
    tpu = chip("tpu-v6e")
    found = step.cut(tpu)
    assert found.batch.query_rows == 256 and found.cut(tpu) is found
    assert sorted(found.inputs["work_rows"]) == [244, 256]
    kernels = {c.kernel.__name__ for e in found.calls for c in e.part.calls}
    assert "attention_columns" in kernels
    assert found.flops == step.flops and found.bytes == step.bytes
    decode = chip_step(TINY, Batch("decode", 1, 500))
    assert decode.cut(tpu) is decode


def test_a_way_that_does_not_build_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ways to a norm one fails; where all do, the first one's error is told."""
    broken = {"rms_norm_rows"}

    def some(call: KernelCall, target: Chip, **options: Any) -> Built:
        if call.kernel.__name__ in broken:
            raise TargetError(f"no {call.kernel.__name__}")
        return build(call, target, **options)

    monkeypatch.setattr(chip_answer, "build", some)
    step = chip_step(TINY, Batch("prefill", 1, 40))
    found = step_answer(step, chip("rngd"))
    norms = {p.built.call.kernel.__name__ for p in found.parts if "norm" in p.name}
    assert norms and norms.isdisjoint(broken)
    assert not found.left_out
    broken.update(("rms_norm", "rms_norm_folded"))
    with pytest.raises(TargetError, match="no rms_norm"):
        step_answer(step, chip("rngd"))


def test_a_way_that_is_not_proved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(call: KernelCall, target: Chip, **options: Any) -> Built:
        if call.kernel.__name__ == "rms_norm_rows":
            raise UnprovedError("the program of 'rms_norm_rows' isn't proved")
        return build(call, target, **options)

    monkeypatch.setattr(chip_answer, "build", some)
    found = step_answer(chip_step(TINY, Batch("prefill", 1, 40)), chip("rngd"))
    assert all("norm: the program of 'rms_norm_rows'" in line for line in found.left_out)
    assert found.left_out and found.json()["left_out"] == list(found.left_out)
