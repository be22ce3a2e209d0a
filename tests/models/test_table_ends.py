"""How far guesses may go to their ends before a measurement contradicts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dure.machine.chip import Chip
from dure.models.tables import ends, rows, score
from dure.models.tables.ends import Allowed, allowed
from dure.models.tables.rows import ModelRow, Predicted
from dure.targets import chip

_HEAD = ",".join(rows.COLUMNS)


@pytest.fixture
def rngd() -> Chip:
    return chip("rngd")


def _row(tmp_path: Path, target: Chip, *, known: str = "yes", within: str = "0.25") -> ModelRow:
    """A decode step that was measured to take 10 ms."""
    line = f"llama-3.1-8b,bf16,1,,decode,1,40,,ms,10,=,{known},{within},host,a table"
    file = tmp_path / "models.csv"
    file.write_text(f"{_HEAD}\n{line}\n", encoding="utf-8")
    (found,) = rows.read_rows(file, target)
    return found


def _law(seconds: Callable[[float], float | None]) -> object:
    """Predictions by a law of the chip's launch, in microseconds, which stands for its guesses."""

    def predicted(asked: Sequence[ModelRow], jobs: int) -> Iterator[tuple[int, Predicted]]:
        for place, row in enumerate(asked):
            yield place, Predicted(row, seconds(row.chip.launch.base * 1e6), "")

    return predicted


def _allowed(
    monkeypatch: pytest.MonkeyPatch,
    row: ModelRow,
    seconds: Callable[[float], float | None],
    end: ends.End = "low",
) -> tuple[Allowed, list[float]]:
    monkeypatch.setattr(ends, "predict", _law(seconds))
    tried: list[float] = []
    return allowed(row.chip, end, [row], tried=tried.append), tried


def test_guesses_go_as_far_as_a_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rngd: Chip
) -> None:
    # A launch of 3 us, which may be 20: 12.5 ms are reached at (12.5 / 9.5) ** (1 / 2) of its way.
    row = _row(tmp_path, rngd)
    found, tried = _allowed(monkeypatch, row, lambda us: 9.5e-3 * (us / 3) ** 0.25)
    assert (found.part, found.rows) == (0.5, 1)
    assert "decode 1 x 40" in found.hinders
    # What is within the tolerance needs no look at the file's own numbers.
    assert tried == [1.0, 0.0, 0.5, 0.75, 0.0, 0.625, 0.0]
    found, _ = _allowed(monkeypatch, row, lambda us: 10e-3)
    assert found == Allowed(1.0, "", 1)
    # One step of the way is too far.
    found, _ = _allowed(monkeypatch, row, lambda us: 10e-3 * (us / 3))
    assert found.part == 0.0 and found.hinders
    # A chip that can't run it isn't the one that was measured.
    found, _ = _allowed(monkeypatch, row, lambda us: 10e-3 if us < 7 else None)
    assert 0 < found.part < 1


def test_a_file_that_is_further_off_gets_no_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rngd: Chip
) -> None:
    row = _row(tmp_path, rngd)
    # 30 % too fast by the file: the slow end may go beyond the measurement, the fast end not on.
    found, _ = _allowed(monkeypatch, row, lambda us: 7e-3 * us / 3)
    assert 0 < found.part < 1
    found, _ = _allowed(monkeypatch, row, lambda us: 7e-3 * us / 3, "high")
    assert found.part in (0.0, 0.125)
    found, _ = _allowed(monkeypatch, row, lambda us: 13e-3 * us / 3, "high")
    assert found.part > 0


def test_what_says_nothing_hinders_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rngd: Chip
) -> None:
    assert allowed(rngd, "low", []) == Allowed()
    unknown = _row(tmp_path, rngd, known="no", within="")
    assert _allowed(monkeypatch, unknown, lambda us: us)[0] == Allowed()
    assert ends.telling([unknown]) == ()
    # Not even the file's own numbers predict it.
    found, _ = _allowed(monkeypatch, _row(tmp_path, rngd), lambda us: None)
    assert found.part == 1.0


def test_a_score_takes_the_ends_that_it_is_given(rngd: Chip) -> None:
    asked = [e for e in score.questions(score.rules(short=True)) if e.cell.chip.name == "rngd"]
    seen: list[float] = []

    def outcomes(cells: Sequence[score.Cell], jobs: int) -> Iterator[tuple[int, score.Outcome]]:
        seen.extend(cell.chip.launch.base * 1e6 for cell in cells)
        yield from ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "outcomes", outcomes)
        given: score.Ends = {("rngd", "low"): Allowed(0.5), ("rngd", "high"): Allowed(0.0)}
        list(score.ask(asked, ends=given))
    assert seen == pytest.approx([3, (3 * 20) ** 0.5, 3], rel=0.05)


def test_chips_that_count_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = score.questions(score.rules(short=True))
    seen: list[tuple[str, str]] = []

    def noted(target: Chip, end: str, *_: object) -> Allowed:
        seen.append((target.name, end))
        return Allowed(0.25)

    monkeypatch.setattr(score, "allowed", noted)
    found = score.measured_ends(asked)
    assert set(found) == set(seen) and ("rngd", "high") in found and ("h100", "low") not in found
    made = replace(score.score(asked, [], score.rules(short=True)), ends=found)
    chips = made.json()["chips"]
    assert isinstance(chips, dict)
    assert chips["rngd"]["ends"]["low"] == {"part": 0.25, "hinders": "", "measured": 0}
