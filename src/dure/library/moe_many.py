"""A mixture of experts over many tokens: work that grows with the choices, not with their square.

The kernels of :mod:`dure.library.moe` compare every choice with every other, and move a token at a
time.  These count the choices of blocks of tokens first (a counting sort), and move a choice of
many tokens at a time.  ``part``, which may be None, is as in :mod:`dure.library.moe_parts`.
"""

from __future__ import annotations

from typing import Any

import dure
import dure.lang as dl
from dure.library.convert import convert
from dure.library.indices import DistinctPlaces, OptionalPlaces, Places
from dure.library.moe import owners
from dure.library.moe_parts import own_choices

_LAST = 2**31 - 1


@dure.kernel
def expert_counts(
    experts: dl.Tensor,
    part: Places,
    counts: dl.Tensor,
    bt: dl.const,
    bk: dl.const,
    be: dl.const,
    count: dl.const,
    held: dl.const,
):
    """How many choices of each block of ``bt`` tokens go to each of the ``held`` experts.

    experts is (T, k), counts (held, blocks).  ``bk`` covers k and ``be`` the experts.
    """
    i = dl.program_id(0)
    found, _ = _choices(experts, part, (i, 0), (bt, bk), (count, held))
    same = found[None, :] == dl.arange(be)[:, None]
    total = dl.sum(dl.where(same, 1, 0), 1)
    dl.store(counts, (0, i), total.reshape((be, 1)))


def _choices(experts: Any, part: Any, at: Any, shape: Any, numbers: Any) -> Any:
    """The experts of a tile of choices in a row, counted from the part's first, and the choices'
    numbers; ``numbers`` are how many experts there are, and how many of them the part has.
    """
    count, held = numbers
    if part is None:
        return owners(experts, at, shape, count)
    return own_choices(experts, at, shape, count, part[0] * held, held)


@dure.kernel
def counted_ends(
    counts: dl.Tensor, starts: dl.Tensor, stops: dl.Tensor, be: dl.const, bb: dl.const
):
    """Where the choices of each expert start and stop in an order by expert, from
    :func:`expert_counts`, ``bb`` blocks at a time; ``be`` covers the experts.
    """
    total = dl.zeros((be,), dl.int32)
    for c in dl.range(dl.cdiv(counts.shape[1], bb)):
        total = total + dl.sum(dl.load(counts, (0, c), (be, bb)), 1)
    earlier = dl.arange(be)[None, :] < dl.arange(be)[:, None]
    below = dl.sum(dl.where(earlier, total[None, :], 0), 1)
    dl.store(starts, (dl.program_id(0),), below)
    dl.store(stops, (dl.program_id(0),), below + total)


@dure.kernel
def counted_places(
    experts: dl.Tensor,
    part: Places,
    counts: dl.Tensor,
    starts: dl.Tensor,
    columns: dl.Tensor,
    bt: dl.const,
    be: dl.const,
    bb: dl.const,
    count: dl.const,
    held: dl.const,
):
    """For each of a token's choices (T, k) its place in that order, which keeps that of the choices
    where experts are equal, in ``columns`` (k, T); -1 where another part has the expert.

    What comes before a choice are the choices of earlier experts, those of its expert in earlier
    blocks of ``bt`` tokens, and those in its own.
    """
    j, i = dl.program_id(0), dl.program_id(1)
    found, at = _choices(experts, part, (i, j), (bt, 1), (count, held))
    first = dl.load(starts, (0,), (be,))
    for c in dl.range(dl.cdiv(i, bb)):
        block = c * bb + dl.arange(bb)[None, :]
        first = first + dl.sum(dl.where(block < i, dl.load(counts, (0, c), (be, bb)), 0), 1)
    own = found[:, None] == dl.arange(be)[None, :]
    place = dl.sum(dl.where(own, first[None, :], 0), 1)
    for n in dl.range(experts.shape[1]):
        other, number = _choices(experts, part, (i, n), (bt, 1), (count, held))
        earlier = (other[None, :] == found[:, None]) & (number[None, :] < at[:, None])
        place = place + dl.sum(dl.where(earlier, 1, 0), 1)
    place = _present(place, found, part)
    dl.store(columns, (j, i), place.reshape((1, bt)))


def _present(place: Any, found: Any, part: Any) -> Any:
    return place if part is None else dl.where(found == _LAST, -1, place)


@dure.kernel
def choice_rows(x: dl.Tensor, columns: DistinctPlaces, y: dl.Tensor, bt: dl.const, bd: dl.const):
    """``y[columns[j, t]] = x[t]`` for x (T, D), columns (k, T), y (T * k, D)."""
    i, c, j = dl.program_id(0), dl.program_id(1), dl.program_id(2)
    rows = dl.load(columns, (j, i), (1, bt), fill=-1).reshape((bt,))
    tile = dl.load(x, (i, c), (bt, bd))
    dl.store(y, (rows, c), convert(tile, y.dtype))


@dure.kernel
def choice_sum(
    y: dl.Tensor,
    columns: OptionalPlaces,
    weights: dl.Tensor,
    z: dl.Tensor,
    bt: dl.const,
    bd: dl.const,
):
    """``z[t]`` is the sum over j of ``weights[t, j] * y[columns[j, t]]``, without places of -1."""
    i, c = dl.program_id(0), dl.program_id(1)
    acc = dl.zeros((bt, bd), dl.float32)
    for j in dl.range(columns.shape[0]):
        rows = dl.load(columns, (j, i), (1, bt), fill=-1).reshape((bt,))
        share = dl.load(weights, (i, j), (bt, 1)).to(dl.float32)
        acc = acc + dl.load(y, (rows, c), (bt, bd)).to(dl.float32) * share
    dl.store(z, (i, c), convert(acc, z.dtype))
