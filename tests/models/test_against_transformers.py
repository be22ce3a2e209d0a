"""Whole tiny models of every family: dure's step on the CPU against ``transformers``, in float32.

Each has two periods of its layers.  A sequence comes in chunks, together with another one, and in
single tokens, and reaches beyond every window.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from reference_models import Reference, reference_model, written_config
from step_runner import Compiled

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen 2": ("qwen2", {}),
    "qwen 3": ("qwen3", {"head_dim": 32}),
    "gemma 3": (
        "gemma3_text",
        {
            "num_hidden_layers": 12,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 1000000.0,
                    "factor": 8.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "exaone 4": (
        "exaone4",
        {
            "num_hidden_layers": 8,
            "sliding_window": 9,
            "rope_parameters": {**LLAMA3, "factor": 16.0},
        },
    ),
    "exaone 4 without windows": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "mixtral": ("mixtral", EXPERTS),
    "mixtral with a window": ("mixtral", {**EXPERTS, "sliding_window": 11}),
    "qwen 3 experts": (
        "qwen3_moe",
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "qwen 3 experts, not normalized": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": False,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "sliding_window": 6,
            "rope_parameters": YARN,
            "swiglu_limit": 1.5,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    kind, values = CASES[case]
    model = reference_model(kind, {**BASE, **values})
    config = written_config(model, tmp_path)
    reference = Reference(model, config)
    runner = Compiled(config, reference.weights())
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, config.vocabulary, n).tolist() for n in (47, 19))
    a, b = runner.cache.sequence(), runner.cache.sequence()
    found_a = [runner.step([(a, first[:17])])]
    both = runner.step([(b, second[:18]), (a, first[17:45])])
    found_a.append(both[18:])
    last = runner.step([(a, first[45:46]), (b, second[18:])])
    found_a.append(last[:1])
    found_a.append(runner.step([(a, first[46:])]))
    for ids, found in (
        (first, np.concatenate(found_a)),
        (second, np.concatenate([both[:18], last[1:]])),
    ):
        expected = reference.logits(ids)
        scale = np.abs(expected).max()
        error = np.abs(found - expected).max() / scale
        assert error < 2e-5, f"{case}: {error:.1e} of the largest logit, {scale:.1f}"


@pytest.mark.parametrize("case", ["gpt-oss", "qwen 3 experts", "exaone 4"])
def test_the_bits_depend_on_no_batch_no_chunks_and_no_workers(case: str, tmp_path: Path) -> None:
    kind, values = CASES[case]
    model = reference_model(kind, {**BASE, **values})
    config = written_config(model, tmp_path)
    weights = Reference(model, config).weights()
    rng = np.random.default_rng(2)
    ids, other = (rng.integers(0, config.vocabulary, n).tolist() for n in (33, 29))
    together = Compiled(config, weights, workers=2)
    a, b = together.cache.sequence(), together.cache.sequence()
    whole = together.step([(b, other), (a, ids)])[len(other) :]
    alone = Compiled(config, weights, workers=1)
    a = alone.cache.sequence()
    cuts = [0, 1, 2, 12, 13, 29, 33]
    parts = [alone.step([(a, ids[i:j])]) for i, j in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
