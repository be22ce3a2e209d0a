"""The decorator that makes a kernel of a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, update_wrapper
from types import FunctionType
from typing import Any

from dure.errors import KernelError
from dure.ir.core import Function
from dure.ir.types import TensorType
from dure.lang.frontend.compile import Specialization, compile_kernel
from dure.lang.frontend.source import Source, source_of
from dure.lang.signature import Signature, signature_of
from dure.lang.values import describe


class Kernel:
    """A tile kernel.  ``k(...)`` or ``k[grid](...)`` launches it; :meth:`specialize` compiles it."""

    __name__: str

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.signature: Signature = signature_of(function)
        update_wrapper(self, function)

    @cached_property
    def source(self) -> Source:
        """The syntax tree and file."""
        return source_of(self.function)

    def specialize(
        self, types: Sequence[TensorType | None], consts: Mapping[str, object]
    ) -> Function:
        """The tile function for arguments of these types and these consts.

        ``types`` has one entry for each tensor or index parameter, in order (``*extras`` last or where
        they stand), None for an absent one.  The grid follows from the stores, else it is symbols
        ``grid_0``, ... that the launch gives.  Raises KernelError at the author's line.
        """
        return self.compile(types, consts).function

    def compile(
        self,
        types: Sequence[TensorType | None],
        consts: Mapping[str, object],
        *,
        explicit_grid: bool = False,
    ) -> Specialization:
        """Like :meth:`specialize`, with the conditions that a launch must check."""
        return compile_kernel(
            self.signature, self.source, types, consts, explicit_grid=explicit_grid
        )

    def __repr__(self) -> str:
        return f"<dure kernel {self.__name__}>"


def kernel(function: Any) -> Kernel:
    """Make a tile kernel of a Python function whose parameters are annotated with dure.lang's types."""
    if not isinstance(function, FunctionType):
        raise KernelError(
            f"@dure.kernel on {describe(function)}",
            rule="a kernel is made of a plain function",
            fix="put @dure.kernel directly above a def",
        )
    return Kernel(function)
