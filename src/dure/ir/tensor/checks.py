"""What the typing rules and costs of tensor ops share.

Tensor ops compute in float32 whatever they store; their reference semantics compute in float64 and
round the result once.  An op's optional operands follow its fixed ones, in the order of the flags
that announce them.  ``quantize`` names the block format in which an op's result is stored along its
last axis ("" for float32): the result is rounded to float32 first, then quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.ir import dtypes
from dure.ir.blocks import Blocks, quantize
from dure.ir.core import Cost, Op
from dure.ir.dtypes import Array, BlockFormat, DType
from dure.ir.expr import Expr, bounds
from dure.ir.rules import broken, tensor
from dure.ir.types import TensorType, Type, static_extent

Doubles: TypeAlias = "npt.NDArray[np.float64]"
Operand: TypeAlias = "Array | Blocks"
Indices: TypeAlias = "npt.NDArray[np.int32]"

FLOAT_DTYPES = (dtypes.float32, dtypes.float16, dtypes.bfloat16)


def count(operands: Sequence[Type], expected: int, name: str) -> list[TensorType]:
    """The operands as tensors; there must be ``expected`` of them."""
    if len(operands) != expected:
        raise broken(
            f"{name} takes {expected} operands, found {len(operands)}",
            "optional operands are announced by attributes",
            "pass one operand for each flag that is set",
        )
    return [tensor(o, f"operand {i} of {name}") for i, o in enumerate(operands)]


def rank(value: TensorType, expected: int, what: str) -> TensorType:
    """``value``, which must have ``expected`` axes."""
    if value.rank != expected:
        raise broken(
            f"{what} is {value}, which has {value.rank} axes", f"{what} has {expected} axes"
        )
    return value


def floating(value: TensorType, what: str) -> TensorType:
    """``value``, which must hold plain floating-point numbers."""
    if value.dtype not in FLOAT_DTYPES:
        raise broken(
            f"{what} is {value}",
            f"{what} holds {', '.join(str(d) for d in FLOAT_DTYPES)}",
        )
    return value


def index(value: TensorType, what: str, axes: int = 1) -> TensorType:
    """``value``, which must be an int32 tensor with a declared range."""
    rank(value, axes, what)
    if value.dtype is not dtypes.int32 or value.index is None:
        raise broken(
            f"{what} is {value}",
            "what addresses memory at run time is an int32 input with a declared range",
            "declare the input with index=(low, high)",
        )
    return value


def equal(found: Expr, expected: Expr, what: str) -> None:
    """Two extents that must be the same expression."""
    if found is not expected:
        raise broken(f"{what} is {found}, not {expected}", f"{what} is {expected}")


def static(extent: Expr, what: str) -> int:
    """An extent that must be a number."""
    value = static_extent(extent)
    if value is None:
        raise broken(f"{what} is {extent}", f"{what} is known when the program is compiled")
    return value


def stored(shape: tuple[Expr, ...], quantize: str) -> TensorType:
    """The type of a float32 result, quantized along its last axis if asked."""
    if not quantize:
        return TensorType(shape, dtypes.float32)
    found = dtypes.element_type(quantize)
    if not isinstance(found, BlockFormat) or not found.factors("scale")[0][0].dtype.is_float:
        raise broken(f"quantize='{quantize}'", "a result is quantized to a block format")
    if found not in dtypes.ACTIVATION_FORMATS:
        names = ", ".join(map(str, dtypes.ACTIVATION_FORMATS))
        raise broken(f"quantize='{quantize}'", f"activations are quantized to {names}", "use one")
    length = static(shape[-1], "the extent that is quantized")
    if length % found.block:
        raise broken(
            f"{length} elements in blocks of {found.block}",
            f"{quantize} stores whole blocks of {found.block} along the last axis",
            "leave the result in float32",
        )
    return TensorType(shape, found, quantized_axis=len(shape) - 1)


def activation_name(name: str) -> None:
    """Refuses an activation that is not declared."""
    if name not in ACTIVATIONS:
        raise broken(f"activation '{name}'", f"an activation is one of {list(ACTIVATIONS)}")


def doubles(value: Operand) -> Doubles:
    """The values in float64."""
    plain = value.decode() if isinstance(value, Blocks) else value
    return plain.astype(np.float64)


def finish(values: Doubles, attrs: Mapping[str, Any]) -> Operand:
    """Round to float32, and quantize if the op's ``quantize`` asks for it."""
    rounded = values.astype(np.float32)
    name: str = attrs.get("quantize", "")
    if not name:
        return rounded
    format = dtypes.element_type(name)
    assert isinstance(format, BlockFormat)
    return quantize(rounded, format)


def erf(values: Doubles) -> Doubles:
    """The error function in float64, by the C library."""
    import math

    result: Doubles = np.vectorize(math.erf, otypes=[np.float64])(values)
    return result


def silu(x: Doubles) -> Doubles:
    """``x * sigmoid(x)``."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu_tanh(x: Doubles) -> Doubles:
    """GELU by its tanh approximation (Hendrycks and Gimpel)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Doubles) -> Doubles:
    """GELU by the error function."""
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def relu(x: Doubles) -> Doubles:
    """``max(x, 0)``."""
    return np.maximum(x, 0)


def same(x: Doubles) -> Doubles:
    """``x``."""
    return x


def sigmoid(x: Doubles) -> Doubles:
    """``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[Doubles], Doubles]] = {
    "": same,
    "silu": silu,
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "relu": relu,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
}


def extent(value: Expr) -> int:
    """An extent as a number: its declared upper bound where it is symbolic (1 if there is none)."""
    high = bounds(value)[1]
    return 1 if high is None else max(0, high)


def elements(value: TensorType) -> int:
    """How many elements a tensor has at its symbols' bounds."""
    total = 1
    for axis in value.shape:
        total *= extent(axis)
    return total


def stored_bytes(value: Type) -> int:
    """Bytes of a tensor at its symbols' bounds, padding not counted."""
    assert isinstance(value, TensorType)
    return int(elements(value) * value.dtype.bits + 7) // 8


def traffic(op: Op) -> int:
    """Bytes that an op reads and writes at least: every operand and every result once."""
    return sum(stored_bytes(v.type) for v in (*op.operands, *op.results))


def moves(op: Op) -> Cost:
    """The cost of an op that computes nothing."""
    return Cost(bytes=traffic(op))


def per_element(flops: int) -> Any:
    """A cost rule: ``flops`` for each element of the first result."""

    def cost(op: Op) -> Cost:
        return Cost(flops * elements(op.results[0].tensor), traffic(op))

    return cost


def plain_dtype(value: TensorType, what: str) -> DType:
    """The dtype of a tensor that must hold plain numbers."""
    if not isinstance(value.dtype, DType):
        raise broken(f"{what} is block-quantized ({value})", f"{what} holds plain numbers")
    return value.dtype


def take(values: npt.NDArray[Any], rows: Operand) -> npt.NDArray[Any]:
    """Rows of ``values`` by an int32 array."""
    assert isinstance(rows, np.ndarray)
    picked: npt.NDArray[Any] = np.take(values, rows.astype(np.int64), axis=0)
    return picked
