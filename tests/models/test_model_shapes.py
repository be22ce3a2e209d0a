"""The shapes of published models: what each name is, and what is wrong said by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.errors import ModelFileError, UsageError
from dure.models import shapes
from dure.models.config import ModelConfig
from dure.models.encoder_config import EncoderConfig, encoder_from_hf
from dure.models.hf_config import config_from_hf, read_json
from dure.models.weights import weight_specs

#: name -> parameters in billions, as commonly stated of each; Gemma without its vision tower.
PARAMETERS = {
    "smollm2-135m": 0.1345,
    "llama-2-7b": 6.738,
    "llama-2-70b": 68.98,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "solar-10.7b": 10.73,
    "qwen3-0.6b": 0.596,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09,
    "gemma-3-4b": 3.88,
    "gemma-3-27b": 27.01,
    "exaone-4.0-32b": 32.0,
    "mixtral-8x7b": 46.70,
    "gpt-oss-120b": 116.83,
}


def test_every_name_is_a_model_with_a_source() -> None:
    assert set(shapes.names()) == {*PARAMETERS, "bert-large"}
    for name in shapes.names():
        assert isinstance(shapes.any_config(name), ModelConfig | EncoderConfig)
        assert shapes.source(name).startswith("https://huggingface.co/")


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_name_has_as_many_parameters_as_are_stated(name: str) -> None:
    config = shapes.model_config(name)
    total = 0
    for spec in weight_specs(config):
        count = 1
        for extent in spec.shape:
            count *= extent
        total += count
    assert total / 1e9 == pytest.approx(PARAMETERS[name], rel=2e-3)


def test_what_sets_families_apart() -> None:
    exaone = shapes.model_config("exaone-4.0-32b")
    assert exaone.windows[:5] == (4096, 4096, 4096, 0, 4096)
    assert exaone.rotated[:5] == (True, True, True, False, True)
    assert exaone.post_norms and not exaone.pre_norms and exaone.qk_norm
    assert exaone.rope.scaling.factor == 16
    gpt = shapes.model_config("gpt-oss-120b")
    assert gpt.windows == (128, 0) * 18 and all(gpt.rotated) and gpt.sinks
    assert gpt.biases == {"q", "k", "v", "o", "router", "gate", "up", "down"}
    assert gpt.activation == "clamped_swiglu" and gpt.swiglu_limit == 7
    assert not gpt.rope.scaling.truncate and gpt.rope.scaling.kind == "yarn"
    assert gpt.experts is not None and (gpt.experts.count, gpt.experts.chosen) == (128, 4)
    qwen = shapes.model_config("qwen3-30b-a3b")
    assert qwen.experts is not None and qwen.experts.chosen == 8 and qwen.experts.normalized
    assert qwen.intermediate == 768 and qwen.qk_norm and not qwen.biases
    mixtral = shapes.model_config("mixtral-8x7b")
    assert mixtral.experts is not None and mixtral.experts.normalized and not mixtral.qk_norm
    assert set(mixtral.windows) == {0} and mixtral.head_dim == 128
    gemma = shapes.model_config("gemma-3-27b")
    assert gemma.windows[:7] == (1024,) * 5 + (0, 1024)
    assert gemma.attention_scale == pytest.approx(168**-0.5)
    bert = shapes.encoder_config("bert-large")
    assert (bert.layers, bert.heads, bert.head_dim, bert.token_types) == (24, 16, 64, 2)


def test_gemma_files_that_leave_out_what_the_class_says(tmp_path: Path) -> None:
    whole = read_json(Path(shapes.__file__).with_name("gemma-3-4b.json"))
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    text = {k: v for k, v in whole["text_config"].items() if k in (*kept, "rope_scaling")}
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}})
    )
    found, expected = shapes.model_config(path), shapes.model_config("gemma-3-4b")
    assert vars(found) | {"where": ""} == vars(expected) | {"where": ""}


def test_a_path_or_its_folder_is_a_model_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(Path(shapes.__file__).with_name("qwen3-8b.json").read_text())
    for place in (path, str(path), tmp_path):
        assert shapes.model_config(place).layers == 36


def test_a_name_that_is_not_there_is_told_with_close_ones() -> None:
    with pytest.raises(UsageError) as error:
        shapes.model_config("llama-3.1-80b")
    assert "no model named 'llama-3.1-80b'" in str(error.value)
    assert "did you mean llama-3.1-8b" in error.value.fix
    assert "qwen3-0.6b" in error.value.rule
    for name in ("", "\0", "x" * 5000):
        with pytest.raises((UsageError, ModelFileError)):
            shapes.model_config(name)
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        shapes.model_config("nowhere/config.json")


def test_a_decoder_is_no_encoder() -> None:
    with pytest.raises(ModelFileError, match="the model is an encoder"):
        shapes.model_config("bert-large")
    with pytest.raises(ModelFileError, match="the model is a decoder"):
        shapes.encoder_config("llama-2-7b")


WRONG: list[tuple[str, str, Any, str]] = [
    ("mixtral-8x7b", "num_local_experts", None, "num_local_experts is None"),
    ("mixtral-8x7b", "num_local_experts", ..., "there is no num_local_experts"),
    ("mixtral-8x7b", "num_local_experts", 1 << 30, "num_local_experts is 1073741824"),
    ("mixtral-8x7b", "num_experts_per_tok", 9, "9 of 8 experts are chosen"),
    ("mixtral-8x7b", "hidden_size", ..., "there is no hidden_size"),
    ("qwen3-30b-a3b", "moe_intermediate_size", "768", "moe_intermediate_size is '768'"),
    ("qwen3-30b-a3b", "mlp_only_layers", [0], "some layers have experts and others don't"),
    ("qwen3-30b-a3b", "norm_topk_prob", 1, "norm_topk_prob is 1"),
    ("exaone-4.0-32b", "sliding_window_pattern", "LLX", "sliding_window_pattern is 'LLX'"),
    ("exaone-4.0-32b", "sliding_window_pattern", 0, "sliding_window_pattern is 0"),
    ("gpt-oss-120b", "swiglu_limit", -7.0, "the limit of the clamped SwiGLU is -7.0"),
    ("gpt-oss-120b", "layer_types", ["linear_attention"] * 36, "a layer of type 'linear_attent"),
    ("gpt-oss-120b", "layer_types", ["full_attention"], "layer_types has other than 36"),
    ("gpt-oss-120b", "layer_types", "full_attention", "layer_types is 'full_attention'"),
    ("gpt-oss-120b", "rope_scaling", "yarn", "rope_scaling is 'yarn'"),
    ("gpt-oss-120b", "rope_parameters", 3, "rope_parameters is 3"),
    ("gpt-oss-120b", "rope_scaling", {"rope_type": "yarn", "truncate": 0}, "truncate is 0"),
    ("gemma-3-4b", "text_config", None, "text_config is None"),
    ("gemma-3-4b", "text_config", ..., "there is no hidden_size"),
    ("bert-large", "type_vocab_size", ..., "there is no type_vocab_size"),
    ("bert-large", "hidden_size", 1000, "16 attention heads share 1000 columns"),
    ("bert-large", "num_hidden_layers", True, "num_hidden_layers is True"),
    ("bert-large", "num_hidden_layers", 1 << 20, "layers is 1048576"),
    ("bert-large", "hidden_act", ["gelu"], "activation"),
    ("bert-large", "layer_norm_eps", "tiny", "layer_norm_eps is 'tiny'"),
    ("bert-large", "position_embedding_type", "relative_key", "relative positions"),
    ("bert-large", "model_type", "mamba", "unknown model_type 'mamba'"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), WRONG)
def test_wrong_values_are_named(
    name: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    values = dict(read_json(Path(shapes.__file__).with_name(f"{name}.json")))
    values[key] = value
    if value is ...:
        del values[key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ModelFileError, match=message) as error:
        shapes.any_config(path)
    assert str(path) in str(error.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(), SCALARS, max_size=2)


@given(st.sampled_from(shapes.names()), st.integers(0, 99), VALUES)
def test_any_value_gives_a_config_or_a_named_error(name: str, place: int, value: Any) -> None:
    values: Any = json.loads(json.dumps(read_json(Path(shapes.__file__).with_name(f"{name}.json"))))
    # Keys of nested objects too.
    owners = [values, *(v for v in values.values() if isinstance(v, dict))]
    keys = [(owner, key) for owner in owners for key in owner if key != "source"]
    owner, key = keys[place % len(keys)]
    owner[key] = value
    read = encoder_from_hf if values["model_type"] == "bert" else config_from_hf
    try:
        read(values)
    except ModelFileError as error:
        assert str(error)
