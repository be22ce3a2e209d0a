"""Index values as text: ``7`` is a number, ``7*4`` four times 7, and ``7:2*4`` is 7 9 11 13.

What attention reads and where a step writes are long runs of this kind, or permutations, which have
no shorter text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dure.errors import ArtefactError
from dure.library.artefact.container import damaged
from dure.library.call import IndexArray

#: The most index values of an artefact's list.
MOST_VALUES = 1 << 26
_TOKEN = re.compile(r"(-?[0-9]{1,10})(?::(-?[0-9]{1,10}))?(?:\*([0-9]{1,9}))?")
#: A shorter run is written number by number.
_SHORTEST = 4
_TOKENS_A_LINE = 16


def encode(values: IndexArray) -> str:
    """The text of these values, in lines."""
    tokens = list(_tokens(np.asarray(values, np.int64).ravel()))
    lines = [tokens[n : n + _TOKENS_A_LINE] for n in range(0, len(tokens), _TOKENS_A_LINE)]
    return "".join(" ".join(line) + "\n" for line in lines)


def _tokens(flat: npt.NDArray[np.int64]) -> Iterator[str]:
    steps = np.diff(flat)
    ends = (np.flatnonzero(np.diff(steps)) + 1).tolist()
    written = 0
    # Steps from start to end are equal: a run of the values from start to end, both included,
    # less those that the run before it has taken.
    for start, end in itertools.pairwise((0, *ends, len(steps))):
        start = max(start, written)
        count = end - start + 1
        if count < _SHORTEST:
            continue
        yield from map(str, flat[written:start].tolist())
        first, step = int(flat[start]), int(steps[start])
        yield f"{first}*{count}" if step == 0 else f"{first}:{step}*{count}"
        written = end + 1
    yield from map(str, flat[written:].tolist())


def decode(text: str, shape: Sequence[int], where: str) -> IndexArray:
    """The values of a text that are as many as the shape says.

    Raises :class:`ArtefactError` for another number, and for what is no 32-bit integer.
    """
    count = 1
    for extent in shape:
        count *= extent
    if not 0 <= count <= MOST_VALUES:
        raise damaged(f"a list of {count} index values", where)
    found = np.empty(count, np.int64)
    at = 0
    for token in text.split():
        parts = _TOKEN.fullmatch(token)
        if parts is None:
            raise damaged(f"'{token[:40]}' is no index value", where)
        first, step, times = int(parts[1]), int(parts[2] or 0), int(parts[3] or 1)
        if times > count - at:
            raise _count(count, where)
        found[at : at + times] = first + step * np.arange(times)
        at += times
    if at != count:
        raise _count(count, where)
    if count and not -(1 << 31) <= found.min() <= found.max() < 1 << 31:
        raise damaged("an index value that 32 bits don't hold", where)
    return found.astype(np.int32).reshape(tuple(shape))


def _count(count: int, where: str) -> ArtefactError:
    return damaged(f"a list of {count} index values has another number of them", where)
