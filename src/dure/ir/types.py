"""Types of values: tensors in memory, tiles in a core, and scalars."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from dure.ir.dtypes import BlockFormat, DType, ElementType
from dure.ir.expr import Const, Expr, const
from dure.ir.layout import AnyLayout, row_major, row_planes

#: How a kernel uses a tensor argument.
Access: TypeAlias = Literal["in", "out", "inout"]


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor in memory.

    ``shape`` counts logical elements and may be symbolic.  A block-quantized tensor names the axis
    that is cut into blocks.  ``layout`` of None leaves the layout to the compiler (row-major where
    nothing else asks for more).  ``index`` is the declared inclusive range of a ``dl.Index``
    argument's elements.
    """

    shape: tuple[Expr, ...]
    dtype: ElementType
    layout: AnyLayout | None = None
    quantized_axis: int = -1
    index: tuple[Expr, Expr] | None = None
    unique: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def block(self) -> BlockFormat | None:
        """The block format, or None for plain numbers."""
        return self.dtype if isinstance(self.dtype, BlockFormat) else None

    def with_layout(self, layout: AnyLayout | None) -> TensorType:
        """The same tensor laid out otherwise."""
        return replace(self, layout=layout)

    def __str__(self) -> str:
        parts = [*(str(s) for s in self.shape), str(self.dtype)]
        text = "tensor<" + " x ".join(parts)
        if self.block is not None:
            text += f", axis={self.quantized_axis}"
        if self.layout is not None:
            text += f", {self.layout}"
        if self.index is not None:
            text += f", index=[{self.index[0]}, {self.index[1]}]" + (
                ", unique" if self.unique else ""
            )
        return text + ">"


@dataclass(frozen=True, slots=True)
class TileType:
    """A tile: a static shape held by one core while it computes."""

    shape: tuple[int, ...]
    dtype: ElementType
    quantized_axis: int = -1

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def block(self) -> BlockFormat | None:
        """The block format, or None for plain numbers."""
        return self.dtype if isinstance(self.dtype, BlockFormat) else None

    @property
    def elements(self) -> int:
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    @property
    def bytes(self) -> int:
        """Bytes that the tile needs in a scratchpad."""
        bits = self.dtype.bits * self.elements
        return int((bits + 7) // 8)

    def with_dtype(self, dtype: DType) -> TileType:
        """The same shape of another plain type."""
        return TileType(self.shape, dtype)

    def __str__(self) -> str:
        axis = f", axis={self.quantized_axis}" if self.block is not None else ""
        return "tile<" + " x ".join([*map(str, self.shape), str(self.dtype)]) + axis + ">"


Type: TypeAlias = TensorType | TileType


def static_extent(extent: Expr) -> int | None:
    """The number that an extent is, or None if it is symbolic."""
    return extent.value if isinstance(extent, Const) else None


def shape_of(*extents: int | Expr) -> tuple[Expr, ...]:
    """A tensor shape from numbers and expressions."""
    return tuple(const(e) if isinstance(e, int) else e for e in extents)


def default_layout(tensor: TensorType) -> AnyLayout:
    """The tensor's layout; where it has none, row-major, a block-quantized row plane by plane."""
    if tensor.layout is not None:
        return tensor.layout
    if isinstance(tensor.dtype, BlockFormat):
        return row_planes(tensor.dtype, tensor.shape, tensor.quantized_axis)
    return row_major(tensor.shape, tensor.dtype.bits)
