"""A launch's arguments: matched to parameters, arrays adopted, consts checked."""

from __future__ import annotations

import dataclasses
import inspect
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.expr import Expr, symbol
from dure.ir.layout import strided
from dure.ir.types import TensorType
from dure.lang.frontend.source import cell_value
from dure.lang.programs import MAX_GRID_AXES
from dure.lang.signature import KernelParameter, Signature
from dure.lang.values import TensorBase, TileBase, as_tuple, describe

if TYPE_CHECKING:
    from dure.runtime.arrays import ArrayView


@dataclass(frozen=True, eq=False, slots=True)
class Arguments:
    """Tensor arguments by name, in the order of the kernel's tensors, and consts by name.

    ``open`` names the consts that have neither value nor default.
    """

    names: tuple[str, ...]
    tensors: tuple[object, ...]
    consts: dict[str, object]
    open: tuple[str, ...]


def match(
    signature: Signature, args: Sequence[object], keywords: Mapping[str, object]
) -> Arguments:
    """Match a call's arguments to the parameters; raises KernelError where they don't fit."""
    bound = _bound(signature, args, keywords)
    missing = [p.name for p in signature.parameters if p.required and p.name not in bound]
    if missing:
        raise _mismatch(signature, f"missing {', '.join(missing)}", args)
    names: list[str] = []
    tensors: list[object] = []
    consts: dict[str, object] = {}
    left: list[str] = []
    for parameter in signature.parameters:
        given = bound.get(parameter.name, parameter.default)
        if parameter.many:
            several = cast("tuple[object, ...]", bound.get(parameter.name, ()))
            for place, value in enumerate(several):
                names.append(f"{parameter.name}_{place}")
                tensors.append(value)
        elif parameter.kind != "const":
            names.append(parameter.name)
            tensors.append(given)
        elif given is inspect.Parameter.empty:
            left.append(parameter.name)
        else:
            consts[parameter.name] = check_const(signature, parameter, given)
    return Arguments(tuple(names), tuple(tensors), consts, tuple(left))


def _bound(
    signature: Signature, args: Sequence[object], keywords: Mapping[str, object]
) -> dict[str, Any]:
    """Arguments by parameter; the plain case by hand, which is five times as fast as inspect."""
    names = signature.positional
    found: dict[str, Any] = dict(zip(names, args, strict=False))
    plain = len(args) <= len(names) and not signature.many
    if plain and all(n in signature.names and n not in found for n in keywords):
        found.update(keywords)
        return found
    try:
        return signature.python.bind_partial(*args, **keywords).arguments
    except TypeError as error:
        raise _mismatch(signature, str(error), args) from None


def _mismatch(signature: Signature, what: str, args: Sequence[object]) -> KernelError:
    parameters = ", ".join(
        f"*{p.name}" if p.many else p.name if p.required else f"[{p.name}]"
        for p in signature.parameters
    )
    return KernelError(
        f"kernel '{signature.name}' was called with {len(args)} positional arguments: {what}",
        rule=f"it takes ({parameters}); those in brackets may be left out",
        fix="give one argument for each parameter",
    )


def check_const(signature: Signature, parameter: KernelParameter, value: object) -> object:
    """A const's value, which must be known and stay the same: hashable, and no array."""
    where = f"const '{parameter.name}' of kernel '{signature.name}'"
    kind = type(value)
    if kind in (int, float, bool, str, type(None)) or isinstance(
        value, dtypes.DType | dtypes.BlockFormat
    ):
        return value
    if kind.__module__ == "numpy" and hasattr(value, "item") and not hasattr(value, "__len__"):
        return cast("Any", value).item()
    is_array = any(
        hasattr(value, n) for n in ("__dlpack__", "__array_interface__", "__cuda_array_interface__")
    )
    if is_array or isinstance(value, TensorBase | TileBase | Expr):
        raise KernelError(
            f"an array ({type(value).__name__}) was passed as {where}",
            rule="a dl.const is known when compiling: number, flag, string, dtype, tuple, function",
            fix=f"annotate it as {parameter.name}: dl.Tensor, or pass a number",
        )
    try:
        hash(value)
    except TypeError:
        raise KernelError(
            f"{describe(value)} was passed as {where}",
            rule="a dl.const is hashable: kernels are kept by their consts' values",
            fix="pass a tuple instead of a list, a frozen dataclass instead of a dict",
        ) from None
    return value


