"""Groups of devices: arrangements, routes and what a link carries."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure import targets
from dure.errors import TargetError
from dure.machine.group import Group, group_of

CHIPS = [name for name in targets.chip_names() if targets.chip(name).links]
COUNTS = (2, 3, 4, 8, 12, 16, 32)


def test_every_chip_has_links() -> None:
    assert len(CHIPS) == 8


@pytest.mark.parametrize("name", CHIPS)
@settings(deadline=None, max_examples=20)
@given(count=st.sampled_from(COUNTS), data=st.data())
def test_relations_are_differences_of_places(name: str, count: int, data: st.DataObject) -> None:
    group = group_of(targets.chip(name), count)
    a, b = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    relation = group.relation(a, b)
    assert group.other(a, relation) == b
    assert (relation == 0) == (a == b)
    assert group.hops(relation) == group.hops(group.relation(b, a))
    whole = sum(group.route(a, relation).values())
    assert whole == (group.hops(relation) if group.link.topology.startswith(("ring", "torus"))
                     else 2 * (a != b))  # fmt: skip


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("count", COUNTS)
def test_every_device_sees_the_same(name: str, count: int) -> None:
    """All to all loads all ways of all devices alike."""
    group = group_of(targets.chip(name), count)
    load: Counter[tuple[str, int]] = Counter()
    for device in range(count):
        for relation in range(count):
            for way, part in group.route(device, relation).items():
                load[way] += part  # type: ignore[assignment]
    for way in {way for way, _ in load}:
        assert len({load[way, device] for device in range(count)}) == 1


def test_a_torus_is_as_square_as_it_can_be() -> None:
    chip = targets.chip("tpu-v6e")
    shapes = {n: group_of(chip, n).shape for n in (2, 3, 4, 8, 16, 32)}
    assert shapes == {
        2: (1, 1, 2),
        3: (1, 1, 3),
        4: (1, 2, 2),
        8: (1, 2, 4),
        16: (1, 4, 4),
        32: (1, 4, 8),
    }


def test_the_widest_link_is_taken() -> None:
    group = group_of(targets.chip("trainium2"), 16)
    assert group.name == "neuronlink"
    assert group.capacity == 128e9
    assert max(map(group.hops, range(16))) == group.farthest == 4


def test_both_ways_round_a_ring_where_they_are_as_long() -> None:
    chip = targets.chip("trainium2")
    ring = Group(chip, 4, "neuronlink_z", (1, 1, 4))
    half = Fraction(1, 2)
    assert ring.route(0, 2) == {("+z", 0): half, ("+z", 1): half, ("-z", 0): half, ("-z", 3): half}
    assert ring.route(0, 3) == {("-z", 0): 1}


def test_a_topology_that_is_not_known() -> None:
    chip = targets.chip("rngd")
    link = chip.links["pcie"].model_copy(update={"topology": "hypercube"})
    odd = chip.model_copy(update={"links": {"pcie": link}})
    with pytest.raises(TargetError, match="hypercube"):
        group_of(odd, 2)
