"""One launch of a library kernel for known sizes: the kernel, its argument types and its consts.

This is what a compiler for a chip takes.  Index arguments come with values: a launch's time
depends on them, and so does which memory it touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.ir.core import Function
from dure.ir.dtypes import BlockFormat, ElementType, int32
from dure.ir.expr import const
from dure.ir.types import TensorType, static_extent

#: The values of an index argument.
IndexArray: TypeAlias = "npt.NDArray[np.int32]"


class TileKernel(Protocol):
    """What gives tile functions: a kernel of the language, or one that was read from a file."""

    @property
    def __name__(self) -> str: ...

    def specialize(
        self, types: Sequence[TensorType | None], consts: Mapping[str, object]
    ) -> Function:
        """The tile function for arguments of these types and these consts."""
        ...


@dataclass(frozen=True)
class KernelCall:
    """A kernel with argument types of constant shapes.

    ``types`` has None for an absent argument.  ``consts`` leaves out the names in ``open``: the
    compiler chooses them; ``tiles`` holds sizes for them that are legal, not good.  ``indices``
    are the values of the index arguments by their position in ``types``.  ``updates`` are the
    positions of arguments that are updated in place though the kernel only stores into them.
    ``variants`` are the only sizes that a stored kernel has; empty where any may be asked for.
    ``devices`` run the kernel together (:mod:`dure.ir.devices`).
    """

    kernel: TileKernel
    types: tuple[TensorType | None, ...]
    consts: Mapping[str, object]
    tiles: Mapping[str, int] = field(default_factory=dict[str, int])
    indices: Mapping[int, IndexArray] = field(default_factory=dict[int, IndexArray])
    updates: tuple[int, ...] = ()
    variants: tuple[Mapping[str, int], ...] = ()
    devices: int = 1

    @property
    def open(self) -> tuple[str, ...]:
        """The tile sizes that the compiler chooses."""
        return tuple(self.tiles)

    def specialize(self, tiles: Mapping[str, int] | None = None) -> Function:
        """The tile function with these sizes for the open consts (default: :attr:`tiles`)."""
        chosen = {**self.tiles, **(tiles or {})}
        return self.kernel.specialize(self.types, {**self.consts, **chosen})


def tensor(dtype: ElementType, *shape: int, axis: int = -1) -> TensorType:
    """The type of a tensor of known extents; ``axis`` is the quantized one of block formats."""
    quantized = axis % len(shape) if isinstance(dtype, BlockFormat) else -1
    return TensorType(tuple(const(e) for e in shape), dtype, quantized_axis=quantized)


def index_tensor(values: IndexArray, low: int, high: int, *, unique: bool = False) -> TensorType:
    """The type of an index argument whose elements lie in ``low .. high``."""
    shape = tuple(const(e) for e in values.shape)
    return TensorType(shape, int32, index=(const(low), const(high)), unique=unique)


def indices(values: Sequence[Any] | npt.NDArray[Any]) -> IndexArray:
    """An int32 array."""
    return np.asarray(values, np.int32)


def stored_bytes(kind: TensorType) -> int:
    """Bytes that a tensor of known extents takes in memory, all planes together."""
    elements = 1
    for extent in kind.shape:
        known = static_extent(extent)
        assert known is not None
        elements *= known
    return int(-(-(elements * kind.dtype.bits) // 8))
