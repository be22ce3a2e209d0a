"""What a kernel's names stand for while it is compiled or interpreted.

An index scalar is a Python int or an :class:`~dure.ir.expr.Expr`; a tile a :class:`TileBase`, a
tensor in memory a :class:`TensorBase`; everything else is a plain Python value, known when the
kernel is compiled. The functions of the language are written once, over a :class:`Builder`: one
records ops (the compiler), the other runs them at once on NumPy (``dl.interpret``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, TypeVar

from dure.errors import KernelError
from dure.ir.blocks import Blocks
from dure.ir.core import Value
from dure.ir.dtypes import Array, ElementType
from dure.ir.expr import Const, Expr
from dure.ir.types import TensorType, TileType

if TYPE_CHECKING:
    from collections.abc import Generator

    from dure.lang.tensor import Tensor
    from dure.lang.tile import Tile

#: A number that addresses memory: known now (int), or when the kernel runs (Expr).
Index: TypeAlias = "int | Expr"
Payload: TypeAlias = "Value | Array | Blocks"
Attrs: TypeAlias = "Mapping[str, Any]"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """Which elements of which axis a tile's axis was loaded from.

    Two tiles that meet with equal ``place`` must come from axes of equal ``extent``.
    """

    place: tuple[Index, ...]
    extent: Index
    tensor: str
    axis: int


class TileBase:
    """A tile: its type, and either the IR value that it will be or the numbers that it is.

    ``origins`` has an :class:`Origin` or None for each axis; ``indices_of`` names the ``dl.Index``
    argument whose elements the tile holds unchanged; ``weak`` says that it is a number without a
    type of its own.
    """

    __slots__ = ("indices_of", "origins", "payload", "type", "weak")

    def __init__(
        self,
        type: TileType,
        payload: Payload,
        origins: tuple[Origin | None, ...] = (),
        indices_of: TensorBase | None = None,
        weak: bool = False,
    ) -> None:
        self.type = type
        self.payload = payload
        self.origins = origins or (None,) * type.rank
        self.indices_of = indices_of
        self.weak = weak

    @property
    def value(self) -> Value:
        """The IR value (while a kernel is compiled)."""
        assert isinstance(self.payload, Value)
        return self.payload

    @property
    def data(self) -> Array | Blocks:
        """The numbers (under ``dl.interpret``)."""
        assert not isinstance(self.payload, Value)
        return self.payload

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents, known when the kernel is compiled."""
        return self.type.shape

    @property
    def dtype(self) -> ElementType:
        """The element type."""
        return self.type.dtype

    @property
    def rank(self) -> int:
        """How many axes."""
        return self.type.rank


class TensorBase:
    """A tensor argument, or a view of one.

    ``name`` is the parameter's; ``extents`` the shape in index scalars.  A view that starts at an
    index scalar along one axis knows it as ``start``: (what it is a view of, axis, index).
    """

    __slots__ = ("extents", "name", "payload", "start", "type")

    def __init__(
        self, name: str, type: TensorType, payload: object, extents: Sequence[Index]
    ) -> None:
        self.name = name
        self.type = type
        self.payload = payload
        self.extents = tuple(extents)
        self.start: tuple[TensorBase, int, Index] | None = None

    @property
    def value(self) -> Value:
        """The IR value (while a kernel is compiled)."""
        assert isinstance(self.payload, Value)
        return self.payload

    @property
    def shape(self) -> tuple[Index, ...]:
        """The extents: ints where the compiler knows them, else index scalars."""
        return self.extents

    @property
    def dtype(self) -> ElementType:
        """The element type."""
        return self.type.dtype

    @property
    def rank(self) -> int:
        """How many axes."""
        return len(self.extents)


