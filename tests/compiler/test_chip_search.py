"""The space of the tile search, the replay of a ring, and what the search makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.compiler.chip import search
from dure.compiler.chip.estimate import estimate
from dure.compiler.chip.lower import lower
from dure.compiler.chip.partition import Partition
from dure.compiler.chip.pipeline import Options, compile_for, prepare
from dure.compiler.chip.ring import Ring
from dure.compiler.chip.search import choose
from dure.compiler.chip.sizes import tiled_by
from dure.compiler.chip.space import Point, Space
from dure.compiler.chip.stages import choose_stages
from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.core import Function
from dure.ir.types import TensorType, shape_of
from dure.library.build import build
from dure.library.call import index_tensor, tensor
from dure.library.matmul import matmul_kn
from dure.library.moe import grouped_matmul
from dure.library.operators import operator
from dure.sim.cost import Costs
from dure.targets import chip, chip_names

NAMES = ("bm", "bn", "bk")


def product(m: int, k: int, n: int, consts: dict[str, int]) -> Function:
    types = [TensorType(shape_of(*s), dtypes.bfloat16) for s in ((m, k), (k, n), (m, n))]
    return matmul_kn.specialize(types, consts)


def space(m: int, k: int, n: int, name: str = "trainium2") -> Space:
    return Space(lambda consts: product(m, k, n, dict(consts)), NAMES, chip(name))


def test_what_a_size_tiles() -> None:
    single = {"bm": 32, "bn": 32, "bk": 32}
    for name, axis, largest in (("bm", 0, 100), ("bn", 1, 700), ("bk", None, 300)):
        found = tiled_by(
            product(100, 300, 700, single), product(100, 300, 700, {**single, name: 64}), 32
        )
        assert (found.axis, found.largest) == (axis, largest)


def test_sizes_stop_at_the_tensor() -> None:
    points = space(3, 300, 700).starts()
    assert [p.tiles for p in points] == [(3, 32, 32), (3, 128, 128), (3, 512, 300)]
    grow = space(3, 300, 700).resized({1: 1})
    assert grow(Point((3, 512, 300))) == Point((3, 700, 300))
    assert grow(Point((3, 700, 300))) is None


@pytest.mark.parametrize(
    ("n", "before", "after"),
    [(28672, 4096, 3584), (11008, 4096, 1376), (8192, 1024, None), (1536 * 8, 512, 1536)],
)
def test_sizes_that_give_every_core_as_much(n: int, before: int, after: int | None) -> None:
    moved = space(1, 256, n).evened(1)(Point((1, before, 128)))
    assert (None if moved is None else moved.tiles[1]) == after


def test_a_row_is_no_larger_than_it_is() -> None:
    """A tile of more rows than there are would be cleared first."""
    found = choose(lambda c: product(1, 512, 4096, dict(c)), NAMES, chip("rngd"))
    assert found.consts["bm"] == 1


@pytest.mark.parametrize("sizes", [(1, 256, 256), (300, 100, 128), (16, 64, 8), (2048, 64, 24)])
@pytest.mark.parametrize("name", ["trainium2", "rngd"])
def test_what_is_left_over_are_programs(name: str, sizes: tuple[int, int, int]) -> None:
    """A split that a grid doesn't have is none of them."""
    found = choose(lambda c: product(*sizes, dict(c)), NAMES, chip(name))
    for other in found.others:
        assert other.compiled.function.body.ops


@pytest.mark.parametrize("name", chip_names())
def test_what_is_chosen_is_what_its_options_compile_to(name: str) -> None:
    """The search schedules copies of programs that it lowers once for many points."""
    found = choose(lambda c: product(64, 512, 384, dict(c)), NAMES, chip(name))
    again = compile_for(product(64, 512, 384, found.consts), chip(name), found.compiled.options)
    assert found.compiled.text == again.text
    for other in islice(found.others, 2):
        function = product(64, 512, 384, other.consts)
        again = compile_for(function, chip(name), other.compiled.options)
        assert other.compiled.text == again.text


