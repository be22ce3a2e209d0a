"""A mixture of experts over many tokens, against what its tensor ops mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import dure.ir.tensor
from dure.ir.core import op_definition
from dure.library.moe_many import (
    choice_rows,
    choice_sum,
    counted_ends,
    counted_places,
    expert_counts,
)

assert dure.ir.tensor
#: Tokens, choices of each, experts; blocks of tokens, and blocks that are added at a time.
SIZES = [
    (1, 1, 1, 1, 1),
    (5, 2, 3, 4, 1),
    (37, 3, 5, 8, 2),
    (64, 8, 128, 16, 4),
    (130, 4, 6, 32, 8),
]


def meaning(name: str, attrs: dict[str, Any], *operands: Any) -> Any:
    definition = op_definition(name)
    assert definition.semantics is not None
    return definition.semantics({**definition.defaults, **attrs}, *operands)


def choices(tokens: int, k: int, experts: int) -> npt.NDArray[np.int32]:
    """Some are of no expert, and some tokens choose one twice."""
    draw = np.random.default_rng([tokens, k, experts])
    return draw.integers(-1, experts + 2, (tokens, k)).astype(np.int32)


def covering(value: int) -> int:
    return 1 << (value - 1).bit_length()


@pytest.mark.parametrize(("tokens", "k", "experts", "bt", "bb"), SIZES)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_order_by_expert_is_counted(
    tokens: int, k: int, experts: int, bt: int, bb: int, parts: int
) -> None:
    count, given = experts * parts, choices(tokens, k, experts * parts)
    for part in range(parts):
        sizes = {"bt": bt, "be": covering(experts), "count": count, "held": experts}
        which = None if parts == 1 else np.array([part], np.int32)
        counts = np.full((experts, -(-tokens // bt)), -7, np.int32)
        starts, stops, columns = (np.full(s, -7, np.int32) for s in (experts, experts, (k, tokens)))
        expert_counts(given, which, counts, **sizes, bk=covering(k))
        counted_ends(counts, starts, stops, be=sizes["be"], bb=bb)
        counted_places(given, which, counts, starts, columns, **sizes, bb=bb)
        operands = (given,) if which is None else (given, which)
        expected = meaning("dispatch", {"experts": count, "parts": parts}, *operands)
        for found, right in zip((columns.T, starts, stops), expected, strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize(
    ("tokens", "k", "width", "bt", "bd"), [(1, 1, 1, 1, 1), (37, 3, 50, 8, 32)]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_go_to_experts_and_come_back(
    tokens: int, k: int, width: int, bt: int, bd: int, parts: int
) -> None:
    draw = np.random.default_rng(tokens)
    x = draw.standard_normal((tokens, width)).astype(np.float32)
    shares = draw.random((tokens, k)).astype(np.float32)
    which = () if parts == 1 else (np.array([1], np.int32),)
    attrs = {"experts": 4, "parts": parts}
    places, *_ = meaning("dispatch", attrs, choices(tokens, k, 4), *which)
    rows, back = np.zeros((tokens * k, width), np.float32), np.zeros_like(x)
    columns = np.ascontiguousarray(places.T)
    choice_rows(x, columns, rows, bt=bt, bd=bd)
    np.testing.assert_array_equal(rows, meaning("expert_rows", {}, x, places))
    choice_sum(rows, columns, shares, back, bt=bt, bd=bd)
    expected = meaning("expert_sum", {}, rows, places, shares)
    np.testing.assert_allclose(back, expected, rtol=1e-5, atol=1e-6)
