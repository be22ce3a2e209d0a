"""Watched passes: dumps, checks, and the pass that is to blame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tile_builder import Kernel
from tile_programs import Program, programs

from dure.errors import IRError
from dure.ir import dtypes
from dure.ir.blocks import Blocks
from dure.ir.core import Function, Op, Region, Value, infer
from dure.ir.expr import cdiv
from dure.ir.parser import parse_function
from dure.ir.passes import Pass, allowed_error, difference, run_passes
from dure.ir.printer import print_function
from dure.ir.rewrite import Rewritten, Scope, clone_function, eliminate_dead_code, rewrite
from dure.ir.samples import copied, draw
from dure.ir.simplify import simplify
from dure.ir.verifier import verify

CLEAN = [Pass("simplify", simplify), Pass("dead code", eliminate_dead_code)]


def kernel(transcendental: bool = False) -> Function:
    k = Kernel("scale")
    n = k.size("n")
    x, y = k.tensor("x", (n,)), k.tensor("y", (n,), access="out")
    i = k.program_id(cdiv(n, 4))
    tile = k.load(x, (i,), (4,))
    tile = k.emit("add", tile, tile)
    k.store(y, (i,), k.emit("exp", tile) if transcendental else k.emit("neg", tile))
    return k.function()


def subtract(op: Op, scope: Scope) -> Rewritten:
    new = infer("sub", op.operands)
    return Rewritten((new,), new.results)


def wrong(function: Function) -> Function:
    return rewrite(function, [("add", subtract)])


def unsorted(function: Function) -> Function:
    return function.with_body(Region((), tuple(reversed(function.body.ops))))


def test_the_first_pass_that_changed_a_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [*CLEAN, Pass("break it", wrong), Pass("and on", clone_function)]
    run_passes(kernel(), passes)
    monkeypatch.setenv("DURE_CHECK", "1")
    with pytest.raises(IRError, match="pass 'break it' changed result 0 of program 'scale'"):
        run_passes(kernel(), passes)
    with pytest.raises(IRError, match=r"after 'shuffle': .*isn't defined before"):
        run_passes(kernel(), [Pass("shuffle", unsorted)])
    with pytest.raises(IRError, match="after 'input'"):
        run_passes(unsorted(kernel()), CLEAN)

    def forgetful(function: Function) -> Function:
        return replace(function, params=function.params[:1], body=Region((), ()))

    with pytest.raises(IRError, match=r"after pass 'forget'|of 1"):
        run_passes(kernel(), [Pass("forget", forgetful)])


def test_every_program_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURE_DUMP", str(tmp_path / "dumps"))
    function = run_passes(kernel(), CLEAN)
    written = sorted((tmp_path / "dumps").iterdir())
    assert [p.name for p in written] == [
        "scale.00.input.txt",
        "scale.01.simplify.txt",
        "scale.02.dead-code.txt",
    ]
    last = parse_function(written[-1].read_text(encoding="utf-8"))
    assert print_function(last) == print_function(function)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DURE_DUMP", str(tmp_path / "file" / "below"))
    with pytest.raises(IRError, match="cannot be written"):
        run_passes(kernel(), CLEAN)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_simplification_passes_its_own_check(program: Program) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DURE_CHECK", "1")
        verify(run_passes(program.function, CLEAN))


def test_results_are_compared_bit_by_bit_where_every_op_is_exact() -> None:
    assert allowed_error(kernel()) == 0
    assert 0 < allowed_error(kernel(transcendental=True)) < 1e-4
    one = np.array([1.0, np.nan, np.inf, 0.0], np.float32)
    assert difference(one, one.copy(), 0) == ""
    assert "1 of 4 elements" in difference(one, np.array([1, np.nan, np.inf, -0.0], np.float32), 0)
    near = np.nextafter(one, np.float32(9))
    assert "at (0,)" in difference(one[:1], near[:1], 0)
    assert difference(one[:1], near[:1], 1e-6) == ""
    assert difference(one, np.where(np.isinf(one), 0, one).astype(np.float32), 1e-3)
    assert difference(one, one.astype(np.float64), 0)
    assert difference(np.array([3]), np.array([4]), 0.25)


def test_samples_obey_bounds_and_ranges() -> None:
    k = Kernel()
    n, m = k.size("n"), k.size("m", 5)
    k.index("i", (n, m), -1, m)
    k.index("u", (m,), 2, n + 9, unique=True)
    k.tensor("w", (n, 64), dtypes.q5_1, quantized_axis=1)
    k.tensor("a", (m, 32), dtypes.int8_block32, quantized_axis=1)
    function = k.function()
    for seed in range(20):
        sample = draw(function, seed)
        i, u, w, a = sample.arguments
        assert isinstance(i, np.ndarray)
        assert isinstance(u, np.ndarray)
        assert isinstance(w, Blocks)
        assert isinstance(a, Blocks)
        assert sample.sizes["m"] <= 5
        assert i.min(initial=0) >= -1
        assert i.max(initial=0) <= sample.sizes["m"]
        assert len(np.unique(u)) == u.size
        assert np.all(np.isfinite(w.decode()))
        sums = a.codes().reshape(-1, 2, 16).sum(-1)
        np.testing.assert_array_equal(a.planes["sum"].astype(np.int64), sums)
        again = copied(w)
        assert isinstance(again, Blocks)
        assert again.planes["d"] is not w.planes["d"]


def test_programs_that_no_sample_fits_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    k = Kernel("narrow")
    n = k.size("n")
    ends = k.index("ends", (2,), 0, n)
    y = k.tensor("y", (n + 1,), access="out")
    one = k.index_load(ends, (0,), "one")
    other = k.index_load(ends, (1,), "other")
    view = k.emit("view", y, axis=0, start=other + 1, stop=one)
    k.store(view, (0,), k.full((1,), 1.0, dtypes.float32))
    monkeypatch.setenv("DURE_CHECK", "1")

    def never(function: Function, seed: int) -> None:
        raise IRError("no such arguments")

    with pytest.warns(UserWarning, match="narrow runs on no generated arguments"):
        run_passes(k.function(), CLEAN, sampler=never)


def test_values_stay_apart() -> None:
    function = kernel()
    other = clone_function(function)
    assert print_function(other) == print_function(function)
    assert not {p.value for p in other.params} & {p.value for p in function.params}
    assert isinstance(other.params[0].value, Value)
