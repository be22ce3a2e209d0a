"""Choosing the next token from one row of logits.

The filters run in the order of Hugging Face's ``generate`` and of vLLM, which is also what clients
of OpenAI-style servers expect.  (llama.cpp's default chain differs in one point: the temperature
comes last there, so that its top-p and min-p see the untempered distribution.)

1. **repetition penalty** (CTRL, arXiv:1909.05858; HF's ``RepetitionPenaltyLogitsProcessor``): the
   logit of a token anywhere in the history, prompt included, is divided by the penalty if it is
   positive and multiplied by it otherwise.
2. **presence penalty** (OpenAI, vLLM): subtracted once from the logit of each token that has been
   *generated*; the prompt's don't count.
3. **temperature**: logits are divided by it.  0 means greedy: the largest logit of step 2, the
   lowest token id among equals, and nothing further.
4. **top-k**: the k largest are kept; among equals at the border the lowest ids.
5. **top-p** (nucleus, arXiv:1904.09751): after renormalizing, the shortest prefix of the tokens by
   falling probability (lowest id first among equals) whose sum reaches p; at least one token.
6. **min-p** (arXiv:2407.01082): tokens with at least min_p times the most likely one's probability.
7. one draw from what is left, by inverting the cumulative sum with one uniform number.

A logit of -inf is a masked token and is never drawn.  NaN, +inf, or a row that is masked throughout
is an error: it means that something upstream is broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dure.errors import DureError, UsageError

_Floats = NDArray[np.floating[Any]]
_Row = NDArray[np.float32]
_Ids = NDArray[np.int64]
_Mask = NDArray[np.bool_]

_FIRST_REACH = 8.0
"""How far below the largest (tempered) logit the border of top-k or top-p is sought at first."""

_LAST_REACH = 128.0
"""Further down, a float32 probability is 0."""

_FEW = 1024
"""So many tokens are sorted rather than narrowed down further."""

_BLOCK = 256
"""Weights that are summed together when one of many is drawn."""

_MOST_TEMPERATURE = 1000.0
_MOST_PRESENCE = 1000.0
_FINITE_MOST = np.finfo(np.float32).max


class LogitsError(DureError):
    """A row of logits that cannot be sampled: NaN, +inf, all masked, or of the wrong shape."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.  The defaults sample from the model's own distribution.

    ``temperature`` from 0 (greedy) to 1000; ``top_k`` >= 0 (0: off); 0 < ``top_p`` <= 1 (1: off);
    0 <= ``min_p`` <= 1 (0: off); ``repetition_penalty`` > 0 (1: off); ``presence_penalty`` from
    -1000 to 1000 (0: off).  The same ``seed`` >= 0 gives the same tokens for the same logits, alone
    or in any batch; None takes one from the operating system.  Raises UsageError for anything else.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        heat = self.temperature
        _require("temperature", heat, 0 <= heat <= _MOST_TEMPERATURE, "from 0 to 1000")
        _require("top_k", self.top_k, _is_count(self.top_k), "a whole number, at least 0")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty < math.inf, "more than 0")
        presence = self.presence_penalty
        in_range = -_MOST_PRESENCE <= presence <= _MOST_PRESENCE
        _require("presence_penalty", presence, in_range, "from -1000 to 1000")
        seed_is_fine = self.seed is None or _is_count(self.seed)
        _require("seed", self.seed, seed_is_fine, "a whole number, at least 0")

    @property
    def is_greedy(self) -> bool:
        """Whether the choice involves no chance."""
        return self.temperature == 0 or self.top_k == 1


