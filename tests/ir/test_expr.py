"""Index expressions: simplification, bounds and proofs against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.errors import IRError
from dure.ir.expr import (
    Expr,
    Range,
    as_expr,
    bounds,
    cdiv,
    compare,
    const,
    evaluate,
    logic,
    maximum,
    minimum,
    proves,
    substitute,
    symbol,
    symbols,
)

N = symbol("n", "size", 0, 6)
M = symbol("m", "size", 1, 4)
#: Bounded by an expression of another symbol, as a program id is by its grid.
P = symbol("p", "grid", 0, cdiv(N, 2) - 1)
Q = symbol("q", "loop", P, N + 1)
U = symbol("u", "size", 2, None)

#: A symbolic expression beside the plain Python function that it must agree with.
Pair = tuple[Expr, Callable[[dict[str, int]], int]]


def assignments() -> Iterator[dict[str, int]]:
    for n, m, u in itertools.product(range(7), range(1, 5), (2, 3, 7)):
        for p in range(-(-n // 2)):
            for q in range(p, n + 2):
                yield {"n": n, "m": m, "p": p, "q": q, "u": u}


ALL = list(assignments())


def leaf() -> st.SearchStrategy[Pair]:
    def of(value: Expr | int) -> Pair:
        if isinstance(value, int):
            return const(value), lambda env: value
        return value, lambda env: env[str(value)]

    return st.sampled_from([N, M, P, Q, U]).map(of) | st.integers(-5, 9).map(of)


def grown(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    def binary(name: str, a: Pair, b: Pair, k: int) -> Pair:
        (x, f), (y, g) = a, b
        operations: dict[str, Callable[[], Pair]] = {
            "+": lambda: (x + y, lambda e: f(e) + g(e)),
            "-": lambda: (x - y, lambda e: f(e) - g(e)),
            "*": lambda: (x * y, lambda e: f(e) * g(e)),
            "//": lambda: (x // k, lambda e: f(e) // k),
            "//m": lambda: (x // M, lambda e: f(e) // e["m"]),
            "%": lambda: (x % k, lambda e: f(e) % k),
            "min": lambda: (minimum(x, y), lambda e: min(f(e), g(e))),
            "max": lambda: (maximum(x, y, k), lambda e: max(f(e), g(e), k)),
            "<": lambda: (x < y, lambda e: int(f(e) < g(e))),
            "<=": lambda: (x <= y, lambda e: int(f(e) <= g(e))),
            "==": lambda: (compare("==", x, y), lambda e: int(f(e) == g(e))),
            "and": lambda: (logic("and", x < y, x < k), lambda e: int(f(e) < min(g(e), k))),
        }
        return operations[name]()

    names = ["+", "-", "*", "//", "//m", "%", "min", "max", "<", "<=", "==", "and"]
    return st.builds(binary, st.sampled_from(names), inner, inner, st.integers(1, 8))


PAIRS = st.recursive(leaf(), grown, max_leaves=7)


@settings(max_examples=300, deadline=None)
@given(PAIRS)
def test_simplification_keeps_every_value(pair: Pair) -> None:
    expr, reference = pair
    low, high = bounds(expr)
    for env in ALL:
        value = evaluate(expr, env)
        assert value == reference(env), (str(expr), env)
        assert low is None or low <= value
        assert high is None or value <= high


@settings(max_examples=600, deadline=None)
@given(PAIRS, PAIRS, st.sampled_from(["<", "<=", "==", "!="]))
def test_what_is_proved_holds(a: Pair, b: Pair, relation: str) -> None:
    condition = compare(relation, a[0], b[0])
    if proves(condition):
        for env in ALL:
            assert evaluate(condition, env), (str(condition), env)


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.integers(0, 6), st.integers(1, 4))
def test_substitution(pair: Pair, n: int, m: int) -> None:
    expr, reference = pair
    replaced = substitute(expr, {N: n, M: m})
    assert not symbols(replaced) & {N, M}
    for env in ALL:
        if env["n"] == n and env["m"] == m:
            assert evaluate(replaced, env) == reference(env)


def test_expressions_are_interned() -> None:
    assert (N + M) * 2 is M * 2 + 2 * N
    assert (N * 4 + 3) // 4 is as_expr(N)
    assert (N * 4 + M) // 4 is not as_expr(N)
    assert cdiv(N * 8, 8) is as_expr(N)
    assert (N % 1) is const(0)
    assert minimum(M, N + 5) is as_expr(M)
    assert minimum(N, N + 1) is as_expr(N)


def test_proofs_that_kernels_need() -> None:
    size, tile = symbol("size", "size", 0, 1 << 20), 64
    pid = symbol("pid", "grid", 0, cdiv(size, tile) - 1)
    assert proves(pid * tile < size)
    assert proves(pid * tile + (tile - 1) < size + tile)
    assert not proves(pid * tile + (tile - 1) < size)
    start = symbol("start", "index", 0, size)
    stop = symbol("stop", "index", start, size)
    step = symbol("step", "loop", 0, cdiv(stop - start, tile) - 1)
    assert proves(start + step * tile < stop)
    assert proves(start + step * tile < size)
    assert proves(compare("<=", minimum(pid * tile + tile, size), size))


def test_the_middle_digit_of_a_core_id_is_below_its_base() -> None:
    core = symbol("core", "grid", 0, 63)
    digit = core // 4 % 4
    assert proves(const(0) <= digit)
    assert proves(digit * 2 + 1 <= const(7))
    assert not proves(digit <= const(2))
    assert not proves(const(1) <= digit)


def test_named_errors() -> None:
    with pytest.raises(IRError, match="division by 0"):
        N // 0
    with pytest.raises(IRError, match="'m' has no value"):
        evaluate(N + M, {"n": 1})
    with pytest.raises(IRError, match="division by 0"):
        evaluate(as_expr(5) // symbol("z"), {"z": 0})


def test_range_counts_trips() -> None:
    for start, stop, step in itertools.product(range(-2, 5), range(-3, 9), (1, 2, 3)):
        found = Range(as_expr(start), as_expr(stop), step).trips
        assert found is const(len(range(start, stop, step)))


def test_what_a_minimum_shares_with_a_sum_counts_once() -> None:
    x, q = symbol("x", "loop", 0, 100), symbol("q", "loop", 0, 50)
    assert bounds(minimum(x, q + 1) - q) == (-50, 1)
    assert bounds(q - minimum(x, q + 1)) == (-1, 50)
    assert bounds(maximum(x, q) - q) == (0, 100)
    # A run of keys: the trips of a loop from part * each on.
    each = x // 16 + 1
    assert bounds(minimum(x + 1, each * 8) - each * 7)[1] == 7
