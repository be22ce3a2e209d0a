"""What was found for a kernel with other consts is only tried: the result is that of two walks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

import dure
import dure.lang as dl
from dure.ir.dtypes import float32, int32
from dure.ir.printer import print_function
from dure.ir.types import TensorType
from dure.lang.frontend import guesses
from dure.lang.kernel import Kernel


@dure.kernel
def scaled(x: dl.Tensor, y: dl.Tensor, bm: dl.const, bn: dl.const, turned: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    if turned:
        dl.store(y, (j, i), dl.load(x, (j, i), (bm, bn)))
    else:
        dl.store(y, (i, j), dl.load(x, (i, j), (bm, bn)))


@dure.kernel
def picked(x: dl.Tensor, rows: dl.Index, y: dl.Tensor, bm: dl.const, bn: dl.const):
    i, j = dl.program_id(0), dl.program_id(1)
    dl.store(y, (i, j), dl.load(x, (dl.load(rows, (i,), (bm,)), j), (bm, bn)))


def _fresh(kernel: Kernel, types: list[TensorType], consts: dict[str, object]) -> str:
    guesses._KNOWN.clear()
    return print_function(kernel.specialize(types, consts))


SIZES = st.sampled_from([1, 2, 4, 8, 16])


@given(st.lists(st.tuples(SIZES, SIZES, st.booleans()), min_size=2, max_size=6))
@settings(deadline=None, max_examples=30)
def test_any_order_of_consts_gives_the_same(drawn: list[tuple[int, int, bool]]) -> None:
    types = [TensorType((33, 40), float32)] * 2
    every = [{"bm": m, "bn": n, "turned": turned} for m, n, turned in drawn]
    alone = [_fresh(scaled, types, consts) for consts in every]
    guesses._KNOWN.clear()
    assert [print_function(scaled.specialize(types, c)) for c in every] == alone


@given(st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=4))
@settings(deadline=None, max_examples=20)
def test_ranges_of_index_arguments_are_guessed_too(drawn: list[tuple[int, int]]) -> None:
    types = [TensorType((9, 40), float32), TensorType((16,), int32), TensorType((16, 40), float32)]
    every = [{"bm": m, "bn": n} for m, n in drawn]
    alone = [_fresh(picked, types, consts) for consts in every]
    guesses._KNOWN.clear()
    assert [print_function(picked.specialize(types, c)) for c in every] == alone
