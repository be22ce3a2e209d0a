"""Whole steps with weights and caches of few bits on a chip's bytes, against the tensor program
with the numbers that codes and scales stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dure.ir.core import declared_ops
from dure.ir.interpret import execute
from dure.ir.tensor.shards import run_shards
from dure.ir.types import static_extent
from dure.library.weight_types import ACTIVATION_TYPES, KV_TYPES, WEIGHT_TYPES, WeightType
from dure.models.batch import Batch, Phase
from dure.models.chip_answer import step_answer
from dure.models.chip_step import ChipStep, chip_step, quantized_weights, sharded
from dure.models.chip_values import run_devices, run_step
from dure.models.config import ModelConfig, RopeConfig
from dure.models.encoder import encoder_specs
from dure.models.encoder_config import EncoderConfig
from dure.models.shards import Shards
from dure.models.weights import weight_specs
from dure.targets import chip, chip_names

Array = npt.NDArray[Any]
DENSE = ModelConfig(
    "qwen3", 64, 96, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), tied=False, qk_norm=True
)

#: Weights whose first row or number makes an outlying column in what products take.
_OUTLYING = {"attention_norm", "mlp_norm", "embedding_norm", "v", "up"}


def drawn(
    step: ChipStep,
    config: ModelConfig | EncoderConfig,
    weights: str,
    kv: str = "fp8",
    outlier: float = 0,
) -> dict[str, Array]:
    """Weights, pools and inputs by name, exactly as codes and scales stand for them; rows that are
    multiplied have a column that is ``outlier`` times as large, where it is given.
    """
    rng = np.random.default_rng(1)
    scheme, cache = WEIGHT_TYPES[weights], KV_TYPES[kv]
    specs = weight_specs(config) if isinstance(config, ModelConfig) else encoder_specs(config)
    quantized = quantized_weights(specs, scheme)
    assert step.program is not None
    arrays: dict[str, Array] = dict(step.inputs)
    for param in step.program.params:
        name, kind = param.value.name, param.value.tensor
        if name in arrays:
            continue
        shape = [static_extent(e) or 0 for e in kind.shape]
        array = rng.standard_normal(shape) * (0.125 if len(shape) > 1 else 0.5)
        if name.startswith("rope_"):
            array = np.clip(array, -1, 1)
        if name.endswith("norm"):
            array += 1
        short = name.rsplit(".", 1)[-1]
        if outlier and short in _OUTLYING:
            array[0] *= outlier
        if short in quantized:
            turned = scheme.quantize(np.swapaxes(array, -1, -2))
            array = np.swapaxes(scheme.dequantize(*turned), -1, -2)
        elif short.endswith("pool") and kv == "int8":
            turned = cache.quantize(np.swapaxes(array, -1, -2))
            array = np.swapaxes(cache.dequantize(*turned), -1, -2)
        elif short.endswith("pool"):
            array = array.astype(cache.code.numpy)
        arrays[name] = array.astype(np.float32)
    return arrays


CASES = [(name, "int8", "int8", DENSE) for name in chip_names()]
CASES += [("rngd", "fp8", "fp8", DENSE), ("atom", "int4", "fp8", DENSE)]
CASES += [("atom-max", "mxfp4", "int8", DENSE)]
_SHORT = (("rngd", "int8"), ("atom", "int4"))


@pytest.mark.parametrize(
    ("name", "weights", "kv", "config"),
    [pytest.param(*case, marks=() if case[:2] in _SHORT else pytest.mark.long) for case in CASES],
)
def test_a_step_on_bytes(name: str, weights: str, kv: str, config: ModelConfig) -> None:
    step = chip_step(config, Batch("decode", 2, 40), "f32", weights=weights, kv=kv)
    target = chip(name)
    answer = step_answer(step, target)
    assert answer.verdict.ok
    arrays = drawn(step, config, weights, kv)
    found = run_step(step, answer.program, target, arrays)
    values = [arrays[p.value.name].copy() for p in step.program.params]
    wanted = np.asarray(execute(step.program, values, step.sizes)[0])
    error = np.abs(found["logits"].astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert error < 0.05
    # The step writes its tokens' slots, and what is elsewhere stays.
    others = np.delete(np.arange(len(arrays["layer.0.k_pool"])), step.inputs["slots"])
    for param in step.program.params:
        if param.access == "inout":
            pool, before = found[param.value.name].astype(np.float64), arrays[param.value.name]
            np.testing.assert_allclose(pool[others], before[others], rtol=1e-5)
            assert (pool[step.inputs["slots"]] != before[step.inputs["slots"]]).any()


# --- rows of activations that are quantized ------------------------------------------------------

BERT = EncoderConfig(64, 96, 2, 4, 256, 64)
#: Cases with the error that a chip's own conversions of float32 operands may make, of attention and
#: the head: a number that they push over the middle of two codes gets the other one.  That of
#: chips which multiply float32 is what is left of float32's own rounding.
ROWS = [
    ("tpu-v6e", "int8", DENSE, "prefill", 1e-5),
    ("h100", "fp8", DENSE, "decode", 1e-5),
    ("tpu-v6e", "int8", BERT, "prefill", 1e-5),
    ("h100", "fp8", BERT, "prefill", 1e-5),
    ("atom", "int8", BERT, "prefill", 0.01),
    ("rngd", "fp8", DENSE, "prefill", 0.1),
    ("atom", "int8", DENSE, "decode", 0.01),
    ("trainium2", "int8", DENSE, "decode", 1e-5),
    ("maia-100", "fp8", BERT, "prefill", 0.1),
]


def rounded(x: Array, scheme: WeightType) -> Array:
    """Rows (..., K) as codes and scales stand for them."""
    rows = np.asarray(x, np.float32).reshape(-1, np.shape(x)[-1])
    codes, scales = scheme.quantize(rows.T)
    return scheme.dequantize(codes, scales).T.reshape(np.shape(x))


def interpreted(step: ChipStep, arrays: Mapping[str, Array]) -> Array:
    """The first output of the step's tensor program."""
    assert step.program is not None
    values = [arrays[p.value.name].copy() for p in step.program.params]
    return np.asarray(execute(step.program, values, step.sizes)[0], np.float64)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[[WeightType, int], None]:
    """Makes the interpreter quantize the rows of all products but that of the head, which has so
    many columns, in NumPy.
    """

    def quantizing(scheme: WeightType, head: int) -> None:
        for name in ("linear", "gated_linear"):
            definition = declared_ops()[name]
            semantics = definition.semantics
            assert semantics is not None

            def wrapped(
                attrs: Mapping[str, Any],
                x: Array,
                weight: Array,
                *rest: Array,
                semantics: Callable[..., Any] = semantics,
            ) -> Any:
                given = x if len(weight) == head else rounded(x, scheme)
                return semantics(attrs, given.astype(np.float32), weight, *rest)

            monkeypatch.setitem(declared_ops(), name, replace(definition, semantics=wrapped))

    return quantizing


