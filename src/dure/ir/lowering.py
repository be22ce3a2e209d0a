"""The table from tensor ops to kernels: who writes kernels registers here, who compiles reads it.

A lowering is a function ``(op, context) -> launches`` registered with :func:`lowers`.  It is called
after fusion and after layouts are chosen, so that the op's operand and result types carry their
layouts, and specialises kernels for exactly these types.  A launch passes the kernel's arguments in
the order of its parameters: operands of the op for ``in``, results of the op (or temporaries) for
``out``, and :class:`Updated` for ``inout``.  Every result of the op is written by one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from dure.errors import IRError
from dure.ir.core import Function, Op, Value
from dure.ir.expr import Expr, IntLike, Symbol, as_expr, symbols
from dure.ir.layout import AnyLayout
from dure.ir.types import TensorType


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a tensor: the op, and the operand's position in it."""

    op: Op
    position: int


#: How activations meet block-quantized weights: as int8 blocks; as block floating point where the
#: weights take it (:func:`dure.ir.dtypes.takes_bfp`), else as int8 blocks; or as they are.
ActivationPolicy: TypeAlias = Literal["int8", "bfp", "float"]


class CompilerTarget(Protocol):
    """What the compiler and the lowerings ask a target.  None leaves a tensor as it is."""

    @property
    def name(self) -> str:
        """The target's name."""
        ...

    @property
    def activations(self) -> ActivationPolicy:
        """How activations meet quantized weights, unless a caller says."""
        ...

    def weight_layout(self, weight: TensorType, uses: Sequence[Use]) -> AnyLayout | None:
        """Where a weight should lie for all of its uses; None uses the file's bytes as they are."""
        ...

    def state_layout(self, state: TensorType, uses: Sequence[Use]) -> AnyLayout | None:
        """Where a KV pool or other state should lie; None is row-major."""
        ...

    def buffer_layout(self, value: TensorType) -> AnyLayout | None:
        """Where an intermediate value should lie; None is row-major (never for block formats)."""
        ...


@dataclass(frozen=True, slots=True)
class Updated:
    """An inout argument: the operand that is donated, and the op's result that takes its place."""

    operand: Value
    result: Value


Argument: TypeAlias = "Value | Updated"


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel to launch where ``guard`` (over the program's symbols) is not 0.

    ``sizes`` gives the kernel's symbols, in their order; None takes them from the arguments'
    shapes.
    """

    kernel: Function
    guard: IntLike = 1
    sizes: Sequence[IntLike] | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the first variant whose guard holds, if one does, over these arguments.

    Of the launches of an op the first does its work, and each that stands ``instead`` of it where
    the first has no variant.
    """

    arguments: Sequence[Argument]
    variants: Sequence[Variant]
    instead: bool = False


@dataclass(slots=True)
class LoweringContext:
    """What a lowering may ask besides the op."""

    target: CompilerTarget
    temporaries: list[Value] = field(default_factory=list[Value])

    def temporary(self, type: TensorType, name: str = "temporary") -> Value:
        """A buffer between two launches of the same lowering, laid out as the target wants it."""
        if type.layout is None:
            type = type.with_layout(self.target.buffer_layout(type))
        value = Value(type, name)
        self.temporaries.append(value)
        return value


Lowering: TypeAlias = Callable[[Op, LoweringContext], Sequence[Launch]]

_LOWERINGS: dict[str, Lowering] = {}


def lowers(name: str) -> Callable[[Lowering], Lowering]:
    """Registers the decorated function as the lowering of the tensor op ``name``."""

    def register(function: Lowering) -> Lowering:
        if name in _LOWERINGS:
            raise IRError(
                f"two lowerings of '{name}'",
                rule="an op has one lowering; variants are chosen inside it",
                fix="extend the lowering that is there",
            )
        _LOWERINGS[name] = function
        return function

    return register


def lowering_of(name: str) -> Lowering:
    """The registered lowering of a tensor op."""
    found = _LOWERINGS.get(name)
    if found is None:
        raise IRError(
            f"no kernel computes the tensor op '{name}'",
            rule="each op of a program has a lowering in the library",
            fix=f"import dure.library first (lowered: {', '.join(sorted(_LOWERINGS))})",
        )
    return found


def lowered_ops() -> Sequence[str]:
    """The names of all ops that have a lowering."""
    return sorted(_LOWERINGS)


def argument_types(launch: Launch) -> list[TensorType]:
    """The types of a launch's arguments, in the order of the kernel's parameters."""
    return [(a.operand if isinstance(a, Updated) else a).tensor for a in launch.arguments]


def sizes_of(kernel: Function, arguments: Sequence[TensorType]) -> tuple[Expr, ...]:
    """The values of a kernel's symbols, from the shapes of its arguments.

    A symbol that occurs only inside of extents (``T * 2`` rows) keeps its value where these are the
    same expressions in the argument.  Raises :class:`IRError` where a symbol gets no value, or two.
    """
    values: dict[Symbol, Expr] = {}
    kept = set[Symbol]()
    for param, argument in zip(kernel.params, arguments, strict=True):
        wanted = param.value.tensor
        if wanted.rank != argument.rank:
            raise _mismatch(kernel, param.value, argument)
        for extent, given in zip(wanted.shape, argument.shape, strict=True):
            if not isinstance(extent, Symbol):
                kept |= symbols(extent) if extent is given else set()
                continue
            if values.setdefault(extent, given) is not given:
                raise _mismatch(kernel, param.value, argument)
    values = {**{symbol: symbol for symbol in kept}, **values}
    missing = [s.name for s in kernel.symbols if s not in values]
    if missing:
        raise IRError(
            f"no argument of kernel '{kernel.name}' gives {', '.join(missing)}",
            rule="a kernel's symbols are extents of its arguments, or sizes= of its variant",
            fix="give the variant its sizes",
        )
    return tuple(values[s] for s in kernel.symbols)


def _mismatch(kernel: Function, param: Value, argument: TensorType) -> IRError:
    return IRError(
        f"argument '{param.name}' of kernel '{kernel.name}' is {argument}",
        rule=f"the kernel was specialised for {param.type}",
        fix="specialise it for the types of the op that is lowered",
    )


def normalized_sizes(variant: Variant, arguments: Sequence[TensorType]) -> tuple[Expr, ...]:
    """A variant's sizes as expressions, derived from the arguments where not given."""
    if variant.sizes is None:
        return sizes_of(variant.kernel, arguments)
    return tuple(as_expr(s) for s in variant.sizes)
