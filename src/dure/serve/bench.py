"""Measuring an engine: prefill, decode, and the memory's read bandwidth in the same run."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

from dure.errors import UsageError
from dure.serve.kv import Sequence
from dure.serve.work import BatchEntry

if TYPE_CHECKING:
    from dure.serve.engine import Engine

_LARGE = 1 << 30
_BURST_BYTES = 1 << 28


def bench(engine: Engine, *, prompt: int, gen: int, batch: int, repeats: int) -> dict[str, object]:
    """Medians over ``repeats`` runs, each with random prompts of its own.

    prefill_tok_s: prompt tokens of all sequences a second.  decode_tok_s: tokens of all sequences
    a second, greedy choice included.  bytes_per_token: bytes in the file of every tensor that a
    step reads, each once, shared by the batch, plus a token's KV at the mean context.  read_gb_s
    and read_gb_s_model_size: 10^9 bytes a second that the same threads read, from 1 GB and from a
    buffer of the model's size, in bursts between the runs.
    """
    _check(engine, prompt, gen, batch, repeats)
    from dure.runtime.bandwidth import BandwidthProbe
    from dure.runtime.pool import shared_pool

    pool = shared_pool(engine.threads)
    large = BandwidthProbe(_LARGE, pool)
    model_size = BandwidthProbe(engine.weight_bytes_per_token, pool)
    passes = max(1, _BURST_BYTES // model_size.nbytes)
    random = np.random.default_rng()
    _run(engine, random, min(prompt, 32), min(gen, 4), batch)
    prefill: list[float] = []
    decode: list[float] = []
    reads: list[float] = []
    small_reads: list[float] = []
    for _ in range(repeats):
        reads.append(large.burst())
        small_reads.append(model_size.burst(passes))
        prefill_s, decode_s = _run(engine, random, prompt, gen, batch)
        prefill.append(batch * prompt / prefill_s)
        decode.append(batch * gen / decode_s)
    reads.append(large.burst())
    small_reads.append(model_size.burst(passes))
    context = prompt + gen / 2
    return {
        "prefill_tok_s": statistics.median(prefill),
        "decode_tok_s": statistics.median(decode),
        "read_gb_s": statistics.median(reads),
        "read_gb_s_model_size": statistics.median(small_reads),
        "bytes_per_token": engine.weight_bytes_per_token / batch + engine.kv_bytes(context),
    }


def _check(engine: Engine, prompt: int, gen: int, batch: int, repeats: int) -> None:
    if min(prompt, gen, batch, repeats) < 1:
        raise UsageError(
            f"a benchmark of {prompt} + {gen} tokens, batch {batch}, {repeats} repeats",
            rule="each of them is at least 1",
        )
    engine.check_room(batch, prompt + gen)


def _run(
    engine: Engine, random: np.random.Generator, prompt: int, gen: int, batch: int
) -> tuple[float, float]:
    """Seconds of prefilling ``batch`` prompts and of ``gen`` decode steps over all of them."""
    prompts = random.integers(0, engine.vocabulary, (batch, prompt)).astype(np.int32)
    sequences: list[Sequence] = []
    try:
        sequences.extend(engine.sequence() for _ in range(batch))
        started = time.perf_counter()
        tokens = [
            int(engine.prefill(sequence, ids).argmax())
            for sequence, ids in zip(sequences, prompts, strict=True)
        ]
        prefilled = time.perf_counter()
        for _ in range(gen):
            entries = [
                BatchEntry(sequence, np.array([token], np.int32), (0,))
                for sequence, token in zip(sequences, tokens, strict=True)
            ]
            tokens = engine.step(entries).argmax(axis=-1).tolist()
        ended = time.perf_counter()
    finally:
        for sequence in sequences:
            engine.release(sequence)
    return prefilled - started, ended - prefilled