class Sampler:
    """Chooses the tokens of one sequence; holds that sequence's random numbers, nothing else."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.Philox(params.seed))
        self._has_penalties = params.repetition_penalty != 1 or params.presence_penalty != 0

    def sample(
        self,
        logits: _Floats,
        history: Sequence[int] | NDArray[np.integer[Any]] = (),
        prompt_tokens: int = 0,
    ) -> int:
        """The next token's id.

        ``logits`` is one row, shape ``[vocabulary]``, of any float dtype (float32 is the fast one);
        it is not changed.  ``history`` holds the ids so far, of which the first ``prompt_tokens``
        are the prompt; only the penalties look at it (pass an int array where it is long).

        Raises LogitsError for a row that cannot be sampled, UsageError for a history with an id
        that the vocabulary doesn't have.
        """
        if logits.ndim != 1 or logits.shape[0] == 0:
            raise LogitsError(
                f"logits of shape {list(logits.shape)} can't be sampled",
                rule="logits are one row, of shape [vocabulary]",
                fix="pass the row of the sequence's last token",
            )
        row = np.asarray(logits, dtype=np.float32)
        likeliest = _likeliest(row)
        if self._has_penalties and len(history) > 0:
            row = self._penalized(row, np.asarray(history, dtype=np.int64), prompt_tokens)
            likeliest = int(row.argmax())
        if self.params.is_greedy:
            return likeliest
        ids, weights = self._distribution(row)
        # One number for each token drawn, whatever the filters: a seed fixes the whole sequence.
        index = _draw(weights, self._random.random())
        return index if ids is None else int(ids[index])

    def _penalized(self, row: _Row, history: _Ids, prompt_tokens: int) -> _Row:
        repetition, presence = self.params.repetition_penalty, self.params.presence_penalty
        lowest, highest = int(history.min()), int(history.max())
        if lowest < 0 or highest >= row.shape[0]:
            raise UsageError(
                "the history holds a token id that the vocabulary doesn't have",
                where=f"ids from {lowest} to {highest}, {row.shape[0]} logits",
                fix="pass the ids of this model's tokenizer",
            )
        row = row.copy()
        if repetition != 1:
            ids = _distinct(history, row.shape[0])
            values = row[ids].astype(np.float64)
            changed = np.where(values > 0, values / repetition, values * repetition)
            # A mask stays a mask, and nothing else becomes one by overflowing.
            limited = np.clip(changed, -_FINITE_MOST, _FINITE_MOST)
            row[ids] = np.where(np.isneginf(values), values, limited)
        if presence != 0:
            row[_distinct(history[prompt_tokens:], row.shape[0])] -= np.float32(presence)
        return row

    def _distribution(self, row: _Row) -> tuple[_Ids | None, _Row]:
        """What may be drawn: token ids (None: all, in order), and weights that needn't sum to 1."""
        params = self.params
        # An overflow means a token so unlikely that its weight is 0 all the same.
        with np.errstate(over="ignore"):
            scaled = row - row.max()
            scaled *= np.float32(min(1 / params.temperature, 1e30))
            weights = np.exp(scaled)
        ids = None
        if params.top_k:
            ids = _top_k(scaled, params.top_k)
            weights = weights[ids]
            if params.top_p < 1:
                sums = np.cumsum(weights, dtype=np.float64)
                keep = int(np.searchsorted(sums, params.top_p * float(sums[-1]), side="left")) + 1
                ids, weights = ids[:keep], weights[:keep]
        elif params.top_p < 1:
            ids = _nucleus(scaled, weights, params.top_p)
            weights = weights[ids]
        if params.min_p > 0:
            weights = np.where(weights >= params.min_p, weights, np.float32(0))
        return ids, weights


def _likeliest(row: _Row) -> int:
    """The first of the largest logits; raises LogitsError for a row that can't be sampled."""
    place = int(row.argmax())
    largest = row.item(place)  # a NaN comes first, so one pass finds all three faults
    if math.isfinite(largest):
        return place
    if math.isnan(largest):
        found = f"{np.count_nonzero(np.isnan(row))} of {row.shape[0]} logits are NaN"
    elif largest > 0:
        found = f"{np.count_nonzero(row == np.inf)} of {row.shape[0]} logits are +inf"
    else:
        found = "every logit is -inf, so that all tokens are masked"
    raise LogitsError(
        f"no token can be chosen: {found}",
        rule="logits are finite, or -inf for a masked token",
        fix="look for an overflow or a damaged weight in the model that computed them",
    )


