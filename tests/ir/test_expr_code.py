"""Compiled index expressions are numbers as evaluated ones are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.errors import IRError
from dure.ir.expr import Expr, as_expr, compare, evaluate, logic, maximum, minimum, symbol
from dure.ir.expr_code import compile_expr, missing, names_of

A, B, C = (symbol(name, "loop", 0, 50) for name in "abc")

LEAVES = st.one_of(st.sampled_from([A, B, C]), st.integers(-9, 9).map(as_expr))


def _grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] - p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        st.tuples(inner, st.integers(1, 7)).map(lambda p: p[0] // p[1]),
        st.tuples(inner, st.integers(1, 7)).map(lambda p: p[0] % p[1]),
        pairs.map(lambda p: p[0] // (maximum(p[1], 1))),
        st.tuples(inner, inner, inner).map(lambda p: minimum(*p)),
        pairs.map(lambda p: maximum(*p)),
        st.tuples(st.sampled_from(["<", "<=", "==", "!="]), inner, inner).map(
            lambda p: compare(p[0], p[1], p[2])
        ),
        pairs.map(lambda p: logic("and", p[0] < 3, p[1] < 5)),
        pairs.map(lambda p: logic("or", p[0] < 3, p[1] < 5)),
    )


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.recursive(LEAVES, _grow, max_leaves=8),
    st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)),
)
def test_compiled_is_evaluated(expr: Expr, numbers: tuple[int, int, int]) -> None:
    values = dict(zip("abc", numbers, strict=True))
    assert compile_expr(expr)(values) == evaluate(expr, values)
    assert names_of(expr) <= set(values)


def test_errors() -> None:
    with pytest.raises(IRError, match="division by 0"):
        compile_expr(A // B)({"a": 1, "b": 0})
    with pytest.raises(KeyError) as caught:
        compile_expr(A * 2 + B)({"a": 1})
    assert "symbol 'b' has no value" in str(missing(caught.value, {"a": 1}))
