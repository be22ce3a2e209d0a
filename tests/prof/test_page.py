"""The page: whole, self-contained, of a bounded size, and safe against what texts hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from long_execution import many

from dure.cli.app import dispatch
from dure.errors import UsageError
from dure.library.answer import Answer
from dure.prof import condense
from dure.prof.page import page, write_page
from dure.prof.records import Profile


def _data(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def _self_contained(text: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!#)(?:https?:)?//""", text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|new WebSocket", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "<link" not in text


def test_a_simulation(simulated: tuple[Answer, Profile]) -> None:
    answer, made = simulated
    text = page([made])
    _self_contained(text)
    (chip,) = _data(text)["chips"]
    assert chip["total"] == answer.ps
    assert sum(part["time"] for part in chip["path"]) == answer.ps
    assert sum(len(track["start"]) for track in chip["tracks"]) == len(made.instructions)
    assert abs(chip["roofline"]["fraction"] - answer.fraction_of_roofline) < 1e-9
    for track in chip["tracks"]:
        lengths = {len(track[n]) for n in ("start", "length", "issued", "flow", "name", "source")}
        assert len(lengths) == 1
        for block, _, start, end, cause, home in track["waits"]:
            assert block < len(track["start"])
            assert end > start
            assert cause < len(chip["tracks"][home]["start"])
    names = [buffer["name"] for buffer in chip["buffers"]]
    assert names == [buffer.name for buffer in made.buffers]
    assert any(chip["sources"][b["source"]]["text"] for b in chip["buffers"] if b["source"] >= 0)


def test_texts_cant_break_out(by_hand: Profile) -> None:
    text = page([by_hand], [("other", "it </script><script>alert(1)</script>")])
    assert text.count("</script>") == 2
    assert "alert(1)</script>" not in text
    assert _data(text)["chips"][0]["sources"][0]["text"].startswith("acc = dl.dot")


def test_a_long_execution_is_a_small_page(by_hand: Profile) -> None:
    long = many(by_hand, 4_000)
    text = page([long])
    assert len(text) < 1_000_000
    (chip,) = _data(text)["chips"]
    assert chip["resolution"] == long.total // condense.PARTS
    assert sum(sum(track["count"]) for track in chip["tracks"]) == 16_000
    assert sum(sum(track["bytes"]) for track in chip["tracks"]) == 8_000 * 4096


def test_curves_keep_their_area() -> None:
    points = [(n * 10, float(n % 7)) for n in range(20_000)]
    short = condense.curve(points, 200_000)
    assert len(short) == condense.POINTS
    ends = [at for at, _ in short[1:]] + [200_000]
    area = sum(value * (end - at) for (at, value), end in zip(short, ends, strict=True))
    assert area == pytest.approx(sum(value * 10 for _, value in points))
    assert max(v for _, v in condense.curve(points, 200_000, highest=True)) == 6


@pytest.mark.parametrize("name", ["report.json", "missing/r.html", "folder.html"])
def test_bad_paths(tmp_path: Path, by_hand: Profile, name: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError) as caught:
        write_page([by_hand], tmp_path / name)
    assert caught.value.fix


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    command = ["report", "gemm", "256x256x256", "--target", "rngd,trainium2", "-o", str(path)]
    assert dispatch(command) == 0
    assert str(path) in capsys.readouterr().out
    data = _data(path.read_text("utf-8"))
    assert [chip["target"] for chip in data["chips"]] == ["rngd", "trainium2"]


def test_a_chip_that_cant_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    command = ["report", "gemm", "64x64x64", "--dtype", "fp8", "--strict", "-o", str(path)]
    assert dispatch([*command, "--target", "trainium2,atom", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {e["target"] for e in said["errors"]} | {t["target"] for t in said["targets"]} == {
        "trainium2",
        "atom",
    }
    assert len(_data(path.read_text("utf-8"))["errors"]) == len(said["errors"])


def test_nothing_is_written_where_no_chip_can(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert dispatch(["report", "gemm", "0x1x1", "--target", "rngd", "-o", str(path)]) == 2
    assert not path.exists()
