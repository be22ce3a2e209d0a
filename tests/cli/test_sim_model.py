"""``dure sim MODEL``: what it prints, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dure.cli.main import run

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return str(path)


def test_a_step_as_json(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sim", small, "--target", "rngd", "--batch", "2", "--context", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in (
        *("ns", "step_tok_s", "bound", "fraction_of_roofline", "confidence", "compile_s"),
        *("sim_s", "chips", "weight_bytes", "kv_bytes", "operators", "joules"),
    ):
        assert key in found
    assert (found["batch"], found["context"], found["phase"]) == (2, 40, "decode")
    # The context is no longer than the model's where none is given.
    assert run(["sim", small, "--target", "rngd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 128


def test_a_step_for_people(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sim", small, "--target", "rngd", "--phase", "prefill", "--context", "20"]) == 0
    shown = capsys.readouterr().out
    assert "prefill of 1 x 20 tokens" in shown
    assert "gate+up" in shown and "attention" in shown


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["llama-3.1-9b"], "llama-3.1-8b"),
        (["llama-3.1-8b", "64x64"], "leave out dims"),
        (["llama-3.1-8b", "--arg", "x=bf16[4]"], "leave out --arg"),
        (["gemm", "64x64x64", "--batch", "2"], "leave out --batch 2"),
        (["llama-3.1-8b", "--batch", "0"], "--batch 1"),
        (["llama-3.1-8b", "--context", "-3"], "--context 1"),
        (["llama-3.1-8b", "--context", "999999"], "--context 131072"),
        (["llama-3.1-8b", "--phase", "both"], "--phase decode"),
        (["llama-3.1-8b", "--context", "many"], "--context 1024"),
        (["llama-3.1-8b", "--context", "9,0"], "--context 1"),
        (["llama-3.1-8b", "--context", "9,7", "--batch", "3"], "--batch 2"),
        (["llama-3.1-8b", "--chunk", "3"], "leave out --chunk"),
        (["llama-3.1-8b", "--phase", "mixed", "--chunk", "-1"], "--chunk 1024"),
        (["llama-3.1-8b", "--phase", "prefill", "--context", "9,7", "--chunk", "8"], "--chunk 7"),
        (["bert-large", "--phase", "prefill", "--context", "9,7"], "one --context"),
        (["llama-3.1-8b", "--dtype", "int4"], "--dtype bf16"),
        (["llama-3.1-405b", "--chips", "1"], "32 devices would hold them"),
        (["llama-3.1-405b", "--chips", "16"], "of each of 16 devices"),
        (["llama-3.1-405b", "--tp", "16", "--batch", "64", "--context", "131072"], "--batch"),
        (["llama-3.1-8b", "--chips", "0"], "--chips 1"),
        (["llama-3.1-8b", "--tp", "-2"], "--tp 1"),
        (["llama-3.1-8b", "--chips", "2", "--tp", "4"], "--chips 4"),
        (["llama-3.1-8b", "--tp", "3"], "--tp 2 (of 1, 2, 4, 8, 16, 32)"),
        (["llama-3.1-8b", "--ep", "2"], "leave out --ep"),
        (["mixtral-8x7b", "--tp", "4", "--ep", "3"], "--ep 2"),
        (["bert-large", "--phase", "prefill", "--context", "64", "--chips", "2"], "--chips 1"),
        (["gemm", "64x64x64", "--chips", "2"], "leave out --chips 2"),
        (["all_reduce", "64x64", "--chips", "1"], "--chips 2"),
        (["all_reduce", "64x64", "--batch", "1"], "leave out --batch 1"),
        (["all_reduce", "64"], "MxH"),
        (["all_reduce"], "MxH"),
        (["all_reduce", "64x64", "--dtype", "int4"], "--dtype bf16"),
        (["reduce_scatter", "64x66", "--chips", "4"], "a multiple of 4 columns"),
        (["bert-large"], "--phase prefill"),
        (["nowhere/config.json"], "config.json"),
    ],
)
def test_what_is_refused(
    arguments: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sim", *arguments, "--target", "rngd"]) == 2
    assert found in capsys.readouterr().err


def test_a_collective_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sim", "all_reduce", "4x256", "--target", "rngd", "--chips", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["op"], found["chips"], found["link"]) == ("all_reduce", 4, "pcie")
    assert found["sent_bytes"] == 2 * (4 * 256 * 2 * 3 // 4)
    assert [part["kernel"] for part in found["parts"]]
