"""Whole steps with weights and caches of few bits on a chip's bytes, against the tensor program
with the numbers that codes and scales stand for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dure.ir.interpret import execute
from dure.ir.types import static_extent
from dure.library.weight_types import KV_TYPES, WEIGHT_TYPES
from dure.models.batch import Batch
from dure.models.chip_answer import step_answer
from dure.models.chip_step import ChipStep, chip_step, quantized_weights
from dure.models.chip_values import run_step
from dure.models.config import ModelConfig, RopeConfig
from dure.models.weights import weight_specs
from dure.targets import chip, chip_names

Array = npt.NDArray[Any]
DENSE = ModelConfig(
    "qwen3", 64, 96, 2, 4, 2, 16, 256, 512, 1e-6, RopeConfig(1e6), tied=False, qk_norm=True
)


def drawn(step: ChipStep, config: ModelConfig, weights: str, kv: str) -> dict[str, Array]:
    """Weights, pools and inputs by name, exactly as codes and scales stand for them."""
    rng = np.random.default_rng(1)
    scheme, cache = WEIGHT_TYPES[weights], KV_TYPES[kv]
    quantized = quantized_weights(weight_specs(config), scheme)
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
