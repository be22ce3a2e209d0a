"""Tiles as the author sees them: operators and methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

from dure.errors import KernelError
from dure.ir.blocks import Blocks
from dure.ir.core import Value
from dure.ir.dtypes import Array, BlockFormat, ElementType
from dure.lang import contraction, shapes
from dure.lang.elementwise import binary, cast_tile, compare, unary
from dure.lang.values import TileBase, describe

if TYPE_CHECKING:
    import numpy.typing as npt


class Tile(TileBase):
    """A block of a tensor that one kernel instance computes with.

    It has a static ``shape`` and a ``dtype``.  Operators work element by element and broadcast as
    NumPy's do; Python numbers adopt the tile's type.
    """

    __slots__ = ()

    def __add__(self, other: object) -> Tile:
        return binary("add", self, other)

    def __radd__(self, other: object) -> Tile:
        return binary("add", other, self)

    def __sub__(self, other: object) -> Tile:
        return binary("sub", self, other)

    def __rsub__(self, other: object) -> Tile:
        return binary("sub", other, self)

    def __mul__(self, other: object) -> Tile:
        return binary("mul", self, other)

    def __rmul__(self, other: object) -> Tile:
        return binary("mul", other, self)

    def __truediv__(self, other: object) -> Tile:
        return binary("div", self, other)

    def __rtruediv__(self, other: object) -> Tile:
        return binary("div", other, self)

    def __floordiv__(self, other: object) -> Tile:
        return binary("floordiv", self, other)

    def __rfloordiv__(self, other: object) -> Tile:
        return binary("floordiv", other, self)

    def __mod__(self, other: object) -> Tile:
        return binary("mod", self, other)

    def __rmod__(self, other: object) -> Tile:
        return binary("mod", other, self)

    def __pow__(self, other: object) -> Tile:
        return binary("pow", self, other)

    def __rpow__(self, other: object) -> Tile:
        return binary("pow", other, self)

    def __and__(self, other: object) -> Tile:
        return binary("and", self, other)

    __rand__ = __and__

    def __or__(self, other: object) -> Tile:
        return binary("or", self, other)

    __ror__ = __or__

    def __xor__(self, other: object) -> Tile:
        return binary("xor", self, other)

    __rxor__ = __xor__

    def __lshift__(self, other: object) -> Tile:
        return binary("shl", self, other)

    def __rlshift__(self, other: object) -> Tile:
        return binary("shl", other, self)

    def __rshift__(self, other: object) -> Tile:
        return binary("shr", self, other)

    def __rrshift__(self, other: object) -> Tile:
        return binary("shr", other, self)

    def __lt__(self, other: object) -> Tile:
        return compare("<", self, other)

    def __le__(self, other: object) -> Tile:
        return compare("<=", self, other)

    def __gt__(self, other: object) -> Tile:
        return compare(">", self, other)

    def __ge__(self, other: object) -> Tile:
        return compare(">=", self, other)

    def __eq__(self, other: object) -> Any:
        return compare("==", self, other)

    def __ne__(self, other: object) -> Any:
        return compare("!=", self, other)

    def __neg__(self) -> Tile:
        return unary("neg", self)

    def __pos__(self) -> Tile:
        return self

    def __abs__(self) -> Tile:
        return unary("abs", self)

    def __invert__(self) -> Tile:
        return unary("not", self)

    def __matmul__(self, other: Tile) -> Tile:
        return contraction.dot(self, other)

    def __getitem__(self, key: object) -> Tile:
        return shapes.subscript(self, key)

    def __bool__(self) -> NoReturn:
        raise KernelError(
            f"the truth of {describe(self)}",
            rule="a condition is known when the kernel is compiled, or is one of index scalars",
            fix="choose element by element with dl.where(condition, a, b)",
        )

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def T(self) -> Tile:
        """The last two axes swapped."""
        return shapes.transpose(self)

    def to(self, dtype: ElementType) -> Tile:
        """The nearest values of another type; a block-quantized tile is dequantized."""
        if isinstance(dtype, BlockFormat):
            return self if dtype == self.dtype else contraction.quantize(self, dtype)
        return cast_tile(self, shapes.plain_dtype(dtype, ".to"))

    def reshape(self, *shape: Any) -> Tile:
        """See :func:`dure.lang.reshape`; the extents may be given one by one."""
        return shapes.reshape(self, shape[0] if len(shape) == 1 else shape)

    def permute(self, *order: Any) -> Tile:
        """See :func:`dure.lang.transpose`; the axes may be given one by one."""
        return shapes.transpose(self, order[0] if len(order) == 1 else order)

    def broadcast_to(self, *shape: Any) -> Tile:
        """See :func:`dure.lang.broadcast_to`."""
        return shapes.broadcast_to(self, shape[0] if len(shape) == 1 else shape)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Tile:
        """See :func:`dure.lang.sum`."""
        return contraction.sum(self, axis, keepdims)

    def max(self, axis: int | None = None, keepdims: bool = False) -> Tile:
        """See :func:`dure.lang.max`."""
        return contraction.max(self, axis, keepdims)

    def min(self, axis: int | None = None, keepdims: bool = False) -> Tile:
        """See :func:`dure.lang.min`."""
        return contraction.min(self, axis, keepdims)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """The numbers, under ``dl.interpret``: ``numpy.asarray(tile)``."""
        if isinstance(self.payload, Value):
            raise KernelError(
                f"the numbers of {describe(self)}, while the kernel is compiled",
                rule="a tile has numbers when the kernel runs",
                fix="run the kernel with dl.interpret to look at them",
            )
        found = self.payload.decode() if isinstance(self.payload, Blocks) else self.payload
        return found if dtype is None else cast("Array", found.astype(dtype))

    def __repr__(self) -> str:
        if isinstance(self.payload, Value):
            return describe(self)
        return f"Tile({self.__array__()!r}, dtype={self.dtype})"