def plain_key(value: object) -> tuple[type, object]:
    """A const without parts in a key: by its type, and a float by its bits.

    1, 1.0 and True are different consts, and so are 0.0 and -0.0, though Python calls them equal;
    a NaN is the same const as another of the same bits, though Python calls them different.
    """
    kind = type(value)
    return kind, _float_bits(cast("float", value)) if kind is float else value


_float_bits = struct.Struct("<d").pack


def const_key(value: object) -> object:
    """A const in a key: by its parts where it has some, which are told apart by ``plain_key``."""
    if isinstance(value, dtypes.DType | dtypes.BlockFormat | type):
        return value
    if isinstance(value, tuple):
        parts = cast("tuple[object, ...]", value)
        return type(parts), tuple(const_key(part) for part in parts)
    if type(value) is FunctionType:
        return _hashable(_function_key(value), value)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return _hashable((type(value), *(const_key(getattr(value, n)) for n in names)), value)
    return plain_key(value)


def _function_key(function: FunctionType) -> object:
    """A function by its code and what it closes over: a lambda in a loop is one const."""
    cells = tuple(const_key(cell_value(cell)) for cell in function.__closure__ or ())
    defaults = (function.__defaults__, tuple((function.__kwdefaults__ or {}).items()))
    code = function.__code__
    return code, code.co_filename, id(function.__globals__), cells, const_key(defaults)


def _hashable(key: object, value: object) -> object:
    """The key; the value itself where a part of it, that Python doesn't compare, has no hash."""
    try:
        hash(key)
    except TypeError:
        return plain_key(value)
    return key


class Form(NamedTuple):
    """What a specialisation knows of an array; ``dense``: the last axis has no gaps."""

    dtype: str
    rank: int
    dense: bool


def form_of(name: str, view: ArrayView) -> Form:
    """The form of an adopted array."""
    if any(stride % view.itemsize for stride in view.strides):
        raise KernelError(
            f"'{name}' has strides of {view.strides} bytes and elements of {view.itemsize}",
            rule="strides are whole elements",
            fix="pass a copy, as in numpy.ascontiguousarray(x)",
        )
    dense = not view.shape or view.strides[-1] == view.itemsize or view.shape[-1] <= 1
    return Form(view.dtype, len(view.shape), dense)


def type_of(name: str, form: Form) -> TensorType:
    """The type of an argument of this form: all sizes are symbols, and all strides but a dense
    last.
    """
    dtype = dtypes.DTYPES[form.dtype]
    shape = tuple(symbol(f"{name}_{axis}", "size", 0) for axis in range(form.rank))
    strides: list[int | Expr] = [
        symbol(f"{name}.stride_{axis}", "stride", -(2**62)) for axis in range(form.rank)
    ]
    if form.rank and form.dense:
        strides[-1] = 1
    layout = strided(strides, dtype.bits)
    return TensorType(shape, dtype, layout)


class Meta(dict[str, Any]):
    """What a grid function sees: consts and arrays by name, as keys or attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the kernel has no parameter '{name}'")


def resolve_grid(name: str, grid: object, meta: Callable[[], Meta]) -> tuple[int, ...]:
    """The extents that a launch's ``[grid]`` means: an int, a tuple, or a function of a Meta."""
    if callable(grid):
        grid = grid(meta())
    entries = as_tuple(grid)
    if not 1 <= len(entries) <= MAX_GRID_AXES:
        raise _bad_grid(name, grid, f"a grid has 1 to {MAX_GRID_AXES} axes")
    return tuple(_extent(name, grid, e) for e in entries)


def _extent(name: str, grid: object, entry: object) -> int:
    number = cast("Any", entry).item() if hasattr(entry, "item") else entry
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _bad_grid(name, grid, "an extent is an integer")
    if not math.isfinite(number) or number != int(number):
        raise _bad_grid(name, grid, "an extent is a finite integer")
    if not 0 <= number < 2**31:
        raise _bad_grid(name, grid, "an extent lies in 0 .. 2**31 - 1")
    return int(number)


def _bad_grid(name: str, grid: object, rule: str) -> KernelError:
    return KernelError(
        f"kernel '{name}' is launched with the grid {grid!r}",
        rule=rule,
        fix=f"{name}[(dl.cdiv(size, tile), ...)](...), or leave the grid out where it follows from "
        "the stores",
    )
