"""Tables of steps: cells that are kept, the score's arithmetic, published rows, the matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dure.errors import UsageError
from dure.machine.chip import Chip
from dure.models.batch import Batch
from dure.models.chip_answer import StepAnswer
from dure.models.chip_devices import Devices, answer_on
from dure.models.chip_step import ChipStep
from dure.models.shapes import any_config, names
from dure.models.tables import cells, matrix, rows, score
from dure.models.tables.cells import Cell, Outcome, outcome, outcomes, step_of
from dure.targets import chip, chip_names

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


@pytest.fixture(scope="module")
def rngd() -> Chip:
    return chip("rngd")


# --- cells ---------------------------------------------------------------------------------------


def test_a_cell_is_a_step_and_is_kept(
    tiny: str, rngd: Chip, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StepAnswer] = []

    def noted(step: ChipStep, chip: Chip, devices: Devices) -> StepAnswer:
        made.append(answer_on(step, chip, devices))
        return made[-1]

    monkeypatch.setattr(cells, "answer_on", noted)
    cell = Cell(tiny, rngd, Batch("decode", 2, 40))
    found = outcome(cell)
    (answer,) = made
    assert (found.ps, found.bound, found.devices) == (answer.ps, answer.bound, 1)
    assert found.fraction == answer.fraction_of_roofline
    assert found.roofline_ps == pytest.approx(answer.roofline_ps)

    def never(*_: object) -> None:
        raise AssertionError("it is kept")

    monkeypatch.setattr(cells, "answer_on", never)
    assert outcome(cell) == found
    # Another batch, another chip or another type is another cell.
    with pytest.raises(AssertionError, match="kept"):
        outcome(replace(cell, batch=Batch("decode", 3, 40)))
    with pytest.raises(AssertionError, match="kept"):
        outcome(replace(cell, chip=chip("rngd", {"cores": "4"})))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "bert-large"])
def test_where_a_model_was_read_makes_no_other_cell(
    name: str, rngd: Chip, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(name, rngd, Batch("decode", 1, 40))
    found = cells._key(cell)
    config = replace(any_config(name), where="/another/place.json")
    assert config == any_config(name)
    monkeypatch.setattr(cells, "any_config", lambda _: config)
    assert cells._key(cell) == found


def test_a_cells_key_is_the_same_in_every_process() -> None:
    """Also of a model whose config holds a set, of which each process has another order."""
    code = (
        "from dure.models.tables import cells, matrix; from dure.targets import chip;"
        "print(cells._key(matrix.asked(['gpt-oss-120b'], [chip('rngd')], False)[0]))"
    )
    found = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_a_cell_depends_on_what_its_key_holds(tiny: str) -> None:
    program = f"""
