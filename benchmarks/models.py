"""Whole models on every chip, in simulation: what their steps attain, and what it takes to know.

    python benchmarks/models.py [--json FILE] [--targets tpu-v6e rngd ...] [--large | --smallest]

For each chip Llama 3.1 8B in 16 bits (on one device where it fits; on ATOM, which it doesn't fit,
int8 weights for the decode and two devices for the prefill): a decode step of one sequence at 1,024
positions as a part of its attainable ceiling, and a prefill of 2,048 tokens as a part of the
published peak, or of the sustained rate where one was measured.  Seconds from the config to the
timed step are CPU seconds of this host, each question in a process of its own, with the largest
memory of that process; ``simulate_s`` is the timing of the finished program.  ``--large`` adds
Llama 3.1 70B and 405B on as many devices as hold them; ``--smallest`` takes one layer of SmolLM2
instead of all, to see that it runs.

``onnxim``: one decode layer of the 8B at 2,048 positions, timed in ``simulate_s``, beside the 273
CPU seconds that ONNXim, a cycle-stepped simulator, takes for one (measured on another host: a
ratio as far as the two are alike).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers.results import stamp, write
from report.markdown import head, line
from report.models import COLUMNS, row

from dure.errors import DureError
from dure.models.attainable import ceiling
from dure.models.batch import Batch
from dure.models.chip_devices import Devices, answer_on
from dure.models.chip_step import chip_step
from dure.models.config import ModelConfig
from dure.models.shapes import any_config
from dure.targets import chip, chip_names

_MODEL = "llama-3.1-8b"
#: CPU seconds of ONNXim for one Llama-3-8B decode layer at a context of 2,048.
_ONNXIM_S = 273.0


@dataclass(frozen=True)
class Question:
    """A step on a chip: ``layers`` of 0 are the model's own."""

    target: str
    model: str
    batch: Batch
    weights: str = ""
    chips: int | None = None
    layers: int = 0


def main() -> None:
    """Ask, print a table row by row, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, help="where the result goes")
    arguments.add_argument("--targets", nargs="+", default=chip_names())
    which = arguments.add_mutually_exclusive_group()
    which.add_argument("--large", action="store_true", help="70B and 405B too")
    which.add_argument("--smallest", action="store_true", help="one layer of a small model")
    chosen = arguments.parse_args()
    result = stamp()
    chips: dict[str, Any] = {}
    result["chips"] = chips
    print(head(COLUMNS, words=3), flush=True)
    for target in chosen.targets:
        chips[target] = {}
        asked = _smallest(target) if chosen.smallest else _questions(target, chosen.large)
        for name, question in asked:
            made = chips[target][name] = _alone(question)
            print(line(row(target, name, made)), flush=True)
    write(chosen.json, result)


def _smallest(target: str) -> list[tuple[str, Question]]:
    step = Question(target, "smollm2-135m", Batch("decode", 1, 1024), layers=1)
    return [("a layer of SmolLM2", step)]


def _questions(target: str, large: bool) -> list[tuple[str, Question]]:
    small = target == "atom"
    decode, prefill = Batch("decode", 1, 1024), Batch("prefill", 1, 2048)
    layer = Question(target, _MODEL, Batch("decode", 1, 2048), layers=1)
    found = [
        ("8B decode", Question(target, _MODEL, decode, weights="int8" if small else "")),
        ("8B prefill", Question(target, _MODEL, prefill, chips=2 if small else None)),
        ("a decode layer", layer),
    ]
    if large:
        found += [
            ("70B decode", Question(target, "llama-3.1-70b", decode)),
            ("405B decode", Question(target, "llama-3.1-405b", decode)),
        ]
    return found


def _alone(question: Question) -> dict[str, Any]:
    """The answer of a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_answer, question).result()


def _answer(question: Question) -> dict[str, Any]:
    started = time.process_time()
    target, config = chip(question.target), any_config(question.model)
    assert isinstance(config, ModelConfig)
    if question.layers:
        count = question.layers
        windows, rotated = config.windows[:count], config.rotated[:count]
        config = replace(config, layers=count, windows=windows, rotated=rotated)
    step = chip_step(config, question.batch, "bf16", question.model, weights=question.weights)
    try:
        found = answer_on(step, target, Devices(question.chips))
    except DureError as error:
        return {"error": f"{error.what}: {error.rule}"}
    seconds = time.process_time() - started
    limits = ceiling(target, "bf16")
    whole = limits.bandwidth if question.batch.phase == "decode" else limits.compute
    measured = question.batch.phase == "decode" or limits.compute_from == "measured"
    made: dict[str, Any] = {
        "chips": found.step.chips,
        "ns": found.ps / 1e3,
        "bound": found.bound,
        "fraction_of_roofline": found.fraction_of_roofline,
        "fraction": found.fraction_of_roofline / (whole if measured else 1.0),
        "fraction_of": "attainable" if measured else "published",
        "config_to_time_s": seconds - found.sim_s,
        "simulate_s": found.sim_s,
        "memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "confidence": found.confidence.status,
    }
    if question.layers and question.model == _MODEL:
        made["onnxim"] = {"cpu_s": _ONNXIM_S, "times_faster": _ONNXIM_S / found.sim_s}
    return made


if __name__ == "__main__":
    main()
