"""``dure save``, and its files as what other commands are asked about."""

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
GOLDEN = str(Path(__file__).parents[1] / "golden" / "0.1.0" / "softmax.dure")
STEP = GOLDEN.replace("softmax", "experts_decode")


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_an_operator_saved_and_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "softmax.dure")
    said = result(capsys, "save", "softmax", "16x64", "-o", file, "--target", "rngd")
    assert said["name"] == "softmax 16x64 bf16" and said["bytes"] == Path(file).stat().st_size
    assert f"sha256 {said['sha256']}\n" in Path(file).read_text(encoding="utf-8")
    found = result(capsys, "sim", file, "--target", "rngd")
    known = result(capsys, "sim", "softmax", "16x64", "--target", "rngd")
    for key in ("op", "dims", "dtype", "ns", "flops", "bytes", "bound", "confidence"):
        assert found[key] == known[key]
    # A file saved again is the same one.
    again = str(tmp_path / "again.dure")
    assert run(["save", file, "-o", again]) == 0
    assert "softmax 16x64 bf16: 1 kernels" in capsys.readouterr().out
    assert Path(again).read_bytes() == Path(file).read_bytes()


def test_every_command_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert result(capsys, "sanitize", GOLDEN, "--target", "rngd")["ok"]
    assert result(capsys, "check", GOLDEN, "--target", "atom")["ok"]
    out = str(tmp_path / "out")
    (program,) = result(capsys, "compile", GOLDEN, "--target", "rngd", "-o", out)["programs"]  # type: ignore[misc]
    assert Path(program["file"]).read_text(encoding="utf-8").startswith("machine function softmax")
    page = str(tmp_path / "page.html")
    assert result(capsys, "report", GOLDEN, "--target", "rngd", "-o", page)["file"] == page


@pytest.mark.long
def test_a_model_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL), encoding="utf-8")
    file = str(tmp_path / "step.dure")
    options = ["--target", "rngd", "--batch", "2", "--context", "20"]
    said = result(capsys, "save", str(config), "-o", file, *options)
    assert len(said["kernels"]) > 8  # type: ignore[arg-type]
    found = result(capsys, "sim", file, "--target", "rngd")
    assert (found["phase"], found["batch"], found["context"]) == ("decode", 2, 20)
    assert run(["sim", file, "--target", "rngd"]) == 0
    assert "decode of 2 x 1 tokens at 20 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["sim", GOLDEN, "16x64"], "leave out dims"),
        (["sim", GOLDEN, "--batch", "2"], "leave out --batch 2"),
        (["sim", GOLDEN, "--dtype", "f32"], "leave out --dtype"),
        (["sim", STEP, "--phase", "prefill"], "leave out --phase prefill"),
        (["check", GOLDEN, "--const", "bm=8"], "leave out --const"),
        (["sim", "no.dure"], "no.dure can't be read"),
        (["save", "softmax", "16x64", "-o", "x.txt"], "-o x.dure"),
        (["save", "softmax", "16x64", "-o", "no/x.dure", "--target", "rngd"], "can't be written"),
        (["save", "softmax", "16x64", "--batch", "3", "-o", "x.dure"], "leave out --batch 3"),
        (["save", "llama-3.1-8b", "16x64", "-o", "x.dure"], "leave out dims"),
        (["save", "softmax", "16x64"], "-o"),
    ],
)
def test_what_is_refused(
    arguments: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    assert found in said.err


def test_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.dure"
    path.write_bytes(Path(GOLDEN).read_bytes().replace(b"exp(", b"log("))
    assert run(["sim", str(path), "--target", "rngd"]) == 2
    said = capsys.readouterr().err
    assert "the artefact is damaged" in said and "bad.dure" in said and "fix:" in said
