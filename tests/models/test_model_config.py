"""Configurations from GGUF metadata and from config.json, right and wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Tiny, write_model

from dure.errors import ModelFileError
from dure.models.config import ModelConfig, RopeConfig, RopeScaling
from dure.models.hf_config import config_from_hf, read_hf_config
from dure.models.rope import frequencies, rope_tables
from dure.models.stored import StoredModel

LLAMA3 = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 168,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}


def test_llama_3_from_config_json() -> None:
    config = config_from_hf(LLAMA3)
    assert (config.family, config.layers, config.group, config.tied) == ("llama", 16, 4, True)
    assert not config.interleaved and config.attention_scale == 1 / 8
    assert config.rope.base == 500000 and config.rope.scaling.kind == "llama3"
    rate, factor = frequencies(config.rope, 64)
    plain, _ = frequencies(RopeConfig(500000.0), 64)
    assert factor == 1
    np.testing.assert_allclose(rate[:4], plain[:4])
    np.testing.assert_allclose(rate[-4:], plain[-4:] / 32)
    assert (np.diff(rate) < 0).all()


def test_gemma_3_from_config_json() -> None:
    config = config_from_hf({"model_type": "gemma3", "text_config": GEMMA3})
    assert config.windows[:7] == (1024,) * 5 + (0, 1024)
    assert config.attention_scale == 1 / math.sqrt(168)
    assert config.rope_of(0).base == 10000 and config.rope_of(0).scaling.kind == "none"
    assert config.rope_of(5).base == 1e6 and config.rope_of(5).scaling.factor == 8
    assert config.norm_offset == 1 and config.post_norms and config.qk_norm and config.tied
    assert config.embedding_scale == math.sqrt(5376) and config.activation == "gelu_tanh"


def test_qwen_and_mistral_from_config_json() -> None:
    base = {**LLAMA3, "rope_scaling": None}
    qwen2 = config_from_hf({**base, "model_type": "qwen2", "sliding_window": 4096})
    assert qwen2.biases == frozenset("qkv") and set(qwen2.windows) == {0}
    qwen3 = config_from_hf({**base, "model_type": "qwen3", "attention_bias": False})
    assert qwen3.qk_norm and not qwen3.biases
    mistral = config_from_hf({**base, "model_type": "mistral", "sliding_window": 4096})
    assert set(mistral.windows) == {4096}
    types = ["full_attention", "sliding_attention"] * 8
    mixed = config_from_hf(
        {**base, "model_type": "mistral", "sliding_window": 64, "layer_types": types}
    )
    assert mixed.windows == (0, 64) * 8


WRONG: list[tuple[str, Any, str]] = [
    ("model_type", "mamba", "unknown model_type 'mamba'"),
    ("model_type", None, "unknown model_type None"),
    ("hidden_size", 0, "hidden_size is 0"),
    ("hidden_size", 1 << 40, "hidden_size is"),
    ("hidden_size", "2048", "is an integer|hidden_size is '2048'"),
    ("num_hidden_layers", True, "num_hidden_layers is True"),
    ("num_key_value_heads", 7, "share 7 KV heads"),
    ("head_dim", 63, "head_dim is 63"),
    ("hidden_act", "relu", "activation 'relu'"),
    ("rms_norm_eps", -1.0, "epsilon of the RMS norm"),
    ("rms_norm_eps", float("nan"), "epsilon of the RMS norm"),
    ("rope_theta", 0.0, "the rope's base"),
    ("rope_scaling", {"rope_type": "magic"}, "unknown rope scaling 'magic'"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_wrong_values_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        config_from_hf({**LLAMA3, key: value})


@given(st.sampled_from(sorted(LLAMA3)), st.none() | st.integers() | st.text() | st.booleans())
def test_any_value_gives_a_config_or_a_named_error(key: str, value: Any) -> None:
    try:
        config_from_hf({**LLAMA3, key: value})
    except ModelFileError as error:
        assert str(error)


def test_a_damaged_config_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        read_hf_config(path)
    path.write_text(json.dumps(LLAMA3)[:100])
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_hf_config(path)
    path.write_text("[]")
    with pytest.raises(ModelFileError, match="not an object"):
        read_hf_config(path)
    path.write_text(json.dumps(LLAMA3))
    assert read_hf_config(path) == config_from_hf(LLAMA3, str(path))


def stored_config(tiny: Tiny, folder: Path) -> ModelConfig:
    path = folder / "model.gguf"
    write_model(tiny, path)
    model = StoredModel.open(path)
    model.close()
    return model.config


def test_gemma_3_from_metadata(tmp_path: Path) -> None:
    config = stored_config(Tiny("gemma3", layers=7, window=5, rope_base=1e6), tmp_path)
    assert config.windows == (5, 5, 5, 5, 5, 0, 5)
    assert config.rope_of(0).base == 10000 and config.rope_of(5).base == 1e6
    assert config.post_norms and config.qk_norm and config.norm_offset == 0
    assert config.embedding_scale == 8.0 and config.attention_scale == 0.25


def test_llama_from_metadata(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = stored_config(Tiny("llama", tied=False, window=64, extra=extra), tmp_path)
    assert not config.interleaved and not config.tied and config.windows == (64, 64)
    assert config.rope.scaling == RopeScaling("linear", 4.0, 256)
    assert stored_config(Tiny("qwen2"), tmp_path).biases == frozenset("qkv")
    extra = {"llama.rope.dimension_count": 8}
    with pytest.raises(ModelFileError, match="dimension_count"):
        stored_config(Tiny("llama", extra=extra), tmp_path)
    extra = {"llama.rope.scaling.type": "longrope"}
    with pytest.raises(ModelFileError, match="unknown rope scaling 'longrope'"):
        stored_config(Tiny("llama", extra=extra), tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(Tiny("llama"), path)
    # The metadata says another head count: 4 heads of 16 become 2 of 16.
    key = b"llama.attention.head_count\x04\x00\x00\x00\x04"
    raw = path.read_bytes()
    assert raw.count(key) == 1
    path.write_bytes(raw.replace(key, key[:-1] + b"\x02"))
    with pytest.raises(ModelFileError, match=r"attn_q\.weight' has the shape \(64, 64\)"):
        StoredModel.open(path)


def test_bytes_that_a_step_reads_count_a_tied_head_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for tied in (True, False):
        tiny = Tiny("llama", tied=tied)
        write_model(tiny, path)
        model = StoredModel.open(path)
        total = sum(w.data.nbytes for w in model.weights())
        table = tiny.vocabulary * tiny.hidden * 4
        assert model.bytes_per_step == (total if tied else total - table)
        model.close()


def test_rope_tables() -> None:
    cosines, sines = rope_tables(RopeConfig(10000.0), 8, 50)
    assert cosines.shape == sines.shape == (50, 4) and cosines.dtype == np.float32
    np.testing.assert_allclose(cosines[49, 1], math.cos(49 / 10), rtol=1e-6)
    np.testing.assert_allclose(sines[7, 0], math.sin(7), rtol=1e-6)
    divided, _ = rope_tables(RopeConfig(10000.0), 8, 50, np.array([1, 2, 4, 8], np.float32))
    np.testing.assert_allclose(divided[3, 1], math.cos(3 / 10 / 2), rtol=1e-6)
    yarn = RopeConfig(10000.0, RopeScaling("yarn", 4.0, 64))
    rate, factor = frequencies(yarn, 64)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    plain, _ = frequencies(RopeConfig(10000.0), 64)
    np.testing.assert_allclose([rate[0], rate[-1]], [plain[0], plain[-1] / 4])
