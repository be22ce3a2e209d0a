"""Interleaved measurement of kernels: see :mod:`peers.measure` for why.

A round visits every case with every number of threads, and there every engine in turn, one at a
time; the others are frozen.  Round 0 warms up and compares every result with NumPy's: an engine
whose result differs is not timed.
"""

from __future__ import annotations

import os
import secrets
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from peers.client import Peer, PeerError
from peers.kernels.cases import TOLERANCE, Case, cases, compile_cases
from peers.kernels.operands import difference, reference

#: The workers that run, by engine and number of threads.
Workers: TypeAlias = dict[tuple[str, int], Peer]

MODULES = {
    "dure": "kernels.dure_worker",
    "numpy": "kernels.numpy_worker",
    "torch": "kernels.torch_worker",
    "torch.compile": "kernels.torch_worker",
    "bandwidth": "bandwidth_worker",
}
_LARGE, _SMALL = 1 << 30, 1 << 24


@dataclass(frozen=True)
class Settings:
    """How to measure; ``only`` keeps the cases whose name holds one of these words."""

    rounds: int
    threads: tuple[int, ...]
    seconds: float
    realtime: bool
    peers_python: str
    smallest: bool
    only: tuple[str, ...] = ()

    def interpreter(self, engine: str) -> str:
        """The Python that has the engine: NumPy is in dure's own."""
        return self.peers_python if engine.startswith("torch") else sys.executable

    def processors(self, threads: int) -> list[int]:
        """The first cores that this process may run on."""
        if hasattr(os, "sched_getaffinity"):
            return sorted(os.sched_getaffinity(0))[:threads]
        return list(range(threads))

    def wanted(self) -> list[Case]:
        """The cases that are asked for."""
        return [c for c in cases(self.smallest) if _among(c.name, self.only)]


@dataclass
class Row:
    """A case with a number of threads: seconds a call by engine, or why there are none."""

    case: Case
    threads: int
    samples: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    errors: dict[str, str] = field(default_factory=dict[str, str])
    differences: dict[str, float] = field(default_factory=dict[str, float])

    def document(self) -> dict[str, Any]:
        """What a result file holds of it."""
        medians = {name: statistics.median(values) for name, values in self.samples.items()}
        numbers = {"flops": self.case.flops, "bytes": self.case.bytes, "medians": medians}
        return {"name": self.case.name, **asdict(self), **numbers}


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """The results after each round, so that a cut run keeps what it has."""
    rows = [Row(case, t) for case in settings.wanted() for t in settings.threads]
    compiled = [[Row(case, 1) for case in pair] for pair in compile_cases()]
    compiled = compiled if _among("compile", settings.only) else []
    bandwidth: dict[int, list[float]] = {threads: [] for threads in settings.threads}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers, engines = _started(settings, rows, folder, stack)
        for number in range(settings.rounds + 1):
            print(f"round {number} of {settings.rounds}", file=sys.stderr)
            for row in rows:
                if number == 0:
                    _check(row, workers, folder)
                else:
                    _time(number, row, workers, settings)
            if number:
                _read(bandwidth, workers, settings)
                for cold, warm in compiled:
                    _compile(cold, warm, settings)
            found = _document(engines, [*rows, *chain(*compiled)], bandwidth)
            yield {"rounds": number, **found}


def _document(
    engines: dict[str, Any], rows: Sequence[Row], bandwidth: dict[int, list[float]]
) -> dict[str, Any]:
    medians = {
        threads: statistics.median(values) for threads, values in bandwidth.items() if values
    }
    return {
        "engines": engines,
        "bandwidth": {"samples": bandwidth, "medians": medians},
        "rows": [row.document() for row in rows],
    }


def _among(name: str, words: Sequence[str]) -> bool:
    return not words or any(word in name for word in words)