def _top_k(scaled: _Row, top_k: int) -> _Ids:
    """The ids of the ``top_k`` largest, by falling value, lowest id first among equals."""
    k = min(top_k, scaled.shape[0])
    low, high = _bracket(scaled, lambda mask: np.count_nonzero(mask) >= k)
    above = np.flatnonzero(scaled >= high)
    border = _sorted(scaled, _between(scaled, low, high))
    return np.concatenate([_sorted(scaled, above), border[: k - len(above)]])


def _nucleus(scaled: _Row, weights: _Row, top_p: float) -> _Ids:
    """The ids of the fewest most likely tokens whose weights sum to ``top_p`` of the total."""
    needed = top_p * float(weights.sum(dtype=np.float64))
    low, high = _bracket(scaled, lambda mask: (weights * mask).sum(dtype=np.float64) >= needed)
    above = np.flatnonzero(scaled >= high)
    border = _sorted(scaled, _between(scaled, low, high))
    sums = np.cumsum(weights[border], dtype=np.float64)
    missing = needed - float(weights[above].sum(dtype=np.float64))
    keep = int(np.searchsorted(sums, missing, side="left")) + 1
    return np.concatenate([above, border[:keep]])


def _bracket(scaled: _Row, is_enough: Callable[[_Mask], bool | np.bool_]) -> tuple[float, float]:
    """Two values with few tokens between them, where the border of a set of the largest lies.

    The tokens from the upper value on are all in the set and aren't enough; those from the lower
    value on are.  So only the few in between need sorting.  ``scaled`` has its maximum at 0.
    """
    low, high = -_FIRST_REACH, math.inf
    while not is_enough(scaled >= low):
        if -low >= _LAST_REACH:
            return -math.inf, low
        low, high = 2 * low, low
    high = min(high, 1.0)
    while np.count_nonzero((scaled >= low) & (scaled < high)) > _FEW:
        middle = float(np.float32((low + high) / 2))
        if not low < middle < high:
            break  # so many equal values: they are sorted by id
        if is_enough(scaled >= middle):
            low = middle
        else:
            high = middle
    return low, high


def _between(scaled: _Row, low: float, high: float) -> _Ids:
    return np.flatnonzero((scaled >= low) & (scaled < high))


def _sorted(scaled: _Row, ids: _Ids) -> _Ids:
    """``ids`` by falling value, lowest id first among equals.  No value is above 0."""
    # A non-negative float's bits sort like the float; with the id below them one sort does both.
    keys = np.abs(scaled[ids]).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _draw(weights: _Row, uniform: float) -> int:
    """The index that ``uniform`` in [0, 1) falls on; an index of weight 0 never comes out."""
    if len(weights) <= 4 * _BLOCK:
        return _invert(weights, uniform, None)
    # Block sums first: a cumulative sum is the one slow thing here, and most of it isn't needed.
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    sums = np.cumsum(blocks, dtype=np.float64)
    block = _invert(blocks, uniform, None)
    rest = uniform * float(sums[-1]) - (float(sums[block - 1]) if block else 0.0)
    start = block * _BLOCK
    return start + _invert(weights[start : start + _BLOCK], uniform, rest)


def _invert(weights: _Row, uniform: float, point: float | None) -> int:
    """The first index whose cumulative weight exceeds ``point``, or ``uniform`` of the total."""
    sums = np.cumsum(weights, dtype=np.float64)
    if point is None:
        point = uniform * float(sums[-1])
    # Rounding may carry the point to the very end: then it is the last index with a weight.
    last = int(np.searchsorted(sums, float(sums[-1]), side="left"))
    return min(int(np.searchsorted(sums, point, side="right")), last)


def _distinct(ids: _Ids, size: int) -> _Ids:
    """The distinct values of ``ids``, all of them below ``size``; faster than sorting them."""
    present = np.zeros(size, dtype=np.bool_)
    present[ids] = True
    return np.flatnonzero(present)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UsageError(
            f"{name} = {value} can't be used: it has to be {allowed}",
            fix=f"give a {name} that is {allowed}",
        )
