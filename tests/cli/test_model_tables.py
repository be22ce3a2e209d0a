"""``dure score``, ``dure matrix``, ``dure validate --rows models`` and ``dure report MODEL``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dure.cli.main import run
from dure.models.tables import cells, matrix, rows, score
from dure.models.tables.cells import Cell, Outcome

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small model, and a cache of its own."""
    monkeypatch.setenv("DURE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return str(path)


@pytest.fixture
def scored(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score of one small model."""
    table: dict[str, Any] = {
        "models": [tiny],
        "batches": [2],
        "contexts": {"decode": 40},
        "dtype": "bf16",
        "least": 0.6,
        "short": {"batches": [1]},
        "side": [{"name": "korean", "targets": ["rngd"]}, {"name": "big", "targets": ["h100"]}],
        "floor": [],
    }
    monkeypatch.setattr(score, "_table", lambda: table)

    def answered(cell: Cell) -> Outcome:
        """Slower by what the chip's launch takes."""
        ps = int(1e6 + 1e12 * cell.chip.launch.base)
        return Outcome(1, 1e6, 0.9, ps, 1e6 / ps, "memory", "guessed")

    monkeypatch.setattr(cells, "outcome", answered)


@pytest.mark.usefixtures("scored")
def test_score(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["score", "--json", "--ends", "whole", "--jobs", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    low, high = found["quotient"]
    sides = found["sides"]
    assert low == pytest.approx(sides["korean"]["low"] / sides["big"]["low"])
    assert high == pytest.approx(sides["korean"]["high"] / sides["big"]["high"])
    for side in sides.values():
        assert side["low"] < side["file"] < side["high"]
    assert found["counts"] is False and all("0.6" in line for line in found["hinders"])
    assert {"low", "high", "file", "side", "so_far", "ends"} == found["chips"]["rngd"].keys()
    assert found["chips"]["rngd"]["ends"] == {}
    assert {"fraction_of_roofline", "of_attainable", "chips", "ns"} <= found["cells"][0].keys()
    assert run(["score", "--json", "--jobs", "1"]) == 0
    chips = json.loads(capsys.readouterr().out)["chips"]
    # Nothing was measured on the one; what was on the other contradicts these times.
    assert chips["rngd"]["ends"]["low"] == {"part": 1.0, "hinders": "", "measured": 0}
    assert chips["h100"]["ends"]["low"]["measured"] > 0
    assert run(["score", "--json", "--ends", "none", "--jobs", "1"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["quotient"] == [None, None]
    assert alone["quotient_by_file"] == found["quotient_by_file"]
    assert run(["score", "--short", "--jobs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "DECODE 1" in shown and "quotient" in shown and "doesn't count" in shown
    assert "only some of the cells" in shown


@pytest.mark.usefixtures("scored")
def test_what_score_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["score", "--target", "rngd,h200"]) == 2
    assert "the score has no chip 'h200'" in capsys.readouterr().err
    assert run(["score", "--ends", "some"]) == 2
    assert "measured, whole, none" in capsys.readouterr().err
    assert run(["score", "--jobs", "0"]) == 2


def test_matrix(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "models.md"
    arguments = ["matrix", "--model", tiny, "--target", "rngd", "--jobs", "1"]
    assert run([*arguments, "--markdown", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cells"]
    assert [(c["model"], c["phase"], c["chips"]) for c in found] == [
        (tiny, "decode", 1),
        (tiny, "prefill", 1),
    ]
    text = page.read_text(encoding="utf-8")
    assert "2 of 2 steps are compiled" in text
    assert run(arguments) == 0
    assert tiny in capsys.readouterr().out
    assert run([*arguments, "--markdown", "none/models.md"]) == 2
    assert "can't be written" in capsys.readouterr().err
    # Cells are put into a matrix that has their chips.
    assert run([*arguments, "--markdown", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == text
    other = ["matrix", "--model", tiny, "--target", "atom", "--markdown", str(page)]
    assert run(other) == 2
    assert "is no matrix of atom" in capsys.readouterr().err
    # The written matrix has a row that is no model of the package.
    assert run([*arguments, "--check", str(page)]) == 2
    assert "is out of date" in capsys.readouterr().err


def test_matrix_keeps_rows_that_others_write_meanwhile(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, entries = tmp_path / "models.md", matrix.entries
    arguments = ["matrix", "--model", tiny, "--target", "rngd", "--jobs", "1"]
    assert run([*arguments, "--markdown", str(page)]) == 0
    row = next(line for line in page.read_text("utf-8").splitlines() if tiny in line)

    def slow(asked: Sequence[Cell], jobs: int) -> Iterator[matrix.Entry]:
        yield from entries(asked, jobs)
        text = page.read_text("utf-8")
        page.write_text(text.replace(row, f"{row}\n{row.replace(tiny, 'another')}"), "utf-8")

    monkeypatch.setattr(matrix, "entries", slow)
    assert run([*arguments, "--markdown", str(page)]) == 0
    assert row.replace(tiny, "another") in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--model", "llama-9"], "there is no model named 'llama-9'"),
        (["--target", "h10"], "no target named 'h10'"),
        (["--check", "nowhere.md"], "can't be read"),
        (["--model", "none/config.json"], "config.json"),
    ],
)
def test_what_matrix_refuses(
    arguments: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["matrix", *arguments]) == 2
    assert found in capsys.readouterr().err


def test_validate_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times that stand for those of steps that take minutes to compile."""

    def quick(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[int, Outcome]]:
        for place, cell in enumerate(cells):
            made = Outcome(cell.devices, 1e9, 0.9, 10**10, 0.1, "memory", "guessed")
            yield place, made

    monkeypatch.setattr(rows, "outcomes", quick)
    page = tmp_path / "page.md"
    arguments = ["validate", "--rows", "models", "--target", "trainium2", "--jobs", "1"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert {row["model"] for row in found} == {"llama-3.1-70b", "llama-3.1-405b"}
    assert all(row["chips"] == 64 and row["unknown"] and row["source"] for row in found)
    assert run(arguments) == 0
    assert "llama-3.1-405b bf16 decode 1 x 10750 on 64 devices" in capsys.readouterr().out
    assert run([*arguments, "--markdown", str(page)]) == 0
    assert "## Whole models" in page.read_text(encoding="utf-8")


def _report(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def test_sim_with_quantized_activations(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sim", tiny, "--target", "rngd", "--context", "40", "--activations", "fp8"]
    assert run([*arguments, "--weights", "fp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["weights"], found["activations"]) == ("bf16", "fp8", "fp8")
    assert "fp8 rows" in {o["name"] for o in found["operators"]}
    assert run([*arguments, "--weights", "fp8"]) == 0
    assert "in fp8 by activations in fp8" in capsys.readouterr().out
    assert run(arguments) == 2
    assert "--weights fp8 --activations fp8" in capsys.readouterr().err


def test_report_of_a_model(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ["report", tiny, "--target", "rngd,trainium2", "--batch", "2", "--context", "40"]
    assert run([*arguments, "-o", str(page), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    data = _report(page)
    assert "decode of 2 x 1 tokens at 40 positions" in data["title"]
    for chip, told in zip(data["chips"], said["targets"], strict=True):
        assert chip["whole"] / 1000 == told["ns"] and chip["total"] == chip["whole"]
        names = [o["name"] for o in chip["operators"]]
        assert names[0] == "embedding" and names[-1] == "head" and "attention" in names
        # Every turn of every operator, one after another.
        assert len(chip["turns"]) == sum(o["count"] for o in chip["operators"])
        ends = [end for _, _, end in chip["turns"]]
        assert ends == sorted(ends) and ends[-1] <= chip["whole"]
        for number, operator in enumerate(chip["operators"]):
            spent = sum(end - start for n, start, end in chip["turns"] if n == number)
            assert spent == pytest.approx(operator["together"], rel=0.01, abs=4e6)
        assert sum(part["time"] for part in chip["path"]) == chip["total"]
        assert any(m["points"] for m in chip["memories"])
        assert {c["unit"] for c in chip["overview"]} == {"B/s", "B"}
        assert not any(track["name"] == "load " for track in chip["tracks"])


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["gemm", "64x64x64", "--batch", "2"], "leave out --batch 2"),
        (["llama-3.1-8b", "64x64"], "leave out dims"),
        (["llama-3.1-8b", "--batch", "0"], "--batch 1"),
        (["llama-3.1-405b", "--chips", "1"], "devices would hold them"),
    ],
)
def test_what_report_refuses(
    arguments: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "page.html")
    assert run(["report", *arguments, "--target", "rngd", "-o", output]) == 2
    assert found in capsys.readouterr().err