import sys
from dure.models.batch import Batch
from dure.models.tables.cells import Cell, outcome
from dure.targets import chip
assert outcome(Cell({tiny!r}, chip("rngd"), Batch("decode", 1, 16))).ps
print(*(name for name in sys.modules if name.startswith("dure.")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {tuple(name.split(".")[1:]) for name in done.stdout.split()}
    # Errors, settings and where answers are kept decide none; nor does the host that asks.
    folders = {*cells._SOURCE, "errors", "settings", "runtime"}
    assert {place[0] for place in loaded} <= folders
    assert not any(place[:2] == ("targets", "cpu") for place in loaded)


def test_equal_cells_are_asked_once(tiny: str, rngd: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Cell] = []

    def once(cell: Cell) -> Outcome:
        asked.append(cell)
        return Outcome(1, 1.0, 1.0)

    monkeypatch.setattr(cells, "outcome", once)
    cell = Cell(tiny, rngd, Batch("decode", 2, 40))
    assert sorted(place for place, _ in outcomes([cell, cell, cell])) == [0, 1, 2]
    assert len(asked) == 1


def test_cells_that_have_no_time(tiny: str, rngd: Chip) -> None:
    alone = rngd.model_copy(update={"links": {}})
    large = outcome(Cell("llama-3.1-70b", alone, Batch("decode", 1, 16)))
    assert (large.ps, large.devices) == (None, 1) and "4 devices would hold them" in large.why
    assert large.weight_bytes > 140e9 and 0 < large.attainable < 1
    longer = outcome(Cell(tiny, rngd, Batch("decode", 1, 129)))
    assert longer.ps is None and "129" in longer.why
    missing = outcome(Cell("llama-9", rngd, Batch("decode", 1, 16)))
    assert "no model named" in missing.why


# --- the score -----------------------------------------------------------------------------------


def _scored(fractions: dict[str, dict[str, float]], least: float = 0.9) -> score.Score:
    """A score in which each chip has one fraction a kind of guesses in all of its cells."""
    given = score.rules()
    asked = score.questions(given)
    found: list[tuple[int, score.Guesses, Outcome]] = []
    for place, entry in enumerate(asked):
        for guess in score.GUESSES:
            mine = fractions.get(entry.entry.target)
            if mine is not None:
                part = mine[guess]
                done = Outcome(1, 1e9, least, int(1e9 / part), part, "memory", "guessed")
                found.append((place, guess, done))
    return score.score(asked, found, given)


def test_the_quotient() -> None:
    korean = {"file": 0.8, "low": 0.6, "high": 0.9}
    big = {"file": 0.85, "low": 0.8, "high": 0.9}
    entries = score.rules().entries
    made = _scored({e.target: korean if e.side == "korean" else big for e in entries})
    assert made.quotient() == pytest.approx(0.8 / 0.85)
    assert made.json()["quotient"] == pytest.approx([0.75, 1.0])
    assert made.chip("atom") == pytest.approx(0.8)
    # ATOM in 16 bits is shown; what counts is int8. H100 is on no side.
    atom = [c for c in made.cells if c.entry.target == "atom"]
    assert {c.cell.weights for c in atom if c.counted} == {"int8"}
    assert {c.cell.model for c in atom if c.counted} == {"llama-3.1-8b"}
    assert not any(c.counted for c in made.cells if c.entry.target == "h100")
    assert len([c for c in made.cells if c.counted and c.entry.side]) == 6 * 2 * 6 + 6
    # 0.8 of a ceiling of 0.9 is above 0.6, and below the floor of a decode step.
    assert not made.counts
    hinders = made.hinders
    assert all("floor" in line and "decode 1" in line for line in hinders)
    assert sum("atom-max" in line for line in hinders) == 1


def test_a_score_counts_above_all_floors() -> None:
    everywhere = dict.fromkeys(
        (e.target for e in score.rules().entries), dict.fromkeys(score.GUESSES, 0.9)
    )
    assert _scored(everywhere).counts
    worse = _scored({**everywhere, "maia-100": dict.fromkeys(score.GUESSES, 0.5)})
    assert not worse.counts
    assert all("maia-100" in line for line in worse.hinders)
    assert any("at least 0.6" in line for line in worse.hinders)


def test_a_missing_cell_leaves_no_quotient() -> None:
    everywhere = {e.target: dict.fromkeys(score.GUESSES, 0.9) for e in score.rules().entries}
    del everywhere["rngd"]
    made = _scored(everywhere)
    assert made.quotient() is None and made.side("korean") is None and made.side("big") is not None
    assert made.json()["quotient"] == [None, None]
    assert any("rngd" in line and "not computed" in line for line in made.hinders)


def test_what_is_faster_than_published_counts_as_the_roofline() -> None:
    fast = {e.target: dict.fromkeys(score.GUESSES, 1.3) for e in score.rules().entries}
    assert _scored(fast).chip("rngd") == 1.0


def test_the_file_of_the_score() -> None:
    given = score.rules()
    assert given.sides == ("korean", "big")
    assert {e.target for e in given.entries} == set(chip_names())
    short = score.rules(short=True)
    assert (short.batches, dict(short.contexts)) == ((1,), {"decode": 1024})
    assert {model for entry in short.entries for model in entry.models} == {"llama-3.1-8b"}
    assert set(given.entries[0].models) <= set(names())


# --- published rows ------------------------------------------------------------------------------

_HEAD = ",".join(rows.COLUMNS)
_ROW = (
    "{model},bf16,1,{set},{phase},{batch},{context},{output},{metric},{value},"
    "=,yes,0.25,host,a table"
)


def _line(**given: object) -> str:
    usual: dict[str, object] = {
        "set": "", "phase": "decode", "batch": 1, "context": 40, "output": "", "metric": "ms",
        "value": 0.05,
    }  # fmt: skip
    return _ROW.format(**{**usual, **given})


def _rows(tmp_path: Path, target: Chip, *lines: str) -> tuple[rows.ModelRow, ...]:
    file = tmp_path / "models.csv"
    file.write_text("\n".join(("# where from", _HEAD, *lines)), encoding="utf-8")
    return rows.read_rows(file, target)


def test_rows_and_what_stands_for_them(tiny: str, tmp_path: Path, rngd: Chip) -> None:
    found = _rows(
        tmp_path,
        rngd,
        _line(model=tiny),
        _line(model=tiny, phase="serve", batch=4, context=20, output=8, metric="tokens/s", value=9),
        _line(model=tiny, phase="serve", batch="", context=20, output=8, metric="requests/s"),
        _line(model=tiny, context=999),
    )
    assert found[1].seconds == pytest.approx(8 / 9) and found[2].seconds == pytest.approx(20.0)
    # A batch that isn't known is as large as fits, up to the most.
    assert found[2].parts()[1][0].batch.sequences == rows.MOST
    small = replace(found[2], chip=chip("rngd", {"memories.hbm.size": "100kB"}))
    with_batch = small.parts()[1][0].batch.sequences
    assert 1 <= with_batch < rows.MOST
    done = dict(rows.predict([found[n] for n in (0, 1, 3)]))
    decode, serve, longer = done[0], done[1], done[2]
    assert decode.seconds is not None and serve.seconds is not None
    assert decode.error == pytest.approx(decode.seconds / 5e-5 - 1)
    assert serve.stands == "prefill 1 x 20 + 2 x decode 4 x 24"
    parts = dict(outcomes([cell for cell, _ in found[1].parts()]))
    total = sum((parts[n].ps or 0) * times for n, (_, times) in enumerate(found[1].parts()))
    assert serve.seconds == pytest.approx(total / 1e12)
    assert serve.predicted.endswith("tokens/s")
    assert longer.seconds is None and longer.good is False and "999" in longer.why
    text = rows.markdown([decode, serve, longer], [("Other", "1", "no target", "b")])
    assert "## Whole models" in text and "unknown: host" in text and "| Other |" in text
    assert json.dumps([one.json() for one in done.values()])


def test_rows_of_eight_bits(tiny: str, tmp_path: Path, rngd: Chip) -> None:
    """Weights and the activations that meet them in that type, values bf16; fp8 caches too, but of
    an encoder, which has none.
    """
    lines = [_line(model=tiny).replace(",bf16,", f",{dtype},") for dtype in ("fp8", "int8")]
    lines += [_line(model="bert-large", phase="prefill").replace(",bf16,", ",fp8,")]
    cells = [row.parts()[0][0] for row in _rows(tmp_path, rngd, *lines)]
    assert [(c.dtype, c.weights, c.activations, c.kv) for c in cells] == [
        ("bf16", "fp8", "fp8", "fp8"),
        ("bf16", "int8", "int8", ""),
        ("bf16", "fp8", "fp8", ""),
    ]
    assert "in fp8 by fp8 with fp8 kv" in cells[0].name
    assert step_of(cells[0]).types == ("bf16", "fp8", "fp8", "fp8")
    # Another type of one of them is another cell.
    found = dict(outcomes([cells[0], replace(cells[0], kv=""), replace(cells[0], activations="")]))
    assert len({(o.ps, o.kv_bytes) for o in found.values()}) == 3
    assert found[0].roofline_ps <= found[2].roofline_ps


def test_a_bound_is_no_error_where_it_holds(tiny: str, tmp_path: Path, rngd: Chip) -> None:
    (row,) = _rows(tmp_path, rngd, _line(model=tiny).replace(",=,", ",>=,"))
    assert rows.Predicted(row, 2 * row.seconds, "").error == 0.0
    assert rows.Predicted(row, row.seconds / 2, "").error == pytest.approx(-0.5)


def test_a_part_of_a_chip_as_a_device(tiny: str, tmp_path: Path, rngd: Chip) -> None:
    (row,) = _rows(tmp_path, rngd, _line(model=tiny, set="cores=2;memory.hbm.size=6GB"))
    ((cell, _),) = row.parts()
    assert (cell.chip.cores.base, cell.chip.memories["hbm"].size.base) == (2, 6e9)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (_line(model="m", set="hbm.speed=1"), "hbm.speed"),
        (_line(model="m", set="cores"), "'cores' sets nothing"),
        (_line(model="m", phase="train"), "phase is 'train'"),
        (_line(model="m", metric="tokens/s"), "metric is 'tokens/s'"),
        (_line(model="m", value="fast"), "value is 'fast'"),
        (_line(model="m", value=-1), "value is '-1'"),
        (_line(model="m", batch=1.5), "batch is 1.5"),
        (_line(model="m", batch=""), "batch is ''"),
        (_line(model="m").replace(",=,", ",<,"), "relation is '<'"),
        (_line(model="m").replace("yes", "perhaps"), "known is 'perhaps'"),
        ("m,bf16", "2 values under"),
    ],
)
def test_rows_that_are_none(line: str, found: str, tmp_path: Path, rngd: Chip) -> None:
    with pytest.raises(UsageError) as caught:
        _rows(tmp_path, rngd, line)
    assert found in str(caught.value) and "models.csv:3" in str(caught.value)