class Builder(Protocol):
    """What the language's functions need of the mode that they run in."""

    def emit(self, name: str, operands: Sequence[TileBase], attrs: Attrs) -> Tile:
        """One op on tiles, with one result."""
        ...

    def load(self, source: TensorBase, lists: Sequence[TileBase], attrs: Attrs) -> Tile:
        """A tile of a tensor."""
        ...

    def store(
        self, target: TensorBase, tile: TileBase, lists: Sequence[TileBase], attrs: Attrs
    ) -> None:
        """Write a tile."""
        ...

    def view(self, source: TensorBase, axis: int, start: Index, stop: Index) -> Tensor:
        """``source[start:stop]`` along an axis."""
        ...

    def index_load(self, source: TensorBase, index: Sequence[Index]) -> Index:
        """An element of an index argument."""
        ...

    def reduce_with(
        self, source: TileBase, axis: int, combine: Callable[..., object], identity: float
    ) -> Tile:
        """A reduction with a combine function of two tiles."""
        ...

    def program_id(self, axis: int) -> Index:
        """The instance's position along a grid axis."""
        ...

    def num_programs(self, axis: int) -> Index:
        """The grid's extent along an axis."""
        ...

    def marks(self, index: Index) -> bool:
        """Whether another use of an equal index means the same place."""
        ...

    def require(self, condition: Index | bool, error: KernelError) -> None:
        """Raise ``error`` unless the condition holds: now, or when the kernel is launched."""
        ...


BUILDER: ContextVar[Builder | None] = ContextVar("dure_builder", default=None)


def builder() -> Builder:
    """The mode that the calling kernel runs in."""
    found = BUILDER.get()
    if found is None:
        raise KernelError(
            "a function of dure.lang was called outside of a kernel",
            rule="dl.load, dl.exp and the like work on tiles, inside a function with @dure.kernel",
            fix="call it in a kernel, or run the kernel with dl.interpret(kernel)[grid](...)",
        )
    return found


def in_kernel() -> bool:
    """Whether the language's functions are in use: a kernel is compiled or interpreted."""
    return BUILDER.get() is not None


class KernelBase:
    """What a kernel called from another kernel is: its function, which is inlined."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function


@contextmanager
def building(mode: Builder) -> Generator[None]:
    """Let the language's functions use this mode."""
    token = BUILDER.set(mode)
    try:
        yield
    finally:
        BUILDER.reset(token)


class Counter(int):
    """A program id or loop variable under ``dl.interpret``: an int known by its identity."""


#: Functions of the language, which the compiler calls instead of reading their source.
_BUILTINS: set[int] = set()


def builtin(function: _F) -> _F:
    """Make ``function`` a part of the language."""
    _BUILTINS.add(id(function))
    return function


def is_builtin(function: object) -> bool:
    """Whether ``function`` is a part of the language."""
    return id(function) in _BUILTINS


def plain(value: Index) -> Index:
    """``value`` as an int if it is known."""
    return value.value if isinstance(value, Const) else value


def is_index(value: object) -> bool:
    """Whether ``value`` is an index scalar (a bool is not)."""
    return isinstance(value, Expr) or (isinstance(value, int) and not isinstance(value, bool))


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Whether ``value`` is a tuple or a list."""
    return isinstance(value, tuple | list)


def as_tuple(value: object) -> tuple[object, ...]:
    """``value`` itself if it is a tuple or a list, else a tuple of it alone."""
    if is_sequence(value):
        return tuple(value)
    return (value,)


def describe(value: object) -> str:
    """What ``value`` is, in an error's words."""
    if isinstance(value, TileBase):
        return f"a tile of {'x'.join(map(str, value.shape)) or 'one number'} {value.dtype}"
    if isinstance(value, TensorBase):
        return f"the tensor '{value.name}' ({', '.join(map(str, value.shape))}) of {value.dtype}"
    if isinstance(value, Expr):
        return f"the index scalar {value}"
    if isinstance(value, int | float) or value is None:
        return repr(value)
    if callable(value) and hasattr(value, "__name__"):
        kind = "class" if isinstance(value, type) else "function"
        return f"the {kind} '{getattr(value, '__name__', '')}'"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"
