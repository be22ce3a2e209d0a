"""Interleaved measurement: every round runs one short burst of each engine, one engine at a time.

Rates on shared hosts drift by tens of per cent within minutes.  A round visits all engines within
seconds, the order turns by one from round to round, and engines that are not being measured are
frozen, so that ratios of medians mean something even where the rates themselves do not last.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.client import Peer, PeerError
from peers.engines import ENGINES, Interpreters
from peers.footprint import bytes_per_token
from peers.prepare import form_of


@dataclass(frozen=True)
class Measure:
    """One quantity, a rate in tokens/s except ``first_token``, which is in seconds."""

    name: str
    label: str
    threads: int
    op: str
    arguments: dict[str, int]

    @property
    def tokens(self) -> int:
        """The tokens that one burst processes."""
        return self.arguments["tokens"] * self.arguments.get("sequences", 1)


def measures(threads: int, generated: int, context: int) -> list[Measure]:
    """What one run measures: ``generated`` tokens after a prompt of ``context`` tokens."""
    one = {"sequences": 1, "context": context, "tokens": generated}
    eight = {"sequences": 8, "context": context, "tokens": max(8, generated // 2)}
    many = f"{threads} threads"
    return [
        Measure("decode_1_thread", "decode, 1 thread", 1, "decode", one),
        Measure("decode", f"decode, {many}", threads, "decode", one),
        Measure("decode_batch_8", f"decode, 8 sequences, {many}", threads, "decode", eight),
        Measure("prefill_128", f"prefill 128, {many}", threads, "prefill", {"tokens": 128}),
        Measure("prefill_512", f"prefill 512, {many}", threads, "prefill", {"tokens": 512}),
    ]


@dataclass(frozen=True)
class Settings:
    """How to measure.  ``bandwidth`` says whether the memory's is read in the same rounds."""

    engines: list[str]
    rounds: int
    threads: int
    generated: int
    context: int
    realtime: bool
    cache: Path
    interpreters: Interpreters
    starts: int
    bandwidth: bool = True
    only: tuple[str, ...] = ()

    @property
    def wanted(self) -> list[Measure]:
        """What is measured: of all measures those that are named, where some are."""
        every = measures(self.threads, self.generated, self.context)
        return [measure for measure in every if not self.only or measure.name in self.only]

    @property
    def processors(self) -> list[int]:
        """The first ``threads`` cores that this process may run on."""
        if hasattr(os, "sched_getaffinity"):
            return sorted(os.sched_getaffinity(0))[: self.threads]
        return list(range(self.threads))


def measure_model(model: Path, settings: Settings) -> dict[str, Any]:
    """Every sample and median of every engine on one model; engines that fail say why."""
    wanted = settings.wanted
    results: dict[str, Any] = {}
    workers: dict[str, dict[int, Peer]] = {}
    bandwidths: dict[str, list[float]] = {}
    try:
        for engine in settings.engines:
            results[engine], workers[engine] = _start(engine, model, settings)
        probes = _start("bandwidth", model, settings)[1] if settings.bandwidth else {}
        workers["bandwidth"] = probes
        live = [engine for engine in settings.engines if workers[engine]]
        for number in range(settings.rounds + 1):
            print(f"{model.stem}: round {number} of {settings.rounds}", file=sys.stderr)
            _round(number, live, wanted, workers, results)
            _bandwidth(number, probes, model.stat().st_size, bandwidths)
        for engine in live:
            peaks = [worker.ask("memory")["peak_bytes"] for worker in _thawed(workers[engine])]
            results[engine]["peak_bytes"] = max(peaks)
    finally:
        for group in workers.values():
            for worker in group.values():
                worker.close()
    for engine in live:
        _first_tokens(engine, model, settings, results)
        results[engine]["medians"] = _medians(results[engine]["samples"])
    step = bytes_per_token(model, settings.context + settings.generated / 2)
    return {
        "file": model.name,
        "file_bytes": model.stat().st_size,
        "bytes_per_token": step,
        "measures": {measure.name: measure.label for measure in wanted},
        "bandwidth": {"samples": bandwidths, "medians": _medians(bandwidths)},
        "engines": results,
        "dure_over": ratios(results),
        "fraction_of_bandwidth": fractions(results, _medians(bandwidths), step, settings.threads),
    }