@pytest.mark.parametrize(
    ("name", "kind", "config", "phase", "most"),
    [pytest.param(*case, marks=() if n < 6 else pytest.mark.long) for n, case in enumerate(ROWS)],
)
def test_a_step_whose_rows_are_quantized(
    name: str,
    kind: str,
    config: ModelConfig | EncoderConfig,
    phase: Phase,
    most: float,
    reference: Callable[[WeightType, int], None],
) -> None:
    batch, target = Batch(phase, 2, 40), chip(name)
    step = chip_step(config, batch, "f32", weights=kind, activations=kind)
    answer = step_answer(step, target)
    assert answer.verdict.ok and step.program is not None
    assert answer.json()["activations"] == kind
    arrays = drawn(step, config, kind, outlier=16)
    found = run_step(step, answer.program, target, arrays)
    outputs = {"logits", "hidden"} & set(found)
    got = found[outputs.pop()].astype(np.float64)

    plain = interpreted(step, arrays)
    reference(ACTIVATION_TYPES[kind], config.vocabulary)
    wanted = interpreted(step, arrays)
    if isinstance(config, EncoderConfig):  # rows between sequences mean nothing
        got, plain, wanted = (x.reshape(2, -1, config.hidden)[:, :40] for x in (got, plain, wanted))
    off, rounding = (np.linalg.norm(x - wanted) / np.linalg.norm(wanted) for x in (got, plain))
    assert off < most and rounding > 0.02


def test_devices_scale_their_own_parts_of_rows(
    reference: Callable[[WeightType, int], None],
) -> None:
    step = sharded(
        chip_step(DENSE, Batch("decode", 2, 40), "f32", weights="int8", activations="int8"),
        Shards(2),
    )
    answer = step_answer(step, chip("tpu-v6e"))
    assert answer.verdict.ok and answer.step.activations == "int8"
    step = answer.step
    assert step.program is not None
    arrays = [drawn(step, DENSE, "int8", outlier=16)] * 2
    found = run_devices(step, answer.program, chip("tpu-v6e"), arrays)
    reference(ACTIVATION_TYPES["int8"], DENSE.vocabulary // 2)
    rows = [[own[p.value.name].copy() for p in step.program.params] for own in arrays]
    for got, expected in zip(found, run_shards(step.program, rows, step.sizes), strict=True):
        logits = np.asarray(expected[0], np.float64)
        assert np.linalg.norm(got["logits"] - logits) < 1e-5 * np.linalg.norm(logits)
