"""The decorator that makes a kernel of a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, update_wrapper
from types import FunctionType
from typing import TYPE_CHECKING, Any

from dure.errors import KernelError
from dure.ir.core import Function
from dure.ir.types import TensorType
from dure.lang.binding import match
from dure.lang.frontend.compile import Specialization, compile_kernel
from dure.lang.frontend.source import Source, source_of
from dure.lang.signature import Signature, signature_of
from dure.lang.values import KernelBase, describe, in_kernel

if TYPE_CHECKING:
    from dure.lang.again import Again
    from dure.lang.launch import Launched, Launcher


class Kernel(KernelBase):
    """A tile kernel: ``k(...)`` and ``k[grid](...)`` launch it, :meth:`specialize` compiles it."""

    __name__: str

    def __init__(self, function: FunctionType) -> None:
        super().__init__(function)
        self.signature: Signature = signature_of(function)
        self._again: Again | None = None
        update_wrapper(self, function)

    @cached_property
    def source(self) -> Source:
        """The syntax tree and file."""
        return source_of(self.function)

    def specialize(
        self, types: Sequence[TensorType | None], consts: Mapping[str, object]
    ) -> Function:
        """The tile function for arguments of these types and these consts.

        ``types`` has one entry for each tensor or index parameter, in order (``*extras`` last or
        where they stand), None for an absent one.  The grid follows from the stores, else it is
        symbols ``grid.0``, ... that the launch gives.  Raises KernelError at the author's line.
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

    def __call__(self, *args: object, **keywords: object) -> None:
        """Launch with the grid that follows from the stores; in a kernel, call the function."""
        again = self._again
        if again is not None and again(args, keywords):
            return
        if in_kernel():
            self.function(*args, **keywords)
        else:
            self.launch(None, args, keywords)

    def __getitem__(self, grid: object) -> GridLaunch:
        """``k[grid](...)``: an int, a tuple of ints, or a function of the arguments by name."""
        return GridLaunch(self, grid)

    def launch(self, grid: object, args: Sequence[object], keywords: Mapping[str, object]) -> None:
        """Launch; ``grid`` of None follows from the stores.  Bad arguments raise KernelError."""
        from dure.lang import interpreter

        arguments = match(self.signature, args, keywords)
        if interpreter.interpreting():
            interpreter.run(self, grid, arguments)
            return
        launched = self.launcher.launch(grid, arguments)
        if grid is None and launched is not None:
            self._remember(args, keywords, launched)

    def _remember(
        self, args: Sequence[object], keywords: Mapping[str, object], launched: Launched
    ) -> None:
        from dure.lang.again import Again

        if self._again is None:
            self._again = Again()
        self._again.remember(args, keywords, launched)

    def forget(self) -> None:
        """Forget how earlier launches were made: what they chose may be chosen otherwise now."""
        if self._again is not None:
            self._again.forget()

    @cached_property
    def launcher(self) -> Launcher:
        """What launches this kernel."""
        from dure.lang.launch import Launcher

        return Launcher(self)

    def __repr__(self) -> str:
        return f"<dure kernel {self.__name__}>"


class GridLaunch:
    """A kernel with a grid, ready to be called."""

    __slots__ = ("grid", "kernel")

    def __init__(self, kernel: Kernel, grid: object) -> None:
        self.kernel = kernel
        self.grid = grid

    def __call__(self, *args: object, **keywords: object) -> None:
        self.kernel.launch(self.grid, args, keywords)


def kernel(function: Any) -> Kernel:
    """Make a tile kernel of a Python function whose parameters are annotated with dure.lang's
    types.
    """
    if not isinstance(function, FunctionType):
        raise KernelError(
            f"@dure.kernel on {describe(function)}",
            rule="a kernel is made of a plain function",
            fix="put @dure.kernel directly above a def",
        )
    return Kernel(function)
