"""Elementwise ops on tiles of one shape.

Floating-point ops on 16-bit types compute in float32 and round once, as every NPU's vector unit
does. Integer arithmetic wraps around; integer division floors.  Transcendental functions are
declared with the error that a target may make, in units in the last place of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dure.ir import dtypes
from dure.ir.core import Cost, Op, OpDef, Region, TypingRule, declare
from dure.ir.dtypes import Array, DType
from dure.ir.rules import broken, plain, same_shape
from dure.ir.types import TileType, Type

_Numpy = Callable[..., Any]


def _rsqrt(values: Array) -> Array:
    return np.asarray(1 / np.sqrt(values.astype(np.float64)))


def _sigmoid(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-values.astype(np.float64))))


def _erf(values: Array) -> Array:
    """Abramowitz-Stegun is too coarse for a reference: the C library's erf in float64."""
    return np.vectorize(math.erf, otypes=[np.float64])(values)


def _logical_shift_right(values: Array, by: Array) -> Array:
    unsigned = np.dtype(f"uint{values.dtype.itemsize * 8}")
    return np.right_shift(values.view(unsigned), by.astype(unsigned)).view(values.dtype)


#: name -> (arity, NumPy function, operand kinds, flops an element, error bound in ulp)
_ARITHMETIC: dict[str, tuple[int, _Numpy, str, int, float]] = {
    "add": (2, np.add, "float int uint", 1, 0.5),
    "sub": (2, np.subtract, "float int uint", 1, 0.5),
    "mul": (2, np.multiply, "float int uint", 1, 0.5),
    "div": (2, np.divide, "float", 1, 0.5),
    "floordiv": (2, np.floor_divide, "int uint", 1, 0),
    "mod": (2, np.mod, "int uint", 1, 0),
    "min": (2, np.minimum, "float int uint", 1, 0),
    "max": (2, np.maximum, "float int uint", 1, 0),
    "pow": (2, np.power, "float", 20, 16),
    "and": (2, np.bitwise_and, "int uint bool", 1, 0),
    "or": (2, np.bitwise_or, "int uint bool", 1, 0),
    "xor": (2, np.bitwise_xor, "int uint bool", 1, 0),
    "neg": (1, np.negative, "float int", 1, 0),
    "abs": (1, np.abs, "float int", 1, 0),
    "not": (1, np.invert, "int uint bool", 1, 0),
    "exp": (1, np.exp, "float", 10, 2),
    "exp2": (1, np.exp2, "float", 10, 2),
    "log": (1, np.log, "float", 10, 2),
    "log2": (1, np.log2, "float", 10, 2),
    "sqrt": (1, np.sqrt, "float", 1, 0.5),
    "rsqrt": (1, _rsqrt, "float", 2, 2),
    "tanh": (1, np.tanh, "float", 15, 4),
    "sigmoid": (1, _sigmoid, "float", 12, 4),
    "erf": (1, _erf, "float", 15, 4),
    "sin": (1, np.sin, "float", 15, 4),
    "cos": (1, np.cos, "float", 15, 4),
    "floor": (1, np.floor, "float", 1, 0),
    "ceil": (1, np.ceil, "float", 1, 0),
    "round": (1, np.rint, "float", 1, 0),
}
_COMPARISONS: dict[str, _Numpy] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_SHIFTS: dict[str, _Numpy] = {
    "shl": np.left_shift,
    "shr": _logical_shift_right,
}


def _elements(op: Op) -> int:
    kind = op.results[0].type
    return kind.elements if isinstance(kind, TileType) else 0


def _typing(name: str, arity: int, kinds: str, result: DType | None) -> TypingRule:
    def rule(
        operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
    ) -> Sequence[Type]:
        if len(operands) != arity:
            raise broken(f"{name} takes {arity} operands, found {len(operands)}", "arity")
        tiles = [plain(o, f"operand {i} of {name}") for i, o in enumerate(operands)]
        same_shape(tiles, name)
        types = {t.dtype for t in tiles}
        if len(types) != 1:
            found = ", ".join(str(t.dtype) for t in tiles)
            raise broken(
                f"{name} of different types: {found}",
                "elementwise ops take operands of one type",
                "convert one of them with .to(dtype)",
            )
        dtype = tiles[0].dtype
        assert isinstance(dtype, DType)
        if dtype.kind not in kinds.split():
            raise broken(
                f"{name} of {dtype}",
                f"{name} takes {kinds.replace(' ', ', ')} operands",
                "convert the operand with .to(dl.float32)",
            )
        return [tiles[0] if result is None else tiles[0].with_dtype(result)]

    return rule


