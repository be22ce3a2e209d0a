"""The command that runs all benchmarks, and the page that it writes of their results."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_committed_page_is_what_the_committed_results_make():
    from report.page import page_of

    differing = page_of(BENCHMARKS / "results").differing(ROOT / "docs" / "performance.md")
    assert not differing, "`python benchmarks/all.py page` writes them"


def test_where_no_result_is_the_page_says_what_makes_one(tmp_path):
    import all as command
    from report.page import page_of

    page = page_of(tmp_path)
    for benchmark in command.BENCHMARKS:
        if benchmark.arguments:
            assert f"    python benchmarks/all.py run --only {benchmark.name}\n" in page.text
    assert "python benchmarks/cuda_gpu.py --json" in page.text
    assert not page.pictures
    assert "{{" not in page.text


def test_a_page_is_written_once_and_old_pictures_go(tmp_path, capsys):
    import all as command

    old = tmp_path / "images" / "performance" / "old.svg"
    old.parent.mkdir(parents=True)
    old.write_text("")
    result = (BENCHMARKS / "results" / "chips.json").read_text("utf-8")
    (tmp_path / "chips.json").write_text(result, "utf-8")
    arguments = ["page", "--out", str(tmp_path)]
    assert command.main([*arguments, "--check"]) == 1
    assert str(old) in capsys.readouterr().err
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--check"]) == 0
    assert [path.name for path in old.parent.iterdir()] == ["chips.svg"]
    (old.parent / "chips.svg").write_text("<svg/>")
    assert command.main([*arguments, "--check"]) == 1


def test_a_script_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capfd):
    import all as command

    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "good.py").write_text(
        "import sys, pathlib; pathlib.Path(sys.argv[2]).write_text(repr(sys.argv[1:]))"
    )
    monkeypatch.setattr(command, "HERE", tmp_path)
    good = command.Benchmark("good")
    failed = command.run([command.Benchmark("bad"), good], tmp_path, smallest=True, realtime=True)
    assert failed == ["bad"]
    made = tmp_path / "good.json"
    assert made.read_text() == repr(["--json", str(made), "--smallest"])
    said = capfd.readouterr().out
    assert "bad: failed, exit status 3" in said
    assert "good: done" in said


def test_what_is_timed_names_the_host_and_may_run_before_all_others(tmp_path):
    import all as command
    from peers.machine import describe, kind

    timed = command.Benchmark("some", ("run", "--out"), timed=True)
    made = timed.command(tmp_path, smallest=False, realtime=True)
    result = tmp_path / f"some-{kind(describe())}.json"
    assert made == [
        sys.executable, str(BENCHMARKS / "some.py"), "run", "--out", str(result), "--realtime"
    ]  # fmt: skip


def kernels(**seconds):
    """A result file of one kernel beside NumPy's, and of a launch that took 1 us."""
    gemm = {"against": "numpy", "goal": 1.0, "floor": 0.9}
    launch = {"against": "seconds", "goal": 0.5e-6, "floor": 2e-6}
    common = {"threads": 1, "errors": {}, "bytes": 64, "flops": 0}
    return {
        "date": "2026-01-02T03:04:05",
        "machine": {"cpu": "A <B>", "cores": 2, "flags": ["avx2"]},
        "settings": {"smallest": False},
        "rounds": 3,
        "engines": {"dure": {"versions": {"dure": "1"}}, "numpy": {"versions": {"numpy": "2|3"}}},
        "bandwidth": {"medians": {"1": 1e10}},
        "rows": [
            {"name": "gemm", "case": {"goals": [gemm]}, "medians": seconds, **common},
            {"name": "launch", "case": {"goals": [launch]}, "medians": {"dure": 1e-6}, **common},
        ],
    }


@pytest.mark.parametrize(
    ("ours", "reached", "verdict", "counts"),
    [
        (1e-3, "2.00x", "goal", "1 reach the goal, 1 more keep the floor, and 0 are below"),
        (2.1e-3, "0.95x", "floor", "0 reach the goal, 2 more keep the floor, and 0 are below"),
        (4e-3, "0.50x", "below", "0 reach the goal, 1 more keep the floor, and 1 are below"),
    ],
)
def test_goals_and_floors_stand_beside_what_kernels_reach(ours, reached, verdict, counts):
    from report.kernels_cpu import chart, table

    document = kernels(dure=ours, numpy=2e-3)
    text = table(document)
    assert f"| numpy | 2 ms | {reached} | 1.00x [0.90x] | {verdict} |" in text
    assert "| seconds |  | 1 us | 500 ns [2 us] | floor |" in text
    assert f"Of 2 comparisons {counts} it." in text
    drawn = ElementTree.fromstring(chart(document))
    said = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"gemm, numpy", "launch, seconds", "0.50"} <= said
    assert "times the goal, A <B>, 2026-01-02" in said


def test_a_kernel_without_a_peer_counts_nowhere():
    from report.kernels_cpu import table

    text = table(kernels(dure=1e-3))
    assert "Of 1 comparisons" in text
    assert "| numpy | not timed |" in text


def test_further_sizes_have_files_of_their_own_and_no_smallest_ones(tmp_path):
    import all as command

    some = command.Benchmark("some", further={"long": ("--context", "4096")})
    usual, long = some.commands(tmp_path, smallest=False, realtime=False)
    assert usual[2:] == ["--json", str(tmp_path / "some.json")]
    assert long[2:] == ["--json", str(tmp_path / "some-long.json"), "--context", "4096"]
    (tiny,) = some.commands(tmp_path, smallest=True, realtime=False)
    assert tiny[2:] == ["--json", str(tmp_path / "some.json"), "--smallest"]
