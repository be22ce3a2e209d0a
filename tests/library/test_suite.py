"""The suite's cases: the kernels agree with their float64 references wherever they run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from library_runner import Execute, compile_and_run, interpret

import dure.lang as dl
import dure.library as library
from dure.ir.blocks import Blocks
from dure.ir.portable import check_portable
from dure.ir.samples import Sample
from dure.ir.types import static_extent
from dure.library.suite import CASES, ITEMS, Case
from dure.library.suite import case as case_of

#: What the suite must stand for.
REQUIRED = {
    *("matmul", "quantized weights", "int4 weights", "mxfp4 weights", "batched matmul"),
    *("gated FFN in one kernel", "rmsnorm", "layernorm", "softmax", "rope", "elementwise"),
    *("reductions", "embedding", "KV-cache write", "causal prefill attention"),
    *("paged decode attention", "argmax", "top-k", "MoE routing", "grouped matmul", "conv2d"),
    *("transpose", "cumulative sum", "encoder attention", "pinned matmul"),
}


def by_kernel() -> list[Case]:
    """One case of every kernel."""
    return list({case.kernel.__name__: case for case in reversed(CASES)}.values())


def names(cases: Iterable[Case]) -> list[str]:
    return [case.name for case in cases]


def check(execute: Execute, case: Case, size: tuple[int, ...], seed: int = 0) -> None:
    drawn = case.drawn(size, seed)
    found = drawn.copied()
    execute(case.kernel, found, updates=bool(case.updates), **drawn.consts, **case.tiles)
    assert case.error(drawn, found) <= 1, f"{case.name} of {size}"


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_the_interpreter_agrees_with_the_reference(case: Case) -> None:
    for size in case.sizes[:2]:
        check(interpret, case, size)


@pytest.mark.parametrize("case", by_kernel(), ids=names(by_kernel()))
def test_compiled_code_agrees_with_the_reference(case: Case) -> None:
    check(compile_and_run, case, case.sizes[1])


@pytest.mark.long
@pytest.mark.parametrize("execute", [interpret, compile_and_run])
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_every_size_agrees_with_the_reference(case: Case, execute: Execute) -> None:
    for size in case.sizes:
        check(execute, case, size, seed=1)


@pytest.mark.parametrize("case", by_kernel(), ids=names(by_kernel()))
def test_plain_python_agrees_with_the_reference(case: Case) -> None:
    drawn = case.drawn(case.sizes[1])
    found = drawn.copied()
    if any(isinstance(a, Blocks) for a in found):
        pytest.skip("a launch takes no block-quantized arrays")
    grid = tuple(static_extent(e) for e in case.call(drawn).specialize().grid)
    kernel = dl.interpret(case.kernel)
    (kernel[grid] if grid else kernel)(*found, **drawn.consts, **case.tiles)
    assert case.error(drawn, found) <= 1


@pytest.mark.parametrize("case", by_kernel(), ids=names(by_kernel()))
def test_every_kernel_is_portable(case: Case) -> None:
    drawn = case.drawn(case.sizes[1])

    def sampled(function: object, seed: int) -> Sample:
        return Sample(tuple(a for a in drawn.copied() if a is not None), {})

    assert check_portable(case.call(drawn).specialize(), sampler=sampled).live_tile_bytes > 0


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_the_full_size_is_an_operator_of_the_same_kernel(case: Case) -> None:
    operator = case.operator()
    assert operator.bytes > 0
    kernels = {call.kernel.__name__ for call in operator.calls}
    other = {"matmul int4", "gated int4", "matmul mxfp4", "gated mxfp4", "encoder attention"}
    other |= {"attention by columns", "attention by rows", "attention of runs", "sums of runs"}
    other |= {"rmsnorm of whole rows", "rope of whole heads"}
    if not any(case.name.startswith(name) for name in other):
        assert case.kernel.__name__ in kernels


def test_the_suite_is_whole() -> None:
    assert set(ITEMS) >= REQUIRED
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.kernel.__name__ for case in CASES} == set(library.__all__)
    for case in CASES:
        assert len(case.sizes) >= 2, case.name
        assert case_of(case.name) is case
        # Something is 1, and something is no power of two.
        assert any(set(size) & {1} for size in case.sizes), case.name
        assert any(extent & (extent - 1) for size in case.sizes for extent in size), case.name


def test_a_wrong_result_is_seen() -> None:
    case = case_of("matmul f32")
    drawn = case.drawn((3, 5, 7))
    found = drawn.copied()
    consts: dict[str, object] = {**drawn.consts, **case.tiles}
    interpret(case.kernel, found, updates=False, **consts)
    result = found[2]
    assert isinstance(result, np.ndarray)
    result[1, 2] += 0.01
    assert case.error(drawn, found) > 1
    result[1, 2] = np.nan
    assert case.error(drawn, found) == float("inf")
