"""The engine on tiny models of every family: right logits, equal bits however they are computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import Tiny, reference_logits, write_model

from dure.errors import ModelFileError, UsageError
from dure.serve.engine import Engine
from dure.serve.sampler import SamplingParams
from dure.serve.work import BatchEntry

pytestmark = pytest.mark.usefixtures("guarded_buffers")

FAMILIES = {
    "llama": Tiny("llama", heads=6, kv_heads=2, layers=3),
    "qwen2": Tiny("qwen2", rope_base=1e6, tied=False),
    "qwen3": Tiny("qwen3", head_dim=32),
    "gemma3": Tiny("gemma3", layers=7, window=5, kv_heads=1, rope_base=1e6, head_dim=32),
}
GREEDY = SamplingParams(temperature=0)


def load(tiny: Tiny, folder: Path, threads: int = 2) -> tuple[Engine, dict[str, np.ndarray]]:
    path = folder / f"{tiny.family}.gguf"
    weights = write_model(tiny, path)
    return Engine.load(path, threads=threads, sequences=8), weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_logits_are_the_references(family: str, kind: str, tmp_path: Path) -> None:
    tiny = replace(FAMILIES[family], weight_type=kind)
    engine, weights = load(tiny, tmp_path)
    ids = np.random.default_rng(1).integers(0, tiny.vocabulary, 40).tolist()
    found, expected = engine.logits(ids), reference_logits(tiny, weights, ids)
    scale = np.abs(expected).max()
    # Keys and values have 16 bits; activations of quantized weights are int8 blocks.
    exact = 4e-3 if engine.kv_dtype == "float16" else 1.2e-2
    assert np.abs(found - expected).max() < scale * (exact if kind == "F32" else 0.06)
    engine.close()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float32"])
def test_a_cache_of_the_type_that_is_asked_for(kv_dtype: str, tmp_path: Path) -> None:
    tiny, path = FAMILIES["qwen3"], tmp_path / "model.gguf"
    weights = write_model(tiny, path)
    ids = np.random.default_rng(1).integers(0, tiny.vocabulary, 70).astype(np.int32)
    expected = reference_logits(tiny, weights, ids.tolist())
    with Engine.load(path, kv_dtype=kv_dtype) as engine:
        assert engine.kv_dtype == kv_dtype
        wanted = last_logits(engine, ids, 512)
        np.testing.assert_array_equal(last_logits(engine, ids, 9), wanted)
        found, scale = engine.logits(ids), np.abs(expected).max()
    bound = {"bfloat16": 1.2e-2, "float16": 4e-3, "float32": 5e-4}[kv_dtype]
    assert np.abs(found - expected).max() < scale * bound
    with pytest.raises(UsageError, match="a KV cache of 'int8'"):
        Engine.load(path, kv_dtype="int8")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_the_same_bits_however_a_sequence_is_computed(
    family: str, kind: str, tmp_path: Path
) -> None:
    tiny = replace(FAMILIES[family], weight_type=kind)
    engine, _ = load(tiny, tmp_path)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, tiny.vocabulary, n).astype(np.int32) for n in (70, 1, 33, 8)]
    wanted = last_logits(engine, prompts[0], 512)
    for chunk in (1, 7, 64):
        np.testing.assert_array_equal(last_logits(engine, prompts[0], chunk), wanted)
    np.testing.assert_array_equal(in_a_batch(engine, prompts), wanted)
    engine.close()
    alone = Engine.load(tmp_path / f"{tiny.family}.gguf", threads=1)
    np.testing.assert_array_equal(last_logits(alone, prompts[0], 512), wanted)
    alone.close()


def last_logits(engine: Engine, ids: np.ndarray, chunk: int) -> np.ndarray:
    """The bits of the logits after the prompt and after two more tokens."""
    sequence = engine.sequence()
    rows = [engine.prefill(sequence, ids, chunk).copy()]
    for token in (3, 5):
        entry = BatchEntry(sequence, np.array([token], np.int32), (0,))
        rows.append(engine.step([entry])[0].copy())
    engine.release(sequence)
    return np.stack(rows).view(np.int32)


def in_a_batch(engine: Engine, prompts: list[np.ndarray]) -> np.ndarray:
    """The same for the first of several sequences, prefilled and decoded together."""
    sequences = [engine.sequence() for _ in prompts]
    cut = len(prompts[0]) // 2
    first = [prompts[0][:cut], *prompts[1:]]
    order = [2, 0, 3, 1]
    engine.step([BatchEntry(sequences[i], first[i], (len(first[i]) - 1,)) for i in order])
    rest = prompts[0][cut:]
    entries = [BatchEntry(sequences[i], np.array([4], np.int32), (0,)) for i in (1, 2)]
    last = BatchEntry(sequences[0], rest, (len(rest) - 1,))
    rows = [engine.step([*entries, last])[-1].copy()]
    for token in (3, 5):
        step = [BatchEntry(s, np.array([token], np.int32), (0,)) for s in sequences]
        rows.append(engine.step(step)[0].copy())
    for sequence in sequences:
        engine.release(sequence)
    return np.stack(rows).view(np.int32)


def test_generate_is_greedy_decoding(tmp_path: Path) -> None:
    engine, _ = load(FAMILIES["llama"], tmp_path)
    prompt = [3, 1, 4, 1, 5]
    tokens = list(engine.generate(prompt, GREEDY, 6))
    ids = list(prompt)
    for token in tokens:
        assert engine.logits(ids)[-1].argmax() == token
        ids.append(token)
    stats = engine.stats
    assert (stats.prompt_tokens, stats.tokens) == (5, 6)
    assert stats.prefill_s > 0 and stats.decode_s > 0 and stats.first_token_s > 0
    stopped = engine.generate(prompt, GREEDY, 6)
    assert next(stopped) == tokens[0]
    stopped.close()
    assert engine.cache.free_pages == engine.limits.pool_pages
    assert engine.cache.free_sequences == engine.limits.sequences
    assert list(engine.generate(prompt, GREEDY, 0)) == []
    engine.close()


def test_bench_gives_its_keys(tmp_path: Path) -> None:
    engine, _ = load(FAMILIES["llama"], tmp_path)
    found = engine.bench(prompt=16, gen=4, batch=2, repeats=1)
    assert set(found) == {
        "prefill_tok_s",
        "decode_tok_s",
        "read_gb_s",
        "read_gb_s_model_size",
        "bytes_per_token",
    }
    assert all(isinstance(value, float) and value > 0 for value in found.values())
    with pytest.raises(UsageError, match="sequences of"):
        engine.bench(prompt=16, gen=4, batch=99, repeats=1)
    engine.close()


def test_what_the_user_got_wrong_is_named(tmp_path: Path) -> None:
    engine, _ = load(FAMILIES["llama"], tmp_path)
    with pytest.raises(UsageError, match="empty"):
        engine.generate([], GREEDY, 5)
    with pytest.raises(UsageError, match="the context 256"):
        engine.generate([1] * 256, GREEDY, 5)
    with pytest.raises(UsageError, match="token id 80"):
        engine.logits([1, 80])
    with pytest.raises(UsageError, match="token id -1"):
        engine.logits([-1])
    with pytest.raises(UsageError, match="-3 tokens"):
        engine.generate([1], GREEDY, -3)
    assert len(list(engine.generate([1] * 250, GREEDY, 50))) == 6
    sequence = engine.sequence()
    entry = BatchEntry(sequence, np.array([1], np.int32), (0,))
    with pytest.raises(UsageError, match="twice"):
        engine.step([entry, entry])
    with pytest.raises(UsageError, match="without tokens"):
        engine.step([])
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.step([entry])
    path = tmp_path / "llama.gguf"
    with pytest.raises(UsageError, match="context of 999"):
        Engine.load(path, context=999)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write_model(FAMILIES["llama"], path)
    monkeypatch.setattr("dure.serve.engine.available_bytes", lambda: 1 << 20)
    with pytest.raises(UsageError, match="GB are free"):
        Engine.load(path)


def test_wrong_models_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(replace(FAMILIES["llama"], family="mamba"), path)
    with pytest.raises(ModelFileError, match="unknown architecture 'mamba'"):
        Engine.load(path)
    write_model(Tiny("qwen2"), path)
    raw = path.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight")
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=r"no tensor .blk\.1\.attn_k\.weight."):
        Engine.load(path)
    write_model(Tiny("llama", heads=4, kv_heads=3), path)
    with pytest.raises(ModelFileError, match="share 3 KV heads"):
        Engine.load(path)
    write_model(Tiny("llama", extra={"llama.expert_count": 8}), path)
    with pytest.raises(ModelFileError, match="mixture of experts"):
        Engine.load(path)
