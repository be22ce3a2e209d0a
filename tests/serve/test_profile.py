"""Watched steps: what they name, how their times add up, what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import Tiny, write_model

from dure.errors import UsageError
from dure.serve.engine import Engine
from dure.serve.profile import Phase, StepUse, profile_steps
from dure.serve.profile_records import step_profile, write_profile

TINY = Tiny("llama", heads=6, kv_heads=2, layers=3, weight_type="Q4_1")


@pytest.fixture(scope="module", params=[1, 2])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(TINY, path)
    with Engine.load(path, threads=request.param, sequences=8, recorded=True) as loaded:
        yield loaded


def of(found: StepUse, start: str) -> list[int]:
    return [entry.count for entry in found.operators if entry.name.startswith(start)]


@pytest.mark.parametrize(("phase", "batch"), [("decode", 1), ("decode", 3), ("prefill", 1)])
def test_a_step_is_what_its_workers_did(engine: Engine, phase: Phase, batch: int) -> None:
    found = profile_steps(engine, "tiny", phase=phase, batch=batch, context=20, steps=3)
    report = engine.program.report
    names = [name for name, _, _ in found.events]
    assert len([name for name in names if name]) == report["launches"]
    assert names.count("") == report["barriers"] == sum(b.count for b in found.barriers)
    assert all(barrier.because for barrier in found.barriers)
    assert of(found, "gated_linear gate+up") == [TINY.layers]
    assert of(found, "linear q") == [TINY.layers] and of(found, "attention") == [TINY.layers]
    assert found.ends.shape == (engine.threads, len(names) + 1)
    assert (np.diff(found.ends, axis=1) >= 0).all() and found.ends.min() == 0
    # The last event ends inside of the call.
    assert 0 < found.ends.max() < 20 * found.ns
    assert all(0 <= part < 1 for part in found.waiting) and len(found.waiting) == engine.threads
    assert found.read > 0 and set(found.peaks) == {"float32", "int8"}


def test_operators_need_what_they_declare(engine: Engine) -> None:
    one = profile_steps(engine, "tiny", batch=1, context=16, steps=1)
    three = profile_steps(engine, "tiny", batch=3, context=16, steps=1)
    for a, b in zip(one.operators, three.operators, strict=True):
        assert a.name == b.name
        assert b.flops == 3 * a.flops, a.name
    (query,) = [o for o in one.operators if o.name == "linear q"]
    config = engine.model.config
    size = config.hidden * config.heads * config.head_dim
    assert query.flops == 2 * size
    assert size * 5 / 8 < query.bytes < size


def test_pages_and_traces(engine: Engine, tmp_path: Path) -> None:
    found = profile_steps(engine, "tiny", context=16, steps=2)
    made = step_profile(found)
    assert len(made.instructions) == engine.threads * engine.program.report["launches"]
    assert [entry.start for entry in made.instructions] == sorted(
        e.start for e in made.instructions
    )
    write_profile(found, tmp_path / "step.html")
    assert "gated_linear gate+up" in (tmp_path / "step.html").read_text()
    write_profile(found, tmp_path / "step.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "step.json.gz").read_bytes()))["traceEvents"]
    assert {"attention", "linear down"} <= {event["name"] for event in events}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch": 0}, "0 sequences"),
        ({"context": 0}, "0 tokens"),
        ({"steps": 0}, "0 steps"),
        ({"phase": "prefill", "batch": 2}, "one sequence"),
        ({"phase": "prefill", "context": 10**6}, "a step takes at most"),
        ({"context": 10**6}, "fewer or shorter"),
        ({"batch": 9}, "at most 8 sequences"),
    ],
)
def test_steps_that_an_engine_cannot_make(engine: Engine, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        profile_steps(engine, "tiny", **{"context": 16, "steps": 1, **given})
    assert said in str(caught.value)


def test_all_sequences_of_an_engine(engine: Engine) -> None:
    """Watching takes no more of them than were asked for."""
    found = profile_steps(engine, "tiny", batch=engine.limits.sequences, context=4, steps=1)
    assert found.tokens == engine.limits.sequences and found.plain_ns is None


def test_steps_of_an_engine_that_does_not_record_stand_beside(
    engine: Engine, tmp_path: Path
) -> None:
    write_model(TINY, tmp_path / "tiny.gguf")
    with Engine.load(tmp_path / "tiny.gguf", threads=engine.threads, sequences=8) as plain:
        found = profile_steps(engine, "tiny", context=4, steps=2, plain=plain)
        assert found.plain_ns is not None and found.plain_ns > 0
        assert plain.cache.free_sequences == 8


def test_an_engine_that_does_not_record(tmp_path: Path) -> None:
    write_model(TINY, tmp_path / "tiny.gguf")
    plain = Engine.load(tmp_path / "tiny.gguf", threads=1)
    with plain, pytest.raises(UsageError, match="keeps no times"):
        profile_steps(plain, "tiny", context=4, steps=1)
