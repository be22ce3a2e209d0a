"""The engine where something is unusual: threads, forks, Ctrl-C, NaN, wrong pages, least sizes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from registers import host_with
from tiny_models import Tiny, reference_logits, write_model

from dure.errors import UsageError
from dure.runtime import host
from dure.runtime.host import default_workers
from dure.serve.engine import Engine
from dure.serve.sampler import LogitsError, SamplingParams
from dure.serve.work import BatchEntry

pytestmark = pytest.mark.usefixtures("guarded_buffers")

TINY = Tiny("llama", heads=6, kv_heads=2, layers=3, weight_type="Q4_1", tied=False)
GREEDY = SamplingParams(temperature=0)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(TINY, path)
    return path


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(path, threads=2, sequences=4) as loaded:
        yield loaded


def bits(engine: Engine, ids: list[int] = IDS) -> np.ndarray:
    return engine.logits(ids).view(np.int32)


# --- threads, processes, signals -----------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_more_threads_than_cores_give_the_same_bits(
    engine: Engine, path: Path, threads: int
) -> None:
    with Engine.load(path, threads=threads) as other:
        assert other.threads == threads
        np.testing.assert_array_equal(bits(other), bits(engine))


@pytest.mark.parametrize("bits_wide", [128, 256, 512])
def test_registers_of_other_machines(
    tmp_path: Path, bits_wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in panels of every width; LLVM splits what the host's registers don't hold."""
    other = host_with(bits_wide)
    monkeypatch.setattr(host, "_features_at", lambda _: other)
    path, floats = tmp_path / "tiny.gguf", replace(TINY, weight_type="F32")
    weights = write_model(floats, path)
    with Engine.load(path, threads=2) as engine:
        found = engine.logits(IDS)
    expected = reference_logits(floats, weights, IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=np.abs(expected).max() * 0.02)


def test_a_single_core(engine: Engine, path: Path) -> None:
    """More workers than the one core that is left to the process, and as many."""
    if not hasattr(os, "sched_setaffinity"):
        return
    wanted, before = bits(engine), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        for threads in (None, 2):
            with Engine.load(path, threads=threads) as alone:
                assert alone.threads == (threads or default_workers())
                np.testing.assert_array_equal(bits(alone), wanted)
    finally:
        os.sched_setaffinity(0, before)


def test_a_forked_child_goes_on_with_its_copy(engine: Engine) -> None:
    if not hasattr(os, "fork"):
        return
    wanted = bits(engine)
    sequence = engine.sequence()
    ids = np.array(IDS, np.int32)
    engine.prefill(sequence, ids[:4])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            last = engine.prefill(sequence, ids[4:]).view(np.int32)
            code = 0 if (last == wanted[-1]).all() and (bits(engine) == wanted).all() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0
    np.testing.assert_array_equal(engine.prefill(sequence, ids[4:]).view(np.int32), wanted[-1])
    engine.release(sequence)


def test_a_fork_while_another_thread_runs_steps(engine: Engine) -> None:
    """The child finds the engine free, though the thread that held it isn't there."""
    if not hasattr(os, "fork"):
        return
    wanted, stop = bits(engine), threading.Event()

    def work() -> None:
        while not stop.is_set():
            engine.logits(IDS)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.alarm(60)
                    code = 0 if (bits(engine) == wanted).all() else 2
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
    np.testing.assert_array_equal(bits(engine), wanted)


def test_control_c_in_a_step_leaves_the_engine_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes while workers run is raised when they have finished."""
    wanted = bits(engine)
    sequence = engine.sequence()
    ids = np.array(IDS, np.int32)
    engine.prefill(sequence, ids[:4])
    run = engine.program.run

    def interrupted(inputs: Any) -> Any:
        run(inputs)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        raise AssertionError("the signal was lost")

    free = engine.cache.free_pages
    with monkeypatch.context() as patch:
        patch.setattr(engine.program, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(sequence, ids[4:])
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate(IDS, GREEDY, 4))
    assert sequence.length == 4
    assert engine.cache.free_pages == free and engine.cache.free_sequences == 3
    np.testing.assert_array_equal(engine.prefill(sequence, ids[4:]).view(np.int32), wanted[-1])
    engine.release(sequence)
    np.testing.assert_array_equal(bits(engine), wanted)


# --- what is no number ---------------------------------------------------------------------------


def spoiled(path: Path, name: str, row: int, number: float = np.nan) -> Path:
    """A copy of the model with a number in a row of a tensor, or in its first block's scale."""
    copy = path.with_name(f"{name}.gguf")
    copy.write_bytes(path.read_bytes())
    data = next(t for t in gguf.GGUFReader(copy, "r+").tensors if t.name == name).data
    if data.dtype == np.float32:
        data[row, 0] = number
    else:
        data[row, :2] = np.array([number], np.float16).view(np.uint8)
    return copy


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_a_token_whose_embedding_is_nan_spoils_its_sequence_alone(
    tmp_path: Path, kind: str
) -> None:
    """From its step on, as in NumPy: of the tokens of one step, a weight of zero times NaN is NaN
    also where attention is masked.
    """
    path = tmp_path / "tiny.gguf"
    write_model(replace(TINY, weight_type=kind), path)
    with Engine.load(path, threads=2, sequences=4) as clean:
        wanted = clean.logits([3, 1, 4])
    with Engine.load(spoiled(path, "token_embd.weight", 9), threads=2, sequences=4) as engine:
        sequence = engine.sequence()
        before = engine.prefill(sequence, np.array([3, 1], np.int32)).copy()
        np.testing.assert_array_equal(before, wanted[1])
        for token in (9, 4):
            assert np.isnan(engine.prefill(sequence, np.array([token], np.int32))).all()
        engine.release(sequence)
        with pytest.raises(LogitsError, match="logits are NaN"):
            list(engine.generate([3, 9], GREEDY, 2))
        # Its pages are used again, and hold NaN where nothing else was written yet.
        for _ in range(2):
            np.testing.assert_array_equal(engine.logits([3, 1, 4]), wanted)
        one, two = engine.sequence(), engine.sequence()
        entries = [
            BatchEntry(one, np.array([9], np.int32), (0,)),
            BatchEntry(two, np.array([3, 1, 4], np.int32), (0, 1, 2)),
        ]
        rows = engine.step(entries)
        assert np.isnan(rows[0]).all()
        np.testing.assert_array_equal(rows[1:], wanted)