def _rounded(function: _Numpy, exact: bool) -> Callable[..., Array]:
    """Compute in float32 (transcendental: float64) and round once to the operand's type."""

    def semantics(attrs: Mapping[str, Any], *operands: Array) -> Array:
        dtype = operands[0].dtype
        with np.errstate(all="ignore"):
            if dtype.kind in "iub":
                return np.asarray(function(*operands)).astype(dtype, copy=False)
            wide = np.float32 if exact and dtype != np.float64 else np.float64
            return np.asarray(function(*(o.astype(wide) for o in operands))).astype(dtype)

    return semantics


def _compared(function: _Numpy) -> Callable[..., Array]:
    def semantics(attrs: Mapping[str, Any], a: Array, b: Array) -> Array:
        return np.asarray(function(a, b)).astype(np.bool_)

    return semantics


def _shifted(function: _Numpy) -> Callable[..., Array]:
    def semantics(attrs: Mapping[str, Any], a: Array, b: Array) -> Array:
        return np.asarray(function(a, b)).astype(a.dtype)

    return semantics


for _name, (_arity, _function, _kinds, _flops, _ulp) in _ARITHMETIC.items():
    declare(
        OpDef(
            _name,
            "tile",
            _typing(_name, _arity, _kinds, None),
            _rounded(_function, _ulp <= 0.5),
            lambda op, flops=_flops: Cost(flops=flops * _elements(op)),
            exact=_ulp <= 0.5,
            error_bound=_ulp,
            elementwise=True,
        )
    )
for _name, _function in _COMPARISONS.items():
    declare(
        OpDef(
            _name,
            "tile",
            _typing(_name, 2, "float int uint bool", dtypes.bool_),
            _compared(_function),
            lambda op: Cost(flops=_elements(op)),
            elementwise=True,
        )
    )
for _name, _function in _SHIFTS.items():
    declare(
        OpDef(
            _name,
            "tile",
            _typing(_name, 2, "int uint", None),
            _shifted(_function),
            lambda op: Cost(flops=_elements(op)),
            elementwise=True,
        )
    )


def _where_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    condition, yes, no = (plain(o, "operand of where") for o in operands)
    same_shape([condition, yes, no], "where")
    if condition.dtype is not dtypes.bool_:
        raise broken(
            f"the condition of where is {condition.dtype}",
            "a condition is bool",
            "compare it: x != 0",
        )
    if yes.dtype != no.dtype:
        raise broken(
            f"where chooses between {yes.dtype} and {no.dtype}",
            "both branches of where have one type",
            "convert one of them with .to(dtype)",
        )
    return [yes]


def _where(attrs: Mapping[str, Any], condition: Array, yes: Array, no: Array) -> Array:
    return np.where(condition.astype(np.bool_), yes, no)


declare(
    OpDef(
        "where",
        "tile",
        _where_typing,
        _where,
        lambda op: Cost(flops=_elements(op)),
        elementwise=True,
        doc="where(condition, a, b): a where the condition holds, else b",
    )
)


def _cast_typing(
    operands: Sequence[Type], attrs: Mapping[str, Any], regions: Sequence[Region]
) -> Sequence[Type]:
    return [plain(operands[0], "the operand of cast").with_dtype(attrs["dtype"])]


def cast_array(values: Array, dtype: DType) -> Array:
    """Floats round to nearest even; float to integer truncates and saturates; integers wrap."""
    if values.dtype == dtype.numpy:
        return values
    with np.errstate(all="ignore"):
        if dtype.is_integer and values.dtype.kind not in "iub":
            low, high = integer_range(dtype)
            wide = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=high, neginf=low)
            return np.clip(np.trunc(wide), low, high).astype(np.int64).astype(dtype.numpy)
        if dtype is dtypes.bool_:
            return values != 0
        if dtype.kind == "float" and dtype.bits == 8:
            return values.astype(np.float32).astype(dtype.numpy)
        return values.astype(dtype.numpy)


def integer_range(dtype: DType) -> tuple[int, int]:
    """The smallest and largest value of an integer type."""
    if dtype.kind == "uint":
        return 0, (1 << dtype.bits) - 1
    return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1


def _cast(attrs: Mapping[str, Any], x: Array) -> Array:
    return cast_array(x, attrs["dtype"])


declare(
    OpDef(
        "cast",
        "tile",
        _cast_typing,
        _cast,
        lambda op: Cost(flops=_elements(op)),
        elementwise=True,
        doc="cast(x) {dtype}: the nearest value of another type",
    )
)
