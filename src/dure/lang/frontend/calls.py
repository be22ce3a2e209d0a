"""Calls: functions of the language run, other Python functions are inlined from their source."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from dure.errors import KernelError
from dure.ir import dtypes
from dure.ir.core import Span
from dure.ir.expr import Expr
from dure.lang import indices, programs
from dure.lang.elementwise import full, unary
from dure.lang.frontend import statements
from dure.lang.frontend.expressions import evaluate, truth
from dure.lang.frontend.frame import Frame, InnerFunction
from dure.lang.frontend.source import FunctionNode, Source, source_of
from dure.lang.values import (
    KernelBase,
    TensorBase,
    TileBase,
    describe,
    is_builtin,
    is_index,
    is_sequence,
)

MAX_DEPTH = 64
#: Modules whose C functions may be called on numbers that are known when the kernel is compiled.
_PURE_MODULES = ("math", "builtins", "_operator", "_functools", "cmath")
_PURE_TYPES: tuple[type, ...] = (int, float, bool, str, tuple, list, dict, slice)


def call(
    frame: Frame,
    function: Any,
    args: Sequence[object],
    keywords: Mapping[str, object],
    span: Span,
) -> object:
    """Call any value of a kernel."""
    special = _PYTHON.get(id(function))
    if special is not None:
        return special(frame, *args, **keywords)
    if is_builtin(function) or _is_method(function):
        wrap = functools.partial(_callable, frame, span)
        found = {k: wrap(v) for k, v in keywords.items()}
        arguments = [wrap(a) for a in args]
        _check_arguments(function, arguments, found)
        return function(*arguments, **found)
    if isinstance(function, KernelBase):
        return call(frame, function.function, args, keywords, span)
    if isinstance(function, InnerFunction):
        bound = _bind_inner(function, args, keywords)
        return inline(frame, function.source, bound, span, function.frame)
    if isinstance(function, types.FunctionType):
        bound = _bind(function, args, keywords)
        return inline(frame, source_of(function), bound, span)
    if isinstance(function, types.MethodType):
        return call(frame, function.__func__, [function.__self__, *args], keywords, span)
    if isinstance(function, functools.partial):
        partial = cast("functools.partial[object]", function)
        merged = {**partial.keywords, **keywords}
        return call(frame, partial.func, [*partial.args, *args], merged, span)
    return _call_static(frame, function, args, keywords, span)


def _is_method(function: object) -> bool:
    owner = getattr(function, "__self__", None)
    return isinstance(owner, TileBase | TensorBase) and isinstance(function, types.MethodType)


def _callable(frame: Frame, span: Span, value: object) -> object:
    """A function given to a function of the language, as something that it can call."""
    if isinstance(value, InnerFunction | types.FunctionType) and not is_builtin(value):

        def inlined(*args: object) -> object:
            return call(frame, value, args, {}, span)

        return inlined
    return value


def _signature(function: Any) -> inspect.Signature:
    """Signatures of the language's functions and methods are looked up once."""
    plain = getattr(function, "__func__", function)
    known = _SIGNATURES if plain is function else _METHODS
    found = known.get(plain)
    if found is None:
        found = inspect.signature(plain)
        if plain is not function:
            found = found.replace(parameters=list(found.parameters.values())[1:])
        known[plain] = found
    return found


_SIGNATURES: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()
#: Of methods, without the object that they belong to.
_METHODS: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()


def _check_arguments(
    function: Any, args: Sequence[object], keywords: Mapping[str, object]
) -> inspect.BoundArguments:
    """The arguments by the names of the function's parameters."""
    signature = _signature(function)
    try:
        return signature.bind(*args, **keywords)
    except TypeError as error:
        raise KernelError(
            f"{function.__name__}: {error}",
            rule=f"it is called as {function.__name__}{_parameters(signature)}",
            fix="give the arguments that it takes",
        ) from None


