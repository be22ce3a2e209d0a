"""A chip with its guesses at one end: which end is slow, and what stays."""

from __future__ import annotations

import pytest

from dure.machine.ends import at_end, pinned_guesses
from dure.models.attainable import attainable_fraction, ceiling
from dure.targets import chip, chip_names

CHIPS = chip_names()


@pytest.mark.parametrize("name", CHIPS)
def test_ends_are_chips_and_move_guesses_alone(name: str) -> None:
    usual = chip(name)
    pinned = pinned_guesses(usual)
    low, high = dict(at_end(usual, "low").quantities()), dict(at_end(usual, "high").quantities())
    for path, number in usual.quantities():
        if number.status != "guessed" or path in pinned:
            assert low[path] == number == high[path]
        else:
            assert {low[path].value, high[path].value} == {number.low, number.high}
            assert low[path].status == "guessed"


@pytest.mark.parametrize("name", CHIPS)
def test_the_slow_end_is_the_slow_one(name: str) -> None:
    usual = chip(name)
    low, high = dict(at_end(usual, "low").quantities()), dict(at_end(usual, "high").quantities())
    moved = [path for path in low if low[path].value != high[path].value]
    for path in moved:
        less, more = low[path].value or 0, high[path].value or 0
        last = path.rsplit(".", 1)[-1]
        if last in ("latency", "issue", "granule", "launch", "descriptor", "combine", "function"):
            assert less > more, path
        if last in ("bandwidth", "outstanding", "width", "size"):
            assert less < more, path


@pytest.mark.parametrize("name", CHIPS)
def test_a_part_of_the_way(name: str) -> None:
    usual = chip(name)
    assert at_end(usual, "low", 0.0) == usual
    low, half = (dict(at_end(usual, "low", part).quantities()) for part in (1.0, 0.5))
    for path, number in usual.quantities():
        found, value = half[path].value, number.value
        ends = (low[path].value, value)
        if ends[0] == ends[1]:
            assert found == value
            continue
        assert found is not None and value is not None and ends[0] is not None
        assert min(ends[0], value) <= found <= max(ends[0], value)
        if all(float(n or 0).is_integer() for n in (number.low, number.high, value)):
            assert found.is_integer()
        else:
            assert found == pytest.approx((ends[0] * value) ** 0.5)
    granule = half["dma.load.granule"].value if "dma.load.granule" in half else 1
    assert granule is not None and int(granule).bit_count() == 1


def test_what_a_peak_fixes_together_stays() -> None:
    assert pinned_guesses(chip("atom-max")) == {"clock", "engines.tensor.numbers.products"}
    assert "engines.tensor.numbers.depth" in pinned_guesses(chip("maia-100"))
    # Larger steps of an array leave more of it idle in a small product.
    low, high = (at_end(chip("atom-max"), end).engines["tensor"] for end in ("low", "high"))
    assert low.numbers["rows_step"].base > high.numbers["rows_step"].base


@pytest.mark.parametrize("name", CHIPS)
def test_ceilings(name: str) -> None:
    usual = chip(name)
    found = ceiling(usual, "bf16")
    assert 0 < found.bandwidth <= 1 and 0 < found.compute <= 1
    # What memory bounds can attain the bandwidth's part, what engines bound the peak's.
    assert attainable_fraction(usual, "bf16", 0, 1 << 30) == pytest.approx(found.bandwidth)
    assert attainable_fraction(usual, "bf16", 1 << 50, 1) == pytest.approx(found.compute)
    # The ends don't move what the published peaks fix.
    for end in ("low", "high"):
        assert ceiling(at_end(usual, end), "bf16").compute == pytest.approx(found.compute, rel=0.03)


def test_measured_ceilings() -> None:
    v6e = ceiling(chip("tpu-v6e"), "bf16")
    assert (v6e.bandwidth, v6e.bandwidth_from) == (0.894, "measured")
    assert (v6e.compute, v6e.compute_from) == (0.89, "measured")
    atom = ceiling(chip("atom-max"), "bf16")
    assert (atom.bandwidth, atom.bandwidth_from, atom.compute_from) == (0.83, "measured", "laws")
