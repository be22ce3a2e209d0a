"""Rewriting keeps what a program computes, and does what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tile_builder import Body, Kernel
from tile_programs import Program, programs

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.core import Function, Op, Region, Value, infer, walk
from dure.ir.expr import Symbol, const
from dure.ir.interpret import run
from dure.ir.printer import print_function
from dure.ir.rewrite import (
    Rewritten,
    Scope,
    clone_function,
    eliminate_common_subexpressions,
    eliminate_dead_code,
    inline,
    rewrite,
)
from dure.ir.simplify import simplify
from dure.ir.verifier import verify

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def outputs(function: Function, program: Program) -> list[bytes]:
    arguments = program.arguments()
    run(function, arguments, seed=5)
    return [a.tobytes() for a in arguments if not isinstance(a, Blocks)]


@SLOW
@given(programs())
def test_simplification_keeps_every_bit(program: Program) -> None:
    before = outputs(program.function, program)
    for step in (
        eliminate_dead_code,
        eliminate_common_subexpressions,
        simplify,
        clone_function,
    ):
        function = step(program.function)
        verify(function)
        assert outputs(function, program) == before
    small, twice = simplify(program.function), simplify(simplify(program.function))
    assert print_function(small) == print_function(twice)


def names(function: Function) -> list[str]:
    return [op.name for op in walk(function.body)]


def started() -> tuple[Kernel, Value, Symbol, Value]:
    k = Kernel()
    n = k.size("n")
    x, y = k.tensor("x", (n,)), k.tensor("y", (n,), access="out")
    i = k.program_id(n)
    return k, y, i, k.load(x, (i,), (1,))


def test_patterns_reach_a_fixpoint_through_regions() -> None:
    k, y, i, tile = started()

    def body(inner: Body, step: Symbol, carried: Sequence[Value]) -> Sequence[Value]:
        first = inner.emit("reshape", carried[0], shape=(1, 1))
        second = inner.emit("transpose", first, order=(1, 0))
        third = inner.emit("transpose", second, order=(1, 0))
        flat = inner.emit("reshape", third, shape=(1,))
        return [inner.emit("neg", inner.emit("neg", flat))]

    (result,) = k.loop(3, [tile], body)
    same = k.choose(const(1), lambda b: [b.emit("abs", result)], lambda b: [result])[0]
    k.store(y, (i,), same)
    function = simplify(k.function())
    verify(function)
    assert names(function) == ["load", "for", "abs", "store"]


def test_common_subexpressions_and_what_they_may_not_share() -> None:
    k, y, i, tile = started()
    n = k.symbols[0]
    z = k.tensor("z", (n,), access="inout")
    table = k.index("table", (n,), 0, n - 1)
    x = k.params[0].value
    again = k.load(x, (i,), (1,))
    total = k.emit("add", k.emit("exp", tile), k.emit("exp", again))
    before = k.load(z, (i,), (1,))
    k.store(z, (i,), total)
    after = k.load(z, (i,), (1,))
    one, other = k.index_load(table, (i,), "one"), k.index_load(table, (i,), "other")
    view = k.emit("view", x, axis=0, start=const(0), stop=other + 1)
    both = k.emit("add", before, after)
    both = k.emit("add", both, k.load(view, (one,), (1,)))
    both = k.emit("add", both, k.load(view, (other,), (1,)))
    k.emit("full", shape=(1,), value=0.0, dtype=dtypes.float32)
    k.store(y, (i,), both)
    function = eliminate_dead_code(eliminate_common_subexpressions(k.function()))
    verify(function)
    assert names(function).count("exp") == 1
    assert names(function).count("index_load") == 1
    assert names(function).count("load") == 4
    assert "full" not in names(function)
    values = [np.arange(4, dtype=np.float32), np.zeros(4, np.float32)]
    values += [np.ones(4, np.float32), np.array([3, 1, 2, 0], np.int32)]
    copies = [v.copy() for v in values]
    run(k.function(), values)
    run(function, copies)
    np.testing.assert_array_equal(values[1], copies[1])


def test_zeros_of_different_sign_are_not_the_same() -> None:
    k, y, i, tile = started()
    plus, minus = (k.full((1,), zero, dtypes.float32) for zero in (0.0, -0.0))
    k.store(y, (i,), k.emit("add", tile, k.emit("min", plus, minus)))
    assert names(eliminate_common_subexpressions(k.function())).count("full") == 2


def test_rewrites_that_never_rest_or_change_types_are_named() -> None:
    k, y, i, tile = started()
    k.store(y, (i,), k.emit("neg", tile))

    def spin(op: Op, scope: Scope) -> Rewritten:
        new = infer("neg", op.operands)
        return Rewritten((new,), new.results)

    def wrong(op: Op, scope: Scope) -> Rewritten:
        new = infer("cast", op.operands, {"dtype": dtypes.int32})
        return Rewritten((new,), new.results)

    with pytest.raises(IRError, match="never come to rest: spin"):
        rewrite(k.function(), [("neg", spin)])
    with pytest.raises(IRError, match="a rewrite of neg that gives"):
        rewrite(k.function(), [("neg", wrong)])


def test_inlining() -> None:
    inner = Kernel("inner")
    m = inner.size("m")
    a = inner.tensor("a", (m,))
    b = inner.tensor("b", (m,), access="out")
    j = inner.program_id(m)

    def body(region: Body, step: Symbol, carried: Sequence[Value]) -> Sequence[Value]:
        return [region.emit("add", carried[0], region.load(a, (step,), (1,)))]

    zero = inner.full((1,), 0.0, dtypes.float32)
    inner.store(b, (j,), inner.loop(j + 1, [zero], body)[0])

    k = Kernel("outer")
    n = k.size("n")
    x, y = k.tensor("x", (n,)), k.tensor("y", (n,), access="out")
    i = k.program_id(n)
    for turn in range(1):
        made = inline(inner.function(), [x, y], {m: n, j: i}, prefix=f"t{turn}_")
        k.ops.extend(made.ops)
    function = k.function()
    verify(function)
    result = np.zeros(5, np.float32)
    run(function, [np.arange(5, dtype=np.float32), result])
    np.testing.assert_array_equal(result, [0, 1, 3, 6, 10])
    with pytest.raises(IRError, match="inlined on 1 arguments"):
        inline(inner.function(), [x])


def test_unchanged_programs_are_shared() -> None:
    k, y, i, tile = started()
    k.store(y, (i,), tile)
    function = k.function()
    assert simplify(function) is function
    other = replace(function, body=Region((), function.body.ops))
    assert eliminate_dead_code(other) is other