def test_files_of_rows_that_are_none(tmp_path: Path, rngd: Chip) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        rows.read_rows(tmp_path / "none.csv", rngd)
    (tmp_path / "empty.csv").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no column 'model'"):
        rows.read_rows(tmp_path / "empty.csv", rngd)


def test_the_packages_rows() -> None:
    found = [row for name in chip_names() for row in rows.packaged(chip(name))]
    assert len(found) >= 16
    for row in found:
        assert row.model in names() and row.source and row.unknown
        assert row.within is None or row.known
        if row.dtype == "bf16":
            assert all(cell.devices == row.devices for cell, _ in row.parts())
    beside = rows.attained({"atom-max": chip("atom-max"), "mtia-v2": chip("mtia-v2")})
    assert {one.target for one in beside} == {"atom-max"}  # a bound says nothing
    assert all(0 < one.fraction < 1 for one in beside)


# --- the matrix ----------------------------------------------------------------------------------


def _entry(
    target: str,
    phase: Any,
    ps: int | None,
    devices: int = 1,
    why: str = "",
    model: str = "llama-3.1-8b",
) -> matrix.Entry:
    fraction = None if ps is None else 0.5
    found = Outcome(devices, 1.0, 0.9, ps, fraction, "memory", "derived", why=why)
    return matrix.Entry(model, target, phase, found)


