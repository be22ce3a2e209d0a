"""A kernel's parameters: tensors, index arguments and consts, from the annotations."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from dure.errors import KernelError
from dure.lang.frontend.source import Empty, cell_value, shown_path
from dure.lang.tensor import Index, Tensor, const

Kind: TypeAlias = Literal["tensor", "index", "const"]
_RULE = "every parameter of a kernel is annotated with dl.Tensor, dl.Index(low, high) or dl.const"


@dataclass(frozen=True, slots=True)
class KernelParameter:
    """One parameter: ``many`` for ``*extras``; ``default`` is Python's marker for none."""

    name: str
    kind: Kind
    index: Index | None = None
    default: Any = inspect.Parameter.empty
    many: bool = False

    @property
    def required(self) -> bool:
        """Whether a call must give it (a const may be left to the compiler)."""
        return self.kind != "const" and not self.many and self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Signature:
    """All parameters in order."""

    name: str
    parameters: tuple[KernelParameter, ...]
    python: inspect.Signature

    @cached_property
    def names(self) -> frozenset[str]:
        """Every parameter's name."""
        return frozenset(p.name for p in self.parameters)

    @cached_property
    def many(self) -> bool:
        """Whether there is a ``*extras``."""
        return any(p.many for p in self.parameters)

    @cached_property
    def positional(self) -> tuple[str, ...]:
        """The parameters that may be given by position."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(p.name for p in self.python.parameters.values() if p.kind in kinds)

    @property
    def tensors(self) -> tuple[KernelParameter, ...]:
        """Tensor and index parameters."""
        return tuple(p for p in self.parameters if p.kind != "const")

    @property
    def consts(self) -> tuple[KernelParameter, ...]:
        """Const parameters."""
        return tuple(p for p in self.parameters if p.kind == "const")

    def tensor_names(self, count: int) -> list[str]:
        """Names for ``count`` tensor arguments; those of ``*extras`` are ``extras_0`` and so on."""
        single = [p.name for p in self.tensors if not p.many]
        many = next((p.name for p in self.tensors if p.many), None)
        if count < len(single) or (count > len(single) and many is None):
            raise KernelError(
                f"kernel '{self.name}' was given {count} tensors",
                rule=f"it takes {len(single)}{' or more' if many else ''}: "
                f"{', '.join([*single, *([f'*{many}'] if many else [])])}",
                fix="pass one argument for each (None for an absent one)",
            )
        place = next((i for i, p in enumerate(self.tensors) if p.many), len(single))
        extra = [f"{many}_{i}" for i in range(count - len(single))]
        return [*single[:place], *extra, *single[place:]]

    def index_of(self, name: str) -> Index | None:
        """The declared range of a tensor argument's elements."""
        for parameter in self.tensors:
            if parameter.name == name or (parameter.many and name.startswith(f"{parameter.name}_")):
                return parameter.index
        return None

    def arguments(
        self, handles: Sequence[Tensor | None], consts: Mapping[str, object]
    ) -> dict[str, object]:
        """What each parameter's name stands for."""
        known = {p.name for p in self.consts}
        for name in consts:
            if name not in known:
                raise KernelError(
                    f"kernel '{self.name}' has no const '{name}'",
                    rule=f"its consts are {', '.join(sorted(known)) or 'none'}",
                    fix="correct the spelling",
                )
        rest = list(handles)
        extra = len(handles) - len([p for p in self.tensors if not p.many])
        found: dict[str, object] = {}
        for parameter in self.parameters:
            if parameter.many:
                found[parameter.name] = tuple(rest[:extra])
                del rest[:extra]
            elif parameter.kind != "const":
                found[parameter.name] = rest.pop(0)
            elif parameter.name in consts:
                found[parameter.name] = consts[parameter.name]
            elif parameter.default is not inspect.Parameter.empty:
                found[parameter.name] = parameter.default
            else:
                raise KernelError(
                    f"the const '{parameter.name}' of kernel '{self.name}' has no value",
                    rule="a kernel is specialised with a value for each of its consts",
                    fix=f"pass {parameter.name}=..., or launch the kernel to let dure choose",
                )
        return found


def signature_of(function: FunctionType) -> Signature:
    """Read a kernel's parameters; raises KernelError for one without a usable annotation."""
    python = inspect.signature(function)
    where = f"{shown_path(function.__code__.co_filename)}:{function.__code__.co_firstlineno}"
    scope = _scope(function)
    found: list[KernelParameter] = []
    for parameter in python.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise KernelError(
                f"kernel '{function.__name__}' takes **{parameter.name}",
                where=where,
                rule="a kernel's parameters have names",
                fix="declare each const by name",
            )
        annotation = _annotation(function, parameter, scope, where)
        many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        found.append(_parameter(function, parameter, annotation, many, where))
    return Signature(function.__name__, tuple(found), python)


def _scope(function: FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = {name: cell_value(cell) for name, cell in cells}
    return {**function.__globals__, **{n: v for n, v in closure.items() if v is not Empty}}


def _annotation(
    function: FunctionType, parameter: inspect.Parameter, scope: dict[str, Any], where: str
) -> Any:
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, scope)
    except Exception as error:
        raise KernelError(
            f"the annotation '{annotation}' of parameter '{parameter.name}': {error}",
            where=where,
            rule=_RULE,
            fix="import dure.lang as dl at the top of the file",
        ) from error


def _parameter(
    function: FunctionType,
    parameter: inspect.Parameter,
    annotation: Any,
    many: bool,
    where: str,
) -> KernelParameter:
    name, default = parameter.name, parameter.default
    if get_origin(annotation) is Annotated:
        declared = [a for a in get_args(annotation)[1:] if isinstance(a, Index)]
        annotation = declared[0] if declared else get_args(annotation)[0]
    if type(None) in get_args(annotation):
        # ``dl.Tensor | None``: an argument that may be absent; every tensor argument may.
        (annotation,) = (a for a in get_args(annotation) if a is not type(None))
    if annotation is Index:
        annotation = Index()
    if isinstance(annotation, Index):
        return KernelParameter(name, "index", annotation, default, many)
    if annotation is Tensor:
        return KernelParameter(name, "tensor", None, default, many)
    if annotation is const and not many:
        return KernelParameter(name, "const", None, default)
    found = "no annotation" if annotation is inspect.Parameter.empty else repr(annotation)
    raise KernelError(
        f"parameter '{name}' of kernel '{function.__name__}' has {found}",
        where=where,
        rule=_RULE,
        fix=f"{name}: dl.Tensor for an array, {name}: dl.const for a number or a function",
    )
