"""Tensors as the author sees them, and the annotations of a kernel's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dure.lang import memory
from dure.lang.values import TensorBase

if TYPE_CHECKING:
    #: A parameter that is known when the kernel is compiled.
    const = Any
else:

    class const:
        """Annotation of a parameter that is known when the kernel is compiled.

        A tile size, a dtype, a flag, a string, a function.  Without a value or default the compiler
        chooses it.
        """


class Tensor(TensorBase):
    """A tensor in memory: a kernel's argument, or a view of one.  Also the annotation of a
    parameter.
    """

    __slots__ = ()

    def __getitem__(self, key: object) -> Any:
        return memory.subscript(self, key)

    def __repr__(self) -> str:
        return f"Tensor({self.name}: {', '.join(map(str, self.shape))} {self.dtype})"


@dataclass(frozen=True)
class Index:
    """Annotation of an int32 argument whose elements address memory.

    Its elements lie in ``low .. high`` (both inclusive; ``high`` of None is whatever fits all that
    they address); -1 in a list means absent.  ``unique`` says that no two elements are equal, so
    that stores through them are disjoint.  Both are checked on the values at every launch.
    """

    low: int = 0
    high: int | None = None
    unique: bool = False
