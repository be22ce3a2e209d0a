"""How many operations a tile kernel's instructions are, where no definition says what it needs.

Tiles count whole, also where they hang over a tensor's edge, as in the instructions of chips.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from dure.errors import DureError
from dure.ir.core import Function, Op, Region, walk
from dure.ir.expr import Expr, evaluate, symbols

#: Instances of a grid, or turns of a loop, that are counted one by one.
_MOST = 1 << 14


def operations(function: Function) -> int | None:
    """The operations of a whole launch of a kernel of known sizes.

    None where they depend on values in memory, or where too many instances differ.
    """
    try:
        extents = [evaluate(extent, {}) for extent in function.grid]
        own = [symbol.name for symbol in function.program_ids]
        if not _names(function.body) & set(own):
            whole = _region(function.body, dict.fromkeys(own, 0))
            for extent in extents:
                whole *= extent
            return whole
        instances = itertools.product(*(range(extent) for extent in extents))
        kept = list(itertools.islice(instances, _MOST + 1))
        if len(kept) > _MOST:
            return None
        return sum(_region(function.body, dict(zip(own, place, strict=True))) for place in kept)
    except DureError:  # a size that isn't known before the launch
        return None


def multiplies_integers(function: Function) -> bool:
    """Whether a kernel's products are of integers, or of blocks of them."""
    left = [op.operands[0].tile for op in walk(function.body) if op.name == "dot"]
    return any(tile.block is not None or tile.dtype.is_integer for tile in left)


def _region(region: Region, known: Mapping[str, int]) -> int:
    return sum(_op(op, known) for op in region.ops)


def _op(op: Op, known: Mapping[str, int]) -> int:
    if op.name == "if":
        then, otherwise = op.regions
        return _region(then if evaluate(op.attr("condition"), known) else otherwise, known)
    if op.name != "for":
        return op.definition.cost(op).flops
    (body,) = op.regions
    start, stop = evaluate(op.attr("start"), known), evaluate(op.attr("stop"), known)
    turns = range(start, stop, op.attr("step"))
    variable = body.symbols[0].name
    if variable not in _names(body):
        return len(turns) * _region(body, {**known, variable: start})
    if len(turns) > _MOST:
        raise DureError(f"{len(turns)} turns that differ")
    return sum(_region(body, {**known, variable: turn}) for turn in turns)


def _names(region: Region) -> set[str]:
    """The symbols that say how often something inside runs."""
    found: set[str] = set()
    for op in walk(region):
        for name in ("start", "stop", "condition") if op.name in ("for", "if") else ():
            value = op.attrs.get(name)
            if isinstance(value, Expr):
                found |= {symbol.name for symbol in symbols(value)}
    return found