def _parameters(signature: inspect.Signature) -> str:
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _bind(
    function: types.FunctionType, args: Sequence[object], keywords: Mapping[str, object]
) -> dict[str, object]:
    bound = _check_arguments(function, args, keywords)
    bound.apply_defaults()
    return dict(bound.arguments)


def _bind_inner(
    function: InnerFunction, args: Sequence[object], keywords: Mapping[str, object]
) -> dict[str, object]:
    spec = function.source.node.args
    names = [a.arg for a in [*spec.posonlyargs, *spec.args]]
    if spec.vararg or spec.kwarg or spec.kwonlyargs:
        raise KernelError(
            f"'{function.source.name}' takes starred or keyword-only parameters",
            rule="a function inside of a kernel has plain parameters",
            fix="define it outside of the kernel, or name every parameter",
        )
    bound = dict(zip(names, args, strict=False))
    bound.update(keywords)
    for name, default in zip(reversed(names), reversed(spec.defaults), strict=False):
        if name not in bound:
            bound[name] = evaluate(function.frame, default)
    if len(args) > len(names) or set(bound) != set(names):
        raise KernelError(
            f"'{function.source.name}' is called with {len(args) + len(keywords)} arguments",
            rule=f"it takes ({', '.join(names)})",
            fix="give the arguments that it takes",
        )
    return bound


def inline(
    frame: Frame,
    source: Source,
    arguments: dict[str, object],
    span: Span,
    parent: Frame | None = None,
) -> object:
    """Walk a function's body in place of its call."""
    if frame.depth >= MAX_DEPTH:
        raise KernelError(
            f"calls {MAX_DEPTH} deep, ending in '{source.name}'",
            rule="functions are inlined where they are called, so that recursion has no end",
            fix="write the recursion as a loop",
        )
    inner = Frame(source, frame.recorder, call, arguments, span, parent, frame.depth + 1)
    return run_function(inner, source.node)


def run_function(frame: Frame, node: FunctionNode) -> object:
    """Run a function's body in its frame; gives what it returns."""
    if isinstance(node, ast.Lambda):
        return evaluate(frame, node.body)
    try:
        statements.run(frame, node.body)
    except statements.Returned as returned:
        return returned.value
    return None


def _call_static(
    frame: Frame,
    function: Any,
    args: Sequence[object],
    keywords: Mapping[str, object],
    span: Span,
) -> object:
    """Functions of Python's own on numbers that are known when the kernel is compiled."""
    wrapped = getattr(function, "__wrapped__", None)
    every = [*args, *keywords.values()]
    static = not any(_has_runtime(v) for v in every)
    if wrapped is not None and not static:
        return call(frame, wrapped, args, keywords, span)
    owner = getattr(function, "__self__", None)
    pure = (
        getattr(function, "__module__", None) in _PURE_MODULES
        or function in _PURE_TYPES
        or (isinstance(owner, _PURE_TYPES) and not isinstance(owner, list | dict))
        or wrapped is not None
    )
    name = getattr(function, "__qualname__", describe(function))
    if not callable(function):
        raise KernelError(
            f"a call of {describe(function)}",
            rule="functions are called",
            fix="pass a function, or remove the parentheses",
        )
    if not pure:
        raise KernelError(
            f"a call of '{name}'",
            rule="a kernel calls functions of dure.lang, Python functions with source, and min, "
            "max, abs, len, int, float, math.* on constants",
            fix="write it with functions of dure.lang, or compute it outside and pass it as a "
            "dl.const",
        )
    if not static:
        found = next(v for v in every if _has_runtime(v))
        raise KernelError(
            f"'{name}' of {describe(found)}",
            rule="Python's own functions are called on what is known when the kernel is compiled",
            fix=f"use dl.{name} if there is one",
        )
    return function(*args, **keywords)


def _has_runtime(value: object) -> bool:
    if is_sequence(value):
        return any(_has_runtime(part) for part in value)
    return isinstance(value, TileBase | TensorBase | Expr | InnerFunction)


# --- Python's built-in functions ----------------------------------------------------------------


