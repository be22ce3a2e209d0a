"""The verifier: random kernels pass, and each rule's breach is named at the author's line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tile_builder import Body, Kernel
from tile_programs import Program, programs

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.core import Function, Op, Region, Span, Value, infer
from dure.ir.expr import Expr, Symbol, cdiv, const, maximum, minimum, symbol
from dure.ir.interpret import run
from dure.ir.types import TileType
from dure.ir.verifier import verify

SPAN = Span("author.py", 7, 4, 20, "    dl.store(c, (i, j), acc)")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_random_programs_are_valid(program: Program) -> None:
    verify(program.function)


def kernel() -> tuple[Kernel, Value, Value, Symbol]:
    """x (n) read, y (n) stored, by instances of 4."""
    k = Kernel()
    n = k.size("n")
    x, y = k.tensor("x", (n,)), k.tensor("y", (n,), access="out")
    i = k.program_id(cdiv(n, 4))
    k.span = SPAN
    return k, x, y, i


def rejected(function: Function, match: str) -> None:
    with pytest.raises(IRError, match=match) as raised:
        verify(function)
    assert raised.value.rule


def test_values_are_defined_before_use_and_once() -> None:
    k, x, y, i = kernel()
    tile = k.load(x, (i,), (4,))
    k.store(y, (i,), tile)
    good = k.function()
    verify(good)
    load, store = good.body.ops
    rejected(good.with_body(Region((), (store, load))), "isn't defined before")
    rejected(good.with_body(Region((), (load, load, store))), "defined twice")
    stranger = Value(TileType((4,), dtypes.float32))
    other = replace(store, operands=(y, stranger))
    rejected(good.with_body(Region((), (load, other))), "isn't defined before")


def test_values_of_a_region_stay_inside() -> None:
    k, x, y, i = kernel()
    inside: list[Value] = []

    def body(inner: Body, step: Symbol, carried: Sequence[Value]) -> Sequence[Value]:
        inside.append(inner.emit("neg", carried[0]))
        return [inside[0]]

    k.loop(3, [k.load(x, (i,), (4,))], body)
    k.store(y, (i,), inside[0])
    rejected(k.function(), "is defined in another region")


def test_types_are_checked_again() -> None:
    k, x, y, i = kernel()
    tile = k.load(x, (i,), (4,))
    negative = infer("neg", [tile])
    wrong = replace(negative, results=(Value(TileType((8,), dtypes.float32)),))
    k.ops.append(wrong)
    k.store(y, (i,), tile)
    rejected(k.function(), "neg gives tile<4 x float32> and is declared to give tile<8")
    k.ops[1] = replace(negative, operands=())
    rejected(k.function(), "neg takes 1 operands")
    k.ops[1] = Op("reshape", (tile,), (Value(tile.type),), {})
    rejected(k.function(), "malformed reshape: KeyError: 'shape'")
    k.ops[1] = Op("nag", (tile,), (Value(tile.type),))
    rejected(k.function(), "unknown op 'nag'")


def test_symbols_are_in_scope_and_mean_one_thing() -> None:
    k, x, y, i = kernel()
    tile = k.load(x, (symbol("elsewhere"),), (4,))
    k.store(y, (i,), tile)
    rejected(k.function(), "'elsewhere' of .* is not in scope")

    k, x, y, i = kernel()
    k.loop(3, [], lambda inner, step, carried: [], name="n")
    rejected(k.function(), "declared inside the scope of another 'n'")

    k, x, y, i = kernel()
    lying = symbol("k", "loop", 0, 1)
    region = Region((), (), (), (lying,))
    k.add("for", [], {"start": const(0), "stop": const(3)}, [region])
    rejected(k.function(), r"'k' is declared in \[0, 1\] and takes values in \[0, 2\]")


def test_errors_show_the_authors_line() -> None:
    k, x, _, i = kernel()
    k.store(x, (i,), k.full((4,), 1.0, dtypes.float32))
    with pytest.raises(IRError, match=r"store into 'x', which is only read") as raised:
        verify(k.function())
    assert "author.py:7" in str(raised.value)
    assert "dl.store(c, (i, j), acc)" in str(raised.value)


def test_outputs() -> None:
    k, x, y, i = kernel()
    k.store(y, (i,), k.load(y, (i,), (4,)))
    rejected(k.function(), "'y' is read before it is written")
    k, x, y, i = kernel()
    k.load(x, (i,), (4,))
    rejected(k.function(), "'y' is an output and is never stored")


def test_tiles_wholly_outside() -> None:
    k, x, y, i = kernel()
    k.store(y, (i,), k.load(x, (-1 - i,), (4,)))
    rejected(k.function(), "wholly before its first element")
    k, x, y, i = kernel()
    fixed = k.tensor("fixed", (8,))
    k.store(y, (i,), k.load(fixed, (i + 2,), (4,)))
    rejected(k.function(), "wholly beyond its 8 elements")


def test_a_loop_that_takes_no_turn_may_hold_any_index() -> None:
    """Generated loops are empty for some constants: nothing in them is ever reached."""
    k, x, y, i = kernel()

    def body(region: Body, step: Symbol, carried: Sequence[Value]) -> Sequence[Value]:
        return [region.emit("add", carried[0], region.load(x, (step,), (4,)))]

    zero = k.full((4,), 0.0, dtypes.float32)
    k.store(y, (i,), k.loop(minimum(0, k.symbols[0]), [zero], body)[0])
    verify(k.function())


def test_computed_indices() -> None:
    k, x, y, i = kernel()
    n = k.symbols[0]
    ids = k.index("ids", (n,), 0, n - 1)
    listed = k.load(ids, (i,), (4,), fill=-1)
    doubled = k.emit("add", listed, listed)
    k.store(y, (i,), k.load(x, (doubled,), (4,)))
    rejected(k.function(), "an index list of 'x' that was computed")


def test_a_list_cut_at_the_edge_must_be_absent_there() -> None:
    def build(fill: float) -> Function:
        k, x, y, i = kernel()
        n = k.symbols[0]
        ids = k.index("ids", (n,), 0, n - 1, unique=True)
        k.store(y, (k.load(ids, (i,), (4,), fill=fill),), k.load(x, (i,), (4,)))
        return k.function()

    rejected(build(0), "load the list with fill=-1|may be cut at an edge")
    verify(build(-1))


def test_views_and_scalar_reads_leave_obligations() -> None:
    k, x, y, i = kernel()
    n = k.symbols[0]
    ends = k.index("ends", (n,), 0, n)
    end = k.index_load(ends, (i,), "end")
    part = k.emit("view", x, axis=0, start=const(0), stop=end)
    k.store(y, (i,), k.load(part, (i,), (4,)))
    assert verify(k.function()) == ()

    far = k.emit("view", x, axis=0, start=const(0), stop=end * 2)
    k.load(far, (0,), (4,))
    (obligation,) = verify(k.function())
    assert "view 0:end*2" in obligation.what
    assert obligation.span == SPAN

    k.emit("view", x, axis=0, start=const(0), stop=n + 1)
    rejected(k.function(), r"view 0:n \+ 1 of axis 0")


Store = Callable[[Kernel, Value, Symbol, Symbol, Value], None]


def grid_2d(store: Store) -> Function:
    """A kernel on a (3, 4) grid that stores a (2, 2) tile into y (n, m)."""
    k = Kernel()
    n, m = k.size("n"), k.size("m")
    y = k.tensor("y", (n, m), access="inout")
    i, j = k.program_id(cdiv(n, 2)), k.program_id(cdiv(m, 2))
    store(k, y, i, j, k.full((2, 2), 1.0, dtypes.float32))
    return k.function()


Place = Callable[[Symbol, Symbol], Expr]


def stored(row: Place, column: Place) -> Store:
    def store(k: Kernel, y: Value, i: Symbol, j: Symbol, tile: Value) -> None:
        k.store(y, (row(i, j), column(i, j)), tile)

    return store


def in_condition(k: Kernel, y: Value, i: Symbol, j: Symbol, tile: Value) -> None:
    def then(inner: Body) -> Sequence[Value]:
        inner.store(y, (i, 0), tile)
        return []

    k.choose(j < 1, then, lambda inner: [])


def looped(k: Kernel, y: Value, i: Symbol, j: Symbol, tile: Value) -> None:
    def body(inner: Body, step: Symbol, carried: Sequence[Value]) -> Sequence[Value]:
        inner.store(y, (i, j * 3 + step), tile)
        return []

    k.loop(3, [], body)


def halves(k: Kernel, y: Value, i: Symbol, j: Symbol, tile: Value) -> None:
    for half in (0, 1):
        k.store(y, (i, j), tile, step=(2, 4), offset=(0, half * 2))


def in_place(k: Kernel, y: Value, i: Symbol, j: Symbol, tile: Value) -> None:
    k.store(y, (i, j), k.load(y, (i, j), (2, 2)))


def neighbour(k: Kernel, y: Value, i: Symbol, j: Symbol, tile: Value) -> None:
    k.store(y, (i, j), k.load(y, (i, j + 1), (2, 2)))


GOOD: list[Store] = [
    stored(lambda i, j: i, lambda i, j: j),
    stored(lambda i, j: -i + 7, lambda i, j: 3 * j + 1),
    stored(lambda i, j: const(0), lambda i, j: i * (j.high or const(0)) + i + j),
    stored(lambda i, j: i + j, lambda i, j: j),
    stored(lambda i, j: i // 2, lambda i, j: (i % 2) * ((j.high or const(0)) + 1) + j),
    in_condition,
    looped,
    halves,
    in_place,
    lambda k, y, i, j, tile: k.store(y, (0, 0), tile, "add"),
]
BAD: list[Store] = [
    stored(lambda i, j: i, lambda i, j: const(0)),
    stored(lambda i, j: j - j + 0, lambda i, j: j),
    stored(lambda i, j: i // 2, lambda i, j: j),
    stored(lambda i, j: i + j, lambda i, j: const(0)),
    stored(lambda i, j: i, lambda i, j: minimum(j, 3)),
    stored(lambda i, j: i, lambda i, j: maximum(j - 1, 0)),
    neighbour,
    lambda k, y, i, j, tile: k.store(y, (i, j), tile, step=(2, 1)),
    lambda k, y, i, j, tile: k.store(y, (i, j), tile, stride=(1, 2)),
]


@pytest.mark.parametrize("store", GOOD)
def test_independent_instances(store: Store) -> None:
    function = grid_2d(store)
    assert verify(function) == ()
    run(function, [np.zeros((6, 8), np.float32)], seed=0)


@pytest.mark.parametrize("store", BAD)
def test_instances_that_touch_one_another(store: Store) -> None:
    function = grid_2d(store)
    rejected(function, "may touch the same elements of 'y'")
    with pytest.raises(IRError, match="grid instance"):
        run(function, [np.zeros((6, 16), np.float32)])


INDICES = st.sampled_from(
    [
        lambda i, j: i,
        lambda i, j: j,
        lambda i, j: i * 2 + j,
        lambda i, j: i * 3 - j,
        lambda i, j: i + j * 3,
        lambda i, j: i // 2,
        lambda i, j: i % 2,
        lambda i, j: (i % 2) * 4 + j,
        lambda i, j: minimum(i, 1) * 4 + j,
        lambda i, j: const(1),
    ]
)


@settings(max_examples=150, deadline=None)
@given(INDICES, INDICES, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_what_is_proved_disjoint_never_collides(
    row: Callable[[Symbol, Symbol], Expr],
    column: Callable[[Symbol, Symbol], Expr],
    first: int,
    second: int,
    stride: int,
) -> None:
    k = Kernel()
    n = k.size("n")
    y = k.tensor("y", (n, n), access="out")
    i, j = k.program_id(3), k.program_id(4)
    tile = k.full((2, 2), 1.0, dtypes.float32)
    k.store(y, (row(i, j), column(i, j)), tile, step=(first, second), stride=(1, stride))
    function = k.function()
    try:
        verify(function)
    except IRError:
        return
    run(function, [np.zeros((64, 64), np.float32)], seed=1)


def through_lists(unique: bool, scalar: bool, low: int = 0) -> Function:
    k = Kernel()
    n, rows = k.size("n"), k.size("rows")
    slots = k.index("slots", (n,), low, rows - 1, unique)
    y = k.tensor("y", (rows, 2), access="inout")
    if scalar:
        i = k.program_id(n)
        at = k.index_load(slots, (i,), "at")
        k.store(y, (at, 0), k.full((1, 2), 1.0, dtypes.float32))
    else:
        i = k.program_id(cdiv(n, 4))
        listed = k.load(slots, (i,), (4,), fill=-1)
        k.store(y, (listed, 0), k.full((4, 2), 1.0, dtypes.float32))
    return k.function()


@pytest.mark.parametrize("scalar", [False, True])
def test_stores_through_index_arguments(scalar: bool) -> None:
    assert verify(through_lists(True, scalar)) == ()
    (obligation,) = verify(through_lists(False, scalar))
    assert "because of the values of index arguments" in obligation.what
    assert obligation.condition is None


def test_malformed_ops_and_types_are_named() -> None:
    k, x, y, i = kernel()
    tile = k.load(x, (i,), (4,))
    k.store(y, (i,), tile)
    good = k.function()
    full = Op("full", (), (Value(tile.type),), {"shape": (4,), "dtype": dtypes.float32})
    rejected(good.with_body(Region((), (full, *good.body.ops))), "malformed full: KeyError")
    loop = Op("for", (), (), {"step": 1}, (Region((), (), (), (symbol("k", "loop"),)),))
    rejected(good.with_body(Region((), (loop, *good.body.ops))), "malformed for: KeyError")
    k.tensor("short", (4, 40), dtypes.q8_0, quantized_axis=1)
    rejected(k.function(), "with a part of a block")
    k.params.pop()
    k.tensor("negative", (-1,))
    rejected(k.function(), "with a negative extent")


def test_attributes_print() -> None:
    k, x, y, i = kernel()
    k.store(y, (i,), k.load(x, (i,), (4,)))
    strange = replace(k.function(), attrs={"secret": object()})
    rejected(strange, "attribute 'secret' holds a object")
