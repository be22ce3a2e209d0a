"""``dure targets show``: every number with its status, its source and its range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dure.cli.app import dispatch
from dure.targets import chip_names


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = dispatch(["targets", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list_has_all_targets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys)
    assert code == 0
    for name in (*chip_names(), "cpu"):
        assert f"\n{name} " in out


@pytest.mark.parametrize("name", [*chip_names(), "cpu"])
def test_show(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = _run(capsys, "show", name)
    assert code == 0
    found = json.loads(_run(capsys, "show", name, "--json")[1])
    assert found["name"] == name
    for path, number in found["numbers"].items():
        assert path in out
        assert number["source"] in out
        assert number["status"] in ("published", "derived", "guessed", "detected")
        if number["status"] == "guessed":
            assert number["low"] <= number["value"] <= number["high"]
            assert f"{number['low']:.10g} to {number['high']:.10g}" in out
    for path, law in found.get("laws", {}).items():
        assert path in out and law["law"] in out and law["source"] in out


def test_show_with_another_number(capsys: pytest.CaptureFixture[str]) -> None:
    change = ("--set", "memory.hbm.bandwidth=2TB/s", "--set", "clock=900MHz")
    number = json.loads(_run(capsys, "show", "rngd", *change, "--json")[1])["numbers"]
    assert number["memories.hbm.bandwidth"]["value"] == 2
    assert number["memories.hbm.bandwidth"]["status"] == "overridden"
    assert number["clock"]["unit"] == "MHz"
    out = _run(capsys, "show", "rngd", *change)[1]
    assert "2 overridden" in out.splitlines()[-1]


def test_show_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[2] / "examples" / "tpu_v4.toml"
    assert json.loads(_run(capsys, "show", str(file), "--json")[1])["name"] == "tpu-v4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tpu-v6",), "did you mean tpu-v6e?"),
        (("none.toml",), "can't be read"),
        (("rngd", "--set", "clock"), "--set clock sets nothing"),
        (("rngd", "--set", "clock="), "sets nothing"),
        (("rngd", "--set", "clock=1"), "isn't a number with its unit"),
        (("rngd", "--set", "memory.hbm.bandwith=2TB/s"), "one of memories.hbm.bandwidth"),
        (("cpu", "--set", "clock=1GHz"), "--set is for chips"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = _run(capsys, "show", *arguments)
    assert code == 2 and not out
    assert words in err
