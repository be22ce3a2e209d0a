"""Every case of the suite on every chip: it compiles, verifies, is proved, and is right."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.compiler.chip.allocate import ScratchpadError
from dure.compiler.chip.pipeline import compile_for
from dure.ir.core import Function
from dure.ir.verifier import verify
from dure.library.build import index_values, tile_function
from dure.library.call import KernelCall
from dure.library.matrix import check_values
from dure.library.suite import CASES, Case
from dure.library.suite import case as case_of
from dure.machine.chip import Chip
from dure.sim.sanitizer import sanitize
from dure.sim.timing import simulate
from dure.targets import chip, chip_names

CHIPS = {name: chip(name) for name in chip_names()}


@functools.cache
def first(name: str) -> tuple[KernelCall, Function]:
    """The first size of a case, the same for all chips."""
    case = case_of(name)
    call = case.call(case.drawn(case.sizes[0]))
    return call, tile_function(call)


def check(case: Case, target: Chip, size: tuple[int, ...]) -> None:
    """Compile, verify, prove, time and run one size."""
    if size == case.sizes[0] and case == case_of(case.name):
        call, function = first(case.name)
    else:
        call = case.call(case.drawn(size))
        function = tile_function(call)
    compiled = compile_for(function, target)
    verify(compiled.function)
    verdict = sanitize(compiled.function, target)
    assert verdict.ok, verdict.render()
    assert simulate(compiled.function, target, indices=index_values(call, compiled.function)).ps > 0
    check_values(case, target, size, compiled)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("name", CHIPS)
def test_the_first_size(name: str, case: Case) -> None:
    check(case, CHIPS[name], case.sizes[0])


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("name", CHIPS)
def test_the_other_sizes(name: str, case: Case) -> None:
    for size in case.sizes[1:]:
        check(case, CHIPS[name], size)


def extents(most: int) -> st.SearchStrategy[int]:
    """Extents, tiny and odd ones above all."""
    return st.one_of(st.integers(1, 9), st.integers(1, most))


def tiled(case: Case, *names: str) -> st.SearchStrategy[Case]:
    """The case with other tile sizes."""
    sizes = st.fixed_dictionaries({name: st.sampled_from([8, 16, 32, 64]) for name in names})
    return sizes.map(lambda tiles: replace(case, tiles={**case.tiles, **tiles}))


def check_where_it_fits(case: Case, target: Chip, size: tuple[int, ...]) -> None:
    try:
        check(case, target, size)
    except ScratchpadError as error:
        assert error.needed > error.size


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    st.sampled_from(["f32", "f16", "bf16", "fp8", "int8"]).flatmap(
        lambda dtype: tiled(case_of(f"matmul {dtype}"), "bm", "bn", "bk")
    ),
    st.sampled_from(sorted(CHIPS)),
    st.tuples(extents(90), extents(200), extents(90)),
)
def test_matmul_of_any_shape(case: Case, name: str, size: tuple[int, ...]) -> None:
    check_where_it_fits(case, CHIPS[name], size)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    st.sampled_from(["f32", "bf16"]).flatmap(
        lambda dtype: tiled(case_of(f"softmax {dtype}"), "bm", "bd")
    ),
    st.sampled_from(sorted(CHIPS)),
    st.tuples(extents(40), extents(200)),
)
def test_softmax_of_any_shape(case: Case, name: str, size: tuple[int, ...]) -> None:
    check_where_it_fits(case, CHIPS[name], size)


@st.composite
def attention_sizes(draw: st.DrawFn) -> tuple[int, ...]:
    """``(Hq, Hkv, Sq, Skv, D)``: the last Sq of Skv positions."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    length = draw(extents(70))
    queries = draw(st.integers(1, length))
    return kv_heads * group, kv_heads, queries, length, draw(st.integers(1, 40))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(["", "window ", "softcap "]).flatmap(
        lambda kind: tiled(case_of(f"causal prefill attention {kind}f32"), "bq", "bk")
    ),
    st.sampled_from(sorted(CHIPS)),
    attention_sizes(),
)
def test_attention_of_any_shape(case: Case, name: str, size: tuple[int, ...]) -> None:
    check_where_it_fits(case, CHIPS[name], size)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    st.sampled_from(["f32", "f16", "bf16"]),
    st.sampled_from(sorted(CHIPS)),
    attention_sizes(),
    st.integers(1, 3),
)
def test_paged_attention_of_any_shape(
    dtype: str, name: str, size: tuple[int, ...], sequences: int
) -> None:
    heads, kv_heads, _, length, d = size
    case = case_of(f"paged decode attention {dtype}")
    check_where_it_fits(case, CHIPS[name], (heads, kv_heads, 1, length, d, sequences))
