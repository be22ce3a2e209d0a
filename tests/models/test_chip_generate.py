"""SmolLM2 with its real weights on simulated chips: the same greedy tokens as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import random_weights
from step_runner import Compiled

from dure.errors import UsageError
from dure.ir.dtypes import bfloat16
from dure.models.chip_generate import ChipModel, numbers
from dure.models.config import ModelConfig, RopeConfig
from dure.models.stored import StoredModel
from dure.serve.gguf_tokenizer import GGUFTokenizer
from dure.serve.kv import Sequence
from dure.targets import chip, chip_names

#: Its continuation, " Paris.", is likelier than any other by far more than 16 bits round away.
PROMPT, COUNT = "The capital of France is", 3
TINY = ModelConfig("llama", 64, 96, 1, 4, 2, 16, 250, 512, 1e-6, RopeConfig(1e4), tied=False)


def greedy_on_cpu(model: StoredModel, weights: dict[str, np.ndarray], ids: list[int]) -> list[int]:
    """The CPU's step program on weights rounded as the chip's are."""
    program = Compiled(model.config, weights)
    sequence = Sequence(0)
    found, given = list[int](), ids
    for _ in range(COUNT):
        logits = program.step([(sequence, given)])
        given = [int(logits[-1].argmax())]
        found += given
    return found


@pytest.mark.model
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "rngd" else pytest.mark.long) for n in chip_names()]
)
def test_smollm2_answers_on_a_chip(smollm2_path: Path, name: str) -> None:
    model = StoredModel.open(smollm2_path)
    try:
        found = numbers(model, 64)
        tables = model.tables(80)
        rounded = {
            n: np.asarray(a, bfloat16.numpy).astype(np.float32)
            for n, a in found.items()
            if not n.startswith("rope")
        }
        ids = GGUFTokenizer(model.file).encode(PROMPT, parse_special=False)
        wanted = greedy_on_cpu(model, rounded | dict(tables), ids)
        assert ChipModel(model.config, found, chip(name)).greedy(ids, COUNT) == wanted
    finally:
        model.close()


def test_a_sequence_that_is_too_long() -> None:
    rng = np.random.default_rng(0)
    target = chip("rngd")
    weights = random_weights(TINY)
    given = {(n if layer is None else f"layer.{layer}.{n}"): a for (layer, n), a in weights.items()}
    given |= {f"rope_{n}": rng.standard_normal((2, 8)).astype(np.float32) for n in ("cos", "sin")}
    model = ChipModel(TINY, given, target, positions=2)
    tokens = model.greedy([1, 2], 1)
    assert 0 <= tokens[0] < TINY.vocabulary
    with pytest.raises(UsageError, match="token 3 of a sequence"):
        model.decode(3)