@pytest.mark.parametrize("name", ["blk.1.attn_v.weight", "blk.0.ffn_up.weight"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_weight_that_is_no_number_shows(path: Path, name: str, number: float) -> None:
    with Engine.load(spoiled(path, name, 3, number), threads=2) as engine:
        assert np.isnan(engine.logits(IDS)).all()
        with pytest.raises(LogitsError, match="logits are NaN"):
            list(engine.generate(IDS, GREEDY, 2))


def test_the_smallest_weights(tmp_path: Path) -> None:
    """Norms whose weights are subnormal: products with them aren't flushed, and nothing is slow."""
    path = tmp_path / "tiny.gguf"
    weights = write_model(replace(TINY, weight_type="F32"), path)
    norm = "output_norm.weight"
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == norm).data[:] = 1e-41
    weights[norm][:] = np.float32(1e-41)
    with Engine.load(path, threads=2) as engine:
        found = engine.logits(IDS)
    expected = reference_logits(replace(TINY, weight_type="F32"), weights, IDS)
    assert (found != 0).mean() > 0.9
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


# --- sizes and pages -----------------------------------------------------------------------------


def test_a_context_of_one_token(engine: Engine, path: Path) -> None:
    with Engine.load(path, threads=2, context=1) as short:
        assert short.context_length == 1
        np.testing.assert_array_equal(bits(short, [5]), bits(engine, [5]))
        with pytest.raises(UsageError, match="the context 1"):
            short.generate([5], GREEDY, 1)
        with pytest.raises(UsageError, match="2 tokens"):
            short.logits([5, 6])
    with pytest.raises(UsageError, match="context of 0"):
        Engine.load(path, context=0)


def test_nothing_to_do(engine: Engine, path: Path) -> None:
    sequence = engine.sequence()
    empty = np.zeros(0, np.int32)
    for entries in ([], [BatchEntry(sequence, empty, ())]):
        with pytest.raises(UsageError, match="a step without tokens"):
            engine.step(entries)
    with pytest.raises(UsageError, match="a step without tokens"):
        engine.prefill(sequence, empty)
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.logits([])
    for options in ({"batch": 0}, {"gen": 0}, {"repeats": 0}, {"prompt": 0}):
        with pytest.raises(UsageError):
            engine.bench(**{"prompt": 4, "gen": 2, "batch": 1, "repeats": 1, **options})
    for options in ({"sequences": 0}, {"chunk": 0}, {"sequences": -1}):
        with pytest.raises(UsageError, match="steps of"):
            Engine.load(path, **options)
    assert engine.cache.free_sequences == 3
    # A step whose rows nobody asks for.
    rows = engine.step([BatchEntry(sequence, np.array([1], np.int32), ())])
    assert rows.shape == (0, TINY.vocabulary) and sequence.length == 1
    engine.release(sequence)


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("page", [-1, 10**6, np.iinfo(np.int32).min, np.iinfo(np.int32).max])
def test_a_page_that_is_none(engine: Engine, page: int, place: int) -> None:
    """Where a sequence's tokens lie, and where it has none yet: neither is read or written."""
    wanted, ids = bits(engine), np.array(IDS, np.int32)
    sequence = engine.sequence()
    engine.prefill(sequence, ids[:4])
    table = engine.cache.block_table
    right, table[sequence.row, place] = int(table[sequence.row, place]), page
    with pytest.raises(UsageError, match="holds indices") as caught:
        engine.prefill(sequence, ids[4:])
    assert caught.value.rule and caught.value.fix
    assert sequence.length == 4
    table[sequence.row, place] = right
    np.testing.assert_array_equal(engine.prefill(sequence, ids[4:]).view(np.int32), wanted[-1])
    engine.release(sequence)
    np.testing.assert_array_equal(bits(engine), wanted)