def _medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items() if values}


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times faster dure is than each peer, by measure."""
    ours = results.get("dure", {}).get("medians", {})
    found: dict[str, dict[str, float]] = {}
    for engine, result in results.items():
        theirs = result.get("medians", {})
        if engine != "dure" and ours and theirs:
            found[engine] = {
                name: theirs[name] / ours[name]
                if name == "first_token"
                else ours[name] / theirs[name]
                for name in theirs
                if name in ours
            }
    return found


def fractions(
    results: dict[str, Any], bandwidths: dict[str, float], step: int, threads: int
) -> dict[str, dict[str, float]]:
    """The part of the bandwidth that each engine's decode would use, reading the GGUF's bytes.

    ``NAME/1gb`` is against a buffer of 1 GB, ``NAME/model_size`` against one of the model's size,
    which a large cache may partly hold.
    """
    found: dict[str, dict[str, float]] = {}
    for engine, result in results.items():
        for name, count in (("decode_1_thread", 1), ("decode", threads)):
            for size in ("1gb", "model_size"):
                rate = result.get("medians", {}).get(name)
                limit = bandwidths.get(f"{size}_{count}_threads")
                if rate and limit:
                    found.setdefault(engine, {})[f"{name}/{size}"] = rate * step / limit
    return found


def _thawed(group: dict[int, Peer]) -> list[Peer]:
    for worker in group.values():
        worker.thaw()
    return list(group.values())


def _start(engine: str, model: Path, settings: Settings) -> tuple[dict[str, Any], dict[int, Peer]]:
    """Start the engine with one thread and with all; on failure say why and run it no more."""
    result: dict[str, Any] = {"label": ENGINES[engine].label, "samples": {}, "errors": {}}
    group: dict[int, Peer] = {}
    try:
        path = form_of(model, ENGINES[engine].form, settings.cache, settings.interpreters)
        wanted = {measure.threads for measure in settings.wanted}
        for threads in sorted(wanted if engine != "bandwidth" else {1, settings.threads}):
            worker = _load(engine, path, threads, settings)
            group[threads] = worker
            result["versions"] = worker.answer["versions"]
            result.setdefault("load_seconds", {})[str(threads)] = worker.answer["seconds"]
            worker.freeze()
    except PeerError as error:
        for worker in group.values():
            worker.close()
        result["absent"], result["error"] = error.absent, str(error)
        print(f"{engine}: {error}", file=sys.stderr)
        return result, {}
    return result, group


def _load(engine: str, path: Path, threads: int, settings: Settings) -> Peer:
    worker = Peer(engine, ENGINES[engine].module, settings.interpreters.of(engine))
    try:
        worker.answer = worker.ask(
            "load",
            model=str(path),
            threads=threads,
            sequences=max(m.arguments.get("sequences", 1) for m in settings.wanted),
            context=max(1024, settings.context + settings.generated + 8),
            processors=settings.processors[:threads],
            realtime=settings.realtime,
        )
    except PeerError:
        worker.close()
        raise
    return worker


def _round(
    number: int,
    live: list[str],
    wanted: list[Measure],
    workers: dict[str, dict[int, Peer]],
    results: dict[str, Any],
) -> None:
    """Every engine on every measure; round 0 warms up and is thrown away."""
    turn = number % len(live) if live else 0
    for measure in wanted:
        for engine in live[turn:] + live[:turn]:
            value = _burst(engine, measure, workers[engine][measure.threads], results)
            if number and value:
                results[engine]["samples"].setdefault(measure.name, []).append(value)


def _burst(engine: str, measure: Measure, worker: Peer, results: dict[str, Any]) -> float | None:
    """Tokens/s of one burst, or None where the engine cannot do it (said once in ``errors``)."""
    if measure.name in results[engine]["errors"]:
        return None
    worker.thaw()
    try:
        return measure.tokens / worker.ask(measure.op, **measure.arguments)["seconds"]
    except PeerError as error:
        results[engine]["errors"][measure.name] = str(error)
        return None
    finally:
        worker.freeze()


def _bandwidth(
    number: int, probes: dict[int, Peer], size: int, found: dict[str, list[float]]
) -> None:
    """Bytes/s read over 1 GB and over the model's size, with one thread and with all."""
    for threads, worker in probes.items():
        worker.thaw()
        for name, count in (("1gb", 1 << 30), ("model_size", size)):
            rate = worker.ask("bandwidth", size=count)["bytes_per_second"]
            if number:
                found.setdefault(f"{name}_{threads}_threads", []).append(rate)
        worker.freeze()


def _first_tokens(engine: str, model: Path, settings: Settings, results: dict[str, Any]) -> None:
    """Seconds from starting a process to the first token after a 16-token prompt, files cached."""
    if not settings.starts:
        return
    path = form_of(model, ENGINES[engine].form, settings.cache, settings.interpreters)
    samples: list[float] = []
    for _ in range(settings.starts):
        try:
            with _load(engine, path, settings.threads, settings) as worker:
                worker.ask("first_token", tokens=16)
                samples.append(time.perf_counter() - worker.started)
        except PeerError as error:
            results[engine]["errors"]["first_token"] = str(error)
            return
    results[engine]["samples"]["first_token"] = samples
