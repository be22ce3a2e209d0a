"""Whole steps on chips' bytes, on one device and on four, against the interpreted program."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
from small_models import DECODERS, arguments, small

from dure.ir.core import op_definition
from dure.ir.dtypes import DType
from dure.ir.tensor.shards import run_shards
from dure.library import chip_lowering_attention
from dure.library.call import KernelCall
from dure.library.chip_lowering import SUITS
from dure.library.collective_product_ways import SummedProduct
from dure.models.batch import Batch, Phase
from dure.models.chip_answer import step_answer
from dure.models.chip_step import chip_step, sharded
from dure.models.chip_values import run_devices
from dure.models.shards import Shards
from dure.targets import chip, chip_names

BATCHES: dict[Phase, Batch] = {
    "decode": Batch("decode", 3, 70, contexts=(40, 3, 70)),
    "prefill": Batch("prefill", 2, 70, chunk=21),
    "mixed": Batch("mixed", 2, 70, chunk=33),
}
#: What runs by default: chip, model, phase and devices.
SHORT = {
    ("rngd", "qwen3-0.6b", "decode", 4),
    ("atom-max", "gemma-3-4b", "mixed", 1),
}


@pytest.mark.parametrize(
    ("name", "model", "phase", "devices"),
    [
        pytest.param(*case, marks=() if case in SHORT else pytest.mark.long)
        for case in (
            (name, model, phase, devices)
            for name in chip_names()
            for model in DECODERS
            for phase in BATCHES
            for devices in ((1, 4) if chip(name).links else (1,))
        )
    ],
)
def test_a_step_on_bytes(name: str, model: str, phase: Phase, devices: int) -> None:
    run_step(name, model, phase, devices)


@pytest.mark.parametrize(
    "pieces", [pytest.param(0, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.long), 2]
)
@pytest.mark.parametrize(
    ("name", "model", "devices"),
    [
        ("rngd", "qwen3-0.6b", 2),
        pytest.param("tpu-v6e", "gpt-oss-120b", 4, marks=pytest.mark.long),
        pytest.param("trainium2", "qwen3-0.6b", 2, marks=pytest.mark.long),
        pytest.param("mtia-v2", "llama-3.1-8b", 4, marks=pytest.mark.long),
        pytest.param("atom-max", "gemma-3-4b", 4, marks=pytest.mark.long),
    ],
)
def test_links_at_work_beside_products(
    name: str, model: str, devices: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SummedProduct, "worth", lambda *_: (pieces,))
    calls = run_step(name, model, "prefill", devices, prefetch=False)
    products = {call.kernel.__name__ for call in calls if "matmul_give" in call.kernel.__name__}
    names = ["all"], ["parts"], ["parts", "parts_and_sums"]
    assert products == {f"matmul_give_{way}" for way in names[pieces]}


@pytest.mark.long
def test_links_of_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SummedProduct, "worth", lambda *_: (-1,))
    calls = run_step("tpu-v6e", "qwen3-0.6b", "prefill", 4, prefetch=False)
    products = {call.kernel.__name__ for call in calls if "matmul_give" in call.kernel.__name__}
    assert products == {"matmul_give_lines"}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("h100", "gpt-oss-120b"),
        *(
            pytest.param(name, model, marks=pytest.mark.long)
            for name in chip_names()
            for model in ("qwen3-0.6b", "gemma-3-4b", "gpt-oss-120b")
            if chip(name).cores.base >= 8 and (name, model) != ("h100", "gpt-oss-120b")
        ),
    ],
)
def test_cores_share_the_keys_of_a_token(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever is faster at this size, and however few keys there are.
    monkeypatch.setitem(SUITS, "grouped_attention", lambda call, chip: False)
    monkeypatch.setattr(chip_lowering_attention, "_LEAST", 32)
    batch = Batch("decode", 2, 90, contexts=(90, 41))
    calls = run_step(name, model, "decode", 1, batch=batch)
    assert "join_attention" in {call.kernel.__name__ for call in calls}


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("rngd", 4),
        *(
            pytest.param(name, devices, marks=pytest.mark.long)
            for name in chip_names()
            for devices in ((1, 4) if chip(name).links else (1,))
            if (name, devices) != ("rngd", 4)
        ),
    ],
)
def test_choices_of_many_tokens_are_counted(name: str, devices: int) -> None:
    batch = Batch("prefill", 2, 90, chunk=90)
    calls = run_step(name, "gpt-oss-120b", "prefill", devices, batch=batch)
    assert "counted_places" in {call.kernel.__name__ for call in calls}


@contextmanager
def undecided() -> Generator[set[int]]:
    """The tokens for which an expert that wasn't chosen is as good as one that was: rounding
    decides, and what comes of it is another result.
    """
    found, definition = set[int](), op_definition("route")
    semantics = definition.semantics
    assert semantics is not None

    def spy(attrs: Mapping[str, Any], logits: Any, *more: Any) -> Any:
        ordered = -np.sort(-np.asarray(logits, np.float64), axis=1)
        last = ordered[:, attrs["k"] - 1 : attrs["k"] + 1]
        found.update(np.flatnonzero(last[:, 0] - last[:, -1] < 0.01).tolist())
        return semantics(attrs, logits, *more)

    # A definition is frozen, for programs; here it is listened to.
    object.__setattr__(definition, "semantics", spy)
    try:
        yield found
    finally:
        object.__setattr__(definition, "semantics", semantics)


def run_step(
    name: str,
    model: str,
    phase: Phase,
    devices: int,
    *,
    prefetch: bool = True,
    batch: Batch | None = None,
) -> list[KernelCall]:
    """Compare a step on bytes with the interpreted program; gives its launches."""
    config = small(model, vocabulary=512)
    experts = config.experts is not None and devices > 1 and len(name) % 2
    shards = Shards(devices, devices if experts else 1)
    whole = sharded(chip_step(config, batch or BATCHES[phase]), shards)
    answer = step_answer(whole, chip(name), prefetch=prefetch)
    step = answer.step
    assert answer.verdict.ok and step.program is not None
    types = {p.value.name: cast(DType, p.value.tensor.dtype).numpy for p in step.program.params}
    arrays = [
        {name: array.astype(types[name]) for name, array in own.items()}
        for own in (
            arguments(step.program, config, step.inputs, shards, device)
            for device in range(devices)
        )
    ]
    found = run_devices(step, answer.program, chip(name), arrays)
    rows = [[own[p.value.name].copy() for p in step.program.params] for own in arrays]
    with undecided() as tokens:
        wanted = run_shards(step.program, rows, step.sizes)
    top = max(float(np.abs(w[0]).max()) for w in wanted)
    for got, expected in zip(found, wanted, strict=True):
        logits = np.asarray(expected[0], np.float64)
        off = np.abs(got["logits"].astype(np.float64) - logits).max(axis=1)
        if phase == "decode":
            off = np.delete(off, [*tokens])
        assert len(off) and off.max() < 0.05 * top
    return [part.built.call for part in answer.parts]