def _extreme(name: str, python: Callable[..., Any]) -> Callable[..., object]:
    def choose(frame: Frame, *values: object) -> object:
        given = values[0] if len(values) == 1 else values
        items = cast("Sequence[Any]", given if is_sequence(given) else values)
        if not any(_has_runtime(v) for v in items):
            return python(items)
        for value in items:
            if not is_index(value):
                raise KernelError(
                    f"{name} of {describe(value)}",
                    rule=f"Python's {name} chooses between index scalars",
                    fix=f"dl.{name}imum(a, b) for tiles, dl.{name}(x, axis) along an axis",
                )
        total: Any = items[0]
        for value in items[1:]:
            if isinstance(total, Expr) or isinstance(value, Expr):
                total = indices.binary(name, total, value)
            else:
                total = python((total, value))
        return total

    return choose


def _absolute(frame: Frame, value: Any) -> object:
    if isinstance(value, TileBase):
        return unary("abs", value)
    return indices.absolute(value) if isinstance(value, Expr) else abs(value)


def _length(frame: Frame, value: Any) -> object:
    if isinstance(value, TensorBase):
        return value.extents[0]
    if isinstance(value, TileBase):
        return value.shape[0]
    return len(value)


def _integer(frame: Frame, value: Any = 0) -> object:
    return value if isinstance(value, Expr) else int(_static("int", value))


def _float(frame: Frame, value: Any = 0.0) -> object:
    if isinstance(value, Expr):
        number = full((), value, dtypes.float32)
        number.weak = True
        return number
    return float(_static("float", value))


def _boolean(frame: Frame, value: Any = False) -> object:
    return truth(value)


def _static(name: str, value: Any) -> Any:
    if isinstance(value, TileBase | TensorBase):
        raise KernelError(
            f"{name}() of {describe(value)}",
            rule="Python's conversions work on numbers known when the kernel is compiled",
            fix="convert a tile with .to(dtype)",
        )
    return value


def _tuple(frame: Frame, value: Any = ()) -> object:
    return tuple(statements.static_items(value))


def _zip(frame: Frame, *values: Any, strict: bool = False) -> object:
    return tuple(zip(*(tuple(statements.static_items(v)) for v in values), strict=strict))


def _enumerate(frame: Frame, value: Any, start: int = 0) -> object:
    return tuple(enumerate(statements.static_items(value), start))


def _reversed(frame: Frame, value: Any) -> object:
    return tuple(reversed(tuple(statements.static_items(value))))


def _total(frame: Frame, value: Any, start: Any = 0) -> object:
    total = start
    for item in statements.static_items(value):
        total = statements.apply_binary(ast.Add(), total, item)
    return total


def _any(frame: Frame, value: Any) -> object:
    total: Any = False
    for item in statements.static_items(value):
        total = indices.logic("or", total, truth(item))
    return total


def _all(frame: Frame, value: Any) -> object:
    total: Any = True
    for item in statements.static_items(value):
        total = indices.logic("and", total, truth(item))
    return total


def _is_instance(frame: Frame, value: Any, kinds: Any) -> object:
    return isinstance(value, kinds)


def _power(frame: Frame, base: Any, exponent: Any) -> object:
    return statements.apply_binary(ast.Pow(), base, exponent)


def _range(frame: Frame, *bounds: Any) -> object:
    return programs.range(*bounds)


_PYTHON: dict[int, Callable[..., object]] = {
    id(builtins.min): _extreme("min", min),
    id(builtins.max): _extreme("max", max),
    id(builtins.abs): _absolute,
    id(builtins.len): _length,
    id(builtins.int): _integer,
    id(builtins.float): _float,
    id(builtins.bool): _boolean,
    id(builtins.tuple): _tuple,
    id(builtins.list): _tuple,
    id(builtins.zip): _zip,
    id(builtins.enumerate): _enumerate,
    id(builtins.reversed): _reversed,
    id(builtins.sum): _total,
    id(builtins.any): _any,
    id(builtins.all): _all,
    id(builtins.isinstance): _is_instance,
    id(builtins.pow): _power,
    id(builtins.range): _range,
}
