"""Which type an operation on mixed operands has: the rules of Triton.

* A Python number takes the type of the tiles that it meets: a float makes an integer tile float32,
  an integer makes a bool tile int32.  So does a tile of one number that was computed from Python
  numbers.
* An index scalar counts as int32, and takes a float tile's type.
* Two tiles: float64, float32, then float16 or bfloat16; float16 with bfloat16 gives float32; two
  different 8-bit floats give float16; a float with an integer gives the float.
* Two integers give the wider one; of the same width, the unsigned one.
* ``/`` gives float32 for integers and for 16-bit floats.
"""

from __future__ import annotations

from collections.abc import Sequence

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.dtypes import DType
from dure.ir.expr import Expr
from dure.lang.values import TileBase, describe

_ORDER = ("float64", "float32")


def common_dtype(operands: Sequence[object], *, divides: bool = False) -> DType:
    """The type in which ``operands`` (tiles, index scalars, Python numbers) are combined."""
    strong = [_strong(o) for o in operands if _is_strong(o)]
    if not strong:
        if any(isinstance(o, Expr) for o in operands):
            strong = [dtypes.int32]
        else:
            strong = [_natural(o) for o in operands]
    total = strong[0]
    for dtype in strong[1:]:
        total = promote(total, dtype)
    for operand in operands:
        if isinstance(operand, Expr):
            total = total if total.is_float else promote(total, dtypes.int32)
        elif not _is_strong(operand):
            total = _adopt(total, _natural(operand))
    if divides and (not total.is_float or total.bits < 32):
        return dtypes.float32
    return total


def promote(left: DType, right: DType) -> DType:
    """The type of an operation on tiles of two types."""
    if left == right:
        return left
    if left.is_float != right.is_float:
        return left if left.is_float else right
    if left.is_float:
        for name in _ORDER:
            if name in (left.name, right.name):
                return dtypes.DTYPES[name]
        if left.bits == right.bits == 8:
            return dtypes.float16
        if left.bits == right.bits:
            return dtypes.float32
        return left if left.bits > right.bits else right
    if left.kind == "bool" or right.kind == "bool":
        return right if left.kind == "bool" else left
    if left.bits != right.bits:
        return left if left.bits > right.bits else right
    return left if left.kind == "uint" else right


def _is_strong(operand: object) -> bool:
    return isinstance(operand, TileBase) and not operand.weak


def _strong(operand: object) -> DType:
    assert isinstance(operand, TileBase)
    if not isinstance(operand.dtype, DType):
        raise KernelError(
            f"arithmetic on {describe(operand)}, which is block-quantized",
            rule="arithmetic, comparisons and reductions take plain numbers",
            fix="dequantize it first with .to(dl.float32), or give it to dl.dot as it is",
        )
    return operand.dtype


def _natural(operand: object) -> DType:
    if isinstance(operand, TileBase):
        assert isinstance(operand.dtype, DType)
        return operand.dtype
    if isinstance(operand, bool):
        return dtypes.bool_
    if isinstance(operand, int):
        return dtypes.int32
    if isinstance(operand, float):
        return dtypes.float32
    raise KernelError(
        f"arithmetic on {describe(operand)}",
        rule="arithmetic takes tiles, index scalars and Python numbers",
        fix="load the tensor's tile first with dl.load(x, index, shape)",
    )


def _adopt(dtype: DType, number: DType) -> DType:
    """A tile's type after it met a Python number."""
    if number.is_float and not dtype.is_float:
        return dtypes.float32
    if number.is_integer and dtype.kind == "bool":
        return dtypes.int32
    return dtype
