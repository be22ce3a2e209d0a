"""Experts that are dealt out over devices: the order of the choices that go to one part of them.

As :mod:`dure.library.moe`, but for the ``held`` experts from ``part[0] * held`` on: choices of
others have the place -1, and add nothing to a token's sum.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.indices import OptionalPlaces, Places
from dure.library.moe import owners

_LAST = 2**31 - 1


def own_choices(experts: Any, at: Any, shape: Any, count: Any, first: Any, held: Any) -> Any:
    """The experts of a tile of choices, counted from the first of the part; those of other parts
    come after every expert.  And the choices' numbers.
    """
    found, number = owners(experts, at, shape, count)
    mine = (found >= first) & (found < first + held)
    return dl.where(mine, found - first, _LAST), number


@dure.kernel
def part_places(
    experts: dl.Tensor,
    part: Places,
    places: dl.Tensor,
    bt: dl.const,
    bo: dl.const,
    bk: dl.const,
    count: dl.const,
    held: dl.const,
):
    """For each choice of one of the part's experts, its place in an order by expert; else -1."""
    i = dl.program_id(0)
    first = part[0] * held
    own, at = own_choices(experts, (i, 0), (bt, bk), count, first, held)
    total = dl.zeros((bt * bk,), dl.int32)
    for c in dl.range(dl.cdiv(experts.shape[0], bo)):
        other, number = own_choices(experts, (c, 0), (bo, bk), count, first, held)
        same = (other[None, :] == own[:, None]) & (number[None, :] < at[:, None])
        total = total + dl.sum(dl.where((other[None, :] < own[:, None]) | same, 1, 0), 1)
    total = dl.where(own == _LAST, -1, total)
    dl.store(places, (i, 0), total.reshape((bt, bk)))


@dure.kernel
def part_ends(
    experts: dl.Tensor,
    part: Places,
    starts: dl.Tensor,
    stops: dl.Tensor,
    be: dl.const,
    bo: dl.const,
    bk: dl.const,
    count: dl.const,
    held: dl.const,
):
    """Where the choices of each of the part's experts start and stop in that order."""
    i = dl.program_id(0)
    first = part[0] * held
    expert = (i * be + dl.arange(be))[:, None]
    below, through = dl.zeros((be,), dl.int32), dl.zeros((be,), dl.int32)
    for c in dl.range(dl.cdiv(experts.shape[0], bo)):
        other, _ = own_choices(experts, (c, 0), (bo, bk), count, first, held)
        below = below + dl.sum(dl.where(other[None, :] < expert, 1, 0), 1)
        through = through + dl.sum(dl.where(other[None, :] <= expert, 1, 0), 1)
    dl.store(starts, (i,), below)
    dl.store(stops, (i,), through)


@dure.kernel
def part_sum(
    y: dl.Tensor,
    places: OptionalPlaces,
    weights: dl.Tensor,
    z: dl.Tensor,
    bk: dl.const,
    bd: dl.const,
):
    """``z[t]`` is the sum over j of ``weights[t, j] * y[places[t, j]]``, without places of -1."""
    t, c = dl.program_id(0), dl.program_id(1)
    rows = dl.load(places, (t, 0), (1, bk), fill=-1).reshape((bk,))
    tile = dl.load(y, (rows, c), (bk, bd)).to(dl.float32)
    shares = dl.load(weights, (t, 0), (1, bk)).to(dl.float32).reshape((bk, 1))
    dl.store(z, (t, c), convert(dl.sum(tile * shares, 0, keepdims=True), z.dtype))