def test_a_written_matrix() -> None:
    models, targets = ("llama-3.1-8b",), ("atom", "rngd")
    found = [
        *(_entry("rngd", phase, 13 * 10**9) for phase in matrix.CONTEXTS),
        *(_entry("atom", phase, 20 * 10**9, 2) for phase in matrix.CONTEXTS),
    ]
    text = matrix.markdown(found, models, targets)
    row = "| llama-3.1-8b | 20 ms on 2, 50.0%, memory, derived | 13 ms, 50.0%, memory, derived |"
    assert row in text
    assert "4 of 4 steps are compiled" in text
    assert matrix.out_of_date(text, found, models, targets) == []
    # Times may change; what has one must keep it.
    slower = [_entry("rngd", "decode", 14 * 10**9)]
    assert matrix.out_of_date(text, slower, models, targets) == []
    worse = [_entry("rngd", "decode", None, why="not proved")]
    (line,) = matrix.out_of_date(text, worse, models, targets)
    assert "rngd was '13 ms, 50.0%, memory, derived' and now: not proved" in line
    assert "no row for qwen3-4b" in matrix.out_of_date(text, [], (*models, "qwen3-4b"), targets)[0]
    assert "columns are atom, rngd" in matrix.out_of_date(text, [], models, ("rngd",))[0]
    assert "is no model" in matrix.out_of_date(text, [], ("other",), targets)[0]
    assert matrix.out_of_date("# nothing", [], models, targets)


