"""``dure validate``: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dure.cli.main import run
from dure.targets import chip_folder

DATA = "op,dims,device_ns\ngemm,64x256x128,3000\nlstm,4x8,100\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "bench.csv"
    file.write_text(DATA, encoding="utf-8")
    return file


def test_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", "--target", "tpu-v6e", "--data", str(data), "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    [row] = found["rows"]
    assert (row["op"], row["dims"], row["measured_ns"]) == ("gemm", "64x256x128", 3000.0)
    assert row["error"] == pytest.approx(row["predicted_ns"] / 3000 - 1)
    assert found["summary"]["gemm"]["median"] == pytest.approx(abs(row["error"]))
    assert found["not_modelled"][0]["work"] == "lstm 4x8"


def test_text_and_another_algorithm(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", "--target", "rngd", "--data", str(data), "--algorithm", "dure"]
    assert run([*arguments, "--set", "clock=2GHz"]) == 0
    out = capsys.readouterr().out
    assert "64x256x128" in out and "ABSOLUTE ERROR" in out and "not modelled: lstm 4x8" in out


def test_the_page(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    arguments = ["validate", "--target", "atom", "--data", str(data), "--markdown", str(page)]
    assert run(arguments) == 0
    assert capsys.readouterr().out == ""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Validation") and "| gemm | 64x256x128 |" in text
    assert run([*arguments[:-1], str(tmp_path / "none" / "page.md")]) == 2
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--algorithm", "mine"], "no algorithm is called 'mine'"),
        (["--data", "{data}"], "measurements and numbers are those of one chip"),
        (["--set", "cores=1"], "measurements and numbers are those of one chip"),
        (["--target", "{mine}", "--rows", "operators"], "no measurement of mine is known"),
        (["--target", "h100", "--rows", "kernels"], "--rows all"),
        (["--target", "h10"], "no target named 'h10'"),
        (["--target", "atom", "--data", "nowhere.csv"], "can't be read"),
        (["--target", "atom", "--data", "{data}", "--set", "speed=2"], "no number speed"),
    ],
)
def test_refusals(
    arguments: list[str], words: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = chip_folder("rngd")
    assert folder is not None
    text = (folder / "machine.toml").read_text(encoding="utf-8")
    mine = data.with_name("mine.toml")
    mine.write_text(text.replace('name = "rngd"', 'name = "mine"'), encoding="utf-8")
    filled = [a.format(data=data, mine=mine) for a in arguments]
    assert run(["validate", *filled]) == 2
    error = capsys.readouterr().err
    assert words in error and "fix: " in error
