"""The time of transfers between devices: latency, bandwidth, and one that stands for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dure
import dure.lang as dl
from dure import targets
from dure.compiler.chip.pipeline import Options, compile_for
from dure.errors import TargetError
from dure.ir.core import Function, Region
from dure.ir.devices import over_devices, own_device, sees_devices
from dure.ir.dtypes import DTYPES
from dure.ir.expr import as_expr, symbol
from dure.library.build import build
from dure.library.call import KernelCall, tensor
from dure.library.collective_kernels import peer
from dure.library.collectives import KINDS, Collective, Kind
from dure.machine.chip import Chip
from dure.machine.group import group_of
from dure.sim.timing import simulate

CHIPS = [name for name in targets.chip_names() if targets.chip(name).links]
BF16 = DTYPES["bfloat16"]


@dure.kernel
def permute(x: dl.Tensor, y: dl.Tensor, by: dl.const, shape: dl.const, bm: dl.const, bn: dl.const):
    """Each device gives all that it has to the one that is ``by`` further."""
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    tile = dl.load(x, (me, i, j), (1, bm, bn)).reshape((1, 1, bm, bn))
    dl.store(y, (peer(me, by, shape), me, i, j), tile)


@dure.kernel
def fetch(x: dl.Tensor, y: dl.Tensor, shape: dl.const, bm: dl.const, bn: dl.const):
    """Each device takes what its neighbour has."""
    me, i, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    dl.store(y, (me, i, j), dl.load(x, (peer(me, 1, shape), i, j), (1, bm, bn)))


def _permute_ps(chip: Chip, devices: int, megabytes: int, by: int = 1) -> int:
    rows = megabytes * 512  # of 1,024 values of 16 bits
    shape = group_of(chip, devices).shape
    types = (tensor(BF16, devices, rows, 1024), tensor(BF16, devices, devices, rows, 1024))
    consts = {"by": by, "shape": shape}
    call = KernelCall(permute, types, consts, {"bm": 64, "bn": 512}, devices=devices)
    tiles = {"bm": 64 if chip.cores.base > 1 else 1024, "bn": 512}
    found = build(call, chip, tiles=tiles, options=Options(stages=4))
    return found.timing.ps


@pytest.mark.parametrize("name", CHIPS)
def test_more_bytes_take_as_long_as_the_link_says(name: str) -> None:
    chip = targets.chip(name)
    for megabytes in (8, 16):
        seconds = megabytes * 2**20 / group_of(chip, 2).capacity
        # The launch, the way in and out, and the gaps between transfers that end together.
        assert seconds < _permute_ps(chip, 2, megabytes) / 1e12 < 1.3 * seconds + 15e-6


def test_the_measured_permutation_of_v6e() -> None:
    """2.3 us + bytes / 86.8 GB/s, beside the launch and the way through the scratchpad."""
    chip = targets.chip("tpu-v6e")
    for megabytes in (4, 16, 64):
        law = 2.3e-6 + megabytes * 2**20 / 86.8e9
        assert _permute_ps(chip, 4, megabytes) / 1e12 == pytest.approx(law, rel=0.05, abs=4e-6)


def test_a_hop_more_takes_its_latency() -> None:
    chip = targets.chip("trainium2")
    found = [_permute_ps(chip, 16, 1, by) for by in (1, 5)]
    # One hop along each of two axes: the bytes cross both links at once.
    assert found[1] - found[0] == 1_500_000


def _program(chip: Chip, devices: int, kind: Kind) -> list[Function]:
    what = Collective(kind, 8 * devices, 64 * devices, BF16)
    return [
        compile_for(over_devices(s.call.specialize(), devices), chip).function
        for way in what.ways(group_of(chip, devices))
        for s in way
    ]


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_device_stands_for_all(name: str, kind: Kind) -> None:
    chip = targets.chip(name)
    cores = min(4, int(chip.cores.base))
    chip = chip.model_copy(update={"cores": chip.cores.__class__(cores, "1", "derived", "test")})
    for program in _program(chip, 4, kind):
        short, whole = simulate(program, chip), simulate(program, chip, full=True)
        assert {c.device for c in short.classes} == {0}
        assert len(whole.classes) > len(short.classes)
        assert short.ps == pytest.approx(whole.ps, abs=4)


def test_the_link_bounds_what_is_large() -> None:
    chip = targets.chip("rngd")
    group = group_of(chip, 4)
    (*_, two_steps) = Collective("all_reduce", 4096, 4096, BF16).ways(group)
    built = [
        build(s.call, chip, tiles={"bm": 128, "bn": 512}, options=Options(stages=3))
        for s in two_steps
    ]
    assert [b.timing.bound for b in built] == ["link", "link"]
    least = 2 * (3 / 4 * 4096 * 4096 * 2) / 64e9
    assert least < sum(b.timing.ps for b in built) / 1e12 < 1.3 * least


def test_a_faster_link_is_faster() -> None:
    def link(bandwidth: str) -> Any:
        return targets.chip("rngd", {"links.pcie.bandwidth": bandwidth})

    found = [_permute_ps(link(f"{rate}GB/s"), 2, 8) for rate in (32, 64, 128)]
    assert found == sorted(found, reverse=True)


def test_devices_do_not_fetch() -> None:
    chip = targets.chip("rngd")
    kind = tensor(BF16, 2, 64, 64)
    call = KernelCall(fetch, (kind, kind), {"shape": (1, 1, 2), "bm": 32, "bn": 64}, devices=2)
    with pytest.raises(TargetError, match="a load from another device's memory"):
        build(call, chip)


def test_tensors_lie_over_the_devices() -> None:
    chip = targets.chip("rngd")
    types = (tensor(BF16, 3, 64, 64), tensor(BF16, 3, 3, 64, 64))
    consts = {"by": 1, "shape": (1, 1, 2), "bm": 32, "bn": 64}
    call = KernelCall(permute, types, consts, devices=2)
    with pytest.raises(TargetError, match="on 2 devices"):
        build(call, chip)


def test_results_are_the_same_on_all_devices() -> None:
    """Sums of floats are added in the order of the devices, wherever they are added."""
    from dure.sim.values import run_values

    chip = targets.chip("tpu-v6e")
    x = np.random.default_rng(0).standard_normal((4, 32, 64)).astype(np.float32)
    (*_, two_steps) = Collective("all_reduce", 32, 64, DTYPES["float32"]).ways(group_of(chip, 4))
    arrays: dict[str, Any] = {"x": x}
    for stage in two_steps:
        program = build(stage.call, chip, tiles=stage.call.tiles).compiled.function
        names = [n for n in stage.arguments if n != "residual"]
        own = [arrays.setdefault(n, np.zeros(x.shape, np.float32)) for n in names]
        shape = tuple(int(str(e)) for e in program.params[0].value.tensor.shape)
        run_values(program, chip, [a.reshape(shape) for a in own])
    parts = x.reshape(4, -1)
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    for device in range(4):
        assert np.array_equal(arrays["y"][device].reshape(-1), expected)


def test_a_view_of_what_is_a_devices_own() -> None:
    """Rows of an expert, of which there may be none behind the last row."""
    device, body = own_device(4), Region((), ())
    function = over_devices(Function("own", "machine", (), body, (), (as_expr(4),), (device,)), 4)
    kind = tensor(BF16, 4 * 16, 8)
    first = symbol("starts_at", "index", 0, 16)
    assert not sees_devices(kind, device * 16 + first, function)
    assert not sees_devices(kind, device * 16, function)
    assert sees_devices(kind, device * 16 + first + 1, function)
    assert sees_devices(kind, as_expr(0), function)
    assert sees_devices(kind, device * 16 + 16, function)
    assert sees_devices(tensor(BF16, 1, 8), as_expr(0), function)
