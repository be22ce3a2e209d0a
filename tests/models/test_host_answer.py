"""A model's step on the host: which launches are measured, and what the CPU target refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from host_rates import rates
from small_models import small

import dure.library  # registers the CPU's lowerings
from dure.cli.main import run
from dure.compiler.barriers import executed
from dure.compiler.pipeline import prepare
from dure.compiler.plan import plan
from dure.errors import DureError
from dure.ir.expr import evaluate
from dure.models import host_answer
from dure.models.batch import Batch
from dure.models.chip_step import chip_step, sharded
from dure.models.config import ModelConfig
from dure.models.host_answer import host_step
from dure.models.shards import Shards
from dure.runtime.bandwidth import BandwidthProbe
from dure.runtime.host import host_features
from dure.targets.cpu import microbench
from dure.targets.cpu.target import CpuTarget

assert dure.library


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs, and little to evict caches with."""
    monkeypatch.setattr(host_answer, "_RUNS", 1)
    monkeypatch.setattr(host_answer, "_EVICTING", 1 << 16)


@pytest.mark.parametrize("batch", [Batch("decode", 3, 20), Batch("prefill", 2, 33)], ids=str)
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-3-4b", "gpt-oss-120b"])
def test_every_launch_of_the_step_is_measured(name: str, batch: Batch) -> None:
    step = chip_step(small(name), batch, "bf16")
    found = host_step(step, rates())
    assert step.program is not None
    planned = plan(
        prepare(step.program, CpuTarget(host_features())).laid_out.step, CpuTarget(host_features())
    )
    executing = sum(
        times
        for op, times in executed(planned.function.body)
        if op.name == "launch"
        and any(evaluate(guard, dict(step.sizes)) for guard, _ in op.attr("variants"))
    )
    assert sum(part.count for part in found.parts) == executing
    assert found.ps == sum(part.count * part.ps for part in found.parts) > 0
    assert found.tokens_a_second == pytest.approx(batch.tokens / (found.ps / 1e12))
    said = found.json()
    assert said["confidence"] == "measured" and said["chips"] == 1
    assert found.fraction_of_roofline > 0


def test_equal_launches_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    seconds = host_answer._Launch.seconds

    def noted(launch: host_answer._Launch, probe: BandwidthProbe) -> float:
        ran.append(launch.key)
        return seconds(launch, probe)

    monkeypatch.setattr(host_answer._Launch, "seconds", noted)
    found = host_step(chip_step(small("llama-3.1-8b"), Batch("decode", 1, 9), "bf16"), rates())
    assert len(ran) == len(set(ran)) < len(found.parts)


def test_what_the_host_has_no_step_of() -> None:
    config: ModelConfig = small("llama-3.1-8b")
    batch = Batch("decode", 1, 9)
    for types in ({"weights": "int8"}, {"weights": "int8", "activations": "int8"}):
        with pytest.raises(DureError, match="--weights, --kv and --activations"):
            host_step(chip_step(config, batch, "bf16", **types), rates())
    with pytest.raises(DureError, match="--chips"):
        host_step(sharded(chip_step(config, batch, "bf16"), Shards(2)), rates())


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(microbench, "measure", rates)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 256, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            }
        )
    )  # fmt: skip
    assert run(["sim", str(path), "--target", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (entry,) = found if isinstance(found, list) else [found]
    assert entry["target"] == "cpu" and entry["ns"] > 0 and entry["operators"]
    assert run(["sim", str(path), "--target", "cpu,rngd"]) == 0
    shown = capsys.readouterr().out
    assert "cpu" in shown and "rngd" in shown
    assert run(["sim", str(path), "--target", "cpu", "--chips", "2"]) == 2
    assert "leave out --chips" in capsys.readouterr().err