def test_rows_of_other_models_stay_in_a_written_matrix() -> None:
    first, second = "llama-3.1-8b", "gemma-3-4b"
    both = [
        _entry("rngd", p, 10**9 * n, model=m)
        for m in (first, second)
        for n, p in enumerate(matrix.CONTEXTS, 1)
    ]
    whole = matrix.markdown(both, (first, second), ("rngd",))
    other = [e for e in both if e.model == second]
    changed = [_entry("rngd", p, None, why="not proved: it's long") for p in matrix.CONTEXTS]
    worse = matrix.markdown([*other, *changed], (first, second), ("rngd",))
    assert "2 of 4 steps" in worse
    assert f"{first} decode on rngd, {first} prefill on rngd: not proved: it's long" in worse
    # One model is asked anew: the other's rows and reasons are as they were written.
    assert matrix.markdown(changed, (first,), ("rngd",), whole) == worse
    assert matrix.markdown(other, (second,), ("rngd",), worse) == worse
    found = [e for e in both if e.model == first]
    assert matrix.markdown(found, (first,), ("rngd",), worse) == whole


def test_columns_of_other_chips_stay_in_a_written_matrix() -> None:
    models, targets = ("gemma-3-4b", "llama-3.1-8b"), ("atom", "rngd")
    ps = {
        (m, t, p): 10**9 * len(m + t + p) for m in models for t in targets for p in matrix.CONTEXTS
    }
    every = [
        _entry(t, p, ps[m, t, p], model=m) for m in models for t in targets for p in matrix.CONTEXTS
    ]
    whole = matrix.markdown(every, models, targets)
    # A chip is asked anew: it fails for one model, and then doesn't.
    why = "not proved"
    changed = [
        _entry("atom", p, None, why=why)
        if m == models[1]
        else _entry("atom", p, ps[m, "atom", p], model=m)
        for m in models
        for p in matrix.CONTEXTS
    ]
    worse = matrix.markdown(changed, models, ("atom",), whole)
    assert "6 of 8 steps" in worse and "llama-3.1-8b decode on atom, " in worse
    assert matrix.read_tables(worse)["Decode"][2][2] == matrix.read_tables(whole)["Decode"][2][2]
    mine = [e for e in every if e.target == "atom"]
    assert matrix.markdown(mine, models, ("atom",), worse) == whole


def test_what_the_matrix_asks(rngd: Chip) -> None:
    asked = matrix.asked(["llama-3.1-8b", "bert-large"], [rngd])
    assert [(c.model, c.batch.phase, c.batch.context) for c in asked] == [
        ("llama-3.1-8b", "decode", 1024),
        ("llama-3.1-8b", "prefill", 2048),
        ("bert-large", "prefill", 512),
    ]
    assert len(matrix.asked([matrix.SHORT], [rngd], short=True)) == 1