def _started(
    settings: Settings, rows: Sequence[Row], folder: Path, stack: ExitStack
) -> tuple[Workers, dict[str, Any]]:
    """A frozen worker of every engine that some row names, for each number of threads."""
    workers: Workers = {}
    engines: dict[str, Any] = {}
    named = dict.fromkeys(name for row in rows for name in row.case.engines)
    for engine in (*named, "bandwidth"):
        options = _options(engine, folder)
        try:
            for threads in settings.threads:
                interpreter = settings.interpreter(engine)
                peer = stack.enter_context(Peer(engine, MODULES[engine], interpreter))
                answer = _loaded(peer, threads, settings, options)
                workers[engine, threads] = peer
                engines[engine] = {"versions": answer["versions"]}
                peer.freeze()
        except PeerError as error:
            engines[engine] = {"absent": error.absent, "error": str(error)}
            print(f"{engine}: {error}", file=sys.stderr)
    return workers, engines


def _options(engine: str, folder: Path) -> dict[str, Any]:
    """What loading an engine needs beside its threads."""
    if engine == "bandwidth":
        return {"model": "", "sequences": 0, "context": 0}
    return {"cache": str(folder / engine), "compiled": engine == "torch.compile"}


def _loaded(
    peer: Peer, threads: int, settings: Settings, options: dict[str, Any]
) -> dict[str, Any]:
    place = {"processors": settings.processors(threads), "realtime": settings.realtime}
    return peer.ask("load", threads=threads, **place, **options)


def _asked(peer: Peer, op: str, **arguments: Any) -> dict[str, Any]:
    """An answer of a worker that is frozen before and after."""
    peer.thaw()
    try:
        return peer.ask(op, **arguments)
    finally:
        peer.freeze()


def _check(row: Row, workers: Workers, folder: Path) -> None:
    """Hold every engine's result against NumPy's."""
    case, seed = row.case, _seed()
    live = [engine for engine in case.engines if (engine, row.threads) in workers]
    expected = reference(case, seed) if live else None
    for engine in live:
        path = str(folder / "result.npy")
        try:
            _asked(workers[engine, row.threads], "check", case=asdict(case), seed=seed, path=path)
        except PeerError as error:
            row.errors[engine] = str(error)
            continue
        assert expected is not None
        found = row.differences[engine] = difference(np.load(path), expected)
        if found > TOLERANCE[case.dtype]:
            row.errors[engine] = f"differs by {found:.1e} of the largest magnitude"


def _time(number: int, row: Row, workers: Workers, settings: Settings) -> None:
    """A burst of every engine whose result agreed, in an order that turns by one each round."""
    case, seed = row.case, _seed()
    live = [engine for engine in case.engines if engine in row.differences]
    live = [engine for engine in live if engine not in row.errors]
    turn = number % len(live) if live else 0
    for engine in live[turn:] + live[:turn]:
        peer = workers[engine, row.threads]
        try:
            burst = {"case": asdict(case), "seed": seed, "seconds": settings.seconds}
            seconds = _asked(peer, "burst", **burst)["seconds"]
            row.samples.setdefault(engine, []).append(seconds)
        except PeerError as error:
            row.errors[engine] = str(error)


def _read(bandwidth: dict[int, list[float]], workers: Workers, settings: Settings) -> None:
    """Bytes/s that dure's probe reads."""
    for threads, samples in bandwidth.items():
        if ("bandwidth", threads) in workers:
            size = _SMALL if settings.smallest else _LARGE
            answer = _asked(workers["bandwidth", threads], "bandwidth", size=size)
            samples.append(answer["bytes_per_second"])


def _compile(cold: Row, warm: Row, settings: Settings) -> None:
    """One process that finds an empty object cache, and one that finds what that one left."""
    options = {"open_tiles": "open" in cold.case.op}
    with tempfile.TemporaryDirectory() as cache:
        for row in (cold, warm):
            try:
                with Peer("dure", "kernels.compile_worker", sys.executable) as peer:
                    _loaded(peer, row.threads, settings, {"cache": cache})
                    seconds = peer.ask("compile", **options)["seconds"]
                    row.samples.setdefault("dure", []).append(seconds)
            except PeerError as error:
                row.errors["dure"] = str(error)


def _seed() -> int:
    """Fresh operands for every measurement."""
    return secrets.randbits(32)
