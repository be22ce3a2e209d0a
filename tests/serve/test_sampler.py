"""The sampler against a plain float64 reading of its contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dure.errors import UsageError
from dure.serve.sampler import LogitsError, Sampler, SamplingParams


def reference_distribution(
    logits: NDArray[Any], history: list[int], prompt_tokens: int, params: SamplingParams
) -> tuple[NDArray[np.float64], bool]:
    """The probability of each token, step by step; and whether a border was too close to call."""
    row = logits.astype(np.float64).copy()
    for token in set(history):
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(history[prompt_tokens:]):
        row[token] -= params.presence_penalty
    row = row.astype(np.float32).astype(np.float64)
    if params.temperature == 0:
        chosen = np.zeros(len(row))
        chosen[int(np.argmax(row))] = 1.0
        return chosen, False
    probability = np.exp((row - row.max()) / params.temperature)
    probability /= probability.sum()
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if params.top_k:
        order = order[: params.top_k]
    left = np.zeros(len(row))
    left[order] = probability[order]
    left /= left.sum()
    close = False
    if params.top_p < 1:
        kept, total = [], 0.0
        for token in order:
            kept.append(token)
            total += left[token]
            close = close or abs(total - params.top_p) < 1e-5
            if total >= params.top_p:
                break
        left[[i for i in range(len(row)) if i not in set(kept)]] = 0.0
    if params.min_p > 0:
        border = params.min_p * left.max()
        close = close or bool(np.any(np.abs(left - border) < 1e-5 * border))
        left[left < border] = 0.0
    return left / left.sum(), close


def sampled_distribution(
    logits: NDArray[Any], history: list[int], prompt_tokens: int, params: SamplingParams
) -> NDArray[np.float64]:
    """The probabilities that the sampler itself draws from."""
    sampler = Sampler(params)
    row = (
        sampler._penalized(logits, np.array(history, np.int64), prompt_tokens)
        if history
        else logits
    )
    chosen = np.zeros(len(logits))
    if params.is_greedy:
        chosen[sampler.sample(logits, history, prompt_tokens)] = 1.0
        return chosen
    ids, weights = sampler._distribution(row)
    chosen[slice(None) if ids is None else ids] = weights
    return chosen / chosen.sum()


@st.composite
def rows(draw: st.DrawFn) -> NDArray[np.float32]:
    """Rows of many kinds: smooth, with ties, with masked tokens, flat, steep, short and long."""
    size = draw(st.sampled_from([1, 2, 3, 17, 300, 1500, 5000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 60.0]))
    row = random.normal(size=size) * scale
    if draw(st.booleans()):
        row = np.round(row)  # ties
    if draw(st.booleans()) and size > 1:
        row[random.integers(0, size, size // 2)] = -np.inf
        row[random.integers(0, size)] = 0.0
    return row.astype(np.float32)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 2000, 10**9]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.6, -0.6]),
    seed=st.integers(0, 2**64),
)


@settings(max_examples=150, deadline=None)
@given(row=rows(), params=PARAMS, data=st.data())
def test_distribution_is_the_references(
    row: NDArray[np.float32], params: SamplingParams, data: st.DataObject
) -> None:
    ids = st.integers(0, len(row) - 1)
    history = data.draw(st.lists(ids, max_size=8))
    prompt_tokens = data.draw(st.integers(0, len(history)))
    expected, close = reference_distribution(row, history, prompt_tokens, params)
    if close:
        return  # float32 and float64 may differ about a token that lies on the border
    found = sampled_distribution(row, history, prompt_tokens, params)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(row=rows(), params=PARAMS)
def test_token_drawn_has_a_probability(row: NDArray[np.float32], params: SamplingParams) -> None:
    sampler, again = Sampler(params), Sampler(params)
    possible = sampled_distribution(row, [], 0, params) > 0
    before = row.copy()
    tokens = [sampler.sample(row) for _ in range(5)]
    assert all(possible[token] for token in tokens)
    assert tokens == [again.sample(row) for _ in range(5)]
    np.testing.assert_array_equal(row, before)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.7, top_k=20, seed=2),
        SamplingParams(temperature=1.5, top_p=0.8, seed=3),
        SamplingParams(min_p=0.2, seed=4),
    ],
)
@pytest.mark.parametrize("size", [40, 3000])
def test_frequencies_follow_the_distribution(params: SamplingParams, size: int) -> None:
    """Pearson's chi-square over 20 groups of tokens; 36.2 is its 99 % point for 19 degrees."""
    row = (np.random.default_rng(7).normal(size=size) * 1.5).astype(np.float32)
    expected, close = reference_distribution(row, [], 0, params)
    assert not close
    draws = 4000
    sampler = Sampler(params)
    counts = np.bincount([sampler.sample(row) for _ in range(draws)], minlength=size)
    order = np.argsort(-expected)
    group = np.minimum((np.cumsum(expected[order]) * 20).astype(int), 19)
    wanted = np.bincount(group, weights=expected[order], minlength=20) * draws
    found = np.bincount(group, weights=counts[order], minlength=20)
    filled = wanted > 0
    assert found[~filled].sum() == 0
    assert float(((found - wanted)[filled] ** 2 / wanted[filled]).sum()) < 36.2


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    row = np.array([0.0, 3.0, 3.0, -1.0], np.float32)
    assert Sampler(SamplingParams(temperature=0)).sample(row) == 1
    assert Sampler(SamplingParams(top_k=1)).sample(row) == 1


