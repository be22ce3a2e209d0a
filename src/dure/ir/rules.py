"""Small checks that typing rules share; each raises an IRError that says what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dure.errors import IRError
from dure.ir.core import Cost
from dure.ir.types import TensorType, TileType, Type

if TYPE_CHECKING:
    from dure.ir.core import Op


def broken(what: str, rule: str, fix: str = "") -> IRError:
    """The error for a broken typing rule."""
    return IRError(what, rule=rule, fix=fix)


def tile(value: Type, what: str) -> TileType:
    """``value`` as a tile type."""
    if not isinstance(value, TileType):
        raise broken(
            f"{what} is {value}, not a tile",
            "tile ops take tiles; a tensor is read with load",
            "load a tile of the tensor first",
        )
    return value


def tensor(value: Type, what: str) -> TensorType:
    """``value`` as a tensor type."""
    if not isinstance(value, TensorType):
        raise broken(
            f"{what} is {value}, not a tensor",
            "loads, stores and views take a tensor in memory",
            "pass the tensor itself, not a tile that was loaded from it",
        )
    return value


def plain(value: Type, what: str) -> TileType:
    """``value`` as a tile of plain numbers."""
    found = tile(value, what)
    if found.block is not None:
        raise broken(
            f"{what} is block-quantized ({found})",
            "elementwise ops and reductions take plain numbers",
            "dequantize it first with .to(dl.float32)",
        )
    return found


def same_shape(operands: Sequence[TileType], name: str) -> tuple[int, ...]:
    """The one shape of all operands."""
    shapes = {o.shape for o in operands}
    if len(shapes) != 1:
        raise broken(
            f"{name} of tiles of different shapes: {', '.join(str(o.shape) for o in operands)}",
            "elementwise ops take tiles of one shape",
            "broadcast the smaller tile first",
        )
    return operands[0].shape


def axis_of(axis: int, rank: int, name: str) -> int:
    """``axis`` counted from the front."""
    if not -rank <= axis < rank:
        raise broken(f"{name} along axis {axis} of a tile of rank {rank}", "the axis exists")
    return axis % rank


def moves_bytes(op: Op) -> Cost:
    """The cost of an op that computes nothing."""
    results = [r.type for r in op.results]
    return Cost(bytes=sum(t.bytes for t in results if isinstance(t, TileType)))


def free(op: Op) -> Cost:
    """The cost of an op that is gone once compiled."""
    return Cost()
