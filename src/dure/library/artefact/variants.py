"""The tile sizes that a stored kernel has.

Tile sizes are static in tile IR, so that a kernel whose sizes are the compiler's choice is stored
several times: in the sizes that are best on the chips that are known, and, for a chip that is not
known yet, in sizes from small to large.  Who compiles it for a chip chooses among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from dure.compiler.chip.pipeline import Options
from dure.compiler.chip.space import Space
from dure.errors import DureError
from dure.library.build import choose_program, tile_function
from dure.library.call import KernelCall
from dure.machine.chip import Chip
from dure.targets import chip, chip_names

#: Chips, each with the options of the compiler that aren't chosen.
Best: TypeAlias = "Sequence[tuple[Chip, Options]]"
#: Sizes of all open consts alike, each up to the extent that it tiles.
_LADDER = (8, 32, 128, 512)
#: Where that isn't known, each of the call's own sizes by itself divided and multiplied by this.
_FACTOR = 4


def stored_sizes(call: KernelCall, best: Best) -> list[dict[str, int]]:
    """The sizes in which a call is stored, in ascending order: its own, the best for these chips
    and options, and a ladder.  Raises the error of a call whose own sizes aren't legal.
    """
    if not call.open:
        return [{}]
    if call.variants:
        return [dict(sizes) for sizes in call.variants]
    tile_function(call)
    found = [dict(call.tiles), *_ladder(call), *_best(call, best)]
    distinct = {tuple(sizes[name] for name in call.open): sizes for sizes in found}
    return [distinct[key] for key in sorted(distinct)]


def _ladder(call: KernelCall) -> list[dict[str, int]]:
    # What a size tiles is the same on every chip.
    space = Space(lambda sizes: tile_function(call, sizes), call.open, chip(chip_names()[0]))
    limits = [space.tiled(place).largest for place in range(len(call.open))]
    if all(limits):
        found = {tuple(min(size, limit or size) for limit in limits) for size in _LADDER}
    else:
        found = _around(tuple(call.tiles[name] for name in call.open))
    legal = [sizes for sizes in found if space.function(sizes) is not None]
    return [dict(zip(call.open, sizes, strict=True)) for sizes in legal]


def _around(own: tuple[int, ...]) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    for place, size in enumerate(own):
        for other in (max(1, size // _FACTOR), size * _FACTOR):
            found.add((*own[:place], other, *own[place + 1 :]))
    return found


def _best(call: KernelCall, best: Best) -> list[dict[str, int]]:
    found: list[dict[str, int]] = []
    for known, options in best:
        try:
            found.append(choose_program(call, known, base=options)[0])
        except DureError:  # this chip doesn't run it
            continue
    return found