def test_penalties_as_defined() -> None:
    row = np.array([2.0, 1.5, -1.0, 1.4], np.float32)
    greedy = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert Sampler(greedy).sample(row, [0]) == 1  # 2 / 2 < 1.5
    assert Sampler(greedy).sample(row, [0, 1]) == 3
    presence = SamplingParams(temperature=0, presence_penalty=1.0)
    assert Sampler(presence).sample(row, [0], prompt_tokens=1) == 0  # the prompt's don't count
    assert Sampler(presence).sample(row, [0], prompt_tokens=0) == 1
    assert Sampler(presence).sample(row, [0, 0, 0], prompt_tokens=0) == 1  # once, not per use


def test_extreme_numbers_stay_numbers() -> None:
    most = np.finfo(np.float32).max
    row = np.array([most, -most, 0.0, -np.inf], np.float32)
    for temperature in (1e-300, 1e-30, 1.0, 1000.0):
        for penalty in (1e-9, 1e9):
            params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=0)
            with np.errstate(all="raise", under="ignore"):
                assert Sampler(params).sample(row, [0, 1, 2]) in (0, 1, 2)
    assert Sampler(SamplingParams(temperature=1e-300, seed=0)).sample(row) == 0


def test_masked_tokens_are_never_drawn() -> None:
    row = np.full(5000, -np.inf, np.float32)
    row[[3, 4999]] = [0.0, 0.5]
    for params in (SamplingParams(seed=0), SamplingParams(top_k=50, top_p=0.999, seed=0)):
        sampler = Sampler(params)
        assert {sampler.sample(row) for _ in range(200)} == {3, 4999}


def test_any_float_dtype() -> None:
    row = np.array([0.0, 9.0, 1.0], np.float16)
    assert Sampler(SamplingParams(temperature=0)).sample(row) == 1
    assert Sampler(SamplingParams(temperature=0)).sample(row.astype(np.float64)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0.0, math.nan, 1.0], "1 of 3 logits are NaN"),
        ([math.inf, 0.0, math.nan], "1 of 3 logits are NaN"),
        ([0.0, math.inf], "1 of 2 logits are +inf"),
        ([-math.inf, -math.inf], "all tokens are masked"),
    ],
)
def test_logits_that_cannot_be_sampled(row: list[float], said: str) -> None:
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.5)):
        with pytest.raises(LogitsError) as caught:
            Sampler(params).sample(np.array(row, np.float32))
        assert said in caught.value.what
        assert caught.value.fix


@pytest.mark.parametrize("shape", [(0,), (1, 4), (), (2, 2)])
def test_logits_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(LogitsError, match="shape"):
        Sampler(SamplingParams()).sample(np.zeros(shape, np.float32))


@pytest.mark.parametrize("history", [[-1], [3], [0, 99]])
def test_history_outside_of_the_vocabulary(history: list[int]) -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        Sampler(SamplingParams(presence_penalty=0.5)).sample(np.zeros(3, np.float32), history)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"presence_penalty": 1e9},
        {"seed": -1},
        {"seed": 0.5},
    ],
)
def test_parameters_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wrong)
    name = next(iter(wrong))
    assert caught.value.what.startswith(f"{name} = ")
    assert name in caught.value.fix


def test_sequences_are_independent() -> None:
    """Two sequences drawn in turns get what each gets alone."""
    row = np.random.default_rng(0).normal(size=500).astype(np.float32)
    alone = [[s.sample(row) for _ in range(20)] for s in map(Sampler, map(seeded, (5, 6)))]
    first, second = Sampler(seeded(5)), Sampler(seeded(6))
    turns = [(first.sample(row), second.sample(row)) for _ in range(20)]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == alone


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(top_p=0.9, seed=seed)