def test_nothing_shorter_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long programs are timed where there are no others, and refused beyond the most."""
    monkeypatch.setattr(search, "_LONGEST", 1)
    found = choose(lambda c: product(64, 64, 64, dict(c)), NAMES, chip("mtia-v2"))
    assert found.simulated == 1
    monkeypatch.setattr(search, "_MOST", 1)
    with pytest.raises(KernelError, match="would execute"):
        choose(lambda c: product(64, 64, 64, dict(c)), NAMES, chip("mtia-v2"))


times = st.integers(0, 1000).map(float)


@settings(max_examples=300, deadline=None)
@given(
    slots=st.integers(1, 6),
    turns=st.integers(1, 200),
    turn=times,
    issue=times,
    latency=times,
    flow=times,
    more=times,
    serial=st.booleans(),
    outstanding=st.integers(1, 8),
)
def test_a_ring_takes_what_its_parts_need(
    slots: int,
    turns: int,
    turn: float,
    issue: float,
    latency: float,
    flow: float,
    more: float,
    serial: bool,
    outstanding: int,
) -> None:
    ring = Ring(slots, turn, issue, latency, flow, flow + more, serial, outstanding)
    found = ring.time(turns)
    once = issue + latency + flow + more + turn
    assert found >= once - 1e-6
    assert found >= turns * max(turn, issue, flow) - 1e-6
    # Transfers that share the bandwidth end together: up to a ring of them has begun too much.
    assert found <= (turns + (0 if serial else slots)) * once + 1e-6
    if slots == 1:
        assert found == pytest.approx(turns * once)


def test_a_ring_by_hand() -> None:
    """Two slots, transfers of 10 behind a latency of 5, turns of 4: the second transfer flows
    while the first is computed on, and each slot comes back after 5 + 10 + 4.
    """
    ring = Ring(2, turn=4, issue=0, latency=5, flow=10, alone=10, serial=True, outstanding=8)
    # Arrivals 15, 25, 35 (issued at 19, flows from 25), 45, ...; each is computed on for 4.
    assert ring.time(4) == 49


@pytest.mark.parametrize("name", chip_names())
@pytest.mark.parametrize("dims", ["1x2048x4000", "37x1000x1100", "300x700x500"])
def test_no_less_is_moved_than_there_is(name: str, dims: str) -> None:
    """Tiles that hang over an edge, and cores with fewer of them, don't make traffic cheaper."""
    what = operator("gemm", dims, "bf16")
    made = build(what.calls[0], chip(name))
    assert made.timing.bytes >= 0.995 * what.bytes


def test_the_core_with_most_of_what_index_arguments_say_counts() -> None:
    """Two experts with tokens on two cores, or both on one."""
    target = chip("rngd")
    x, w, y = (tensor(dtypes.bfloat16, *s) for s in ((4, 64), (8, 64, 32), (4, 32)))
    ends = index_tensor(np.zeros(8, np.int32), 0, 4)
    sizes = {"bm": 2, "bn": 32, "bk": 32}
    function = grouped_matmul.specialize([x, w, ends, ends, None, y], sizes)
    prepared = prepare(function, target, Partition((2, 1), (0, 1)), Options())
    tree = lower(prepared.function, target)
    choose_stages(tree, target, 2)

    def busy(*tokens: int) -> float:
        given = np.array(tokens, np.int32)
        indices = {"starts": np.cumsum(given) - given, "stops": np.cumsum(given)}
        return estimate(tree, prepared.function, target, Costs(target), indices).work

    apart, together = busy(2, 0, 0, 0, 2, 0, 0, 0), busy(2, 2, 0, 0, 0, 0, 0, 0)
    assert together == pytest.approx(busy(0, 0, 0, 0, 0, 0, 2, 2))
    assert together > 1.5 * apart


def test_a_search_goes_on_from_where_no_start_compiles() -> None:
    """Sizes that fit are found one by one, and the walk goes on from the first."""

    def specialize(consts: Mapping[str, int]) -> Function:
        if consts["bm"] > 8 or consts["bk"] < 64:
            raise KernelError("no tiles of this size", rule="few rows, deep tiles", fix="others")
        return product(256, 1024, 2048, dict(consts))

    found = choose(specialize, NAMES, chip("trainium2"))
    assert found.consts["bm"] == 8 and found.consts["bn"] >= 128
