"""Traces: what Perfetto's importer of the trace-event format needs to place every event."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dure.cli.app import dispatch
from dure.errors import UsageError
from dure.library.answer import Answer
from dure.prof.records import Profile
from dure.prof.trace import trace, write_trace


def _check(events: list[dict[str, Any]]) -> None:
    """Every event is whole; slices of a thread nest; arrows begin and end inside slices."""
    named = {(e["pid"], e.get("tid")) for e in events if e["name"] in ("thread_name",)}
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    arrows: dict[str, list[str]] = {}
    for event in events:
        assert event["pid"] in processes
        if event["ph"] == "M":
            continue
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(v, int | float) for v in event["args"].values())
            continue
        key = event["pid"], event["tid"]
        assert key in named
        if event["ph"] == "X":
            assert event["dur"] >= 0
            end = round(event["ts"] + event["dur"], 3)
            threads.setdefault(key, []).append((event["ts"], end))
        else:
            arrows.setdefault(event["id"], []).append(event["ph"])
            assert any(start <= event["ts"] <= end for start, end in threads[key])
    assert all(sorted(phases) == ["f", "s"] for phases in arrows.values())
    for slices in threads.values():
        open_ends: list[float] = []
        for start, end in sorted(slices, key=lambda s: (s[0], -s[1])):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)


def test_a_simulation(simulated: tuple[Answer, Profile]) -> None:
    _, made = simulated
    events: list[dict[str, Any]] = json.loads(json.dumps(trace(made)))["traceEvents"]
    _check(events)
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    for queue in made.queues:
        assert any(name.startswith(queue.name) for name in names)
    assert sum(e["ph"] == "s" for e in events) == sum(
        w.cause is not None for i in made.instructions for w in i.waits
    )
    counters = {e["name"] for e in events if e["ph"] == "C"}
    assert any(made.roofline.memory in name for name in counters)
    assert any(name.endswith(" bytes") for name in counters)


def test_processes_are_core_classes(by_hand: Profile) -> None:
    events: Any = trace(by_hand)["traceEvents"]
    _check(events)
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"toy: gemm by hand", "4 cores as core (core0 0)"}
    dots = [e for e in events if e["name"] == "dot"]
    assert [e["args"]["start_ps"] for e in dots] == [320, 720]
    assert dots[0]["args"]["source"] == "kernel.py:4"
    assert any(e["name"] == "wait empty" for e in events)


def test_gzip_is_the_same(tmp_path: Path, by_hand: Profile) -> None:
    plain, packed = tmp_path / "t.json", tmp_path / "t.json.gz"
    write_trace(by_hand, plain)
    write_trace(by_hand, packed)
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"t.json", "t.json.gz"}


@pytest.mark.parametrize("name", ["trace.txt", "missing/t.json", "folder.json", "nul\0.json"])
def test_bad_paths(tmp_path: Path, by_hand: Profile, name: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UsageError) as caught:
        write_trace(by_hand, tmp_path / name)
    assert caught.value.fix


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json.gz"
    command = ["trace", "gemm", "256x256x256", "--target", "trainium2", "--json", "-o", str(path)]
    assert dispatch(command) == 0
    said = json.loads(capsys.readouterr().out)
    data = json.loads(gzip.decompress(path.read_bytes()))
    assert data["otherData"]["picoseconds"] == said["ns"] * 1000
    _check(data["traceEvents"])


@pytest.mark.parametrize(
    "more",
    [
        ["--target", "all", "-o", "t.json"],
        ["--target", "rngd", "-o", "t.html"],
        ["--target", "nothing", "-o", "t.json"],
    ],
)
def test_bad_commands(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dispatch(["trace", "gemm", "64x64x64", *more]) == 2
    assert "fix:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
